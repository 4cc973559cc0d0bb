"""What both entries do before and after their training loops: prepare the data and the model, score, release.

Nothing here talks to other ranks. Where all ranks' results are needed the entry hands in a `gather` of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from datasets import Dataset
from huggingface_hub.utils import disable_progress_bars
from safetensors.torch import load_file
from torch import nn

from pipeline import hub, record, release
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
from pipeline.topology import BatchPlan, Topology

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
    elif config.push_to_hub:
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
        train["length"],
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
        f"topology    {topology.world_size} process(es), backend {topology.backend}, {place}\n"
        f"precision   {topology.precision}{' (autocast; weights and optimizer in fp32)' if topology.precision != 'fp32' else ''}\n"
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


def seed_dropout(config: TrainConfig, topology: Topology) -> None:
    """Dropout masks of its own for each rank: with one seed for all, ranks would drop the same places of different rows."""
    torch.manual_seed(config.seed + 1 + topology.rank)


def load_weights(model: nn.Module, config: TrainConfig, step: int) -> None:
    """Put the weights of the checkpoint of that step into the model, in place."""
    assert config.output_dir is not None
    path = checkpoint_folder(config.output_dir, step) / "model.safetensors"
    if not path.is_file():
        raise UserError(f"{path}, the best checkpoint, is gone. Run with --resume none to train anew (this run is kept beside it).")
    model.load_state_dict(load_file(path))


def conclude(
    entry: str,
    config: TrainConfig,
    topology: Topology,
    plan: BatchPlan,
    prepared: Prepared,
    model: nn.Module,
    recorder: Recorder,
    gather: Callable[[Shard], Sequence[Shard]],
) -> dict[str, Any]:
    """Calibrate the best model on the validation share, score the test rows once, and make the run's record.

    In fp32 whatever the training precision: these are the figures of the released weights, which others load in fp32.
    All ranks call this; `gather` returns every rank's shard to every rank. Returns the record (see `record.run_record`).
    """
    recorder.say("Scoring the best checkpoint in fp32: validation for the temperature, then test, once.")
    weights_hash = weights_sha256(model)

    def score(rows: Dataset) -> np.ndarray:
        rank, world_size = topology.rank, topology.world_size
        return in_order(gather(predict_logits(model, rows, prepared.collator, topology.torch_device, rank=rank, world_size=world_size)))

    logits, labels = score(prepared.validation), np.asarray(prepared.validation["labels"])
    temperature = fit_temperature(logits, labels)
    fold_temperature(model, temperature)
    validation = compute_metrics(logits / temperature, labels, prepared.label_names)
    test = compute_metrics(score(prepared.test), np.asarray(prepared.test["labels"]), prepared.label_names)
    data = prepared.texts.provenance | {"warnings": prepared.texts.warnings, "model_commit": prepared.source.commit}
    return record.run_record(
        entry, config, topology, plan, recorder, data,
        temperature=temperature, validation=validation, test=test, weights_sha256=weights_hash,
    )  # fmt: skip


def publish(config: TrainConfig, prepared: Prepared, model: nn.Module, run: dict[str, Any]) -> None:
    """Rank 0's last work, with the process group gone: write run.json and the release folder, push it if asked to."""
    assert config.output_dir is not None
    output = Path(config.output_dir)
    write_json(output / "run.json", run)
    texts, validation = prepared.texts, prepared.validation
    golden = release.choose_golden(
        texts.validation["text"], texts.validation["label"], validation["length"], config.max_length, seed=config.seed
    )
    folder = release.build_release(output / "release", model.cpu(), prepared.tokenizer, run, golden)
    test = run["test"]
    print(
        f"test        accuracy {test['accuracy']:.4f}, macro F1 {test['macro_f1']:.4f}, nll {test['nll']:.4f}, "
        f"calibration error {test['ece']:.4f} ({test['examples']} rows, each once)\n"
        f"training    {run['train_seconds']:.1f} s, {run['samples_per_second']:.1f} samples/s\n"
        f"record      {output / 'run.json'}\n"
        f"release     {folder}",
        flush=True,
    )
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
