"""What the programs that measure share: launching the entries, figures taken in turns, and results with provenance."""

from __future__ import annotations

import functools
import hashlib
import json
import math
import os
import random
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypeVar

import psutil
from tqdm.auto import tqdm

from pipeline.checkpoint import write_json
from pipeline.errors import UserError
from pipeline.record import surroundings
from pipeline.topology import allowed_cores

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
T = TypeVar("T")
GRACE_SECONDS = 40  # the launcher itself gives its workers 30 s

# What a user types for each entry and number of processes; `pipeline.launch` takes the launch files of the device.
COMMANDS = {
    ("trainer", 1): ("pipeline.launch", "train"),
    ("trainer", 2): ("pipeline.launch", "train-ddp"),
    ("raw", 1): ("pipeline.train_ddp",),
    ("raw", 2): ("pipeline.launch", "train-raw-ddp"),
}


@dataclass(frozen=True)
class Launch:
    """One run to be launched: `entry` is trainer or raw; the folder is its --output_dir, beside which its log is kept.

    On `cuda`, `pipeline.launch` takes as many GPUs as it sees: show it two (CUDA_VISIBLE_DEVICES) for two processes.
    """

    entry: str
    processes: int
    folder: Path
    arguments: tuple[str, ...]
    device: str = "cpu"

    @property
    def command(self) -> list[str]:
        module, *kind = COMMANDS[self.entry, self.processes]
        return [sys.executable, "-m", module, *kind, *self.arguments, "--device", self.device, "--output_dir", str(self.folder)]

    @property
    def log(self) -> Path:
        return self.folder.with_name(self.folder.name + ".log")


def run_all(
    launches: Sequence[Launch], environment: dict[str, str], slots: int = 0, timeout: float = 900
) -> Iterator[tuple[Launch, dict[str, Any], float]]:
    """Run them, at most `slots` processes at a time (0: as many as there are cores), and yield each as it ends.

    Returns, a run: its launch, its run.json, its seconds from start to end. `environment` is added to this process's own.
    Runs whose speed is measured go alone (`slots=1`, `interleave`). Raises UserError for a run that fails or takes longer
    than `timeout` seconds. Nothing of the runs is left when this ends.
    """
    slots = slots or allowed_cores()
    waiting, running = list(launches), dict[Launch, tuple["subprocess.Popen[str]", Any, float]]()
    try:
        while waiting or running:
            busy = sum(launch.processes for launch in running)
            if waiting and (not running or busy + waiting[0].processes <= slots):
                launch = waiting.pop(0)
                launch.folder.parent.mkdir(parents=True, exist_ok=True)
                log = launch.log.open("w", encoding="utf-8")
                # A session of its own: the terminal's Ctrl-C comes to us alone, and we end the run in order.
                process = subprocess.Popen(
                    launch.command, cwd=ROOT, env=os.environ | environment, text=True, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
                )  # fmt: skip
                running[launch] = (process, log, time.monotonic())
                continue
            time.sleep(0.05)
            for launch, (process, log, start) in list(running.items()):
                if process.poll() is None and time.monotonic() - start > timeout:
                    raise UserError(f"{launch.folder.name} took longer than {timeout:.0f} s. Its log: {launch.log}")
                if process.poll() is not None:
                    log.close()
                    del running[launch]
                    if process.returncode:
                        raise UserError(
                            f"{launch.folder.name} failed with code {process.returncode}: {last_words(launch.log)} Its log: {launch.log}"
                        )
                    yield launch, json.loads((launch.folder / "run.json").read_text(encoding="utf-8")), time.monotonic() - start
    finally:
        for process, log, _ in running.values():
            end(process)
            log.close()


