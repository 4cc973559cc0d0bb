"""The frame around the checks: all ranks walk through the same list together, and none waits for one that has failed.

A check is a function of the `Context` that returns findings; rank 0's count. What it raises becomes its FAIL line, and
checks that build on what it should have set are left out. Everything that ranks tell each other goes through
`Ranks.gather`, which carries failures too: a rank that fails in mid-check says so in place of its next answer.
"""

from __future__ import annotations

import itertools
import os
import socket
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from pipeline.checkpoint import write_json
from pipeline.config import TrainConfig
from pipeline.doctor.findings import WAITING, Finding, from_error
from pipeline.errors import explain
from pipeline.model import build_model
from pipeline.run import training_sampler
from pipeline.sampler import GlobalBatchSampler
from pipeline.topology import Topology

NEEDED = {"model": "model", "prepared": "data"}  # fields of the Context that checks may need, in words


class RankFailed(Exception):
    """A check ended on some rank; every rank knows already."""


class Ranks:
    """The group of all ranks, and the notes by which the parent process sees how far each has come."""

    def __init__(self, rank: int, folder: Path) -> None:
        self.rank, self.folder = rank, folder
        self.stage, self.number, self.of = "start", 0, 0

    def note(self, doing: str) -> None:
        note = {"rank": self.rank, "stage": self.stage, "number": self.number, "of": self.of, "doing": doing, "pid": os.getpid()}
        write_json(self.folder / f"rank-{self.rank}.json", note)

    def gather(self, value: Any) -> list[Any]:
        """Every rank's value, in the order of the ranks, on every rank. Raises RankFailed where one came with a failure."""
        return self._exchange(("value", value))

    def tell_failure(self, line: str) -> RankFailed:
        """Answers the others' next `gather`, wherever in the check they are; returns what to report."""
        try:
            self._exchange(("failure", line))
        except RankFailed as failed:
            return failed
        raise AssertionError("a failure was sent and none came")

    def _exchange(self, mine: tuple[str, Any]) -> list[Any]:
        self.note(WAITING)
        box: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(box, mine)
        self.note("working")
        failures: dict[str, list[int]] = {}
        for rank, (kind, value) in enumerate(box):
            if kind == "failure":
                failures.setdefault(value, []).append(rank)
        if failures:
            alone = len(box) == 1
            told = [line if alone or len(who) == len(box) else f"rank {', '.join(map(str, who))}: {line}" for line, who in failures.items()]
            raise RankFailed("; ".join(told))
        return [value for _, value in box]


@dataclass
class Context:
    """What the checks look at. What has a default is set by earlier checks; None: not there, because that check failed."""

    config: TrainConfig
    topology: Topology
    ranks: Ranks
    asked: int  # processes the launch file asks for
    launch: str  # name of the launch file
    refused: str | None = None  # why the configured device or precision cannot be had; `topology` is a substitute then
    plan: Any = None  # BatchPlan
    model_found: bool | None = None
    prepared: Any = None  # Prepared
    lengths: Any = None  # tokens of each training row, (rows,), read from the table once: row by row takes seconds
    model: Any = None  # as the run would train it, on its device
    parameter_bytes: int = 0
    host: str = field(default_factory=socket.gethostname)

    def sampler(self, rank: int, world_size: int, accumulation: int) -> GlobalBatchSampler:
        """The run's own sampler, as it would deal to that rank."""
        place = replace(self.topology, rank=rank, world_size=world_size)
        plan = replace(self.plan, world_size=world_size, accumulation=accumulation)
        return training_sampler(self.config, place, plan, {"length": self.lengths})  # type: ignore[arg-type]

    def build(self, config: TrainConfig) -> nn.Module:
        """The run's own model on this rank's device."""
        prepared, place = self.prepared, self.topology
        return build_model(prepared.source, config, prepared.label_names, place.attention).to(place.torch_device)

    def collate(self, rows: Sequence[int]) -> dict[str, torch.Tensor]:
        """Training rows as the padded batch a model takes, on this rank's device."""
        batch = self.prepared.collator([self.prepared.train[int(row)] for row in rows])
        return {name: tensor.to(self.topology.torch_device) for name, tensor in batch.items()}


@dataclass(frozen=True)
class Check:
    name: str
    run: Callable[[Context], list[Finding]]
    needs: tuple[str, ...] = ()  # of NEEDED


def run_checks(context: Context, checks: Sequence[Check]) -> Iterator[list[Finding]]:
    """Each check's findings as it ends. All ranks must walk through; the findings of rank 0 are the ones to show."""
    ranks = context.ranks
    for number, check in enumerate(checks, start=1):
        ranks.stage, ranks.number, ranks.of = check.name, number, len(checks)
        ranks.note("working")
        missing = [NEEDED[name] for name in check.needs if getattr(context, name) is None]
        # Agreed upon, since a check can have failed on one rank only.
        missing = list(dict.fromkeys(itertools.chain.from_iterable(ranks.gather(missing))))
        if missing:
            yield [Finding(check.name, f"not looked at: it needs the {' and the '.join(missing)}, see above", "to be looked at", "skip")]
            continue
        try:
            findings = check.run(context)
            ranks.gather(None)
        except RankFailed as failed:
            findings = [from_error(check.name, str(failed))]
        except Exception as error:
            traceback.print_exception(error)  # into the log, which --debug shows
            line = explain(error) or f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else 'no message'}"
            findings = [from_error(check.name, str(ranks.tell_failure(line)))]
        yield findings
