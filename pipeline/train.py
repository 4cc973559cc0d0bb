"""Fine-tune with Trainer and Accelerate: the same command for one process, two GPUs or many machines.

    accelerate launch --config_file configs/accelerate/cpu2.yaml -m pipeline.train configs/ag_news.yaml
    accelerate launch --config_file configs/accelerate/gpu2.yaml -m pipeline.train configs/ag_news.yaml --epochs 1
    python -m pipeline.train configs/ag_news.yaml                  # one process

The numbers `[DDP n]` are those of `pipeline/train_ddp.py`, which does by hand what these lines leave to the libraries.
"""

from __future__ import annotations

import os
import sys
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import DDPCommunicationHookType, DistributedType, broadcast_object_list, gather, gather_object
from torch.utils.data import DataLoader
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer import TRAINER_STATE_NAME

from pipeline import checkpoint, sharding, trace
from pipeline.batches import EVALUATION_ROWS, in_order, predict_logits, training_loader
from pipeline.config import TrainConfig, parse
from pipeline.errors import GO_ON, UserError, run_entry
from pipeline.metrics import compute_metrics
from pipeline.model import build_model, classification_loss, scheduler_name, warmup_steps
from pipeline.record import Recorder
from pipeline.run import Keeper, Outcome, Prepared, announce, conclude, prepare, publish, seed_dropout, training_sampler
from pipeline.sampler import GlobalBatchSampler
from pipeline.state import TrainingState, load_weights
from pipeline.stopping import Stopped, Stopper
from pipeline.topology import BatchPlan, Topology, find_topology, plan_batches
from pipeline.watch import Watch

PROG = "accelerate launch --config_file configs/accelerate/X.yaml -m pipeline.train"
ENTRY = "trainer"


