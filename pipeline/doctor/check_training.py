"""The model and its steps: what is trained, in which numbers, whether many ranks compute what one would, and what it costs."""

from __future__ import annotations

import itertools
import math
import resource
import socket
import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import psutil
import torch
import torch.distributed as dist
from torch import nn
from torch.utils.data import DataLoader
from transformers import Trainer, TrainingArguments

from pipeline.doctor.check_launch import free_memory
from pipeline.doctor.frame import Context, Finding, gib, judge
from pipeline.model import classification_loss, decay_groups
from pipeline.topology import DTYPES, BatchPlan

# Relative difference of the gradients of one and of many ranks. Only the order of additions differs: 8e-8 to 3e-7
# measured in fp32 with MiniLM and a model of the size of DistilBERT on two gloo ranks. A wrong row shows from 1e-2 on.
TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-10}
REFERENCE_ROWS = 8  # of the compared batch, but each micro-batch has a row: a full one takes a CPU a quarter of a minute
SPARE = 0.1  # share of the memory to be left: a run's checkpoints and validations come on top
MOST_COMMUNICATION = 0.33  # share of a step
LONG_HOURS = 24


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
    alone = replace(small, world_size=1, accumulation=n * accumulation)
    model = context.build(replace(context.config, dropout=0.0)).train()

    def first_step(plan: BatchPlan) -> list[list[int]]:
        return list(itertools.islice(context.sampler(plan, place.rank), plan.accumulation))

    loss, reference = (backward(context, model, first_step(alone)), gradient_vector(model)) if place.rank == 0 else (0.0, torch.ones(1))
    context.gather(None)  # whatever raises from here on raises on every rank: all have the same model and as many rows
    mine, vector = by_trainer(context, model, first_step(small))
    losses, norms = zip(*context.gather((mine, length(vector))), strict=True)
    if place.rank != 0:
        return []
    launched, norm, tolerance = sum(losses) / n, length(reference), TOLERANCE[reference.dtype]
    factor, apart = launched / loss, (max(norms) - min(norms)) / norm
    off = max(apart, abs(factor - 1), length(vector - reference) / norm)
    found = f"loss {launched:.6f}, gradient norm {norms[0]:.5f}, off by {off:.1e}"
    advice = "Compare the rows of the first step (--trace true) and the versions of torch, transformers and accelerate."
    if apart > tolerance:
        found, advice = f"{found}, unlike on the ranks", "Some gradient is not all-reduced: look for parameters kept out of DDP."
    elif round(factor) > 1 and abs(factor - round(factor)) < 1e-3:
        found, advice = f"{found}: {factor:.0f} times the loss", "Set accepts_loss_kwargs = False on the model, as pipeline/model.py does."
    return [judge("gradient", found, f"{loss:.6f}, {norm:.5f} as one process, within {tolerance:.0e}", off <= tolerance, advice)]


def gradient_vector(model: nn.Module) -> torch.Tensor:
    """The gradient of all that learns, `(parameters,)`, on the CPU."""
    gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in model.parameters() if p.requires_grad]
    return torch.cat([gradient.flatten().cpu() for gradient in gradients])


def length(vector: torch.Tensor) -> float:
    """Its norm, summed up in float64: in float32 the squares of 67 million parameters came to 0.4% less."""
    return float(torch.linalg.vector_norm(vector, dtype=torch.float64))


def by_trainer(context: Context, model: nn.Module, mine: Sequence[Sequence[int]]) -> tuple[float, torch.Tensor]:
    """This rank's loss, and the gradient, of one optimizer step of stock Trainer: the model's own loss, Trainer's own loop."""
    steps: list[tuple[torch.Tensor, torch.Tensor]] = []

    class OneStep(Trainer):
        def get_train_dataloader(self) -> DataLoader[Any]:
            return DataLoader([context.collate(rows) for rows in mine], batch_size=None)  # type: ignore[arg-type]

        def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
            steps.append((super().training_step(*args, **kwargs), gradient_vector(model)))  # in this order
            return steps[-1][0]

    model.zero_grad()
    OneStep(model, TrainingArguments(
        output_dir=str(context.folder), use_cpu=context.topology.device == "cpu", max_steps=1, gradient_accumulation_steps=len(mine),
        ddp_find_unused_parameters=False, save_strategy="no", report_to="none", disable_tqdm=True,
    )).train()  # fmt: skip
    return float(sum(loss for loss, _ in steps)), steps[-1][1]


