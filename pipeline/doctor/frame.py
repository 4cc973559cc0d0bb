"""The frame around the checks: all ranks walk through the same list together, and none waits for one that has failed.

A check is a function of the `Context` that returns `Finding`s. What it raises becomes its FAIL line, and checks that build
on it are left out. All that ranks tell each other goes through `Context.gather`, which carries failures too: a rank that
fails in mid-check says so in place of its next answer.
"""

from __future__ import annotations

import contextlib
import sys
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import nn

from pipeline.config import TrainConfig
from pipeline.errors import explain
from pipeline.model import build_model
from pipeline.run import training_sampler
from pipeline.sampler import GlobalBatchSampler
from pipeline.topology import BatchPlan, Topology

Level = Literal["ok", "warn", "FAIL", "skip"]  # skip: could not be looked at, because of a FAIL elsewhere


@dataclass(frozen=True)
class Finding:
    what: str
    found: str
    expected: str
    level: Level = "ok"
    next: str = ""  # the next step of the person who reads it

    def __str__(self) -> str:
        start = f"{self.level:<6}{self.what:<16}{self.found}"
        if self.level == "ok":
            return f"{start} (expected: {self.expected})"
        return start + "".join(f"\n{'':<24}{word}: {text}" for word, text in (("expected", self.expected), ("next", self.next)) if text)


def judge(what: str, found: str, expected: str, good: bool, next: str, bad: Level = "FAIL") -> Finding:
    """A finding that is ok where `good` holds, else `bad` with its next step."""
    return Finding(what, found, expected) if good else Finding(what, found, expected, bad, next)


def from_error(what: str, text: str, expected: str = "no error") -> Finding:
    """A FAIL out of an error's line; our own errors say first what is wrong, then what to do."""
    found, _, advice = " ".join(text.split()).partition(". ")
    return Finding(what, found.rstrip("."), expected, "FAIL", advice or "Put that right, then run the doctor again.")


def verdict(findings: Sequence[Finding]) -> str:
    failed, warned, skipped = (sum(f.level == level for f in findings) for level in ("FAIL", "warn", "skip"))
    if failed:
        return f"{failed} FAILED, {warned} warning(s), {skipped} not looked at. Mend the first FAIL, then look again."
    if warned:
        return f"Nothing FAILED; {warned} warning(s) to know of, {len(findings)} looked at."
    return f"All is well: {len(findings)} looked at."


def gib(amount: float) -> str:
    return f"{amount / 2**30:.3g} GiB"


class RankFailed(Exception):
    """Sent: what failed on this rank. Raised: what failed on some rank, and every rank knows."""


@dataclass
class Context:
    """What the checks look at. What has a default is set by the check named beside it."""

    config: TrainConfig
    topology: Topology
    folder: Path  # for what has to be written
    asked: int  # processes the launch file asks for
    launch: str  # name of the launch file
    refused: str | None = None  # why the configured device or precision cannot be had; `topology` is a substitute then
    sharded: bool = False  # the launch file says FSDP; `topology` is that of DDP
    tick: Callable[[], None] = lambda: None  # tells the others that this rank moves
    done: set[str] = field(default_factory=set)  # names of the checks that came to their end, on all ranks
    plan: Any = None  # batch: BatchPlan
    prepared: Any = None  # dataset: Prepared
    lengths: Any = None  # dataset: tokens of each training row, (rows,)
    model: Any = None  # parameters: as the run would train it, on its device
    parameter_bytes: int = 0  # parameters
    cost: tuple[float, float] = (0, 0)  # longest batch: seconds of a micro-batch, whatever its size, and of each token

    def gather(self, value: Any) -> list[Any]:
        """Every rank's value, in the order of the ranks, on every rank; a RankFailed among them is raised on every rank."""
        box: list[Any] = [None] * dist.get_world_size()
        self.tick()
        dist.all_gather_object(box, value)
        failed = {rank: str(answer) for rank, answer in enumerate(box) if isinstance(answer, RankFailed)}
        if failed:
            alike = len(failed) == len(box) and len(set(failed.values())) == 1
            raise RankFailed(failed[0] if alike else "; ".join(f"rank {rank}: {line}" for rank, line in failed.items()))
        return box

    def sampler(self, plan: BatchPlan, rank: int) -> GlobalBatchSampler:
        """The run's own sampler, as it would deal batches of that plan to that rank."""
        place = replace(self.topology, rank=rank, world_size=plan.world_size)
        # The lengths were read from the table once: row by row it takes seconds.
        return training_sampler(self.config, place, plan, {"length": self.lengths})  # type: ignore[arg-type]

    def build(self, config: TrainConfig) -> nn.Module:
        """The run's own model on this rank's device."""
        place = self.topology
        return build_model(self.prepared.source, config, self.prepared.label_names, place.attention).to(place.torch_device)

    def collate(self, rows: Sequence[int]) -> dict[str, torch.Tensor]:
        """Training rows as the padded batch a model takes, on this rank's device."""
        batch = self.prepared.collator([self.prepared.train[int(row)] for row in rows])
        return {name: tensor.to(self.topology.torch_device) for name, tensor in batch.items()}


def attempt(context: Context, name: str, check: Callable[[Context], list[Finding]], needs: Sequence[str] = ()) -> list[Finding]:
    """A check's findings: rank 0's, and what is not well on others; or what kept it from its end. All ranks call this together."""
    missing = [need for need in needs if need not in context.done]
    if missing:
        return [Finding(name, f"not looked at: it builds on {' and '.join(missing)}, see above", "", "skip")]
    try:
        try:
            with contextlib.redirect_stdout(None):  # the findings say it all
                mine = check(context)
        except RankFailed:
            raise
        except Exception as error:
            if "--debug" in sys.argv:
                traceback.print_exception(error)
            context.gather(RankFailed(explain(error) or f"{type(error).__name__}: {error}".split("\n")[0]))
            raise
        shown, *others = context.gather(mine)
    except RankFailed as failed:
        return [from_error(name, str(failed))]
    for rank, findings in enumerate(others, start=1):
        told = {(finding.level, finding.found) for finding in shown}
        news = [finding for finding in findings if finding.level != "ok" and (finding.level, finding.found) not in told]
        shown += [replace(finding, what=f"{finding.what}, rank {rank}") for finding in news]
    context.done.add(name)
    return shown