class TextTrainer(Trainer):
    """Trainer with this project's order of the data, loss, exact evaluation and whole checkpoints."""

    def __init__(
        self, config: TrainConfig, prepared: Prepared, sampler: GlobalBatchSampler, recorder: Recorder, keeper: Keeper | None,
        stopper: Stopper, watch: Watch, **kwargs: Any,
    ) -> None:  # fmt: skip
        super().__init__(train_dataset=prepared.train, eval_dataset=prepared.validation, **kwargs)
        self.config, self.prepared, self.sampler, self.recorder = config, prepared, sampler, recorder
        self.keeper, self.stopper, self.watch, self.stopping = keeper, stopper, watch, False
        self.class_weights = None if prepared.class_weights is None else prepared.class_weights.to(self.args.device)
        if (handler := self.accelerator.ddp_handler) is not None:  # [DDP 5] not among TrainingArguments
            handler.gradient_as_bucket_view, handler.static_graph = True, config.static_graph
            handler.bucket_cap_mb = config.bucket_mb  # handed on only where it is not the default
            if config.comm_hook == "fp16":
                handler.comm_hook = DDPCommunicationHookType.FP16
        self.remove_callback(PrinterCallback)
        self.add_callback(Conductor(self))

    def get_train_dataloader(self) -> DataLoader[Any]:
        # Not prepared by Accelerate: that would shard batches which the sampler has already dealt to the ranks.
        return training_loader(
            self.prepared.train, self.sampler, self.prepared.collator,
            workers=self.config.dataloader_workers, pin_memory=self.recorder.topology.device == "cuda",
        )  # fmt: skip

    def compute_loss(self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None) -> Any:
        labels = inputs.pop("labels")
        outputs = model(**inputs)
        loss = classification_loss(outputs.logits, labels, self.class_weights)  # Trainer divides it by the accumulation
        self.watch.beat(f"step {self.state.global_step + 1}, backward and all-reduce")
        return (loss, outputs) if return_outputs else loss

    def evaluate(self, *_: Any, **__: Any) -> dict[str, float]:
        # [DDP 8] Metrics over exact shards. Trainer's own evaluation repeats rows to fill the last round of batches
        # and then cuts them off again, which leaves its loss wrong; here each row is scored once, on one rank.
        with self.recorder.pause("validation"), self.stopper.released():
            place = self.recorder.topology
            assert self.model is not None
            self.watch.beat(f"validation after step {self.recorder.step}")
            shard = predict_logits(
                self.model, self.prepared.validation, self.prepared.collator, self.args.device,
                rank=place.rank, world_size=place.world_size, autocast=place.autocast, tick=self.watch.tick,
            )  # fmt: skip
            rows = self.prepared.validation
            if place.sharded and place.rank >= -(-len(rows) // EVALUATION_ROWS) % place.world_size > 0:
                # One batch less than the others, who would wait: under FSDP a forward gathers the weights from all ranks.
                predict_logits(self.model, rows.select([0]), self.prepared.collator, self.args.device, autocast=place.autocast)
            logits = in_order(gather_object([shard]))
            metrics = compute_metrics(logits, self.prepared.validation["labels"], self.prepared.label_names)
            if self.recorder.evaluated(self.recorder.step, metrics):
                self.control.should_training_stop = True
            if self.keeper:
                self.keeper.judged()
        return {f"eval_{name}": value for name, value in metrics.items() if isinstance(value, float)}

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        # [DDP 9] Save on rank 0, and wait: Trainer calls this on every rank. Its own files are pickles, and count as a
        # checkpoint however few of them were written; ours are those of the raw script, made whole by a manifest.
        with self.recorder.pause("checkpoint"):
            self.watch.beat(f"checkpoint {self.recorder.step}", slow=True)
            folder, state = checkpoint.checkpoint_folder(self.config.output_dir or "", self.recorder.step), self.training_state()
            if self.keeper:
                checkpoint.begin(folder)
            self.accelerator.wait_for_everyone()
            state.save_rank(folder, self.recorder.topology.rank)
            if self.keeper or self.recorder.topology.sharded:
                state.save_shared(folder, writes=self.keeper is not None)
            if self.keeper:
                self.state.save_to_json(str(folder / TRAINER_STATE_NAME))
            self.accelerator.wait_for_everyone()
            if self.keeper:
                self.keeper.commit()
            self.accelerator.wait_for_everyone()
        if self.stopping:
            raise Stopped(f"checkpoint-{self.recorder.step} is complete")
        # After the checkpoint it judges: a run that is ended meanwhile comes back to this place.
        if self.recorder.owes_evaluation:
            self.evaluate()

    def training_state(self) -> TrainingState:
        """What the raw script calls by its names, found where Trainer and Accelerate keep it."""
        assert self.model is not None and self.optimizer is not None
        optimizer = getattr(self.optimizer, "optimizer", self.optimizer)  # without Accelerate's wrapper
        return TrainingState(self.model, optimizer, self.lr_scheduler, self.accelerator.scaler, loss=self._tr_loss)

    # Trainer calls these four at the right places when it resumes.

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        assert self.model is not None
        load_weights(self.model, Path(resume_from_checkpoint))

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is not None:
            self._tr_loss = torch.tensor(0.0, device=self.args.device)
            self.training_state().load_optimizer(Path(checkpoint))  # and the scaler

    def _load_scaler(self, checkpoint: str | None) -> None:
        pass

    def _load_rng_state(self, checkpoint: str | None) -> None:
        if checkpoint is not None:
            place = self.recorder.topology
            self.training_state().load_rank(Path(checkpoint), place.rank, place.world_size, self.config.seed)
            self._globalstep_last_logged = self.recorder.logged_step


class Conductor(TrainerCallback):
    """Tells the Trainer when to log, save and stop, and recorder and watch what happens."""

    def __init__(self, trainer: TextTrainer) -> None:
        self.trainer, self.recorder, self.watch = trainer, trainer.recorder, trainer.watch

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, optimizer: Any = None, **_: Any
    ) -> None:
        config = self.trainer.config
        if config.trace:
            plain, folder = getattr(optimizer, "optimizer", optimizer), Path(config.output_dir or "") / "trace"
            trace.attach(model, plain, folder, self.recorder.topology.rank, after_step=self.recorder.step)
        self.recorder.start()

    def on_epoch_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        # [DDP 4] Sampler and set_epoch: Trainer reaches set_epoch only of samplers in loaders that Accelerate prepared
        # (and of ours only in a resumed epoch), so it is called here.
        self.trainer.sampler.set_epoch(state.global_step // self.trainer.sampler.steps)
        self.watch.beat(f"step {state.global_step + 1}, data and forward")

    def on_substep_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.watch.beat(f"step {state.global_step + 1}, data and forward")

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.recorder.stepped(state.global_step)
        if self.trainer.keeper:
            self.trainer.keeper.stepped()
        self.watch.beat(f"step {state.global_step + 1}, data and forward")
        # [DDP 10] One rank may be told to stop (SIGTERM) and the others not: they agree on the step after which all do.
        self.trainer.stopping = self.trainer.stopper.agreed()
        control.should_log = self.recorder.should_log(state.global_step)
        control.should_save = self.trainer.stopping or self.recorder.should_save(state.global_step)

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: dict[str, Any] | None = None, **_: Any
    ) -> None:
        if logs and "loss" in logs:
            self.recorder.logged(state.global_step, logs["loss"], logs["learning_rate"], logs.get("grad_norm"))