def now(device: torch.device) -> float:
    """Seconds of the clock, once a GPU's queue is empty."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def longest_batch(context: Context) -> list[Finding]:
    """A step with the longest texts of train on every rank at once, without a word between them: its memory and its time.

    Short ones before it make the optimizer's moments, so that the long one has a run's peak, and show what any step costs.
    A device without the room raises, and the error's own line is the finding.
    """
    config, place, plan, model = context.config, context.topology, context.plan, context.model.train()
    by_length, on_gpu = np.argsort(context.lengths), place.device == "cuda"
    # What is free, and what this process has already; what others hold on this device is not ours.
    usable = torch.cuda.mem_get_info()[0] + torch.cuda.memory_reserved() if on_gpu else free_memory()[0]
    context.gather(None)  # nobody takes any before all have looked
    held = psutil.Process().memory_info().rss
    optimizer = torch.optim.AdamW(decay_groups(model, config.weight_decay), lr=1e-6, fused=True)

    def step(rows: np.ndarray) -> tuple[float, int]:
        """Seconds, and tokens with padding."""
        began = now(place.torch_device)
        backward(context, model, [rows.tolist()], place.autocast)
        torch.nn.utils.clip_grad_norm_(model.parameters(), config.max_grad_norm or math.inf)
        optimizer.step()
        optimizer.zero_grad()
        return now(place.torch_device) - began, len(rows) * int(context.lengths[rows].max())

    step(by_length[:1])
    least, few = step(by_length[:1])
    for _ in range(1 + on_gpu):  # a GPU chooses its kernels at the first one; on the CPU a second would cost more than it tells
        seconds, many = step(by_length[-plan.per_device :])
    per_token = max(0.0, seconds - least) / max(1, many - few)
    context.cost = max(0.0, least - few * per_token), per_token

    # On the CPU the highest of all that the process did so far: a little too much, never too little. Linux counts in KiB.
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024) - held
    peak = torch.cuda.max_memory_reserved() if on_gpu else peak
    where = socket.gethostname(), place.local_rank if on_gpu else None  # the ranks of a machine share its memory; a GPU has one rank
    peaks = [of_rank for its, of_rank in context.gather((where, peak)) if its == where]
    found = f"{plan.per_device} rows x {context.lengths.max()} tokens: {gib(sum(peaks))} for {len(peaks)} rank(s) of {gib(usable)}"
    advice = "Halve --max_per_device_batch_size (accumulation makes up for it, the result stays), or lower --max_length."
    return [judge("longest batch", found, f"at most {1 - SPARE:.0%}", sum(peaks) <= usable * (1 - SPARE), advice)]


def speed(context: Context) -> list[Finding]:
    """The link between ranks, measured with a tensor of the gradient's size, and the time of an epoch.

    Bus bandwidth is 2 (n - 1) / n times the bytes over the time, as NVIDIA's nccl-tests define it (doc/PERFORMANCE.md). An
    epoch is added up from its micro-batches' padded tokens, at the cost found by `longest_batch`, and an all-reduce a step.
    """
    config, plan, n, device = context.config, context.plan, context.topology.world_size, context.topology.torch_device
    sampler, (fixed, per_token) = context.sampler(plan, context.topology.rank), context.cost
    longest = context.lengths[np.asarray(list(sampler))].max(1)  # of each micro-batch
    compute = float(len(longest) * fixed + longest.sum() * plan.per_device * per_token) / sampler.steps
    vector = torch.zeros(sum(p.numel() for p in context.model.parameters() if p.requires_grad), device=device)
    reduces = []
    for _ in range(3):
        context.gather(None)
        began = now(device)
        dist.all_reduce(vector)
        reduces.append(now(device) - began)
    compute, reduce = (max(of_ranks) for of_ranks in zip(*context.gather((compute, min(reduces))), strict=True))
    step = compute + reduce  # DDP hides a part of the all-reduce under backward
    found = f"{gib(vector.nbytes)} in {reduce * 1e3:.0f} ms, {2 * (n - 1) / n * vector.nbytes / reduce / 1e9:.2f} GB/s: at most "
    found = found + f"{reduce / step:.0%} of a step" if n > 1 else "not needed: one process"
    advice = "The link is slow for this model: a larger --global_batch_size with accumulation talks less often; between GPUs look at "
    advice += "NCCL_P2P_DISABLE and NCCL_SOCKET_IFNAME, between machines at the network."
    findings = [judge("all-reduce", found, f"up to {MOST_COMMUNICATION:.0%}", reduce <= MOST_COMMUNICATION * step, advice, "warn")]
    hours = step * (config.max_steps if config.max_steps > 0 else math.ceil(config.epochs * sampler.steps)) / 3600
    found = f"about {step * sampler.steps / 60:.1f} min, {sampler.steps} steps of {step:.2f} s, {plan.global_rows / step:.0f} rows/s; "
    advice = "Train on fewer rows first (--max_train_samples), with a shorter --max_length, or on more or faster devices."
    return [*findings, judge("epoch", f"{found}{hours:.1f} h in all", f"less than {LONG_HOURS} h", hours < LONG_HOURS, advice, "warn")]
