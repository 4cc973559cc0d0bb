"""One thread that runs blocking functions for the event loop, in the order in which they were asked for.

Not an executor of the standard library: those join their threads at exit, so a download or a batch that hangs would
keep the process from ending. This thread is a daemon and is left behind.
"""

from __future__ import annotations

import asyncio
import queue
import threading
from collections.abc import Callable
from typing import Any, TypeVar

Result = TypeVar("Result")


class Worker:
    def __init__(self, name: str) -> None:
        self._calls: queue.SimpleQueue[tuple[Callable[[], Any], asyncio.Future[Any]] | None] = queue.SimpleQueue()
        threading.Thread(target=self._work, name=name, daemon=True).start()

    async def run(self, function: Callable[..., Result], *arguments: Any) -> Result:
        """`function(*arguments)` in the thread; raises what it raises. Cancelling the caller does not stop the call."""
        future: asyncio.Future[Result] = asyncio.get_running_loop().create_future()
        self._calls.put((lambda: function(*arguments), future))
        return await future

    def stop(self) -> None:
        """The thread ends after the calls it already has."""
        self._calls.put(None)

    def _work(self) -> None:
        while (call := self._calls.get()) is not None:
            function, future = call
            if future.cancelled():  # the caller went away while the call waited
                continue
            result, error = None, None
            try:
                result = function()
            except BaseException as raised:  # the caller's to judge; the thread must live on
                error = raised
            try:
                future.get_loop().call_soon_threadsafe(_settle, future, result, error)
            except RuntimeError:  # the loop is closed: nobody waits any more
                return
            del call, function, future, result, error  # else the last batch lives until the next one comes


async def in_thread(name: str, function: Callable[..., Result], *arguments: Any) -> Result:
    """`function(*arguments)` in a thread of its own, for what may take long: a download, a model that is loaded."""
    worker = Worker(name)
    try:
        return await worker.run(function, *arguments)
    finally:
        worker.stop()


def _settle(future: asyncio.Future[Any], result: Any, error: BaseException | None) -> None:
    if future.cancelled():
        return
    if error is None:
        future.set_result(result)
    else:
        # Only an Exception may travel through a future unharmed; a panic of a native library is a BaseException.
        future.set_exception(error if isinstance(error, Exception) else RuntimeError(f"{type(error).__name__}: {error}"))
