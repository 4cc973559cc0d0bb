"""The model and its arithmetic: what is trained, in which numbers, and whether many ranks compute what one would."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils.data import DataLoader
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

from pipeline.doctor.findings import Finding, judge
from pipeline.doctor.frame import Context
from pipeline.model import classification_loss
from pipeline.topology import DTYPES, BatchPlan

# Relative difference of the gradients of one and of many ranks. Only the order of additions differs: 8e-8 to 2e-7
# measured in fp32 with MiniLM and a model of the size of DistilBERT on two gloo ranks. A wrong row shows from 1e-2 on.
TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-10}
LOSS_TOLERANCE = 1e-5  # Trainer logs losses in fp32, whatever the model computes in
REFERENCE_ROWS = 8  # of the compared batch, but each micro-batch has a row: a full one takes a CPU a quarter of a minute


def backward(context: Context, model: nn.Module, micro_batches: Sequence[Sequence[int]], autocast: torch.dtype | None = None) -> float:
    """One optimizer step's loss, and its gradient in the parameters, as pipeline/train_ddp.py computes them on one rank.

    Class weights are left out: they change what a row counts, not how rows are shared.
    """
    total = 0.0
    for rows in micro_batches:
        batch = context.collate(rows)
        labels = batch.pop("labels")
        with torch.autocast(context.topology.device, dtype=autocast, enabled=autocast is not None):
            logits = model(**batch).logits
        loss = classification_loss(logits, labels) / len(micro_batches)
        loss.backward()
        total += loss.item()
        context.tick()
    return total


def parameters(context: Context) -> list[Finding]:
    """One forward and backward of two short rows, in the run's precision: which parameters learn, and in which numbers."""
    place = context.topology
    model = context.model = context.build(context.config).train()
    given: Counter[torch.dtype] = Counter()
    layers = [layer for layer in model.modules() if isinstance(layer, nn.Linear)]
    hooks = [layer.register_forward_hook(lambda _layer, _inputs, output: given.update([output.dtype])) for layer in layers]
    backward(context, model, [np.argsort(context.lengths)[:2].tolist()], place.autocast)
    for hook in hooks:
        hook.remove()
    every = dict(model.named_parameters())
    frozen = [name for name, p in every.items() if not p.requires_grad]
    unused = [name for name, p in every.items() if p.requires_grad and p.grad is None]
    model.zero_grad()
    context.parameter_bytes = sum(p.numel() * p.element_size() for p in every.values())
    size = sum(p.numel() for p in every.values()) / 1e6

    some = f"{len(frozen)} of {len(every)} tensors ({size:.1f} M parameters){f', as {frozen[0]}' if frozen else ''}"
    advice = "If nobody froze them on purpose, set requires_grad again where the model is built."
    findings = [judge("frozen", some, "none", not frozen, advice, "warn")]
    some = f"{len(unused)} tensors get no gradient{f', as {unused[0]}' if unused else ''}"
    # With several ranks DDP waits for every parameter's gradient: the second step ends in an error, or hangs.
    advice = "Remove them from the model; DDP would fail at the second step (find_unused_parameters is off, it costs time)."
    findings.append(judge("unused", some, "none", not unused, advice, "FAIL" if place.world_size > 1 else "warn"))
    found = ", ".join(f"{n} of {sum(given.values())} linear layers in {str(dtype).removeprefix('torch.')}" for dtype, n in given.items())
    advice = "The run would compute in other numbers than it says. Use --precision auto, and no autocast inside the model."
    findings.append(judge("precision", found, f"{place.precision}, all of them", set(given) == {DTYPES[place.precision]}, advice))
    return findings


