"""What both entries do before and after their training loops: prepare the data and the model, score, release.

Nothing here talks to other ranks. Where all ranks' results are needed the entry hands in a `gather` of its own.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from datasets import Dataset
from huggingface_hub.utils import disable_progress_bars
from torch import nn

from pipeline import checkpoint, hub, record, release
from pipeline.backup import Backup, restore
from pipeline.batches import Collator, in_order, predict_logits
from pipeline.calibration import fit_temperature, fold_temperature
from pipeline.checkpoint import checkpoint_folder, write_json
from pipeline.config import TrainConfig
from pipeline.data import TextData, class_weights, load_texts, tokenize
from pipeline.errors import UserError
from pipeline.metrics import compute_metrics
from pipeline.model import load_tokenizer, weights_sha256
from pipeline.record import Recorder
from pipeline.sampler import GlobalBatchSampler
from pipeline.sources import Source, find_model
from pipeline.speed import peak_memory_gib, speed
from pipeline.state import load_weights
from pipeline.topology import BatchPlan, Topology

BACKUP_SECONDS = 60  # for the last checkpoint to reach the Hub, once all else is done
Shard = tuple[np.ndarray, np.ndarray]  # row numbers and logits of one rank


@dataclass(frozen=True)
class Prepared:
    """Data ready for training; the same on every rank."""

    source: Source  # of the pre-trained model
    texts: TextData
    tokenizer: Any
    train: Dataset  # columns input_ids, length, labels; unpadded
    validation: Dataset
    test: Dataset
    collator: Collator
    class_weights: torch.Tensor | None  # (classes,), on the CPU

    @property
    def label_names(self) -> list[str]:
        return self.texts.label_names


def prepare(config: TrainConfig, topology: Topology, plan: BatchPlan) -> Prepared:
    """Load, check, split and tokenise. One rank of each machine calls this first and fills its caches; the others read them.

    Raises UserError for whatever is wrong with the data, and, before any hour is spent, for a Hub that would refuse
    the release at the end.
    """
    speaks = topology.rank == 0
    transformers.utils.logging.disable_progress_bar()  # its bars for reading and writing weights appear on every rank
    if not speaks:
        disable_progress_bars()
    elif config.push_to_hub or config.hub_checkpoints:
        hub.check_before_training(config)
    texts = load_texts(config, show_progress=speaks)
    source = find_model(config.model, config.model_revision)
    tokenizer = load_tokenizer(source, config)
    if speaks:
        for warning in [*texts.warnings, *([source.warning] if source.warning else [])]:
            print(f"warning: {warning}", flush=True)
    train, validation, test = (
        tokenize(rows, tokenizer, config.max_length, show_progress=speaks) for rows in (texts.train, texts.validation, texts.test)
    )
    if len(train) < plan.global_rows:
        raise UserError(
            f"{len(train)} training rows are fewer than one global batch of {plan.global_rows}. Lower --global_batch_size to at "
            f"most {len(train)}, or add rows."
        )
    collator = Collator(tokenizer.pad_token_id, multiple_of=8 if topology.device == "cuda" and topology.precision != "fp32" else 1)
    weights = None
    if config.class_weights == "balanced":
        weights = torch.tensor(class_weights(train["labels"], len(texts.label_names)), dtype=torch.float32)
    return Prepared(source, texts, tokenizer, train, validation, test, collator, weights)


def training_sampler(config: TrainConfig, topology: Topology, plan: BatchPlan, train: Dataset) -> GlobalBatchSampler:
    return GlobalBatchSampler(
        train["length"][:],  # the whole column at once: row by row takes ten seconds for a hundred thousand
        global_batch_size=plan.global_rows,
        accumulation=plan.accumulation,
        num_replicas=topology.world_size,
        rank=topology.rank,
        seed=config.seed,
        length_grouping=config.length_grouping,
    )


def announce(entry: str, config: TrainConfig, topology: Topology, plan: BatchPlan, prepared: Prepared, recorder: Recorder) -> None:
    """Say on rank 0 where this runs, with what arithmetic, and for how long."""
    place = torch.cuda.get_device_name() if topology.device == "cuda" else f"CPU, {topology.threads} thread(s) each"
    rows = f"{len(prepared.train)} training, {len(prepared.validation)} validation, {len(prepared.test)} test rows"
    weights = f", class weights {config.class_weights}" if prepared.class_weights is not None else ""
    recorder.say(
        f"entry       {entry}\n"
        f"topology    {topology.world_size} process(es), backend {topology.backend}, {place}{', FSDP' * topology.sharded}\n"
        f"precision   {topology.precision}{' (autocast; weights and optimizer in fp32)' if topology.autocast else ''}\n"
        f"model       {config.model}, {len(prepared.label_names)} classes{weights}\n"
        f"data        {config.dataset}: {rows}\n"
        f"batch       {plan}\n"
        f"steps       {recorder.steps_per_epoch} an epoch, {recorder.total_steps} in all, {len(recorder.evaluation_steps)} evaluation(s)\n"
        f"output      {config.output_dir}"
    )
    if recorder.finished:
        recorder.say(
            f"resumed     this run is finished, trained by {recorder.sessions[-1]['topology']['world_size']} process(es): nothing is left to train. "
            "To train anew: another --output_dir, or --resume none, which keeps this one beside."
        )
    elif recorder.step:
        recorder.say(f"resumed     after step {recorder.step} of {recorder.total_steps}")
        before = recorder.sessions[-1]["topology"]["world_size"]
        if before != topology.world_size and config.dropout != 0:
            recorder.say(
                f"note        {topology.world_size} process(es) go on from {before}: dropout masks belong to a rank, so from here they differ "
                "from a run that never changed. With --dropout 0 only rounding would."
            )


def seed_dropout(config: TrainConfig, topology: Topology) -> None:
    """Dropout masks of its own for each rank: with one seed for all, ranks would drop the same places of different rows."""
    torch.manual_seed(config.seed + 1 + topology.rank)


def identity(prepared: Prepared) -> dict[str, str]:
    """Which model and which rows a run learns from, by content: a checkpoint of others is not resumed."""
    weights = hashlib.sha256()
    for path in sorted(prepared.source.folder.glob("*.safetensors")):
        with path.open("rb") as file:
            weights.update(hashlib.file_digest(file, "sha256").digest())
    rows = hashlib.sha256(json.dumps(prepared.label_names).encode())
    for table in (prepared.train, prepared.validation, prepared.test):
        for name in ("input_ids", "length", "labels"):
            for chunk in table.data.column(name).chunks:
                rows.update(np.asarray(chunk.flatten() if name == "input_ids" else chunk).tobytes())
    return {"model": weights.hexdigest(), "dataset": rows.hexdigest()}


class Keeper:
    """Rank 0's part of saving: making checkpoints whole, removing old ones, and handing them to the Hub's backup."""

    def __init__(self, entry: str, config: TrainConfig, topology: Topology, prepared: Prepared, recorder: Recorder) -> None:
        assert config.output_dir is not None
        self.entry, self.config, self.topology, self.recorder = entry, config, topology, recorder
        self.output_dir = config.output_dir
        self.identity = identity(prepared)
        self.backup: Backup | None = None

    def find_resume(self) -> Path | None:
        """The checkpoint to go on from, fetched from the Hub where that has a newer one; None to start from the beginning."""
        restore(self.config, self.recorder.say)
        folder = checkpoint.find_resume(self.config, self.entry, self.identity)
        checkpoint.begin_run(self.output_dir)
        if self.config.hub_checkpoints:
            assert self.config.hub_repo is not None
            self.backup = Backup(self.output_dir, self.config.hub_repo, self.config.hub_private, self.recorder.say)
        return folder

    @property
    def folder(self) -> Path:
        return checkpoint_folder(self.output_dir, self.recorder.step)

    def commit(self) -> None:
        """All ranks have written their files of this step."""
        checkpoint.commit(self.folder, self.config, self.entry, self.topology.world_size, self.identity, self.recorder.state())
        self._kept()

    def judged(self) -> None:
        """The validation of this step's checkpoint is done."""
        checkpoint.amend(self.folder, self.recorder.state())
        self._kept()

    def _kept(self) -> None:
        checkpoint.rotate(self.output_dir, self.config.save_total_limit)
        if self.backup:
            self.backup.committed()

    def stepped(self) -> None:
        """Between two steps: see to the push in the background."""
        if self.backup:
            self.backup.poll()

    def close(self, patience_seconds: float = 0) -> None:
        """Training is over: say what the Hub's backup holds, or how to complete it."""
        backup, self.backup = self.backup, None
        if backup:
            backup.close(patience_seconds)


