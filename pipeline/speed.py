"""How fast a run was, in figures that compare across machines: samples, tokens, padding, steps, memory, arithmetic.

They stand under `speed` in `run.json` and cost the training loop one reading of the clock a step: what each step worked
on follows from the sampler, whose batches are a pure function of (seed, epoch, step).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from pipeline.record import Recorder
from pipeline.sampler import GlobalBatchSampler

FIRST_STEPS = 3  # left out of the figures: they load code, fill caches and build DDP's buckets


@dataclass
class Work:
    """What some optimizer steps computed on, over all ranks. `squares`: the sum of the rows' squared lengths, for attention."""

    rows: int = 0
    tokens: int = 0
    squares: int = 0
    padded_tokens: int = 0  # with padding: rows x the longest of their micro-batch
    padded_squares: int = 0


def work(sampler: GlobalBatchSampler, first: int, last: int, multiple_of: int = 1) -> Work:
    """Of the steps `first` (0-based) up to, but not including, `last`; micro-batches are padded to a `multiple_of` tokens."""
    done = Work()
    for epoch in range(first // sampler.steps, -(-last // sampler.steps)):
        sampler.set_epoch(epoch)
        begin = epoch * sampler.steps
        for batch in sampler.global_batches()[max(0, first - begin) : last - begin]:
            lengths = sampler.lengths[sampler.hands(batch)]  # (micro-batches, rows, ranks)
            padded = (-(-lengths.amax(1) // multiple_of) * multiple_of).double()
            done.rows += lengths.numel()
            done.tokens += int(lengths.sum())
            done.squares += int(lengths.double().square().sum())
            done.padded_tokens += sampler.batch_size * int(padded.sum())
            done.padded_squares += sampler.batch_size * int(padded.square().sum())
    return done


def training_flops(model: nn.Module, tokens: int, squares: int) -> float:
    """Floating-point operations of forward and backward: 6 x matrix parameters x tokens + 12 x layers x width x squared lengths.

    Per token a matrix parameter multiplies and adds once forward (2) and twice backward (4); the two products of attention
    are (seq, width) x (width, seq) and (seq, seq) x (seq, width) in each layer. Source: Chowdhery et al. 2022 (PaLM), appendix B;
    Kaplan et al. 2020, table 1, from which the 6 is. Counted are the matrices in the stack of layers; embedding tables are
    looked up, not multiplied, and the head sees one token a row. (Too low for a model that uses its layers repeatedly.)
    """
    stacks = [module for module in model.modules() if isinstance(module, nn.ModuleList)]
    matrices = {
        id(parameter): parameter.numel()
        for stack in stacks
        for module in stack.modules()
        if not isinstance(module, nn.Embedding)
        for parameter in module.parameters(recurse=False)
        if parameter.dim() == 2
    }
    layers, width = (getattr(model.config, name, 0) for name in ("num_hidden_layers", "hidden_size"))  # a rare model has other names
    return 6.0 * sum(matrices.values()) * tokens + 12.0 * layers * width * squares


def peak_memory_gib(device: torch.device) -> float | None:
    """The most memory that torch held on this GPU, or, on the CPU, that this process had in use; None where Linux does not tell."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    status = Path("/proc/self/status")  # not getrusage: its maximum includes that of the launcher this process was forked from
    found = re.search(r"VmHWM:\s*(\d+) kB", status.read_text()) if status.exists() else None
    return int(found.group(1)) / 2**20 if found else None


def speed(
    recorder: Recorder, lengths: Sequence[int], model: nn.Module, memory: Sequence[float | None], multiple_of: int = 1
) -> dict[str, Any]:
    """The figures of the last session that trained, for `run.json`.

    Args:
        lengths: tokens of each training row, `(rows,)`.
        memory: each rank's peak in GiB, `(ranks,)`.
        multiple_of: as in the run's Collator.

    `samples_per_second` here leaves the first steps out; the one beside it in `run.json` is of all steps. Seconds are those
    between the ends of steps, without validation and checkpoints. A GPU is not waited for at each: their sum is right, and of
    single steps only those that log.
    """
    session = recorder.sessions[-1]
    seconds = recorder.step_times[-(recorder.step - session["after_step"]) :] if recorder.step > session["after_step"] else []
    seconds = seconds[FIRST_STEPS:] if len(seconds) > 2 * FIRST_STEPS else seconds
    if not seconds:  # of a run that an earlier version trained
        return {"steps": 0}
    batch, config = session["batch"], recorder.config
    sampler = GlobalBatchSampler(
        lengths, global_batch_size=batch["global"], accumulation=batch["accumulation"], num_replicas=batch["world_size"], rank=0,
        seed=config.seed, length_grouping=config.length_grouping,
    )  # fmt: skip
    done = work(sampler, recorder.step - len(seconds), recorder.step, multiple_of)
    total = sum(seconds)
    return {
        "steps": len(seconds),
        "seconds": total,
        "samples_per_second": done.rows / total,
        "tokens_per_second": done.tokens / total,
        "padded_share": 1 - done.tokens / done.padded_tokens,
        "step_seconds": {f"p{share}": float(np.percentile(seconds, share)) for share in (10, 50, 90, 99)},
        "peak_memory_gib": [None if peak is None else round(peak, 3) for peak in memory],
        # On the tokens of the texts, and on all that were computed, those of the padding too.
        "flops_per_second": training_flops(model, done.tokens, done.squares) / total,
        "flops_per_second_with_padding": training_flops(model, done.padded_tokens, done.padded_squares) / total,
    }
