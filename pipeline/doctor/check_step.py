"""What a step costs: the memory of the longest batch, the link between ranks, and the time of an epoch."""

from __future__ import annotations

import contextlib
import math
from functools import partial
from pathlib import Path

import numpy as np
import psutil
import torch
import torch.distributed as dist

from pipeline.doctor.check_machine import free_memory
from pipeline.doctor.check_model import backward, timed, wrapped
from pipeline.doctor.findings import Finding, gib, judge
from pipeline.doctor.frame import Context
from pipeline.model import decay_groups

SPARE = 0.1  # share of the memory to be left: a run's checkpoints and validations come on top
MOST_COMMUNICATION = 0.33  # share of a step
SLOWER = 1.5  # between ranks that do exactly the same work
LONG_HOURS = 24


def _reset_peak() -> None:
    """Linux forgets the process's highest memory when 5 is written here (proc(5)); where that is not allowed it stays too high."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def _peak() -> int:
    """Highest resident bytes of this process."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024


def _step(context: Context, model: torch.nn.Module, optimizer: torch.optim.Optimizer, micro_batches: list[list[int]]) -> None:
    """One optimizer step as the run does it."""
    backward(context, model, micro_batches, context.topology.autocast)
    torch.nn.utils.clip_grad_norm_(model.parameters(), context.config.max_grad_norm or math.inf)
    optimizer.step()
    optimizer.zero_grad()


def _optimizer(context: Context) -> torch.optim.Optimizer:
    return torch.optim.AdamW(decay_groups(context.model, context.config.weight_decay), lr=1e-6, fused=True)


def longest_batch(context: Context) -> list[Finding]:
    """Two steps with the longest texts of train on every rank at once, without a word between them: memory, and equal speed.

    The first step makes the optimizer's moments, the second has the peak. A device without the room raises, and the
    error's own line is the finding; a process ended by the system is told by the parent.
    """
    place, plan, model = context.topology, context.plan, context.model
    rows = np.argsort(context.lengths)[::-1][: plan.per_device].tolist()
    context.ranks.gather(None)
    free, total = torch.cuda.mem_get_info() if place.device == "cuda" else free_memory()
    before = psutil.Process().memory_info().rss
    torch.cuda.reset_peak_memory_stats() if place.device == "cuda" else _reset_peak()
    optimizer = _optimizer(context)
    model.train()
    seconds = 0.0
    for _ in range(2):
        seconds = timed(lambda: _step(context, model, optimizer, [rows]), place.torch_device)
    if place.device == "cuda":
        # What others hold on this GPU is not ours to use.
        need, total = torch.cuda.max_memory_reserved(), free + torch.cuda.memory_reserved()
    else:
        need = _peak() - before
    everyone = context.ranks.gather((context.host, need, free, total, seconds))
    here = [entry for entry in everyone if entry[0] == context.host]
    # On the CPU the ranks of a machine share its memory; a GPU has one rank.
    share, room = (sum(entry[1] for entry in here), free) if place.device == "cpu" else (max(entry[1] for entry in here), total)
    size = f"{plan.per_device} rows x {context.lengths.max()} tokens"
    found = f"{size}: {gib(share)} for {len(here)} rank{'s' * (len(here) > 1)} of {gib(room)}"
    advice = "Halve --max_per_device_batch_size (accumulation makes up for it, the result stays), or lower --max_length."
    findings = [judge("longest batch", found, f"at most {gib(room * (1 - SPARE))}", share <= room * (1 - SPARE), advice)]
    if len(everyone) > 1:
        times = [entry[4] for entry in everyone]
        found = f"the same work takes {min(times):.3f} to {max(times):.3f} s (rank {times.index(max(times))})"
        advice = "All wait for the slowest rank: look for other programs there, for heat, or for unlike hardware."
        findings.append(judge("slowest rank", found, f"at most {SLOWER} times", max(times) <= SLOWER * min(times), advice, "warn"))
    return findings


def speed(context: Context) -> list[Finding]:
    """The link between ranks, measured with a tensor of the gradient's size, and the time of an epoch.

    Bus bandwidth is 2 (n - 1) / n times the bytes over the time, as NVIDIA's nccl-tests define it (doc/PERFORMANCE.md):
    what the slowest link carries, whatever the number of ranks. Steps are timed at three sizes, the middles of the
    shortest, middle and longest third of the epoch's steps, whose mean stands for all.
    """
    place, plan, model = context.topology, context.plan, context.model
    sampler = context.sampler(place.rank, place.world_size, plan.accumulation)
    tokens = sampler.lengths[sampler.global_batches()].sum(1)
    by_size = tokens.argsort()
    chosen = [int(by_size[int(len(by_size) * part)]) for part in (5 / 6, 1 / 6, 1 / 2)]
    mine = np.asarray(list(sampler)).reshape(sampler.steps, plan.accumulation, plan.per_device)
    optimizer = _optimizer(context)
    ddp = wrapped(context, model)
    steps = []
    for step in chosen:  # warm from the check before
        context.ranks.gather(None)
        steps.append(timed(partial(_step, context, ddp, optimizer, mine[step].tolist()), place.torch_device))
    vector = torch.zeros(sum(p.numel() for p in model.parameters() if p.requires_grad), device=place.torch_device)
    reduces = []
    for _ in range(4):
        context.ranks.gather(None)
        reduces.append(timed(lambda: dist.all_reduce(vector), place.torch_device))
    everyone = context.ranks.gather((float(np.mean(steps)), float(np.median(reduces[1:]))))
    step_seconds, reduce_seconds = max(step for step, _ in everyone), max(reduce for _, reduce in everyone)
    return [*_link(context, vector.nbytes, reduce_seconds, step_seconds), _epoch(context, sampler.steps, step_seconds)]


def _link(context: Context, size: int, reduce_seconds: float, step_seconds: float) -> list[Finding]:
    n = context.topology.world_size
    expected = f"at most {MOST_COMMUNICATION:.0%} of a step"
    if n == 1:
        return [Finding("all-reduce", "not needed: one process", expected)]
    bandwidth = 2 * (n - 1) / n * size / reduce_seconds
    share = reduce_seconds / step_seconds
    found = f"{gib(size)} in {reduce_seconds * 1e3:.0f} ms, {bandwidth / 1e9:.2f} GB/s: at most {min(share, 1):.0%} of a step (DDP hides a part)"
    advice = "The link is slow for this model: a larger --global_batch_size with accumulation talks less often; between GPUs look at "
    advice += "NCCL_P2P_DISABLE and NCCL_SOCKET_IFNAME, between machines at the network."
    return [judge("all-reduce", found, expected, share <= MOST_COMMUNICATION, advice, "warn")]


def _epoch(context: Context, steps: int, step_seconds: float) -> Finding:
    config = context.config
    in_all = config.max_steps if config.max_steps > 0 else math.ceil(config.epochs * steps)
    rate = config.global_batch_size / step_seconds
    found = f"{duration(steps * step_seconds)} an epoch ({steps} steps of {step_seconds:.2f} s, {rate:.0f} rows/s), {duration(in_all * step_seconds)} in all"
    advice = "Train on fewer rows first (--max_train_samples), with a shorter --max_length, or on more or faster devices."
    return judge("epoch", found, f"in all less than {LONG_HOURS} h", in_all * step_seconds < LONG_HOURS * 3600, advice, "warn")


def duration(seconds: float) -> str:
    """Seconds for people, in the unit that fits."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
