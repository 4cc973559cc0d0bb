"""Kill a training run with SIGKILL, again and again, and show that it ends as if nothing had happened: `make crash-test`.

    python -m benchmarks.crash_test                         # 26 kills, both entries, the real encoder
    python -m benchmarks.crash_test --kills 4 --entries raw

A run of two processes (CPU, fp32, dropout on) is killed, launcher and every worker at once, at random moments of four kinds:
while it starts, while it trains, inside the writing of a checkpoint, and after its last step. Then the same command is
started again, and killed again, until its share of kills is used up and it may end. Its weights, its optimizer and its logged
history must be those of a run that was never killed, bit for bit. Written to benchmarks/results/crash_test.json.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil
from tqdm.auto import tqdm

from benchmarks.common import ROOT, Launch, provenance, provenance_lines, run_all, write_results
from pipeline.assets import fetch
from pipeline.checkpoint import MANIFEST, candidates, step_of, whole
from pipeline.errors import UserError, run_entry
from pipeline.quickstart import FAMILY, family

MOMENTS = ("train", "write", "train", "write", "start", "train", "write", "train", "write", "end", "train", "write", "train")
KILLS = 2 * len(MOMENTS)
PATIENCE_SECONDS = 300
PAGE = ROOT / "benchmarks" / "crash_test.md"


@dataclass(frozen=True)
class Kill:
    """What a kill met: the kind of moment, seconds since the launch, and what lay in the run's folder right after it."""

    moment: str
    seconds: float
    newest_whole: int | None  # step of the newest whole checkpoint
    half_written: int | None  # step of the checkpoint that was being written


class Victim:
    """One launch of the run, all of whose processes can be killed at once."""

    def __init__(self, launch: Launch, environment: dict[str, str]) -> None:
        self.folder, self.name, self.began = launch.folder, f"crash-test-{uuid.uuid4().hex}", time.monotonic()
        self.known = [p.name for p in candidates(self.folder)]
        self.log = launch.log
        with self.log.open("w", encoding="utf-8") as log:
            self.process = subprocess.Popen(
                launch.command, cwd=ROOT, env=os.environ | environment | {FAMILY: self.name}, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
            )  # fmt: skip

    @property
    def ended(self) -> bool:
        return self.process.poll() is not None

    def wait_for(self, what: Callable[[], bool]) -> bool:
        """Look every two milliseconds; False when the run has ended before it came."""
        while not what():
            if self.ended:
                return what()
            if time.monotonic() - self.began > PATIENCE_SECONDS:
                self.kill()
                raise UserError(f"The run did not come to where it was to be killed within {PATIENCE_SECONDS} s. Its log: {self.log}")
            time.sleep(0.002)
        return True

    def trains(self) -> bool:
        """Steps are being made: the progress bar is there."""
        return "step/s" in self.log.read_text(encoding="utf-8", errors="replace")

    def writing(self) -> int | None:
        """The step of the checkpoint that this launch is writing now."""
        for folder in reversed(candidates(self.folder)):
            if not (folder / MANIFEST).exists() and folder.name not in self.known:
                return step_of(folder)
        return None

    def kill(self) -> None:
        """SIGKILL to the launcher, then to every worker's process group (workers lead sessions of their own)."""
        members = psutil.Process(self.process.pid).children(recursive=True) if not self.ended else []
        for process in [self.process, *members]:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(os.getpgid(process.pid), signal.SIGKILL)
        self.process.wait()
        psutil.wait_procs(members, timeout=10)
        if survivors := family(self.name):
            raise RuntimeError(f"{survivors} outlived the kill")


