"""Pushes of checkpoints in the background: training goes on beside them, and never waits for, nor dies of, the Hub.

A push is a child process, `python -m pipeline.backup push ...`: what hangs, crashes or leaks there does so there, and
the training process keeps its interpreter to itself. It is the same command that a person types for what was left.
"""

from __future__ import annotations

import contextlib
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import datetime
from pathlib import Path

from pipeline import checkpoint
from pipeline.backup.branch import branch_of
from pipeline.backup.to_hub import LOG

RETRY_SECONDS = (30.0, 600.0)  # pause after a first failure, and the longest after more of them
STALLED_SECONDS = 600  # a push that has read nothing for so long is ended. Its own limits (hub_access) come first
LOOK_SECONDS = 10


class Backup:
    """Keeps the Hub's branch of a run at its newest checkpoint. Used by rank 0 alone; raises nothing.

    `committed` and `poll` take no time to speak of and may be called at any step; only `close` waits, as long as told.
    """

    def __init__(
        self,
        output_dir: str | Path,
        repo: str,
        private: bool = False,
        say: Callable[[str], object] = print,
        retry_seconds: tuple[float, float] = RETRY_SECONDS,
        stalled_seconds: float = STALLED_SECONDS,
    ) -> None:
        self.run, self.repo, self.say = Path(output_dir), repo, say
        self.retry_seconds, self.stalled_seconds = retry_seconds, stalled_seconds
        self._arguments = ["push", "--run", str(output_dir), "--repo", repo, *(["--private"] if private else [])]
        # States of the run are numbered: what an earlier session left may not have reached the Hub.
        self._newest = 1 if checkpoint.whole(output_dir) else 0
        self._pushed = self._carried = 0
        self._pushed_name = ""  # the newest checkpoint folder when the last successful push began
        self._child: subprocess.Popen[bytes] | None = None
        self._child_name, self._log_start = "", 0
        self._looked, self._read, self._moved = 0.0, -1, 0.0
        self._pause, self._not_before = retry_seconds[0], 0.0
        self._reason = ""
        self._said: set[str] = set()

    @property
    def command(self) -> str:
        """What a person types to push by hand."""
        return f"python -m pipeline.backup {shlex.join(self._arguments)}"

    def committed(self) -> None:
        """There is a new complete checkpoint, or a later manifest of one."""
        self._newest += 1
        self._not_before = 0.0
        self.poll()

    def poll(self) -> None:
        """See to the child: take note of its end, start the next where there is something to push."""
        try:
            if self._child is not None:
                code = self._child.poll()
                if code is None:
                    self._watch(self._child)
                    return
                self._ended(code)
            if self._unpushed and time.monotonic() >= self._not_before:
                self._start()
        except Exception as error:  # no room for the log, no process to be had: not the training's trouble
            self._failed(f"{type(error).__name__}: {error}")

    def close(self, patience_seconds: float) -> str:
        """Give what is not pushed yet so many seconds, then end; says, and returns, what is on the Hub and what is not."""
        deadline = time.monotonic() + patience_seconds
        self._not_before = 0.0
        try:
            while self._unpushed and time.monotonic() < deadline:
                self.poll()
                if self._child is None and self._not_before > deadline:
                    break  # no time for another attempt
                time.sleep(0.05)
        finally:
            self._end_child()
            line = self._verdict(patience_seconds)
            if line:
                self.say(line)
        return line

    @property
    def _unpushed(self) -> bool:
        return self._pushed < self._newest

    def _verdict(self, patience_seconds: float) -> str:
        if not self._newest:
            return ""
        if not self._unpushed:
            return f"checkpoints {self.repo}, branch {branch_of(self.run)}: {self._pushed_name}"
        newest = checkpoint.whole(self.run)
        reason = self._reason or f"its push did not end within {patience_seconds:g} s."
        return f"warning: {newest[-1].name if newest else self.run} is not on the Hub: {reason} Push it with `{self.command}`"

    # -- the child ------------------------------------------------------------------------------------------------

    def _start(self) -> None:
        folders = checkpoint.whole(self.run)
        if not folders:
            raise FileNotFoundError(f"{self.run} holds no complete checkpoint")
        # The project's folder, so that `-m` finds the package whatever folder the run works in.
        source = str(Path(__file__).resolve().parents[2])
        path = os.pathsep.join(filter(None, [source, os.environ.get("PYTHONPATH")]))
        self._carried, self._child_name = self._newest, folders[-1].name
        with (self.run / LOG).open("ab") as log:
            log.write(f"{datetime.now():%Y-%m-%d %H:%M:%S} {self._child_name}\n".encode())
            log.flush()
            self._log_start = log.tell()
            self._child = subprocess.Popen(
                [sys.executable, "-m", "pipeline.backup", *self._arguments, "--parent", str(os.getpid())],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env={**os.environ, "PYTHONPATH": path, "HF_HUB_DISABLE_PROGRESS_BARS": "1"},
                start_new_session=True,  # Ctrl-C is for the training, which then gives the push some time
            )
        self._read, self._looked, self._moved = -1, time.monotonic(), time.monotonic()

    def _watch(self, child: subprocess.Popen[bytes]) -> None:
        """End a child that stands still. A slow upload reads its files on; where that cannot be seen its own limits must do."""
        now = time.monotonic()
        if now - self._looked < min(LOOK_SECONDS, self.stalled_seconds):
            return
        self._looked = now
        try:
            read = int(Path(f"/proc/{child.pid}/io").read_text().split()[1])  # rchar: bytes
        except (OSError, ValueError, IndexError):
            return
        if read != self._read:
            self._read, self._moved = read, now
        elif now - self._moved >= self.stalled_seconds:
            child.kill()
            child.wait()
            self._child = None
            self._failed(f"the push stood still for {self.stalled_seconds:g} s and was ended.")

    def _ended(self, code: int) -> None:
        self._child = None
        if code == 0:
            self._pushed, self._pushed_name = self._carried, self._child_name
            self._pause, self._reason = self.retry_seconds[0], ""
            return
        with (self.run / LOG).open("rb") as log:
            log.seek(self._log_start)
            lines = log.read().decode("utf-8", "replace").splitlines()
        errors = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
        self._failed(errors[-1] if errors else f"the push ended with code {code}; {self.run / LOG} says more.")

    def _failed(self, reason: str) -> None:
        self._reason = reason
        self._not_before = time.monotonic() + self._pause
        self._pause = min(2 * self._pause, self.retry_seconds[1])
        kind = re.sub(r"\d+", "0", reason)
        if kind not in self._said:
            self._said.add(kind)
            what = re.sub(r" [^.]*same command again[^.]*\.", "", reason)  # advice for a person who typed it
            self.say(f"warning: a checkpoint did not reach the Hub: {what} Training goes on, and the push is tried again.")

    def _end_child(self) -> None:
        child, self._child = self._child, None
        if child is None:
            return
        with contextlib.suppress(ProcessLookupError):
            child.send_signal(signal.SIGTERM)
        try:
            child.wait(5)
        except subprocess.TimeoutExpired:
            child.kill()
            child.wait()
        for left in self.run.glob(".push-*"):  # its links would hold the disk space of checkpoints that are removed
            shutil.rmtree(left, ignore_errors=True)
