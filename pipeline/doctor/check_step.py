"""What a step costs: the memory of the longest batch, the link between ranks, and the time of an epoch."""

from __future__ import annotations

import math
import resource
import socket
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import psutil
import torch
import torch.distributed as dist

from pipeline.doctor.check_launch import free_memory
from pipeline.doctor.check_model import backward
from pipeline.doctor.findings import Finding, gib, judge
from pipeline.doctor.frame import Context
from pipeline.model import decay_groups

SPARE = 0.1  # share of the memory to be left: a run's checkpoints and validations come on top
MOST_COMMUNICATION = 0.33  # share of a step
LONG_HOURS = 24


def timed(work: Callable[[], Any], device: torch.device) -> float:
    """Seconds the work takes, a GPU's queue included."""
    began = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - began


def longest_batch(context: Context) -> list[Finding]:
    """A step with the longest texts of train on every rank at once, without a word between them: its memory and its time.

    Short ones before it make the optimizer's moments, so that the long one has a run's peak, and show what a step costs
    whatever its size. A device without the room raises, and the error's own line is the finding; a process ended by the
    system is told by the launcher.
    """
    config, place, plan, model = context.config, context.topology, context.plan, context.model.train()
    by_length, on_gpu = np.argsort(context.lengths), place.device == "cuda"
    # Ours is what is free, and what this process has already; what others hold is not.
    usable = torch.cuda.mem_get_info()[0] + torch.cuda.memory_reserved() if on_gpu else free_memory()[0]
    context.gather(None)  # nobody takes any before all have looked
    held = 0 if on_gpu else psutil.Process().memory_info().rss
    optimizer = torch.optim.AdamW(decay_groups(model, config.weight_decay), lr=1e-6, fused=True)

    def step(rows: np.ndarray) -> tuple[float, int]:
        """Seconds, and tokens with padding."""

        def work() -> None:
            backward(context, model, [rows.tolist()], place.autocast)
            torch.nn.utils.clip_grad_norm_(model.parameters(), config.max_grad_norm or math.inf)
            optimizer.step()
            optimizer.zero_grad()

        return timed(work, place.torch_device), len(rows) * int(context.lengths[rows].max())

    step(by_length[:1])
    least, few = step(by_length[:1])
    for _ in range(1 + on_gpu):  # a GPU chooses its kernels at the first one; on the CPU a second would cost more than it tells
        seconds, many = step(by_length[-plan.per_device :])
    per_token = max(0.0, seconds - least) / max(1, many - few)
    context.cost = max(0.0, least - few * per_token), per_token

    # The highest that the process ever had, on the CPU with what it took before: a little too much, never too little.
    peak = torch.cuda.max_memory_reserved() if on_gpu else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - held
    # The ranks of a machine share its memory; a GPU has one rank.
    where = f"{socket.gethostname()}, {f'GPU {place.local_rank}' if on_gpu else 'CPU'}"
    peaks = [of_rank for its, of_rank in context.gather((where, peak)) if its == where]
    found = f"{plan.per_device} rows x {context.lengths.max()} tokens: {gib(sum(peaks))} for {len(peaks)} rank(s) of {gib(usable)}"
    advice = "Halve --max_per_device_batch_size (accumulation makes up for it, the result stays), or lower --max_length."
    return [judge("longest batch", found, f"at most {1 - SPARE:.0%}", sum(peaks) <= usable * (1 - SPARE), advice)]


def speed(context: Context) -> list[Finding]:
    """The link between ranks, measured with a tensor of the gradient's size, and the time of an epoch.

    Bus bandwidth is 2 (n - 1) / n times the bytes over the time, as NVIDIA's nccl-tests define it (doc/PERFORMANCE.md):
    what the slowest link carries, whatever the number of ranks. An epoch is added up from the padded tokens of its
    micro-batches, at the cost that "longest batch" found, and one all-reduce a step.
    """
    config, plan, n, device = context.config, context.plan, context.topology.world_size, context.topology.torch_device
    sampler = context.sampler(plan, context.topology.rank)
    mine = np.asarray(list(sampler))  # (micro-batches, rows)
    fixed, per_token = context.cost
    compute = (len(mine) * fixed + float(context.lengths[mine].max(1).sum()) * plan.per_device * per_token) / sampler.steps
    vector = torch.zeros(sum(p.numel() for p in context.model.parameters() if p.requires_grad), device=device)
    reduces = []
    for _ in range(3 * (n > 1)):
        context.gather(None)
        reduces.append(timed(lambda: dist.all_reduce(vector), device))
    slowest, reduce = (max(of_ranks) for of_ranks in zip(*context.gather((compute, min(reduces, default=0.0))), strict=True))
    step = slowest + reduce  # DDP hides a part of the all-reduce under backward
    found = "not needed: one process"
    if n > 1:
        found = f"{gib(vector.nbytes)} in {reduce * 1e3:.0f} ms, {2 * (n - 1) / n * vector.nbytes / reduce / 1e9:.2f} GB/s: at most "
        found += f"{reduce / step:.0%} of a step"
    advice = "The link is slow for this model: a larger --global_batch_size with accumulation talks less often; between GPUs look at "
    advice += "NCCL_P2P_DISABLE and NCCL_SOCKET_IFNAME, between machines at the network."
    expected, good = f"up to {MOST_COMMUNICATION:.0%}", reduce / step <= MOST_COMMUNICATION
    findings = [judge("all-reduce", found, expected, good, advice, "warn")]
    steps = config.max_steps if config.max_steps > 0 else math.ceil(config.epochs * sampler.steps)
    found = f"about {step * sampler.steps / 60:.1f} min: {sampler.steps} steps of {step:.2f} s, {plan.global_rows / step:.0f} rows/s; "
    found += f"{step * steps / 3600:.1f} h in all"
    advice = "Train on fewer rows first (--max_train_samples), with a shorter --max_length, or on more or faster devices."
    return [*findings, judge("epoch", found, f"less than {LONG_HOURS} h", step * steps < LONG_HOURS * 3600, advice, "warn")]
