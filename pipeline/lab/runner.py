"""Two processes that run experiments, each side in a process group of its own, and what comes back from them."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from pipeline.checkpoint import write_json
from pipeline.lab import averaging, data, evaluation, gradients, waiting
from pipeline.lab.frame import SIDES, Experiment
from pipeline.lab.world import World, prepare

EXPERIMENTS: dict[str, Experiment] = {
    kind.name: kind()
    for kind in (*data.EXPERIMENTS, *gradients.EXPERIMENTS, *averaging.EXPERIMENTS, *evaluation.EXPERIMENTS, *waiting.EXPERIMENTS)
}
WORLD_SIZE = 2
EXPERIMENT_SECONDS = 180.0  # allowed, the start included; on two free cores each takes some seconds


def run(names: Sequence[str], folder: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Run experiments one after the other on two gloo ranks, and yield each name and result as it is done.

    A result has `broken` and `cured`, each with `figures`, `seconds` and `ranks` (what each rank returned, rank 0 first).
    `folder`, empty, is scratch space. Raises RuntimeError where a rank fails or the ranks do not come to their end in time;
    no process is left then.
    """
    prepare(folder)
    context = mp.start_processes(work, (list(names), folder), nprocs=WORLD_SIZE, join=False, start_method="spawn")
    assert context is not None
    try:
        for name in names:
            deadline, last = time.monotonic() + EXPERIMENT_SECONDS, [part(folder, name, SIDES[-1], rank) for rank in range(WORLD_SIZE)]
            while not all(path.exists() for path in last):
                context.join(timeout=0.1)  # raises where a rank has failed, with its traceback
                if time.monotonic() > deadline:
                    raise RuntimeError(f"experiment {name} has not ended after {EXPERIMENT_SECONDS:.0f} s")
            yield name, collect(EXPERIMENTS[name], folder)
    finally:
        for process in context.processes:
            process.kill()
            process.join()


def part(folder: Path, name: str, side: str, rank: int) -> Path:
    return folder / f"{name}-{side}-{rank}.json"


def collect(experiment: Experiment, folder: Path) -> dict[str, Any]:
    result = {}
    for side in SIDES:
        parts = [json.loads(part(folder, experiment.name, side, rank).read_text(encoding="utf-8")) for rank in range(WORLD_SIZE)]
        ranks = [its["result"] for its in parts]
        result[side] = {"figures": experiment.figures(ranks), "seconds": max(its["seconds"] for its in parts), "ranks": ranks}
    return result


def work(rank: int, names: list[str], folder: Path) -> None:
    """One rank's life: every experiment, first broken, then cured."""
    torch.set_num_threads(1)
    # Accelerate, which Trainer uses, reads its place here, and wants an address even of a process group that is there.
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": WORLD_SIZE, "LOCAL_WORLD_SIZE": WORLD_SIZE}
    os.environ |= {name: str(value) for name, value in place.items()} | {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": "0",
        "OMP_NUM_THREADS": "1",
    }
    world = World(rank, WORLD_SIZE, folder)
    for name in names:
        for side in SIDES:
            meeting, patience = f"file://{folder}/{name}-{side}.meeting", timedelta(seconds=EXPERIMENTS[name].timeout)
            dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=WORLD_SIZE, timeout=patience)
            torch.manual_seed(0)
            began = time.perf_counter()
            result = EXPERIMENTS[name].rank(world, broken=side == "broken")
            dist.destroy_process_group()
            write_json(part(folder, name, side, rank), {"result": result, "seconds": time.perf_counter() - began})