def kill_once(launch: Launch, environment: dict[str, str], moment: str, draw: random.Random, span: float) -> Kill | None:
    """Start the run, kill it at a random moment of that kind; None when it had ended before. `span`: its training seconds."""
    victim = Victim(launch, environment)
    try:
        if moment == "start":
            alive = victim.wait_for(lambda: time.monotonic() - victim.began > 8) if draw.random() < 0.5 else True
            time.sleep(draw.uniform(0, 3))
        elif moment == "train":
            alive = victim.wait_for(victim.trains)
            time.sleep(draw.uniform(0, span / 3))
        elif moment == "write":
            alive = victim.wait_for(lambda: victim.writing() is not None)
            time.sleep(draw.choice((0.0, 0.02, 0.1, 0.3)) * draw.random())
        else:
            alive = victim.wait_for(lambda: "Scoring the best checkpoint" in victim.log.read_text(encoding="utf-8", errors="replace"))
            time.sleep(draw.uniform(0, 1))
        if not alive or victim.ended:
            return None
        return _killed(victim, moment)
    finally:
        if not victim.ended:
            victim.kill()


def _killed(victim: Victim, moment: str) -> Kill:
    seconds = time.monotonic() - victim.began
    victim.kill()
    steps = [step_of(p) for p in whole(victim.folder)]
    return Kill(moment, round(seconds, 2), max(steps, default=None), victim.writing())


def ending(folder: Path) -> dict[str, Any]:
    """What a run came to: every logged figure, and the bytes of its last checkpoint."""
    record = json.loads((folder / "run.json").read_text(encoding="utf-8"))
    manifest = json.loads((whole(folder)[-1] / MANIFEST).read_text(encoding="utf-8"))
    judged = [{name: value for name, value in entry.items() if name not in ("seconds", "samples_per_second")} for entry in record["epochs"]]
    files = {name: facts["sha256"] for name, facts in manifest["files"].items() if name.endswith(".safetensors")}
    return {
        "steps": record["steps"],
        "history": record["history"],
        "validations": judged,
        "test": record["test"],
        "best": record["best"],
        "files": files,
    }


def crash(
    entry: str, moments: Sequence[str], options: Sequence[str], work: Path, environment: dict[str, str], draw: random.Random, bar: Any
) -> dict[str, Any]:
    """Kill runs of one entry at these moments; every run that ends is compared with one that nothing happened to."""
    reference = Launch(entry, 2, work / f"{entry}-never-killed", tuple(options))
    _, record, _ = next(iter(run_all([reference], environment)))
    expected, span = ending(reference.folder), record["train_seconds"]
    bar.update()
    runs: list[dict[str, Any]] = []
    left = list(moments)
    while left:
        launch = Launch(entry, 2, work / f"{entry}-{len(runs) + 1}", tuple(options))
        kills: list[Kill] = []
        while left:
            bar.set_description(f"{entry}: a kill in '{left[0]}'")
            kill = kill_once(launch, environment, left[0], draw, span)
            if kill is None:
                break  # it came to its end first: the next run takes the kill
            kills.append(kill)
            left.pop(0)
            bar.update()
        if not (launch.folder / "run.json").exists() or kills:
            bar.set_description(f"{entry}: going on to the end")
            next(iter(run_all([launch], environment)))
        found = ending(launch.folder)
        different = [name for name in expected if found[name] != expected[name]]
        runs.append({"kills": [asdict(kill) for kill in kills], "equal": not different, "different": different})
        if not different:
            shutil.rmtree(launch.folder)
    return {"entry": entry, "steps": expected["steps"], "runs": runs}


def settings(work: Path, model: Path, dataset: Path, rows: int) -> list[str]:
    """A short run with many checkpoints: two epochs, one every nine steps, so that they fall between logs and validations too."""
    config = work / "run.yaml"
    config.write_text(
        f"model: {model}\ndataset: {dataset}\nmax_length: 32\nmax_train_samples: {rows}\nvalidation_share: 0.02\nepochs: 2\n"
        "global_batch_size: 16\nlearning_rate: 1.0e-4\nprecision: fp32\ncpu_threads: 1\ncheckpoint_steps: 9\nlogging_steps: 4\nonnx: false\n",
        encoding="utf-8",
    )
    return [str(config)]


