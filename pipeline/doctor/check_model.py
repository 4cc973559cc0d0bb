"""The model and its arithmetic: what is trained, in which numbers, and whether many ranks compute what one would."""

from __future__ import annotations

import contextlib
import itertools
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

from pipeline.doctor.findings import Finding, judge
from pipeline.doctor.frame import Context
from pipeline.model import classification_loss
from pipeline.topology import DTYPES

# Relative difference of the gradients of one and of many ranks. Only the order of additions differs: 8e-8 to 2e-7
# measured in fp32 with MiniLM and a model of the size of DistilBERT on two gloo ranks. A wrong row shows from 1e-2 on.
TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-10}
LOSS_TOLERANCE = 1e-5  # Trainer logs losses in fp32, whatever the model computes in
MATRIX = 768  # rows and columns for timing a product: the width of DistilBERT


def parameters(context: Context) -> list[Finding]:
    """Which parameters learn: one forward and backward of two short rows shows those that get no gradient."""
    model = context.build(context.config).train()
    batch = context.collate(np.argsort(context.lengths)[:2].tolist())
    labels = batch.pop("labels")
    classification_loss(model(**batch).logits, labels).backward()
    every = dict(model.named_parameters())
    frozen = [name for name, p in every.items() if not p.requires_grad]
    unused = [name for name, p in every.items() if p.requires_grad and p.grad is None]
    model.zero_grad()
    total, learn = sum(p.numel() for p in every.values()), sum(p.numel() for p in every.values() if p.requires_grad)
    context.parameter_bytes = sum(p.numel() * p.element_size() for p in every.values())
    context.model = model
    some = f"{len(frozen)} parameters do not learn, as {frozen[0]}" if frozen else "none"
    advice = "If nobody froze them on purpose, set requires_grad again where the model is built."
    findings = [judge("frozen", f"{some} ({learn / total:.0%} of {total / 1e6:.1f} M learn)", "none", not frozen, advice, "warn")]
    some = f"{len(unused)} parameters get no gradient, as {unused[0]}" if unused else "none"
    # With several ranks DDP waits for every parameter's gradient: the second step ends in an error, or hangs.
    advice = "Remove them from the model; DDP would fail at the second step (find_unused_parameters is off, it costs time)."
    return [*findings, judge("unused", some, "none", not unused, advice, "FAIL" if context.topology.world_size > 1 else "warn")]


def precision(context: Context) -> list[Finding]:
    """The numbers the model's linear layers really give under the run's autocast, and whether that is any faster here."""
    place, model = context.topology, context.model
    wanted = DTYPES[place.precision]
    given: Counter[torch.dtype] = Counter()
    layers = [layer for layer in model.modules() if isinstance(layer, nn.Linear)]
    hooks = [layer.register_forward_hook(lambda _layer, _inputs, output: given.update([output.dtype])) for layer in layers]
    batch = context.collate([0])
    batch.pop("labels")
    try:
        with torch.no_grad(), torch.autocast(place.device, dtype=place.autocast, enabled=place.autocast is not None):
            model(**batch)
    finally:
        for hook in hooks:
            hook.remove()
    found = ", ".join(f"{n} of {sum(given.values())} linear layers in {str(dtype).removeprefix('torch.')}" for dtype, n in given.items())
    advice = "The run would compute in other numbers than it says. Use --precision auto, and no autocast inside the model."
    findings = [judge("precision", found, f"{place.precision}, all of them", set(given) == {wanted}, advice)]
    if place.autocast is not None:
        ratio = max(
            context.ranks.gather(seconds_of_product(place.torch_device, wanted) / seconds_of_product(place.torch_device, torch.float32))
        )
        found = f"a {place.precision} product takes {ratio:.2f} of the time of fp32"
        advice = f"{place.precision} is emulated on this hardware: use --precision fp32" + (", or fp16." if place.device == "cuda" else ".")
        findings.append(judge(f"{place.precision} speed", found, "less than 1", ratio < 1, advice, "warn"))
    return findings


def seconds_of_product(device: torch.device, dtype: torch.dtype) -> float:
    """Seconds of the fastest of five products of two square matrices."""
    a, b = (torch.ones(MATRIX, MATRIX, device=device, dtype=dtype) for _ in range(2))
    return min(timed(lambda: a @ b, device) for _ in range(5))


def timed(work: Callable[[], Any], device: torch.device) -> float:
    """Seconds the work takes, a GPU's queue included."""
    began = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - began


def backward(context: Context, model: nn.Module, micro_batches: Sequence[Sequence[int]], autocast: torch.dtype | None = None) -> float:
    """One optimizer step's loss, and its gradient in the parameters, as pipeline/train_ddp.py computes them.

    `model` may be wrapped in DDP, or not. Class weights are left out: they change what a row counts, not how rows are shared.
    """
    total = 0.0
    for micro, rows in enumerate(micro_batches):
        batch = context.collate(rows)
        labels = batch.pop("labels")
        talks = micro == len(micro_batches) - 1 or not isinstance(model, DistributedDataParallel)
        with contextlib.nullcontext() if talks else model.no_sync():  # type: ignore[operator]
            with torch.autocast(context.topology.device, dtype=autocast, enabled=autocast is not None):
                logits = model(**batch).logits
            loss = classification_loss(logits, labels) / len(micro_batches)
            loss.backward()
        total += loss.item()
    return total


