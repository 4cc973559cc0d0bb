"""A rank's part: join the others, walk through the checks, and, as rank 0, tell what was found.

Started by the doctor's command through `accelerate launch`, with FOLDER, ASKED and LAUNCH before a run's arguments.
"""

from __future__ import annotations

import os
import sys
import time
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch.distributed as dist
import transformers

from pipeline import sharding
from pipeline.config import parse
from pipeline.doctor import check_launch, check_sources, check_training
from pipeline.doctor.frame import Context, Finding, attempt, verdict
from pipeline.errors import UserError, run_entry
from pipeline.topology import Topology, find_topology
from pipeline.watch import Watch

PATIENCE = 5  # times hang_seconds: a check can take longer than a step
RUN = ("batch", "model", "dataset")  # what it takes to build what the run would train; for a download ranks may rightly wait long

# Name, function, and the names of the checks it builds on.
CHECKS = [
    ("world size", check_launch.world_size, ()),
    ("devices", check_launch.devices, ()),
    ("versions", check_launch.same_everywhere, ()),
    ("batch", check_launch.batches, ()),
    ("Hub", check_sources.hub, ()),
    ("model", check_sources.model, ()),
    ("dataset", check_sources.texts, ()),
    ("epoch's rows", check_sources.coverage, RUN),
    ("parameters", check_training.parameters, RUN),
    ("room", check_launch.room, ("parameters",)),
    ("longest batch", check_training.longest_batch, ("parameters",)),
    ("speed", check_training.speed, ("longest batch",)),
    ("gradient", check_training.gradient, ("parameters",)),
]


def join(topology: Topology) -> None:
    """The process group of the launcher's environment; a process that talks to nobody becomes a group of one."""
    device_id = topology.torch_device if topology.device == "cuda" else None
    alone: dict[str, Any] = {} if "RANK" in os.environ else {"store": dist.HashStore(), "rank": 0, "world_size": 1}
    # Long, for rank 0 may have to download while the others wait; the watch sees who hangs.
    dist.init_process_group("nccl" if device_id else "gloo", timeout=timedelta(hours=1), device_id=device_id, **alone)


def main(argv: list[str]) -> int:
    folder, asked, launch, *arguments = argv
    config, began = parse(arguments), time.monotonic()
    transformers.logging.set_verbosity_error()  # the findings say it all
    # Asked, then taken out: Accelerate would shard what the checks want to see whole.
    sharded, refused = sharding.asked_for(), None
    os.environ.pop("ACCELERATE_USE_FSDP", None)
    try:
        topology = find_topology(config)
    except UserError as error:  # examine the nearest that this machine has
        refused = str(error)
        topology = find_topology(replace(config, precision="auto", device="cpu" if config.device == "cpu" else "auto"))
    join(topology)
    findings: list[Finding] = []
    with Watch(Path(folder), topology.rank, topology.world_size, PATIENCE * config.hang_seconds) as watch:
        context = Context(config, topology, Path(folder), int(asked), launch, refused, sharded, watch.tick)
        for name, check, needs in CHECKS:
            watch.beat(name, slow=name in RUN)
            findings += (found := attempt(context, name, check, needs))
            if topology.rank == 0:
                print(*found, sep="\n", flush=True)
        if topology.rank == 0:
            print(f"{verdict(findings)} {time.monotonic() - began:.0f} s.", flush=True)
        context.gather(None)  # the launcher ends all others when the first one has failed
    dist.destroy_process_group()
    return int(any(finding.level == "FAIL" for finding in findings))


if __name__ == "__main__":
    sys.exit(run_entry(main))
