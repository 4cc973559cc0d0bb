"""What answers at one moment: a model with its queue. A request keeps the one it began with to its end."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from serve.batcher import Batcher
from serve.machine import trim_memory
from serve.metrics import Metrics
from serve.model import Model
from serve.release import Release
from serve.revisions import now
from serve.settings import Settings
from serve.worker import in_thread


@dataclass(frozen=True, eq=False)
class Serving:
    model: Model
    batcher: Batcher
    requests: set[object] = field(default_factory=set)  # that began with this model and have not ended
    since: str = field(default_factory=now)

    @classmethod
    def begin(cls, model: Model, settings: Settings, metrics: Metrics, on_death: Callable[[], None]) -> Serving:
        """Starts a queue in front of `model`."""
        batcher = Batcher(
            model.engine,
            model.canary,
            metrics,
            tokens_per_second=model.proof.tokens_per_second,
            batch_tokens=settings.batch_tokens,
            queue_tokens=settings.queue_tokens,
            longest_wait=settings.deadline_seconds,
            stall_seconds=settings.stall_seconds,
            on_death=on_death,
        )
        batcher.start()
        return cls(model, batcher)

    @contextlib.contextmanager
    def request(self) -> Iterator[None]:
        """For as long as this lasts the batcher runs."""
        ticket = object()
        self.requests.add(ticket)
        try:
            yield
        finally:
            self.requests.discard(ticket)

    def renamed(self, release: Release) -> Serving:
        """The same engine and queue under another commit with the same files."""
        return dataclasses.replace(self, model=dataclasses.replace(self.model, release=release), since=now())


async def retire(old: Serving) -> None:
    """Stops `old` when the last of its requests has its answer, and gives its memory back."""
    while old.requests:  # bounded by the deadline of requests
        await asyncio.sleep(0.05)
    await old.batcher.stop()
    del old
    await in_thread("trim", trim_memory)
