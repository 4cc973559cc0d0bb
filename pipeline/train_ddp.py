"""Data-parallel training by hand: what Trainer and Accelerate do for `pipeline.train`, written out.

    torchrun --nproc_per_node 2 -m pipeline.train_ddp configs/ag_news.yaml
    torchrun --nproc_per_node 2 -m pipeline.train_ddp configs/ag_news.yaml --device cpu --max_steps 20
    python -m pipeline.train_ddp configs/ag_news.yaml              # one process, the same code

Every process runs this file from top to bottom, each on its own share of every batch. The ten ideas marked `[DDP n]`
are all that distribution adds to a plain training script; where a marker explains itself it says why the lines are
there and what one sees when they are missing, and further lines of the same idea carry its number. `pipeline/train.py`
has the same numbers where Trainer and Accelerate do the same.
"""

from __future__ import annotations

import contextlib
import os
import socket
import sys
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import fp16_compress_hook
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader
from transformers import get_scheduler

from pipeline import checkpoint, sharding, trace
from pipeline.batches import predict_logits, training_loader
from pipeline.config import FIELDS, TrainConfig, parse
from pipeline.errors import GO_ON, UserError, run_entry, tell
from pipeline.metrics import counts, counts_size, from_counts
from pipeline.model import build_model, classification_loss, decay_groups, scheduler_name, warmup_steps
from pipeline.record import Recorder
from pipeline.run import Keeper, Outcome, Prepared, announce, conclude, prepare, publish, seed_dropout, training_sampler
from pipeline.state import TrainingState
from pipeline.stopping import Stopped, Stopper
from pipeline.topology import BatchPlan, Topology, find_topology, plan_batches
from pipeline.watch import Watch

PROG = "torchrun --nproc_per_node N -m pipeline.train_ddp"
ENTRY = "raw"


def join_process_group(topology: Topology) -> None:
    """[DDP 1] Rendezvous: the processes find each other and agree who is who.

    torchrun gave each its RANK, WORLD_SIZE and the address of a key-value store (MASTER_ADDR, MASTER_PORT, on the first
    machine); `init_process_group` has all of them meet there. NCCL moves data between GPUs, gloo between CPUs. Without
    the call the first collective below fails; a script without any collective would train N separate models, each on
    everything, and let them overwrite each other's files.
    """
    if "RANK" not in os.environ:  # started by plain `python`: a group of one
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "RANK": "0", "WORLD_SIZE": "1"}
    # [DDP 2] Device: one process, one GPU, chosen by *local* rank (rank 8 on the second machine of 8 drives GPU 0
    # there). find_topology has called torch.cuda.set_device(local_rank); without it every process of a machine
    # allocates on GPU 0, which runs out of memory while the others idle, or NCCL reports a duplicate GPU.
    device_id = topology.torch_device if topology.device == "cuda" else None
    dist.init_process_group("nccl" if topology.device == "cuda" else "gloo", timeout=timedelta(minutes=30), device_id=device_id)


def from_rank_zero(value: Any) -> Any:
    """[DDP 9] Rank 0's value on every rank: a decision all must share (which checkpoint to resume) is taken once."""
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def validate(model: torch.nn.Module, prepared: Prepared, topology: Topology, watch: Watch) -> dict[str, Any]:
    """[DDP 8] Metrics over exact shards: every row scored by one rank, sums added with one all-reduce.

    Ranks score disjoint shards that cover each row once, and what is reduced are counts, never ratios: the mean of two
    ranks' accuracies is wrong when their shards differ in size, and macro F1 cannot be averaged at all. The usual
    mistakes: reporting rank 0's shard as the result, or a padding sampler that counts some rows twice.
    """
    numbers, logits = predict_logits(
        model, prepared.validation, prepared.collator, topology.torch_device,
        rank=topology.rank, world_size=topology.world_size, autocast=topology.autocast, tick=watch.tick,
    )  # fmt: skip
    labels = np.asarray(prepared.validation["labels"])[numbers]
    sums = np.zeros(counts_size(len(prepared.label_names)))
    if len(numbers):
        sums += counts(logits, labels)
    total = torch.from_numpy(sums).to(topology.torch_device)
    dist.all_reduce(total)
    return from_counts(total.cpu().numpy(), prepared.label_names)


def gather_shards(shard: tuple[np.ndarray, np.ndarray]) -> list[tuple[np.ndarray, np.ndarray]]:
    """[DDP 8] Every rank's `(row numbers, logits)` on every rank, for the final scoring, which needs the logits themselves."""
    shards: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(shards, shard)
    return shards