@dataclass(frozen=True)
class Outcome:
    """What a rank comes out of training with. `model` is the best one, calibrated; `keeper` is there on rank 0."""

    prepared: Prepared
    model: nn.Module
    record: dict[str, Any]
    keeper: Keeper | None


def conclude(
    entry: str,
    config: TrainConfig,
    topology: Topology,
    plan: BatchPlan,
    prepared: Prepared,
    model: nn.Module,
    recorder: Recorder,
    gather: Callable[[Shard], Sequence[Shard]],
    tick: Callable[[], None],
) -> dict[str, Any]:
    """Take the best checkpoint, calibrate it on the validation share, score the test rows once, and make the run's record.

    In fp32 whatever the training precision: these are the figures of the released weights, which others load in fp32.
    All ranks call this; `gather` returns every rank's shard to every rank, `tick` is called after each batch. Returns the
    record (see `record.run_record`).
    """
    assert recorder.best is not None and config.output_dir is not None
    load_weights(model, checkpoint_folder(config.output_dir, recorder.best["step"]))
    # Ranks stand for rows here: what is gathered is a row number and what belongs to it.
    memory = in_order(gather((np.array([topology.rank]), np.array([[peak_memory_gib(topology.torch_device)]]))))[:, 0].tolist()
    recorder.say("Scoring the best checkpoint in fp32: validation for the temperature, then test, once.")
    weights_hash = weights_sha256(model)

    def score(rows: Dataset) -> np.ndarray:
        rank, world_size = topology.rank, topology.world_size
        shard = predict_logits(model, rows, prepared.collator, topology.torch_device, rank=rank, world_size=world_size, tick=tick)
        return in_order(gather(shard))

    logits, labels = score(prepared.validation), np.asarray(prepared.validation["labels"])
    temperature = fit_temperature(logits, labels)
    fold_temperature(model, temperature)
    validation = compute_metrics(logits / temperature, labels, prepared.label_names)
    test = compute_metrics(score(prepared.test), np.asarray(prepared.test["labels"]), prepared.label_names)
    data = prepared.texts.provenance | {"warnings": prepared.texts.warnings, "model_commit": prepared.source.commit}
    return record.run_record(
        entry, config, topology, plan, recorder, data,
        temperature=temperature, validation=validation, test=test, weights_sha256=weights_hash,
        speed=speed(recorder, prepared.train["length"][:], model, memory, prepared.collator.multiple_of),
    )  # fmt: skip


