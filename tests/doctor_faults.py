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
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from pipeline.config import parse
from pipeline.doctor import check_data, check_hub, check_launch, check_model, check_step
from pipeline.doctor.examine import join
from pipeline.doctor.findings import Finding
from pipeline.doctor.frame import Check, Context, Ranks, run_checks
from pipeline.topology import find_topology

RANK = int(os.environ["RANK"])


class Faults:
    """Each method plants one fault in a fresh context and returns the check that has to see it."""

    def __init__(self, context: Context) -> None:
        self.context, self.deal, self.build = context, context.sampler, context.build

    def a_row_on_both_ranks(self) -> Callable[..., Any]:
        """Rank 1 gets a row that is rank 0's."""

        def sampler(rank: int, world_size: int, accumulation: int) -> Any:
            dealt = self.deal(rank, world_size, accumulation)
            if rank == 1:
                theirs = next(iter(self.deal(0, world_size, accumulation)))
                dealt.deal = lambda batch, deal=dealt.deal: torch.cat([torch.tensor([[theirs[0]]]), deal(batch)[:, 1:]], dim=1)
            return dealt

        self.context.sampler = sampler  # type: ignore[method-assign]
        return check_data.coverage

    def rows_dealt_wrongly(self) -> Callable[..., Any]:
        """The classic: every rank learns from rank 0's rows."""
        self.context.sampler = lambda rank, *rest: self.deal(0, *rest)  # type: ignore[method-assign]
        return check_model.gradient

    def loss_times_world_size(self) -> Callable[..., Any]:
        """What stock Trainer does to models like DistilBERT when it is not told otherwise."""

        def build(config: Any) -> nn.Module:
            model = self.build(config)
            model.accepts_loss_kwargs = True  # type: ignore[assignment]
            return model

        self.context.build = build  # type: ignore[method-assign]
        return check_model.gradient

    def a_parameter_kept_out_of_the_all_reduce(self) -> Callable[..., Any]:
        def build(config: Any) -> nn.Module:
            model = self.build(config)
            DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, ["pre_classifier.weight"])
            return model

        self.context.build = build  # type: ignore[method-assign]
        return check_model.gradient

    def an_unused_parameter(self) -> Callable[..., Any]:
        def build(config: Any) -> nn.Module:
            model = self.build(config)
            model.forgotten = nn.Parameter(torch.zeros(3))
            return model

        self.context.build = build  # type: ignore[method-assign]
        return check_model.parameters

    def a_slow_rank(self) -> Callable[..., Any]:
        model: Any = self.build(self.context.config)
        model.register_forward_hook(lambda *_: time.sleep(0.2 * RANK))
        self.context.model = model
        return check_step.longest_batch

    def a_link_too_slow_for_the_model(self) -> Callable[..., Any]:
        """The link is what it is; the share of a step that it may take is set to next to nothing."""
        self.context.model = self.build(self.context.config)

        def check(context: Context) -> list[Finding]:
            allowed, check_step.MOST_COMMUNICATION = check_step.MOST_COMMUNICATION, 1e-4
            try:
                return check_step.speed(context)
            finally:
                check_step.MOST_COMMUNICATION = allowed

        return check

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
        import dataclasses

        self.context.config = dataclasses.replace(self.context.config, max_train_samples=160 - 16 * RANK)
        return check_data.texts

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
            context.ranks.gather("first")
            if RANK == 1:
                raise OSError("the cable is loose")
            context.ranks.gather("second")
            context.ranks.gather("third")
            return []

        return check


def main(result: str, arguments: list[str]) -> None:
    config = parse(arguments)
    topology = find_topology(config)
    join(topology)
    names = [name for name in vars(Faults) if not name.startswith("_")]
    found: dict[str, list[dict[str, Any]]] = {}
    with tempfile.TemporaryDirectory() as folder:
        base = Context(config, topology, Ranks(RANK, Path(folder)), asked=2, launch="two.yaml")
        list(run_checks(base, [Check("batch", check_launch.batches), Check("model", check_hub.model), Check("dataset", check_data.texts)]))
        for name in ["nothing", *names]:
            context = Context(
                config,
                topology,
                base.ranks,
                asked=2,
                launch="two.yaml",
                plan=base.plan,
                model_found=True,
                prepared=base.prepared,
                lengths=base.lengths,
            )
            if name == "nothing":
                checks = [check_launch.world_size, check_launch.same_everywhere, check_data.coverage, check_model.parameters]
                checks += [check_model.gradient, check_step.longest_batch]
            else:
                checks = [getattr(Faults(context), name)()]
            found[name] = [f.to_dict() for said in run_checks(context, [Check(name, check) for check in checks]) for f in said]
    if RANK == 0:
        Path(result).write_text(json.dumps(found), encoding="utf-8")
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