def last_words(log: Path) -> str:
    """A failed run's own error line, else the last line it wrote."""
    lines = [line for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    return next((line for line in lines if line.startswith("error")), lines[-1] if lines else "it wrote nothing.")


def end(process: subprocess.Popen[str]) -> None:
    """End a launcher and its workers: one SIGTERM, which it hands on, and what is left after a while is killed."""
    members = psutil.Process(process.pid).children(recursive=True) if process.poll() is None else []
    process.terminate()
    try:
        process.wait(GRACE_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    kill(psutil.wait_procs(members, timeout=1)[1])


def kill(processes: Iterable[psutil.Process]) -> None:
    """SIGKILL to each that is still there. psutil compares start times: never to another's process with the same id."""
    for process in processes:
        with suppress(psutil.NoSuchProcess):
            process.kill()


def interleave(
    variants: Mapping[str, Callable[[], T]], rounds: int, minutes: float = math.inf, order: random.Random | None = None,
    bar: tqdm[Any] | None = None,
) -> dict[str, list[T]]:  # fmt: skip
    """Measure every variant once per round, each round beginning with another one; returns figures by variant, `(rounds,)`.

    Taken in turns, so that a machine that grows slow in between is slow for all of them. With an `order`, each round has one
    of its own: what slows the machine down for half a minute meets other variants each time. After the first, a round is
    begun only if one as long as the longest so far ends within `minutes` of the start. `bar` is moved on, and told the name.
    """
    figures: dict[str, list[T]] = {name: [] for name in variants}
    names, start, longest = list(variants), time.monotonic(), 0.0
    for i in range(rounds):
        began = time.monotonic()
        if i and began - start + longest > 60 * minutes:
            break
        for name in order.sample(names, len(names)) if order else names[i % len(names) :] + names[: i % len(names)]:
            if bar is not None:
                bar.set_description(name)
            figures[name].append(variants[name]())
            if bar is not None:
                bar.update()
        longest = max(longest, time.monotonic() - began)
    return figures


def ratio(figures: Sequence[float], base: Sequence[float]) -> dict[str, float]:
    """One variant over another, round by round (what a round has in common cancels): `median`, `lowest` and `highest`."""
    rounds = [a / b for a, b in zip(figures, base, strict=True)]
    return {"median": statistics.median(rounds), "lowest": min(rounds), "highest": max(rounds)}


@functools.cache
def provenance() -> dict[str, Any]:
    """When, where and with what code. Called before anything is measured: files may be edited while it is."""
    return {"date": datetime.now(UTC).isoformat(timespec="seconds"), "provenance": surroundings()}


def named(kind: str, label: str) -> str:
    """`kind`, or `kind-label` for another machine's results. Raises UserError for a label that is no part of a file's name."""
    if not re.fullmatch(r"[a-z0-9]*", label):
        raise UserError(f"--label is '{label}': allowed are small letters and digits, for example t4x2.")
    return f"{kind}-{label}" if label else kind


def write_results(name: str, results: Mapping[str, Any], folder: Path | None = None) -> Path:
    """Write <name>.json with its provenance, to results/ or another folder."""
    folder = folder or RESULTS
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.json"
    write_json(path, {"format": 1, **provenance(), **results})
    return path


def machine(results: Mapping[str, Any]) -> str:
    """The hardware in a few words: GPUs where there are any, else the cores and their CPU."""
    where = results["provenance"]["hardware"]
    gpus = f"{len(where['gpus'])}x {where['gpus'][0]}" if where["gpus"] else ""
    return gpus or f"{where['cores']} cores of {where['cpu']}".replace("(R)", "").replace("  ", " ")


def caption(figure: Any, results: Mapping[str, Any]) -> None:
    """In a picture's upper corner, what a reader who meets it alone has to know: hardware, date and command."""
    words = f"{machine(results)}, {results['date'][:10]}: {results['provenance']['command']}"
    height = 0.2 / figure.get_figheight()  # inches
    figure.get_layout_engine().set(rect=(0, 0, 1, 1 - height))
    figure.text(0.99, 1 - 0.3 * height, words, fontsize=7, color="#7b8794", ha="right", va="top")


def digest(results: Mapping[str, Any]) -> str:
    """Names results, whatever the order of their keys."""
    return hashlib.sha256(json.dumps(results, sort_keys=True).encode()).hexdigest()


def save(figure: Any, path: Path, results: Mapping[str, Any], **style: Any) -> None:
    """Write a picture with the digest of the results it was drawn from, by which a test finds a stale one, and no time of making."""
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Software": None, "Description": digest(results)}, **style)


def provenance_lines(results: Mapping[str, Any]) -> str:
    """Two lines for a page: what measured, when, on what, with which versions."""
    where, versions = results["provenance"]["hardware"], results["provenance"]["versions"]
    commit, dirty = results["provenance"]["code"]["commit"], results["provenance"]["code"]["dirty"]
    code = f"code {commit[:12]}{' with uncommitted changes' if dirty else ''}" if commit else "code outside a git checkout"
    gpus = ", ".join(where["gpus"]) or "no GPU"
    return (
        f"Measured on {results['date'][:10]} by `{results['provenance']['command']}` on {where['cores']} cores of {where['cpu']}, {gpus}; "
        f"torch {versions['torch']}, transformers {versions['transformers']}, accelerate {versions['accelerate']}, Python {versions['python']}; {code}."
    )