def training_arguments(config: TrainConfig, topology: Topology, plan: BatchPlan, recorder: Recorder) -> TrainingArguments:
    """This project's configuration in Trainer's words."""
    assert config.output_dir is not None
    return TrainingArguments(
        output_dir=config.output_dir,
        # [DDP 2] Device: Accelerate picks the GPU of the local rank; `use_cpu` must be said here, the launcher does not.
        use_cpu=topology.device == "cpu",
        # [DDP 7] Autocast, unscale, clip in order: Accelerate keeps the order; bf16 or fp16 is all one says.
        bf16=topology.precision == "bf16",
        fp16=topology.precision == "fp16",
        max_grad_norm=config.max_grad_norm,
        per_device_train_batch_size=plan.per_device,
        # [DDP 6] no_sync: Trainer enters it for all micro-batches of a step but the last.
        gradient_accumulation_steps=plan.accumulation,
        num_train_epochs=config.epochs,
        max_steps=recorder.total_steps,
        learning_rate=config.learning_rate,
        weight_decay=config.weight_decay,
        warmup_steps=warmup_steps(config, recorder.total_steps),
        lr_scheduler_type=scheduler_name(config),
        optim="adamw_torch_fused",
        # [DDP 5] Wrap and all-reduce: Accelerate wraps the model in the same DistributedDataParallel. Left to itself
        # Trainer makes it look for unused parameters after every forward; this model has none.
        ddp_find_unused_parameters=False,
        seed=config.seed,
        data_seed=config.seed,
        # When to log, validate and save is the Conductor's business.
        logging_strategy="no",
        eval_strategy="no",
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        remove_unused_columns=False,
    )


def refuse_data_parallel(topology: Topology) -> None:
    """Plain `python` on several GPUs makes Trainer fall back to torch DataParallel: slower than one GPU, and other results."""
    gpus = torch.cuda.device_count() if topology.device == "cuda" else 0
    if "RANK" not in os.environ and gpus > 1:
        raise UserError(
            f"One process sees {gpus} GPUs, and Trainer would use torch DataParallel, which is slow and changes the result. Use all: "
            f"accelerate launch --config_file configs/accelerate/gpu2.yaml --num_processes {gpus} -m pipeline.train CONFIG; "
            "or one: CUDA_VISIBLE_DEVICES=0 python -m pipeline.train CONFIG."
        )