def wrapped(context: Context, model: nn.Module) -> DistributedDataParallel:
    device_ids = [context.topology.local_rank] if context.topology.device == "cuda" else None
    return DistributedDataParallel(model, device_ids=device_ids, gradient_as_bucket_view=True)


def take_gradient(model: nn.Module) -> torch.Tensor:
    """The gradient as one vector `(parameters,)` on the CPU; the model has none afterwards."""
    learning = [p for p in model.parameters() if p.requires_grad]
    vector = torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten().cpu() for p in learning])
    model.zero_grad()
    return vector


def gradient(context: Context) -> list[Finding]:
    """Loss and gradient of the first global batch: by one process alone, by DDP, and by stock Trainer.

    Dropout off and no autocast, so that only the order of additions differs. Shows a loss multiplied by the world size
    (what stock Trainer does to models like DistilBERT), rows dealt wrongly, and gradients that are not reduced.
    """
    plan, place = context.plan, context.topology
    model = context.build(replace(context.config, dropout=0.0)).train()
    mine = list(itertools.islice(context.sampler(place.rank, place.world_size, plan.accumulation), plan.accumulation))
    loss, reference = 0.0, torch.empty(0)
    if place.rank == 0:
        whole = next(iter(context.sampler(0, 1, 1)))
        loss = backward(context, model, [whole[i : i + plan.per_device] for i in range(0, len(whole), plan.per_device)])
        reference = take_gradient(model)
    # Whatever raises from here on raises on every rank: all have the same model and as many rows.
    context.ranks.gather(None)
    ddp = backward(context, wrapped(context, model), mine), take_gradient(model)
    findings = []
    for name, (total, vector) in (("DDP", ddp), ("Trainer", by_trainer(context, model, mine))):
        everyone = context.ranks.gather((total, float(vector.double().norm())))
        if place.rank == 0:
            findings.append(compare(f"gradient, {name}", loss, reference, vector, everyone))
    return findings


def by_trainer(context: Context, model: nn.Module, mine: Sequence[Sequence[int]]) -> tuple[float, torch.Tensor]:
    """Loss and gradient of the same rows by one optimizer step of stock Trainer: the model's own loss, Trainer's own loop."""
    seen: dict[str, Any] = {}

    class OneStep(Trainer):
        def get_train_dataloader(self) -> DataLoader[Any]:
            return DataLoader([context.collate(rows) for rows in mine], batch_size=None)  # type: ignore[arg-type]

    class Look(TrainerCallback):
        def on_pre_optimizer_step(self, *_: Any, **__: Any) -> None:
            seen["gradient"] = take_gradient(model)

        def on_log(self, *_: Any, logs: dict[str, Any] | None = None, **__: Any) -> None:
            seen.setdefault("loss", (logs or {}).get("loss"))

    trainer = OneStep(
        model,
        TrainingArguments(
            output_dir=str(context.ranks.folder), use_cpu=context.topology.device == "cpu", max_steps=1, max_grad_norm=0, logging_steps=1,
            per_device_train_batch_size=len(mine[0]), gradient_accumulation_steps=len(mine), ddp_find_unused_parameters=False,
            save_strategy="no", report_to="none", disable_tqdm=True, remove_unused_columns=False, dataloader_pin_memory=False,
        ),
        callbacks=[Look()],
    )  # fmt: skip
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    return seen["loss"], seen["gradient"]


def compare(what: str, loss: float, reference: torch.Tensor, vector: torch.Tensor, everyone: list[tuple[float, float]]) -> Finding:
    """The launched loss (mean over ranks) and gradient beside the reference's; `everyone`: each rank's loss and gradient norm."""
    tolerance, norm = TOLERANCE[reference.dtype], float(reference.double().norm())
    launched = sum(of_rank for of_rank, _ in everyone) / len(everyone)
    off = float((vector - reference).double().norm()) / norm
    apart = max(abs(of_rank - everyone[0][1]) for _, of_rank in everyone) / norm
    factor = launched / loss
    found = f"loss {launched:.6f}, gradient norm {everyone[0][1]:.5f}, off by {max(off, apart):.1e}"
    advice = "Compare the rows of the first step (--trace true) and the versions of torch, transformers and accelerate."
    if apart > tolerance:
        found, advice = f"{found}, unlike on the ranks", "Some gradient is not all-reduced: look for parameters kept out of DDP."
    elif round(factor) > 1 and abs(factor - round(factor)) < 1e-3:
        found, advice = f"{found}: {factor:.0f} times the loss", "Set accepts_loss_kwargs = False on the model, as pipeline/model.py does."
    good = max(off, apart) <= tolerance and abs(factor - 1) <= LOSS_TOLERANCE
    return judge(what, found, f"{loss:.6f}, {norm:.5f} as one process, within {tolerance:.0e}", good, advice)
