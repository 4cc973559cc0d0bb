"""Launches of the measuring worker, kept ready side by side and asked in turns: the figures behind `benchmarks.explain`.

Turns are short, some seconds, and go round: a machine that grows slow for a minute is slow for every launch and every
way of stepping alike. Whoever has no turn sleeps. All turns walk the same first batches of an epoch.
"""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

from torch.distributed import TCPStore
from tqdm.auto import tqdm

from benchmarks.common import ROOT, end, interleave, last_words
from pipeline.errors import UserError
from pipeline.topology import allowed_cores

ANSWER_SECONDS = 300
# What may help: changed options, and how many steps share one all-reduce.
REMEDIES: dict[str, dict[str, Any]] = {
    "larger buckets": {"bucket_mb": 100},
    "smaller buckets": {"bucket_mb": 5},
    "fp16 hook": {"comm_hook": "fp16"},
    "accumulation": {"accumulation": 2},
    "static graph": {"static_graph": True},
}
LINK_BYTES = [2**12, 2**16, 2**18, 2**20, 2**22, 2**24, 2**26]
LINK_REPEATS = 7
WARM_TURNS = 2  # of each launch, not counted: what a first time costs, kernels for new shapes and memory; as many with stamps in odd steps as in even


class Launch:
    """A torchrun of the worker that waits for tasks."""

    def __init__(self, store: TCPStore, name: str, processes: int, threads: int, options: Sequence[str], folder: Path, module: str) -> None:
        self.store, self.name, self.log, self._turn = store, name, folder / f"{name}.log", 0
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
        # The launcher would look after its workers ten times a second.
        command += ["--monitor_interval", "2", "-m", module, str(store.port), name, *options]
        command += ["--cpu_threads", str(threads), "--output_dir", str(folder / name)]
        environment = os.environ | {"OMP_NUM_THREADS": str(threads), "TOKENIZERS_PARALLELISM": "false"}
        with self.log.open("w", encoding="utf-8") as log:
            self.process = subprocess.Popen(
                command, cwd=ROOT, env=environment, text=True, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
            )

    def ask(self, method: str, **task: Any) -> list[Any]:
        """The answers of all ranks. Raises UserError when the launch has ended, or takes too long."""
        key, deadline = f"{self.name}/{self._turn}", time.monotonic() + ANSWER_SECONDS
        self._turn += 1
        self.store.set(key, json.dumps({"method": method, **task}))
        while not self.store.check([f"{key}/done"]):
            if self.process.poll() is not None:
                raise UserError(f"the measuring launch {self.name} ended: {last_words(self.log)} Mend that and run the same command again.")
            if time.monotonic() > deadline:
                raise UserError(f"the measuring launch {self.name} did not answer for {ANSWER_SECONDS} s. Take fewer --steps.")
            time.sleep(0.02)
        return json.loads(self.store.get(f"{key}/done"))

    def dismiss(self) -> None:
        """Let it end after the turn it is at. Idle ranks wait inside a collective, where a signal would not reach them."""
        self.store.set(f"{self.name}/{self._turn}", "null")

    def close(self) -> None:
        try:
            self.process.wait(20)
        except subprocess.TimeoutExpired:
            end(self.process)


@contextmanager
def launched(
    shapes: dict[str, tuple[int, int]], options: Sequence[str], folder: Path, module: str = "benchmarks.explain.worker"
) -> Iterator[dict[str, Launch]]:
    """Launches by name, of `(processes, threads each)`; each says `about` itself once it is ready. None is left at the end."""
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=ANSWER_SECONDS))
    launches: dict[str, Launch] = {}
    try:
        for name, (processes, threads) in shapes.items():
            launches[name] = Launch(store, name, processes, threads, options, folder, module)
        yield launches
    finally:
        for launch in launches.values():
            launch.dismiss()
        for launch in launches.values():
            launch.close()


def shapes(processes: int, device: str) -> dict[str, tuple[int, int]]:
    """One process with a rank's threads (its device), that many of them, and on the CPU one process with all cores."""
    threads = max(1, allowed_cores() // processes)
    every = {"one": (1, threads), "many": (processes, threads)}
    return every | ({"all cores": (1, threads * processes)} if device == "cpu" else {})


def measure(options: Sequence[str], processes: int, device: str, rounds: int, steps: int, folder: Path) -> dict[str, Any]:
    """Raw figures: `about` by launch, and by `launch/way` the rounds, each a list over ranks of a list over steps.

    Ways: `entry`, `alone`, `together` and each remedy (seconds by part), `link float32` and `link float16` (seconds by size), and
    `passes` (seconds by name).
    Beside them `buckets`, the bytes of each all-reduce by size of bucket, and a `timeline`.
    """
    formed = shapes(processes, device)
    plan: list[tuple[str, str, dict[str, Any]]] = [(name, "entry", {"method": "entry", "steps": steps}) for name in formed]
    plan += [("many", way, {"method": "own", "steps": steps, "together": way == "together"}) for way in ("alone", "together")]
    plan += [("many", name, {"method": "entry", "steps": steps, **changes}) for name, changes in REMEDIES.items()]
    for dtype in ("float32", "float16"):
        plan += [("many", f"link {dtype}", {"method": "link", "sizes": LINK_BYTES, "repeats": LINK_REPEATS, "dtype": dtype})]
    plan += [("many", "passes", {"method": "passes", "repeats": LINK_REPEATS})]
    with launched(formed, options, folder) as launches, tqdm(total=rounds * len(plan), unit="turn", desc="explain") as bar:
        about = {name: launch.ask("about")[0] for name, launch in launches.items()}
        many = launches["many"]
        buckets = {
            str(size): [span[3] for span in many.ask("timeline", steps=1, bucket_mb=size)[0][0] if span[0] == "all-reduce"]
            for size in sorted({25, *(changes["bucket_mb"] for changes in REMEDIES.values() if "bucket_mb" in changes)})
        }
        for launch in launches.values():
            for _ in range(WARM_TURNS):
                launch.ask("entry", steps=steps)
        turns = {f"{name}/{way}": partial(launches[name].ask, **task) for name, way, task in plan}
        raw = interleave(turns, rounds, order=random.Random(0), bar=bar)
        # A GPU's all-reduce runs in a stream of its own, where the host's clock does not see it.
        timeline = many.ask("timeline", steps=steps) if device == "cpu" else None
    return {"about": about, "turns": raw, "buckets": buckets, "timeline": timeline}