def main(config: TrainConfig) -> None:
    """Train, then, on rank 0 alone, write and publish the release."""
    topology = find_topology(config)
    refuse_data_parallel(topology)
    plan = plan_batches(config, topology.world_size)
    # [DDP 1] Rendezvous: PartialState joins the process group that the launcher's environment describes.
    state = PartialState(cpu=topology.device == "cpu", timeout=timedelta(minutes=30))
    if state.num_processes != topology.world_size:
        # Seen with a launch file that says use_cpu and a script that does not: as many runs of one process each.
        raise RuntimeError(f"launched with {topology.world_size} processes, but Accelerate sees {state.num_processes}")
    outcome = run(config, replace(topology, backend=state.backend or "none"), plan, state)
    # [DDP 10] Teardown. (A rank that fails leaves it to the end of its process: closing a group can wait for peers.)
    state.destroy_process_group()
    if topology.rank == 0:
        publish(config, outcome)


def run(config: TrainConfig, topology: Topology, plan: BatchPlan, state: PartialState) -> Outcome:
    """One rank's whole work that needs the others."""
    stopper = Stopper(lambda values: gather(torch.tensor([values], device=topology.torch_device)).amax(0).tolist())
    # [DDP 3] Rank 0 (of each machine) first, the others then read the cache it filled.
    with state.local_main_process_first():
        prepared = prepare(config, topology, plan)
    sampler = training_sampler(config, topology, plan, prepared.train)
    recorder = Recorder(config, topology, plan, steps_per_epoch=sampler.steps)
    keeper = Keeper(ENTRY, config, topology, prepared, recorder) if topology.rank == 0 else None
    resume: Path | None = broadcast_object_list([keeper.find_resume() if keeper else None])[0]
    checkpoint.check_shared(config.output_dir or "")

    model: Any = build_model(prepared.source, config, prepared.label_names, topology.attention)
    if resume:
        recorder.load(checkpoint.read_manifest(resume)["recorder"])
    with Watch(Path(config.output_dir or ""), topology.rank, topology.world_size, config.hang_seconds) as watch:
        arguments = training_arguments(config, topology, plan, recorder)
        if topology.sharded:
            os.environ.setdefault("FSDP_TRANSFORMER_CLS_TO_WRAP", sharding.layer_class(model))
            # Accelerate would run DDP on the CPU without a word: it allows FSDP under the names of accelerators only. After
            # TrainingArguments, which makes the state anew; device and backend stay.
            PartialState().distributed_type = DistributedType.MULTI_GPU
        trainer = TextTrainer(config, prepared, sampler, recorder, keeper, stopper, watch, model=model, args=arguments)
        if trainer.is_fsdp_enabled != topology.sharded:
            raise RuntimeError(f"the launch file {'asks' if topology.sharded else 'does not ask'} for FSDP, but Trainer thinks otherwise")
        announce("Trainer + Accelerate", config, topology, plan, prepared, recorder)
        seed_dropout(config, topology)
        try:
            with stopper.held():
                if recorder.owes_evaluation:
                    model.to(topology.torch_device)
                    trainer._load_from_checkpoint(str(resume))
                    trainer.evaluate()
                if not recorder.finished:
                    trainer.train(resume_from_checkpoint=str(resume) if resume else None)
            recorder.stop()
            watch.beat("final scoring")
            if topology.sharded:  # a whole model to put the best weights into: rank 0 will go on alone
                model = build_model(prepared.source, config, prepared.label_names, topology.attention).to(topology.torch_device)
            else:
                # Accelerate left its autocast around forward; the final figures are those of the fp32 weights.
                model = trainer.accelerator.unwrap_model(trainer.model_wrapped, keep_fp32_wrapper=False)
            record = conclude(ENTRY, config, topology, plan, prepared, model, recorder, lambda shard: gather_object([shard]), watch.tick)
        except BaseException:
            recorder.stop()
            if keeper:
                keeper.close()
            raise
    return Outcome(prepared, model, record, keeper)


def entry(argv: list[str]) -> None:
    main(parse(argv, PROG))


if __name__ == "__main__":
    sys.exit(run_entry(entry, interrupted=GO_ON))