def largest_of_ranks(values: list[float]) -> list[float]:
    """[DDP 10] How ranks agree to stop: when one was told to (SIGTERM), the maximum of all flags is 1 on every rank."""
    tensor = torch.tensor(values, dtype=torch.float64, device="cuda" if dist.get_backend() == "nccl" else "cpu")
    dist.all_reduce(tensor, op=dist.ReduceOp.MAX)
    return tensor.tolist()


def initial_state(config: TrainConfig, topology: Topology, model: torch.nn.Module, total_steps: int) -> TrainingState:
    """What a checkpoint must hold besides the weights: optimizer, schedule, loss scaler, and each rank's random state."""
    # Fused: one pass over all parameters instead of several small operations for each.
    optimizer = torch.optim.AdamW(decay_groups(model, config.weight_decay), lr=config.learning_rate, fused=True)
    scheduler = get_scheduler(
        scheduler_name(config), optimizer, num_warmup_steps=warmup_steps(config, total_steps), num_training_steps=total_steps
    )
    # fp16 has no exponent for small gradients: the loss is scaled up before backward, gradients down before use.
    scaler = torch.amp.GradScaler(topology.device, enabled=topology.precision == "fp16")
    # The loss is summed on the device: .item() in each step would wait for it.
    loss = torch.zeros((), dtype=next(model.parameters()).dtype, device=topology.torch_device)
    return TrainingState(model, optimizer, scheduler, scaler, loss)


def save(state: TrainingState, keeper: Keeper | None, recorder: Recorder, rank: int) -> None:
    """[DDP 9] Save on rank 0, and wait.

    After an all-reduced step all ranks hold the same weights, so one writes; two writing the same file tear it. Only
    the random states and the losses not yet logged differ, and each rank writes its own. The barriers keep the order:
    nobody writes before the folder is there, and the manifest that makes the folder a checkpoint comes after everybody's
    file. Without them a rank can run ahead and die, or be killed, with a checkpoint that looks whole and is not.
    """
    folder = checkpoint.checkpoint_folder(recorder.config.output_dir or "", recorder.step)
    if rank == 0:
        checkpoint.begin(folder)
    dist.barrier()
    state.save_rank(folder, rank)
    if rank == 0:
        state.save_shared(folder)
    dist.barrier()
    if keeper:
        keeper.commit()
    dist.barrier()


def wrap(model: torch.nn.Module, config: TrainConfig, topology: Topology) -> DistributedDataParallel:
    """[DDP 5] Wrap: from here on backward communicates.

    DDP copies rank 0's weights to all, then watches backward. As gradients become ready it packs them into buckets and
    all-reduces each, averaging over ranks, while backward still computes earlier layers: communication hides under
    computation. Every rank then takes the same optimizer step on the same average. Without it, ranks drift apart and the
    saved model has learnt from one share of the data only. Buffers have no gradient: rank 0's are copied to all, at the
    start and before the first forward of each step (here position numbers, which never differ; elsewhere BatchNorm's averages).
    """
    ddp = DistributedDataParallel(
        model,
        device_ids=[topology.local_rank] if topology.device == "cuda" else None,
        # After backward each gradient is a view of its bucket: the average is neither copied back nor kept twice.
        gradient_as_bucket_view=True,
        # Larger buckets: fewer all-reduces, so less latency. Smaller ones: the first starts earlier, and the last, for which no
        # backward is left to hide under, is shorter, but never shorter than a parameter: the word embedding's gradient comes
        # last, and is a third of DistilBERT's. Untold, torch makes the first 1 MiB and the others 25; told, all are alike.
        bucket_cap_mb=None if config.bucket_mb == FIELDS["bucket_mb"].default else config.bucket_mb,
        # A promise: every step uses the same parameters, as often as the first step did. A parameter used anew is an error at
        # once; one no longer used is an error in the next step, and this one has learnt from gradients that were not reduced.
        # Where only some ranks break it, the others wait for them.
        static_graph=config.static_graph,
    )
    if config.comm_hook == "fp16" and topology.world_size > 1:
        # In place of a bucket's own all-reduce: round to fp16, send half the bytes, widen again. The price is two passes over
        # the gradients and their rounding: 11 bits are left of what is 6e-5 or more, fewer of less, nothing below 3e-8; what is
        # above 65,504 overflows.
        ddp.register_comm_hook(None, fp16_compress_hook)
    return ddp


