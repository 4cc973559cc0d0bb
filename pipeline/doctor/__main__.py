"""Examine a launch before hours are spent on it: `make doctor`.

    python -m pipeline.doctor configs/ag_news.yaml
    python -m pipeline.doctor configs/ag_news.yaml --launch configs/accelerate/cpu2.yaml --epochs 1 --json doctor.json

Starts the launch file's processes as `accelerate launch` would for training, has them measure together what usually goes
wrong without a word, and prints one line for each: what, found, expected, and the next step where it is not well. Writes
nothing but caches. Exit code 0: all is well (warnings allowed); 1: something FAILED; 2: the command cannot be understood.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, NoReturn

import psutil
import yaml

from pipeline.checkpoint import write_json
from pipeline.config import parse
from pipeline.doctor.findings import DONE, WAITING, Finding, count, table
from pipeline.errors import UserError, run_entry
from pipeline.launch import build_command
from pipeline.quickstart import child

PROG = "python -m pipeline.doctor"
START_SECONDS = 120  # a cold disk takes long over the imports
RANK_FOLDER = "DISTRINEWS_DOCTOR"  # set: this process is one of the launched ranks, and that folder is for its notes
# pipeline.launch keeps the launchers' forty lines away and says by which signal a rank was ended. Imported before the
# change of folder, for the caller's folder need not be the project's.
START = "import os, sys; from pipeline.launch import launch; os.chdir(sys.argv[1]); sys.exit(launch(sys.argv[2:]))"


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}. Usage: {PROG} CONFIG.yaml [--launch configs/accelerate/X.yaml] [--json FILE] [--option value ...]")


def read_options(argv: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """The doctor's own options, and the rest, which is a run's."""
    parser = _Parser(prog=PROG, allow_abbrev=False, usage=f"{PROG} [CONFIG.yaml] [--launch FILE] [--json FILE] [--option value ...]",
                     description="All options of `python -m pipeline.train --help` are understood too, and:")  # fmt: skip
    parser.add_argument("--launch", type=Path, help="Launch file; none: cpu2.yaml without a GPU, else gpu1.yaml or gpu2.yaml.")
    parser.add_argument("--json", type=Path, help="Also write the findings to this file.")
    parser.add_argument("--timeout", type=float, default=600, help="Seconds without any progress after which ranks count as hung (600).")
    return parser.parse_known_args(argv)


def launch_command(launch: Path | None, arguments: list[str], device: str) -> tuple[list[str], Path, int]:
    """The bare `accelerate launch` command of the ranks, its launch file, and the number of processes that this asks for."""
    if launch is None:
        import torch

        command, _ = build_command("train-ddp", arguments, device, torch.cuda.device_count() if torch.cuda.is_available() else 0)
        command[command.index("pipeline.train")] = "pipeline.doctor"
        launch = Path(command[command.index("--config_file") + 1])
    else:
        command = ["accelerate", "launch", "--config_file", str(launch), "-m", "pipeline.doctor", *arguments]
    if not launch.is_file():
        there = ", ".join(sorted(str(path) for path in Path("configs/accelerate").glob("*.yaml")))
        raise UserError(f"No launch file {launch}. There are {there or 'none in configs/accelerate'}.")
    settings = yaml.safe_load(launch.read_text(encoding="utf-8"))
    if not isinstance(settings, dict):
        raise UserError(f"{launch} is no launch file: allowed is what `accelerate config` writes, as in configs/accelerate/.")
    own = command[: command.index("-m")]
    processes = own[own.index("--num_processes") + 1] if "--num_processes" in own else settings.get("num_processes", 1)
    return command, launch, int(processes)


def notes(folder: Path) -> list[dict[str, Any]]:
    """What each rank wrote last, by rank."""
    return sorted((json.loads(path.read_text(encoding="utf-8")) for path in folder.glob("rank-*.json")), key=lambda note: note["rank"])


def state_of(pid: int) -> str:
    """The system's word for what a process does: running, sleeping, stopped, disk-sleep, ..."""
    try:
        return str(psutil.Process(pid).status())
    except psutil.NoSuchProcess:
        return "gone"