def run(entries: Sequence[str], kills: int, options: Sequence[str], work: Path, environment: dict[str, str], seed: int) -> dict[str, Any]:
    """`kills` kills, spread over the entries; returns the results (`passed`: every run that was killed equals its reference)."""
    draw = random.Random(seed)
    share = [kills // len(entries) + (i < kills % len(entries)) for i in range(len(entries))]
    results = []
    with tqdm(total=kills + len(entries), unit="launch", dynamic_ncols=True) as bar:
        for entry, count in zip(entries, share, strict=True):
            moments = [MOMENTS[i % len(MOMENTS)] for i in range(count)]
            results.append(crash(entry, moments, options, work, environment, draw, bar))
    done = [kill for result in results for one in result["runs"] for kill in one["kills"]]
    passed = sum(len(one["kills"]) for result in results for one in result["runs"] if one["equal"])
    return {
        "seed": seed,
        "kills": len(done),
        "without_consequence": passed,
        "inside_a_write": sum(kill["half_written"] is not None for kill in done),
        "passed": len(done) == kills and passed == kills,
        "entries": results,
    }


TITLES = {
    "start": "while it starts",
    "train": "while it trains",
    "write": "when a checkpoint folder has appeared",
    "end": "after the last step, while it scores and writes the release",
}


def page(results: dict[str, Any]) -> str:
    """The page of a result, in Markdown."""
    lines = [
        "# Killed and started again",
        "",
        f"{provenance_lines(results)} all-MiniLM-L6-v2 on Reuters R8, two processes, fp32, dropout on, a checkpoint every 9 steps.",
        "",
        f"**{results['without_consequence']} of {results['kills']} kills left no trace**: after SIGKILL to the launcher and to every worker's process "
        "group, the same command ended with the weights, the optimizer's state, every logged loss and gradient norm, every validation and the test "
        f"figures of a run that was never killed, bit for bit. {results['inside_a_write']} kills fell inside the writing of a checkpoint (right after, a "
        "folder without a manifest lay there).",
        "",
        "| entry | run | killed | seconds after its launch | whole checkpoint it went on from | half-written one left | ends equal |",
        "|---|---|---|---|---|---|---|",
    ]
    for result in results["entries"]:
        for number, one in enumerate(result["runs"], 1):
            for kill in one["kills"]:
                newest, half = (kill[name] if kill[name] is not None else "none" for name in ("newest_whole", "half_written"))
                equal = "yes" if one["equal"] else "no: " + ", ".join(one["different"])
                lines.append(
                    f"| {result['entry']} | {number} | {TITLES[kill['moment']]} | {kill['seconds']} | {newest} | {half} | {equal} |"
                )
    return "\n".join(lines) + "\n"


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.crash_test", description=__doc__.split("\n\n")[0], allow_abbrev=False)
    parser.add_argument("--kills", type=int, default=KILLS, help=f"How many in all ({KILLS}).")
    parser.add_argument("--entries", nargs="+", choices=("raw", "trainer"), default=["raw", "trainer"], help="Which entries (both).")
    parser.add_argument("--seed", type=int, default=0, help="Of the moments (0).")
    arguments = parser.parse_args(argv)
    if arguments.kills < len(arguments.entries):
        raise UserError(f"--kills is {arguments.kills}: allowed is at least {len(arguments.entries)}, one for each entry.")
    provenance()
    assets = fetch()
    with tempfile.TemporaryDirectory(prefix="crash-test-") as folder:
        work = Path(folder)
        environment = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "PYTHONUNBUFFERED": "1"}
        results = run(arguments.entries, arguments.kills, settings(work, assets.encoder, assets.r8, 800), work, environment, arguments.seed)
    path = write_results("crash_test", results)
    PAGE.write_text(page(json.loads(path.read_text(encoding="utf-8"))), encoding="utf-8")
    print(
        f"{results['without_consequence']} of {results['kills']} kills left no trace; {results['inside_a_write']} of them fell inside the writing "
        f"of a checkpoint. {path.relative_to(ROOT)}"
    )
    for result in results["entries"]:
        for number, one in enumerate(result["runs"], 1):
            if not one["equal"]:
                print(f"  {result['entry']}, run {number}: {', '.join(one['different'])} differ", file=sys.stderr)
    return 0 if results["passed"] else 1


if __name__ == "__main__":
    sys.exit(run_entry(main))