def publish(config: TrainConfig, outcome: Outcome) -> None:
    """Rank 0's last work, with the process group gone: write run.json and the release folder, push it if asked to."""
    assert config.output_dir is not None and outcome.keeper is not None
    output, prepared, run = Path(config.output_dir), outcome.prepared, outcome.record
    write_json(output / "run.json", run)
    texts, validation = prepared.texts, prepared.validation
    golden = release.choose_golden(
        texts.validation["text"], texts.validation["label"], validation["length"], config.max_length, seed=config.seed
    )
    folder = release.build_release(output / "release", outcome.model.cpu().float(), prepared.tokenizer, run, golden)
    test = run["test"]
    print(
        f"test        accuracy {test['accuracy']:.4f}, macro F1 {test['macro_f1']:.4f}, nll {test['nll']:.4f}, "
        f"calibration error {test['ece']:.4f} ({test['examples']} rows, each once)\n"
        f"training    {run['train_seconds']:.1f} s, {run['samples_per_second']:.1f} samples/s\n"
        f"record      {output / 'run.json'}\n"
        f"release     {folder}",
        flush=True,
    )
    outcome.keeper.close(BACKUP_SECONDS)
    if config.push_to_hub:
        assert config.hub_repo is not None
        published = hub.publish(folder, config.hub_repo, tag=config.hub_tag, private=config.hub_private)
        print(
            f"published   {published.repo} at {published.commit}, tag {published.tag}\n            {published.url}\nproof       {published.proof}",
            flush=True,
        )
        write_json(
            output / "published.json", {"repo": published.repo, "commit": published.commit, "tag": published.tag, "url": published.url}
        )
    else:
        print(f"publish it  python -m pipeline.hub --run {output} --repo your-name/{output.name.replace('_', '-')}", flush=True)
