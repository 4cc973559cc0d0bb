"""Being asked to stop: SIGTERM ends a run with everything saved, and with exit code 75.

Schedulers send SIGTERM before they take a machine away, to the launcher or to one rank, and launchers pass it on at
slightly different moments. A rank that stopped at once would leave the others waiting in an all-reduce, or save another
step than they do. So inside the training loop the signal only sets a flag; about once a second all ranks compare their
flags and, when one is set, save the step they stand at together. Outside the loop there is nothing to save, and the
process ends at once. Exit code 75 (EX_TEMPFAIL of sysexits.h, "try again later") tells a scheduler to start the same command again.
"""

from __future__ import annotations

import atexit
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from pipeline.errors import EXIT_STOPPED

CHECK_SECONDS = 1.0  # a step longer than this is checked after each


class Stopped(SystemExit):
    """Leaves the program with code 75; like KeyboardInterrupt it is no `Exception` that something could swallow."""

    def __init__(self, kept: str = "Complete checkpoints are kept") -> None:
        super().__init__(EXIT_STOPPED)
        # While an error is on its way out the launcher is only clearing up, and the error is what is to be read.
        if os.environ.get("RANK", "0") == "0" and sys.exc_info()[1] is None:
            print(f"\nStopped by SIGTERM. {kept}: run the same command again to go on.", file=sys.stderr, flush=True)


class Stopper:
    """One per process. `reduce_max` is the entry's own way to take the maximum over ranks of a list of floats."""

    def __init__(self, reduce_max: Callable[[list[float]], list[float]]) -> None:
        self._reduce_max = reduce_max
        self._asked = self._held = False
        self._steps, self._wait = 0, 1  # steps since the last comparison, steps from one to the next
        self._since = time.monotonic()
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, self._on_signal)
            # Once the interpreter shuts down nothing is left to be saved, and an exception would only make noise.
            atexit.register(signal.signal, signal.SIGTERM, signal.SIG_IGN)

    def _on_signal(self, *_: Any) -> None:
        again, self._asked = self._asked, True
        if not self._held and not again:  # launchers repeat it; once is enough
            raise Stopped

    @contextmanager
    def held(self) -> Iterator[None]:
        """Around the steps of training: the signal waits for `agreed`, or for the end of the block."""
        self._held = True
        self._since = time.monotonic()
        try:
            yield
        finally:
            self._held = False
        if self._asked:
            raise Stopped

    @contextmanager
    def released(self) -> Iterator[None]:
        """Inside `held`, around work that can be dropped, such as a validation: the signal ends the process at once."""
        self._held = False
        if self._asked:
            raise Stopped
        try:
            yield
        finally:
            self._held = True
            self._since, self._steps = time.monotonic(), 0

    def agreed(self) -> bool:
        """After every optimizer step, on every rank: whether all stop here, because one of them was asked to.

        The ranks talk only about once a second. How many steps that is follows from the slowest rank's time for a step,
        which the same exchange spreads, so all ranks talk after the same step.
        """
        self._steps += 1
        if self._steps < self._wait:
            return False
        now = time.monotonic()
        asked, seconds = self._reduce_max([float(self._asked), (now - self._since) / self._steps])
        self._since, self._steps, self._wait = now, 0, max(1, int(CHECK_SECONDS / max(seconds, 1e-6)))
        return asked > 0