def watch(command: list[str], folder: Path, timeout: float) -> str | None:
    """Run the ranks to their end; a word on each check as it begins. Returns what went wrong with them, or None."""
    before: list[dict[str, Any]] = []
    deadline, shown = time.monotonic() + max(timeout, START_SECONDS), 0
    environment = os.environ | {RANK_FOLDER: str(folder)}
    arguments = [sys.executable, "-c", START, str(Path.cwd()), *command]
    with (folder / "log").open("wb") as log, child(arguments, environment, stdout=log, stderr=subprocess.STDOUT) as process:
        while process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.1)
            if (now := notes(folder)) != before:
                deadline, before = time.monotonic() + timeout, now
                if now[0]["number"] > shown:
                    shown = now[0]["number"]
                    print(f"[{shown}/{now[0]['of']}] {now[0]['stage']}", file=sys.stderr, flush=True)
        hung = process.poll() is None
        working = [note for note in notes(folder) if note["doing"] != DONE]
        for note in working:
            if (state := state_of(note["pid"])) not in ("running", "sleeping"):
                note["doing"] = f"its process is {state}"
        if hung:  # a rank that has stopped would not hear the launcher's SIGTERM
            with contextlib.suppress(psutil.NoSuchProcess):
                for member in psutil.Process(process.pid).children(recursive=True):
                    member.kill()
    # The culprit is the one that does not wait; in a collective of the check itself all are at work.
    busy = [note for note in working if note["doing"] != WAITING] or working
    places = "; ".join(f"rank {note['rank']} in '{note['stage']}' ({note['doing']})" for note in working)
    if hung:
        stuck = ", ".join(f"rank {note['rank']}" for note in busy) or "the launcher"
        return (
            f"{stuck} {'has' if len(busy) < 2 else 'have'} not moved for {timeout:.0f} s. Last seen: {places or 'before any rank began'}."
        )
    if process.returncode:
        text = (folder / "log").read_text(encoding="utf-8", errors="replace")
        told = re.findall(r"^(?:error[^:]*: .*|\w*(?:Error|Exception)\b.*)$", text, flags=re.MULTILINE)
        return f"{told[-1].removeprefix('error: ') if told else f'exit code {process.returncode}'} Last seen: {places or 'before any rank began'}."
    return None


def main(argv: list[str]) -> int:
    options, arguments = read_options(argv)
    config = parse(arguments, PROG)
    command, launch, asked = launch_command(options.launch, arguments, config.device)
    began = time.monotonic()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # unwinds, so that no rank is left running
    with tempfile.TemporaryDirectory(prefix="doctor-") as name:
        folder = Path(name)
        write_json(folder / "task.json", {"asked": asked, "launch": str(launch)})
        trouble = watch(command, folder, options.timeout)
        report = folder / "report.json"
        said = json.loads(report.read_text(encoding="utf-8"))["findings"] if report.exists() else []
        if "--debug" in sys.argv or (trouble and not said):
            sys.stderr.write((folder / "log").read_text(encoding="utf-8", errors="replace"))
    findings = [Finding(**finding) for finding in said]
    if not said and not trouble:
        print("The ranks of this machine came to the end; the report is where rank 0 runs.")
        return 0
    if trouble:
        advice = "Look at that rank's check; memory running out is the usual cause. --debug shows all that the ranks said."
        findings.append(Finding("ranks", trouble, "every rank comes to the end", "FAIL", advice))
    seconds = time.monotonic() - began
    print(
        f"{launch}, {asked} process{'es' * (asked > 1)}, {config.model}, {config.dataset}; {seconds:.0f} s\n{table(findings)}", flush=True
    )
    if options.json:
        summary = {"launch": str(launch), "asked": asked, "seconds": seconds, "config": config.to_dict()}
        options.json.parent.mkdir(parents=True, exist_ok=True)
        write_json(options.json, summary | {"failed": count(findings, "FAIL"), "findings": [finding.to_dict() for finding in findings]})
    return 1 if count(findings, "FAIL") else 0


def rank(argv: list[str]) -> None:
    from pipeline.doctor.examine import examine

    examine(parse(argv, PROG), Path(os.environ[RANK_FOLDER]))


if __name__ == "__main__":
    sys.exit(run_entry(rank if RANK_FOLDER in os.environ else main))
