"""A rank's part: join the others, walk through the checks, and, as rank 0, write down what was found."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch.distributed as dist

from pipeline.checkpoint import write_json
from pipeline.config import TrainConfig
from pipeline.doctor import check_data, check_hub, check_launch, check_machine, check_model, check_step
from pipeline.doctor.findings import DONE, Finding
from pipeline.doctor.frame import Check, Context, Ranks, run_checks
from pipeline.errors import UserError
from pipeline.topology import Topology, find_topology

REPORT = "report.json"

CHECKS = [
    Check("world size", check_launch.world_size),
    Check("devices", check_launch.devices),
    Check("versions", check_launch.same_everywhere),
    Check("batch", check_launch.batches),
    Check("Hub", check_hub.reachable),
    Check("right to write", check_hub.write_access),
    Check("model", check_hub.model),
    Check("dataset", check_data.texts),
    Check("epoch's rows", check_data.coverage, ("prepared",)),
    Check("parameters", check_model.parameters, ("prepared",)),
    Check("room", check_machine.room, ("model",)),
    Check("precision", check_model.precision, ("model",)),
    Check("gradient", check_model.gradient, ("model",)),
    Check("longest batch", check_step.longest_batch, ("model",)),
    Check("speed", check_step.speed, ("model",)),
]


def nearest_topology(config: TrainConfig) -> tuple[Topology, str | None]:
    """The configured topology, or the nearest that this machine has, and why it is not the configured one."""
    refused = None
    for candidate in (config, replace(config, precision="auto"), replace(config, precision="auto", device="cpu")):
        try:
            return find_topology(candidate), refused
        except UserError as error:
            refused = refused or str(error)
    raise UserError(refused or "no device")


def join(topology: Topology) -> None:
    """The process group of the launcher's environment; a process that talks to nobody becomes a group of one."""
    device_id = topology.torch_device if topology.device == "cuda" else None
    alone: dict[str, Any] = {} if "RANK" in os.environ else {"store": dist.HashStore(), "rank": 0, "world_size": 1}
    # Long, for rank 0 may have to download; the parent process has the clock that counts.
    dist.init_process_group("nccl" if device_id else "gloo", timeout=timedelta(hours=1), device_id=device_id, **alone)


def examine(config: TrainConfig, folder: Path) -> None:
    """Called on every rank. `folder` has task.json of the parent, and gets the ranks' notes and the report."""
    ranks = Ranks(int(os.environ.get("RANK", "0")), folder)
    ranks.note("joining the others")
    topology, refused = nearest_topology(config)
    join(topology)
    task = json.loads((folder / "task.json").read_text(encoding="utf-8"))
    context = Context(config, topology, ranks, asked=task["asked"], launch=task["launch"], refused=refused)
    findings: list[Finding] = []
    for found in run_checks(context, CHECKS):
        findings += found
        if topology.rank == 0:
            write_json(folder / REPORT, {"findings": [finding.to_dict() for finding in findings]})
    ranks.note(DONE)
    dist.destroy_process_group()