def gradient(context: Context) -> list[Finding]:
    """Loss and gradient of a small global batch, dealt as the run deals: by one process alone, and by stock Trainer on all ranks.

    Dropout off and no autocast, so that only the order of additions differs. Shows a loss multiplied by the world size
    (what stock Trainer does to models like DistilBERT), rows dealt wrongly, and gradients that are not reduced.
    """
    place, n, accumulation = context.topology, context.plan.world_size, min(context.plan.accumulation, 2)
    per_device = max(1, min(context.plan.per_device, REFERENCE_ROWS // (n * accumulation)))
    small = BatchPlan(n * accumulation * per_device, n, accumulation, per_device)
    model = context.build(replace(context.config, dropout=0.0)).train()
    mine = list(itertools.islice(context.sampler(small, place.rank), accumulation))
    loss, reference = 0.0, torch.empty(0)
    if place.rank == 0:
        whole = context.sampler(BatchPlan(small.global_rows, 1, 1, small.global_rows), 0)
        loss = backward(context, model, [next(iter(whole))])
        reference = take_gradient(model)
    # Whatever raises from here on raises on every rank: all have the same model and as many rows.
    context.gather(None)
    launched, vector = by_trainer(context, model, mine)
    norms = context.gather(float(vector.double().norm()))
    if place.rank != 0:
        return []
    tolerance, norm, factor = TOLERANCE[reference.dtype], float(reference.double().norm()), launched / loss
    apart = max(abs(of_rank - norms[0]) for of_rank in norms) / norm
    off = max(apart, float((vector - reference).double().norm()) / norm)
    found = f"loss {launched:.6f}, gradient norm {norms[0]:.5f}, off by {off:.1e}"
    advice = "Compare the rows of the first step (--trace true) and the versions of torch, transformers and accelerate."
    if apart > tolerance:
        found, advice = f"{found}, unlike on the ranks", "Some gradient is not all-reduced: look for parameters kept out of DDP."
    elif round(factor) > 1 and abs(factor - round(factor)) < 1e-3:
        found, advice = f"{found}: {factor:.0f} times the loss", "Set accepts_loss_kwargs = False on the model, as pipeline/model.py does."
    good = off <= tolerance and abs(factor - 1) <= LOSS_TOLERANCE
    return [judge("gradient", found, f"{loss:.6f}, {norm:.5f} as one process, within {tolerance:.0e}", good, advice)]


def take_gradient(model: nn.Module) -> torch.Tensor:
    """The gradient as one vector `(parameters,)` on the CPU; the model has none afterwards."""
    learning = [p for p in model.parameters() if p.requires_grad]
    vector = torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten().cpu() for p in learning])
    model.zero_grad()
    return vector


def by_trainer(context: Context, model: nn.Module, mine: Sequence[Sequence[int]]) -> tuple[float, torch.Tensor]:
    """Loss (mean over ranks) and gradient of one optimizer step of stock Trainer: the model's own loss, Trainer's own loop."""
    seen: dict[str, Any] = {}

    class OneStep(Trainer):
        def get_train_dataloader(self) -> DataLoader[Any]:
            return DataLoader([context.collate(rows) for rows in mine], batch_size=None)  # type: ignore[arg-type]

    class Look(TrainerCallback):
        def on_pre_optimizer_step(self, *_: Any, **__: Any) -> None:
            seen["gradient"] = take_gradient(model)  # Trainer's step then finds none, and changes nothing

        def on_log(self, *_: Any, logs: dict[str, Any] | None = None, **__: Any) -> None:
            seen.setdefault("loss", (logs or {}).get("loss"))

    trainer = OneStep(
        model,
        TrainingArguments(
            output_dir=str(context.folder), use_cpu=context.topology.device == "cpu", max_steps=1, max_grad_norm=0, logging_steps=1,
            per_device_train_batch_size=len(mine[0]), gradient_accumulation_steps=len(mine), ddp_find_unused_parameters=False,
            save_strategy="no", report_to="none", disable_tqdm=True, remove_unused_columns=False, dataloader_pin_memory=False,
        ),
        callbacks=[Look()],
    )  # fmt: skip
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    return seen["loss"], seen["gradient"]