def train(
    config: TrainConfig, topology: Topology, plan: BatchPlan, prepared: Prepared, loader: DataLoader[Any], state: TrainingState,
    recorder: Recorder, keeper: Keeper | None, stopper: Stopper, watch: Watch,
) -> None:  # fmt: skip
    """The loop: `recorder.total_steps` optimizer steps from `recorder.step` on, saving and validating on the way."""
    ddp = wrap(state.model, config, topology)
    weights = prepared.class_weights.to(topology.torch_device) if prepared.class_weights is not None else None
    sampler = loader.batch_sampler
    recorder.start()
    while recorder.step < recorder.total_steps and not recorder.finished:
        epoch, done = divmod(recorder.step, recorder.steps_per_epoch)
        # [DDP 4] Sampler and set_epoch: the sampler gives each rank its share of every global batch, drawn from
        # (seed, epoch). Without a distributed sampler all ranks learn from the same rows: N GPUs, the result of one.
        # Without set_epoch every epoch repeats the first, silently, and rows that filled no batch are never learnt from.
        sampler.set_epoch(epoch)  # type: ignore[union-attr]
        micro_batches = iter(resumed(loader, done * plan.accumulation))
        for _ in range(done, recorder.steps_per_epoch):
            ddp.train()
            for micro in range(plan.accumulation):
                watch.beat(f"step {recorder.step + 1}, data and forward")
                batch = {name: tensor.to(topology.torch_device, non_blocking=True) for name, tensor in next(micro_batches).items()}
                labels = batch.pop("labels")
                # [DDP 6] no_sync: gradients of all micro-batches but the last stay local and add up; the last backward
                # reduces the sum. Without it every micro-batch pays for an all-reduce: the same result, much slower.
                # The forward belongs inside: DDP decides there whether the coming backward will communicate.
                with ddp.no_sync() if micro < plan.accumulation - 1 else contextlib.nullcontext():
                    # [DDP 7] Mixed precision, in order: autocast the forward, scale the loss, backward, all-reduce,
                    # *unscale*, clip, step. Clipped before the reduction, each rank's gradient is cut by another factor;
                    # clipped before unscaling (the scale starts at 65,536), every gradient is cut to the threshold and
                    # then divided by the scale. SGD all but stands still. Adam divides by the gradient's own size, and still
                    # takes steps some six times too short: 1/65,536 spread over 67 M parameters is 2e-9, below its eps of 1e-8.
                    with torch.autocast(topology.device, dtype=topology.autocast, enabled=topology.autocast is not None):
                        logits = ddp(**batch).logits
                    # Divided by the accumulation: DDP averages over ranks, this averages over micro-batches.
                    loss = classification_loss(logits, labels, weights) / plan.accumulation
                    watch.beat(f"step {recorder.step + 1}, backward and all-reduce")
                    state.scaler.scale(loss).backward()
                state.loss += loss.detach()
            state.scaler.unscale_(state.optimizer)
            grad_norm = None
            if config.max_grad_norm > 0:
                grad_norm = torch.nn.utils.clip_grad_norm_(ddp.parameters(), config.max_grad_norm)
            learning_rate = state.scheduler.get_last_lr()[0]
            scale = state.scaler.get_scale()
            state.scaler.step(state.optimizer)  # skips the step where fp16 overflowed to inf
            state.scaler.update()
            if state.scaler.get_scale() >= scale:
                state.scheduler.step()  # a skipped step must not use up the schedule
            state.optimizer.zero_grad()
            recorder.stepped(recorder.step + 1)
            if keeper:
                keeper.stepped()
            if recorder.should_log(recorder.step):
                # [DDP 8] The loss of a step is the mean over ranks; each rank knows only its own part.
                total = state.loss.clone()
                dist.all_reduce(total)
                mean = total.item() / topology.world_size / (recorder.step - recorder.logged_step)
                recorder.logged(recorder.step, mean, learning_rate, grad_norm.item() if grad_norm is not None else None)
                state.loss.zero_()
            stopping = stopper.agreed()
            if stopping or recorder.should_save(recorder.step):
                with recorder.pause("checkpoint"):
                    watch.beat(f"checkpoint {recorder.step}", slow=True)
                    save(state, keeper, recorder, topology.rank)
            if stopping:
                raise Stopped(f"checkpoint-{recorder.step} is complete")
            if recorder.owes_evaluation:
                judge(state.model, prepared, topology, recorder, keeper, stopper, watch)
            if recorder.step >= recorder.total_steps or recorder.finished:
                break


