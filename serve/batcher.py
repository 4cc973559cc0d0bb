"""Brings texts that wait at the same time to the engine together.

As many batches run at a time as the engine computes well beside each other, each in a thread of its own, its lane. While
they run, texts gather; when one ends, the next is made of the text that waited longest and those nearest to it in length.
So an idle service answers at once, a busy one batches as much as its load asks for, and there is no waiting time to
tune. All state belongs to the event loop: no locks.

    batcher = Batcher(engine, canary, ...); batcher.start()
    rows = await batcher.logits([[101, 2023, 102]], ["text"])   # one row of logits per text, or Refusal
    await batcher.stop()
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from serve.engine import Batch, Engine, Logits
from serve.errors import Refusal
from serve.metrics import Metrics
from serve.worker import Worker

log = logging.getLogger("serve")


@dataclass(eq=False, slots=True)
class Job:
    """One text. Its answer is a row of logits or a refusal; cancelled, nobody waits for it any more."""

    ids: Sequence[int]
    name: str  # what its caller calls it
    answer: asyncio.Future[Logits | Refusal]
    since: float = field(default_factory=time.monotonic)


@dataclass(eq=False, slots=True)
class Lane:
    worker: Worker = field(default_factory=lambda: Worker("engine"))
    began: float | None = None  # when the call the engine is in began
    task: asyncio.Task[None] | None = None


class Batcher:
    def __init__(
        self,
        engine: Engine,
        canary: Sequence[int],
        metrics: Metrics,
        *,
        tokens_per_second: float,
        batch_tokens: int = 0,
        queue_tokens: int = 0,
        longest_wait: float = 10.0,
        stall_seconds: float = 30.0,
        on_death: Callable[[], None] = lambda: None,
    ) -> None:
        """`canary` is a text (token ids) the engine is known to answer; `tokens_per_second` its speed at first."""
        self.engine, self.canary, self.metrics = engine, canary, metrics
        self.batch_tokens = batch_tokens or engine.batch_tokens
        # Half a second's work of a good CPU engine, four batches of a GPU: longer queues only make everybody wait.
        self.queue_tokens = queue_tokens or max(8192, 4 * engine.batch_tokens)
        self.longest_wait, self.stall_seconds, self.on_death = longest_wait, stall_seconds, on_death
        self._speed = tokens_per_second
        self._waiting: list[Job] = []  # in order of arrival
        self._pending = 0  # tokens accepted and not yet answered
        self._wake = asyncio.Event()
        self._lanes = [Lane() for _ in range(engine.lanes)]
        self._free = 0  # lanes without a batch
        self._dead: str | None = None

    def start(self) -> None:
        for lane in self._lanes:
            lane.task = asyncio.get_running_loop().create_task(self._serve(lane))

    async def stop(self) -> None:
        """Ends at once; who still waits is refused."""
        self._dead = self.trouble()  # who waits for an engine that is stuck hears that it is down, not that the service stops
        lanes, self._lanes = self._lanes, []
        for lane in lanes:
            # A lane, its task and the batcher would hold each other, and the engine's memory, until garbage is collected.
            task, lane.task = lane.task, None
            if task:
                task.cancel()
                await asyncio.wait([task])
            lane.worker.stop()
        _refuse(self._waiting, self._end())

    def trouble(self) -> str | None:
        """Why this batcher cannot answer, or None. A stall passes when the engine comes back; death does not."""
        if self._dead:
            return self._dead
        if not self._lanes or any(lane.task is None or lane.task.done() for lane in self._lanes):
            return "the batcher does not run"
        if any(lane.began is not None and time.monotonic() - lane.began > self.stall_seconds for lane in self._lanes):
            return f"the engine has been busy with one batch for more than {self.stall_seconds:g} s"
        return None

    async def logits(self, texts: Batch, names: Sequence[str]) -> list[Logits]:
        """One row (classes,) per text; `names` are the texts' in a Refusal. Cancelled, what does not run yet is dropped."""
        tokens = sum(map(len, texts))
        self._admit(tokens)
        loop = asyncio.get_running_loop()
        jobs = [Job(ids, name, loop.create_future()) for ids, name in zip(texts, names, strict=True)]
        self._count(tokens)
        self._waiting += jobs
        self._wake.set()
        rows: list[Logits] = []
        try:
            for job in jobs:
                answer = await job.answer
                if isinstance(answer, Refusal):
                    raise answer
                rows.append(answer)
            return rows
        finally:
            self._count(-tokens)
            for job in jobs:
                job.answer.cancel()

    def _admit(self, tokens: int) -> None:
        if trouble := self.trouble():
            raise Refusal(503, "engine_down", f"No predictions at the moment: {trouble}.", retry_after=10)
        # An idle service takes any request, whatever its size. A busy one does not take what it could not answer in time.
        late = self._pending > 0 and (self._pending + tokens) / self._speed > self.longest_wait
        if (seconds := self.overloaded()) or late:
            raise overload(seconds or self._drained())

    def overloaded(self) -> int | None:
        """Whole seconds after which a caller should try again while the queue is full, else None."""
        return self._drained() if self._pending >= self.queue_tokens else None

    def _drained(self) -> int:
        return min(60, max(1, math.ceil(self._pending / self._speed)))

    def _count(self, tokens: int) -> None:
        self._pending += tokens
        self.metrics.queue.inc(tokens)  # while one model follows another there are two queues, and this is their sum

    async def _serve(self, lane: Lane) -> None:
        try:
            while True:
                self._free += 1
                while not (batch := self._next_batch()):
                    self._wake.clear()
                    await self._wake.wait()
                self._free -= 1
                try:
                    await self._run(lane, batch)
                finally:  # stopped or broken in the middle: nobody may be left waiting
                    _refuse(batch, self._end())
        except asyncio.CancelledError:
            raise
        except Exception as error:
            log.exception("the batcher failed")  # a defect of ours; /ready must not stay green over it
            self._die(f"{type(error).__name__} in the batcher")

    def _next_batch(self) -> list[Job]:
        """The oldest text and its nearest in length, as many as fit and leave work for the other free lanes."""
        self._waiting = [job for job in self._waiting if not job.answer.done()]  # callers who went away
        if not self._waiting:
            return []
        length, most = len(self._waiting[0].ids), math.ceil(len(self._waiting) / self._free)
        batch: list[Job] = []
        longest = tokens = 0
        for job in sorted(self._waiting, key=lambda job: abs(len(job.ids) - length)):  # stable: the older of equals first
            longest, tokens = max(longest, len(job.ids)), tokens + len(job.ids)
            area = self._padded(longest) * (len(batch) + 1)
            if batch and (len(batch) == most or area > self.batch_tokens or area - tokens > self.engine.max_padding * area):
                break
            batch.append(job)
        taken = set(map(id, batch))
        self._waiting = [job for job in self._waiting if id(job) not in taken]
        now = time.monotonic()
        for job in batch:
            self.metrics.queue_wait.observe(now - job.since)
        return batch

    def _padded(self, length: int) -> int:
        return -(-length // self.engine.length_step) * self.engine.length_step

    async def _run(self, lane: Lane, batch: list[Job]) -> None:
        """Answers every job of `batch`. A batch that fails is halved until the text that does it stands alone."""
        batch = [job for job in batch if not job.answer.done()]
        if self._dead or not batch:
            return
        try:
            rows = await self._compute(lane, [job.ids for job in batch])
        except Exception as error:
            self.metrics.failures.inc()
            if len(batch) == 1:
                await self._blame(lane, batch[0], error)
            else:
                half = len(batch) // 2
                await self._run(lane, batch[:half])
                await self._run(lane, batch[half:])
            return
        for job, row in zip(batch, rows, strict=True):
            if not np.isfinite(row).all():
                await self._blame(lane, job, ArithmeticError("logits that are not finite"))
            elif not job.answer.done():
                job.answer.set_result(row)

    async def _compute(self, lane: Lane, texts: Batch) -> Logits:
        lane.began = began = time.monotonic()
        try:
            rows = await lane.worker.run(self.engine.logits, texts)
        finally:
            lane.began = None
        seconds, tokens = max(time.monotonic() - began, 1e-6), sum(map(len, texts))
        self._speed += 0.2 * (self.engine.lanes * tokens / seconds - self._speed)  # what admission and Retry-After reckon with
        padded = len(texts) * self._padded(max(map(len, texts)))
        self.metrics.batch_texts.observe(len(texts))
        self.metrics.batch_tokens.observe(padded)
        self.metrics.tokens.labels("text").inc(tokens)
        self.metrics.tokens.labels("padding").inc(padded - tokens)
        self.metrics.engine_seconds.inc(seconds)
        return rows

    async def _blame(self, lane: Lane, job: Job, error: Exception) -> None:
        """The engine failed on this text alone. If it still answers the canary, it is the text; else the engine is dead."""
        try:
            healthy = bool(np.isfinite(await self._compute(lane, [self.canary])).all())
        except Exception:
            healthy = False
        # The error's own text may quote the input, so the log gets its kind alone.
        if not healthy:
            self._die(f"the engine has failed ({type(error).__name__})")
        log.warning("the model failed on a text of %d tokens: %s", len(job.ids), type(error).__name__)
        if not job.answer.done():
            job.answer.set_result(
                _down() if not healthy else Refusal(422, "text_fails", "The model cannot compute an answer for this text.", field=job.name)
            )

    def _end(self) -> Refusal:
        return _down() if self._dead else Refusal(503, "stopping", "The service is stopping; try again later.", retry_after=5)

    def _die(self, reason: str) -> None:
        if self._dead:
            return
        log.error("%s; no predictions from now on", reason)
        self._dead = reason
        self.on_death()
        _refuse(self._waiting, _down())


def overload(seconds: int) -> Refusal:
    return Refusal(429, "overloaded", f"The queue is full; try again in {seconds} s.", retry_after=seconds)


def _down() -> Refusal:
    return Refusal(503, "engine_down", "The engine failed; try again later.", retry_after=10)


def _refuse(jobs: Sequence[Job], refusal: Refusal) -> None:
    for job in jobs:
        if not job.answer.done():
            job.answer.set_result(refusal)
