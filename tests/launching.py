"""Launch real runs as a user does, and make sure that nothing of them outlives the test."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil

ROOT = Path(__file__).resolve().parent.parent


def environment(**extra: str) -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "0", "PYTHONUNBUFFERED": "1", **extra}


# Real texts, a tiny model, and no more than it takes to see something learnt.
SHORT_RUN = """
model: {model}
dataset: {data}
max_length: 48
max_train_samples: 900
global_batch_size: 16
learning_rate: 5.0e-4
precision: fp32
device: cpu
onnx: false
"""


def short_run(folder: Path, model: Path, data: Path, settings: str) -> None:
    """Write `folder/run.yaml`: a short run, and further lines of settings."""
    (folder / "run.yaml").write_text(SHORT_RUN.format(model=model, data=data) + settings, encoding="utf-8")


def wait_until(process: subprocess.Popen[str], come: Callable[[], bool], seconds: float = 120, look: float = 0.01) -> None:
    """Look until it has come; the process must be running all that time, and not for too long."""
    deadline = time.monotonic() + seconds
    while not come():
        ended = process.poll()
        if ended is not None or time.monotonic() > deadline:
            kill(family(process))
            told = f"it had ended with {ended}" if ended is not None else f"it did not come in {seconds} s"
            try:
                raise AssertionError(f"{told}: {process.communicate(timeout=30)}")
            except subprocess.TimeoutExpired as error:  # what it left running holds its output
                raise AssertionError(f"{told}: {error.stdout!r} {error.stderr!r}") from None
        time.sleep(look)


def watch_notes(folder: Path) -> dict[int, dict[str, Any]]:
    """What the ranks of the run in `folder` tell of themselves (`pipeline/watch.py`); one that is not there yet is missing."""
    notes = {}
    for path in (folder / ".watch").glob("rank-*.json"):
        with contextlib.suppress(OSError):
            notes[int(path.stem.removeprefix("rank-"))] = json.loads(path.read_text(encoding="utf-8"))
    return notes


def suspend_in_a_step(process: subprocess.Popen[str], folder: Path, checkpoint: int) -> None:
    """SIGSTOP to rank 1 of two, after the checkpoint; returns when rank 0 waits for it, in a step.

    Not at a checkpoint, where a standstill may rightly last for minutes: there the rank is let go for a moment.
    """

    def in_a_step() -> bool:
        return not any(note["slow"] for note in watch_notes(folder).values())

    wait_until(process, lambda: (folder / f"checkpoint-{checkpoint}" / "manifest.json").exists() and in_a_step())
    for _ in range(20):
        notes = watch_notes(folder)
        assert notes.keys() == {0, 1}, f"the run is at its end: {sorted(path.name for path in folder.iterdir())}"
        os.kill(notes[1]["pid"], signal.SIGSTOP)
        pulse = watch_notes(folder)[0]["pulse"]
        wait_until(process, lambda before=pulse: watch_notes(folder)[0]["pulse"] >= before + 2, seconds=20)
        if in_a_step():
            return
        os.kill(notes[1]["pid"], signal.SIGCONT)
        time.sleep(0.02)
    raise AssertionError(f"at a checkpoint each time: {watch_notes(folder)}")


def family(process: subprocess.Popen[str]) -> list[psutil.Process]:
    """The process and all below it; workers sit in sessions of their own, but their parents are known."""
    try:
        top = psutil.Process(process.pid)
        return [top, *top.children(recursive=True)]
    except psutil.NoSuchProcess:
        return []


def workers(process: subprocess.Popen[str]) -> dict[int, psutil.Process]:
    """Those of its family that are a rank, by rank."""
    found = {}
    for member in family(process):
        with contextlib.suppress(psutil.NoSuchProcess):  # a short-lived one, a rank or not
            if (rank := member.environ().get("RANK")) is not None:
                found.setdefault(int(rank), member)  # its children, which come later, have it as well
    return found


def alive(processes: Iterable[psutil.Process]) -> list[psutil.Process]:
    found = []
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):  # it ended between the two questions
            found += [process] if process.is_running() and process.status() != psutil.STATUS_ZOMBIE else []
    return found


def kill(processes: Iterable[psutil.Process], number: int = signal.SIGKILL) -> None:
    """The signal to each that is still there: workers end by themselves as soon as their launcher is killed."""
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.send_signal(number)


def lose(process: subprocess.Popen[str]) -> None:
    """All of a run at once, as when its machine is lost; nothing of it is left on return."""
    members = family(process)
    kill(members)
    psutil.wait_procs(members, timeout=10)
    assert not (left := alive(members)), f"outlived SIGKILL: {left}"


@contextmanager
def started(arguments: list[str], cwd: Path = ROOT, module: str = "pipeline.launch", **extra: str) -> Iterator[subprocess.Popen[str]]:
    """`python -m MODULE ARGUMENTS` in the background; whatever is left of it at the end of the block is killed."""
    process = subprocess.Popen(
        [sys.executable, "-m", module, *arguments],
        cwd=cwd,
        env=environment(**extra),
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    try:
        yield process
    finally:
        kill(family(process))
        process.wait(30)


def launch(
    arguments: list[str], timeout: float = 240, module: str = "pipeline.launch", cwd: Path = ROOT, **extra: str
) -> subprocess.CompletedProcess[str]:
    """Run to the end; returns code, stdout and stderr. The process family must be gone by then."""
    with started(arguments, cwd=cwd, module=module, **extra) as process:
        seen: dict[int, psutil.Process] = {}
        deadline = time.monotonic() + timeout
        # communicate() in slices, so that the workers are seen while they live.
        while True:
            seen |= {p.pid: p for p in family(process)}
            try:
                out, err = process.communicate(timeout=1)
                break
            except subprocess.TimeoutExpired:
                if time.monotonic() > deadline:
                    kill(seen.values())
                    raise
        left = alive([p for p in seen.values() if p.pid != process.pid])
        psutil.wait_procs(left, timeout=5)
        assert not alive(left), f"left behind: {left}"
        return subprocess.CompletedProcess(arguments, process.returncode, out, err)


def error_lines(done: subprocess.CompletedProcess[str]) -> list[str]:
    return [line for line in done.stderr.splitlines() if line.startswith("error")]
