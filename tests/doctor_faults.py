"""Launched by tests/test_doctor_launched.py with two processes: plants one fault after the other in a real group of
ranks, lets the doctor's checks look, and writes what they found.

    torchrun --standalone --nproc_per_node 2 tests/doctor_faults.py RESULT.json CONFIG.yaml [--option value ...]
"""

from __future__ import annotations

import importlib
import json
import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from pipeline.config import parse
from pipeline.doctor import check_launch, check_sources, check_training
from pipeline.doctor.examine import CHECKS, join
from pipeline.doctor.frame import Context, Finding, attempt
from pipeline.topology import find_topology

RANK = int(os.environ["RANK"])


class Faults:
    """Each method plants one fault in a fresh context and returns the check that has to see it."""

    def __init__(self, context: Context) -> None:
        self.context, self.deal, self.build = context, context.sampler, context.build

    def a_row_on_both_ranks(self) -> Callable[..., Any]:
        """Rank 1 gets a row that is rank 0's."""

        def sampler(plan: Any, rank: int) -> Any:
            dealt = self.deal(plan, rank)
            if rank == 1:
                theirs = next(iter(self.deal(plan, 0)))
                dealt.deal = lambda batch, deal=dealt.deal: torch.cat([torch.tensor([[theirs[0]]]), deal(batch)[:, 1:]], dim=1)
            return dealt

        self.context.sampler = sampler  # type: ignore[method-assign]
        return check_sources.coverage

    def a_rank_with_less_to_do(self) -> Callable[..., Any]:
        class Short:
            def __init__(self, dealt: Any) -> None:
                self.dealt, self.set_epoch = dealt, dealt.set_epoch

            def __iter__(self) -> Iterator[list[int]]:
                return iter(list(self.dealt)[RANK:])

        self.context.sampler = lambda *place: Short(self.deal(*place))  # type: ignore[method-assign, assignment, return-value]
        return check_sources.coverage

    def rows_dealt_wrongly(self) -> Callable[..., Any]:
        """The classic: every rank learns from rank 0's rows."""
        self.context.sampler = lambda plan, _rank: self.deal(plan, 0)  # type: ignore[method-assign]
        return check_training.gradient

    def loss_times_world_size(self) -> Callable[..., Any]:
        """What stock Trainer does to models like DistilBERT when it is not told otherwise."""

        def build(config: Any) -> nn.Module:
            model = self.build(config)
            model.accepts_loss_kwargs = True  # type: ignore[assignment]
            return model

        self.context.build = build  # type: ignore[method-assign]
        return check_training.gradient

    def a_parameter_kept_out_of_the_all_reduce(self) -> Callable[..., Any]:
        def build(config: Any) -> nn.Module:
            model = self.build(config)
            DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, ["pre_classifier.weight"])
            return model

        self.context.build = build  # type: ignore[method-assign]
        return check_training.gradient

    def an_unused_parameter(self) -> Callable[..., Any]:
        def build(config: Any) -> nn.Module:
            model = self.build(config)
            model.forgotten = nn.Parameter(torch.zeros(3))
            return model

        self.context.build = build  # type: ignore[method-assign]
        return check_training.parameters

    def a_link_too_slow_for_the_model(self) -> Callable[..., Any]:
        """The link is what it is; beside it, computing is said to take no time at all."""
        self.context.model, self.context.cost = self.build(self.context.config), (0.0, 0.0)
        return check_training.speed

    def another_device_on_one_rank(self) -> Callable[..., Any]:
        """No test machine has unlike devices, so rank 1 says that it has a GPU."""
        if RANK == 1:
            torch.cuda.get_device_name = lambda _device: "Tesla T4"  # type: ignore[assignment]
            self.context.topology = replace(self.context.topology, device="cuda")
        return check_launch.devices

    def a_full_machine_at_the_second_rank(self) -> Callable[..., Any]:
        """Rank 1 stands for the first of another machine, with a model too large for it."""
        if RANK == 1:
            self.context.topology = replace(self.context.topology, local_rank=0)
            self.context.parameter_bytes = 2**50
        return check_launch.room

    def another_library_on_one_rank(self) -> Callable[..., Any]:
        if RANK == 1:
            other = Path(tempfile.mkdtemp()) / "tokenizers-0.1.2.dist-info"
            other.mkdir()
            (other / "METADATA").write_text("Metadata-Version: 2.1\nName: tokenizers\nVersion: 0.1.2\n", encoding="utf-8")
            sys.path.insert(0, str(other.parent))
            importlib.invalidate_caches()
        return check_launch.same_everywhere

    def other_rows_on_one_rank(self) -> Callable[..., Any]:
        """As if the second machine had an older copy of the files."""
        self.context.config = replace(self.context.config, max_train_samples=160 - 16 * RANK)
        return check_sources.texts

    def two_groups_of_one(self) -> Callable[..., Any]:
        """A launch file that says use_cpu and a script that does not: Accelerate sees one process on each rank."""
        from accelerate import PartialState

        PartialState._reset_state()
        PartialState(cpu=False)  # kept for the life of the process, whatever is asked for later
        return check_launch.world_size

    def fewer_than_asked(self) -> Callable[..., Any]:
        self.context.asked = 4
        return check_launch.world_size

    def an_exception_on_one_rank(self) -> Callable[..., Any]:
        """In mid-check, while the other rank waits for an answer."""

        def check(context: Context) -> list[Finding]:
            context.gather("first")
            if RANK == 1:
                raise OSError("the cable is loose")
            context.gather("second")
            context.gather("third")
            return []

        return check


def main(result: str, arguments: list[str]) -> None:
    config = parse(arguments)
    topology = find_topology(config)
    join(topology)
    checks = {name: check for name, check, _ in CHECKS}
    found: dict[str, list[Finding]] = {}
    with tempfile.TemporaryDirectory() as folder:
        base = Context(config, topology, Path(folder), asked=2, launch="two.yaml")
        for name in ("batch", "model", "dataset"):
            attempt(base, name, checks[name])
        well = replace(base)
        names = ("world size", "devices", "versions", "epoch's rows", "parameters", "longest batch", "gradient")
        found["nothing"] = [finding for name in names for finding in attempt(well, name, checks[name])]
        for fault in [name for name in vars(Faults) if not name.startswith("_")]:
            context = replace(base)
            found[fault] = attempt(context, fault, getattr(Faults(context), fault)())
    if RANK == 0:
        Path(result).write_text(json.dumps({fault: [asdict(f) for f in findings] for fault, findings in found.items()}), encoding="utf-8")
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