def judge(
    model: torch.nn.Module, prepared: Prepared, topology: Topology, recorder: Recorder, keeper: Keeper | None, stopper: Stopper, watch: Watch
) -> None:  # fmt: skip
    """Validate the checkpoint just saved. Saved first: a run that is ended meanwhile comes back to this place."""
    with recorder.pause("validation"), stopper.released():
        watch.beat(f"validation after step {recorder.step}")
        recorder.evaluated(recorder.step, validate(model, prepared, topology, watch))
        if keeper:
            keeper.judged()


def resumed(loader: DataLoader[Any], skip: int) -> DataLoader[Any]:
    """The loader without its first micro-batches: row numbers are skipped, no data is read."""
    from accelerate import skip_first_batches

    return skip_first_batches(loader, skip) if skip else loader


def run(config: TrainConfig, topology: Topology) -> Outcome:
    """One rank's whole work that needs the others."""
    stopper = Stopper(largest_of_ranks)
    plan = plan_batches(config, topology.world_size)
    # [DDP 3] Rank 0 first (of each machine: local rank 0): it downloads model and data, splits and tokenises into the
    # cache while the others wait at the barrier, then they read it. Without it all processes of a machine download the
    # same files and race for the same cache.
    prepared = prepare(config, topology, plan) if topology.local_rank == 0 else None
    dist.barrier()
    prepared = prepared or prepare(config, topology, plan)

    loader = training_loader(
        prepared.train, training_sampler(config, topology, plan, prepared.train), prepared.collator,
        workers=config.dataloader_workers, pin_memory=topology.device == "cuda",
    )  # fmt: skip
    recorder = Recorder(config, topology, plan, steps_per_epoch=len(loader) // plan.accumulation)
    keeper = Keeper(ENTRY, config, topology, prepared, recorder) if topology.rank == 0 else None
    resume = from_rank_zero(keeper.find_resume() if keeper else None)
    checkpoint.check_shared(config.output_dir or "")  # several machines write and read one folder

    model = build_model(prepared.source, config, prepared.label_names, topology.attention).to(topology.torch_device)
    state = initial_state(config, topology, model, recorder.total_steps)
    seed_dropout(config, topology)  # [DDP 4] Masks of its own for each rank: noise that all share does not average out.
    if resume:
        recorder.load(checkpoint.read_manifest(resume)["recorder"])
        state.load_shared(resume)
        state.load_rank(resume, topology.rank, topology.world_size, config.seed)
    if config.trace and not recorder.finished:
        trace.attach(model, state.optimizer, Path(config.output_dir or "") / "trace", topology.rank, after_step=recorder.step)
    announce("raw DDP", config, topology, plan, prepared, recorder)
    with Watch(Path(config.output_dir or ""), topology.rank, topology.world_size, config.hang_seconds) as watch:
        try:
            with stopper.held():
                if recorder.owes_evaluation:
                    judge(model, prepared, topology, recorder, keeper, stopper, watch)
                if not recorder.finished:
                    train(config, topology, plan, prepared, loader, state, recorder, keeper, stopper, watch)
            recorder.stop()
            watch.beat("final scoring")
            record = conclude(ENTRY, config, topology, plan, prepared, model, recorder, gather_shards, watch.tick)
        except BaseException:
            recorder.stop()
            if keeper:
                keeper.close()
            raise
    return Outcome(prepared, model, record, keeper)


def leave_process_group(failed: bool) -> None:
    """[DDP 10] Teardown on every path, the failing ones too.

    It ends the backend's threads and connections in order. Without it NCCL warns of leaked resources, and a process
    can hang at its exit while a peer is still in a collective. A failed rank must not wait for peers who will never
    come: NCCL's communicator is aborted then, not closed.
    """
    if failed and dist.get_backend() == "nccl":
        dist.distributed_c10d._abort_process_group()
    else:
        dist.destroy_process_group()


def main(config: TrainConfig) -> None:
    """Train, then, on rank 0 alone, write and publish the release."""
    if sharding.asked_for():
        raise UserError(
            "The launch file asks for FSDP, and this script is DDP by hand. Launch pipeline.train with it, or this with torchrun."
        )
    topology = find_topology(config)
    join_process_group(topology)
    failed = True
    try:
        outcome = run(config, replace(topology, backend=dist.get_backend()))
        failed = False
    except Exception as error:
        tell(error)  # before the teardown, which peers can hold up
        raise
    finally:
        leave_process_group(failed)
    if topology.rank == 0:  # [DDP 9] alone from here on: an upload may take longer than any rank should wait at a barrier
        publish(config, outcome)


def entry(argv: list[str]) -> None:
    main(parse(argv, PROG, suffix="-raw"))


if __name__ == "__main__":
    sys.exit(run_entry(entry, interrupted=GO_ON))
