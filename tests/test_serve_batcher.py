"""The batcher alone, over an engine that can be held, poisoned and broken at will."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Awaitable, Callable
from typing import Any

import numpy as np
import pytest

from serve.batcher import Batcher
from serve.engine import Batch, Logits
from serve.errors import Refusal
from serve.metrics import Metrics

POISON, NOT_FINITE = 13, 14
CANARY = [1, 2, 3]


class HandEngine:
    """Answers (first id, length) for every text, so that a mixed-up answer shows."""

    name, device, precision, threads, batch_tokens, max_padding, length_step = "hand", "cpu", "fp32", 1, 100, 0.25, 1
    lanes = 1

    def __init__(self) -> None:
        self.open = threading.Event()
        self.open.set()
        self.broken = False
        self.batches: list[list[int]] = []  # the lengths in each call

    def logits(self, texts: Batch) -> Logits:
        assert self.open.wait(10)
        self.batches.append([len(text) for text in texts])
        if self.broken or any(POISON in text for text in texts):
            raise ValueError("the engine failed")
        return np.array([[np.nan if NOT_FINITE in text else text[0], len(text)] for text in texts], np.float32)


def with_batcher(test: Callable[[HandEngine, Batcher], Awaitable[None]], **options: Any) -> None:
    async def run() -> None:
        engine = HandEngine()
        batcher = Batcher(engine, CANARY, Metrics(), **{"tokens_per_second": 1000, **options})
        batcher.start()
        try:
            await asyncio.wait_for(test(engine, batcher), 20)
        finally:
            engine.open.set()
            await batcher.stop()

    asyncio.run(run())


async def ask(batcher: Batcher, texts: Batch) -> list[Logits]:
    return await batcher.logits(texts, [f"texts[{number}]" for number in range(len(texts))])


async def hold(engine: HandEngine, batcher: Batcher) -> asyncio.Task[list[Logits]]:
    """Closes the engine with one text in it, so that what comes next has to wait."""
    engine.open.clear()
    first = asyncio.create_task(ask(batcher, [[1]]))
    await asyncio.sleep(0.05)
    return first


def text(number: int, length: int) -> list[int]:
    return [1000 + number, *[1] * (length - 1)]


def test_every_text_gets_its_own_answer_in_batches_of_similar_length() -> None:
    async def test(engine: HandEngine, batcher: Batcher) -> None:
        first = await hold(engine, batcher)
        lengths = [3, 40, 4, 38, 3, 39, 4, 90, 120]
        tasks = [asyncio.create_task(ask(batcher, [text(i, length)])) for i, length in enumerate(lengths)]
        await asyncio.sleep(0.05)
        engine.open.set()
        rows = [(await task)[0].tolist() for task in tasks]
        await first
        assert rows == [[1000 + i, length] for i, length in enumerate(lengths)]
        # The oldest (3) with its like; 40 with one neighbour (three would pass 100 tokens); one alone may be longer than a batch.
        assert engine.batches == [[1], [3, 3, 4, 4], [40, 39], [38], [90], [120]]

    with_batcher(test)


def test_an_idle_batcher_answers_at_once_and_a_request_keeps_its_order() -> None:
    async def test(engine: HandEngine, batcher: Batcher) -> None:
        rows = await ask(batcher, [text(i, 1 + i % 7) for i in range(50)])
        assert [row[0] for row in rows] == [1000 + i for i in range(50)]
        loop = asyncio.get_running_loop()
        began = loop.time()
        for _ in range(20):
            await ask(batcher, [[5]])
        assert loop.time() - began < 1  # 50 ms each would be a fixed wait for company

    with_batcher(test)


def test_a_full_queue_refuses_with_the_time_to_wait() -> None:
    async def test(engine: HandEngine, batcher: Batcher) -> None:
        first = await hold(engine, batcher)
        second = asyncio.create_task(ask(batcher, [[1] * 89]))
        await asyncio.sleep(0.01)
        assert batcher.overloaded() is None  # 90 wait, it is full at 100
        third = asyncio.create_task(ask(batcher, [[1] * 500]))  # what comes before that is let in, whatever its size
        await asyncio.sleep(0.01)
        assert batcher.overloaded() == 30
        with pytest.raises(Refusal) as refusal:
            await ask(batcher, [[1]])
        # 590 tokens at 20 a second
        assert (refusal.value.status, refusal.value.code, refusal.value.retry_after) == (429, "overloaded", 30)
        engine.open.set()
        await asyncio.gather(first, second, third)
        assert batcher._pending == 0 and batcher.overloaded() is None

    with_batcher(test, tokens_per_second=20, queue_tokens=100, longest_wait=60)


def test_what_could_not_be_answered_in_time_is_refused_at_the_door() -> None:
    async def test(engine: HandEngine, batcher: Batcher) -> None:
        first = await hold(engine, batcher)
        second = asyncio.create_task(ask(batcher, [[1] * 30]))  # done in 3.1 s at 10 tokens a second: let in
        await asyncio.sleep(0.01)
        with pytest.raises(Refusal, match="try again in 4 s") as refusal:
            await ask(batcher, [[1] * 10])  # done in 4.1 s, and 4 are allowed; the queue is empty in 3.1
        assert refusal.value.status == 429
        engine.open.set()
        await asyncio.gather(first, second)

    with_batcher(test, tokens_per_second=10, longest_wait=4)


def test_a_text_that_fails_fails_alone() -> None:
    async def test(engine: HandEngine, batcher: Batcher) -> None:
        first = await hold(engine, batcher)
        good = [asyncio.create_task(ask(batcher, [text(i, 5)])) for i in range(9)]
        bad = [asyncio.create_task(ask(batcher, [[kind, 1, 1, 1, 1]])) for kind in (POISON, NOT_FINITE)]
        request = asyncio.create_task(ask(batcher, [text(20, 5), [POISON] * 5, text(21, 5)]))
        await asyncio.sleep(0.05)
        engine.open.set()
        assert [(await task)[0][0] for task in good] == [1000 + i for i in range(9)]
        for task in bad:
            with pytest.raises(Refusal) as refusal:
                await task
            assert (refusal.value.status, refusal.value.field) == (422, "texts[0]")
        with pytest.raises(Refusal) as refusal:
            await request
        assert (refusal.value.status, refusal.value.field) == (422, "texts[1]")
        await first
        assert batcher.trouble() is None
        assert len((await ask(batcher, [text(1, 2)]))[0]) == 2

    with_batcher(test)


def test_a_dead_engine_is_known_to_be_dead_and_told_once() -> None:
    deaths: list[str] = []

    async def test(engine: HandEngine, batcher: Batcher) -> None:
        first = await hold(engine, batcher)
        others = [asyncio.create_task(ask(batcher, [text(i, 5 + 20 * i)])) for i in range(5)]
        await asyncio.sleep(0.05)
        engine.broken = True
        engine.open.set()
        for task in (first, *others):
            with pytest.raises(Refusal) as refusal:
                await task
            assert (refusal.value.status, refusal.value.code) == (503, "engine_down")
        assert "ValueError" in (batcher.trouble() or "")
        with pytest.raises(Refusal):  # at the door, at once
            await ask(batcher, [[1]])
        assert batcher._pending == 0 and deaths == ["dead"]

    with_batcher(test, on_death=lambda: deaths.append("dead"))


def test_an_engine_that_dies_is_not_asked_again_for_every_text() -> None:
    async def test(engine: HandEngine, batcher: Batcher) -> None:
        engine.broken = True
        with pytest.raises(Refusal, match="The engine failed"):
            await ask(batcher, [text(i, 1) for i in range(64)])
        assert len(engine.batches) <= 9  # 64 halved down to one text, and the canary

    with_batcher(test)


def test_lanes_share_what_waits_and_run_side_by_side() -> None:
    async def test(engine: HandEngine, batcher: Batcher) -> None:
        engine.open.clear()
        rows = asyncio.create_task(ask(batcher, [text(i, 5) for i in range(8)]))
        await asyncio.sleep(0.05)
        assert [lane.began is not None for lane in batcher._lanes] == [True, True] and not batcher._waiting
        engine.open.set()
        assert [row[0] for row in await rows] == [1000 + i for i in range(8)]
        assert sorted(map(len, engine.batches)) == [4, 4]

    HandEngine.lanes = 2
    try:
        with_batcher(test)
    finally:
        HandEngine.lanes = 1


def test_a_stuck_engine_shows_until_it_comes_back() -> None:
    async def test(engine: HandEngine, batcher: Batcher) -> None:
        first = await hold(engine, batcher)
        await asyncio.sleep(0.15)
        assert "busy with one batch" in (batcher.trouble() or "")
        with pytest.raises(Refusal) as refusal:
            await ask(batcher, [[1]])
        assert refusal.value.status == 503
        engine.open.set()
        await first
        assert batcher.trouble() is None

    with_batcher(test, stall_seconds=0.1)


def test_work_of_callers_who_left_is_dropped_before_it_runs() -> None:
    async def test(engine: HandEngine, batcher: Batcher) -> None:
        first = await hold(engine, batcher)
        left = [asyncio.create_task(ask(batcher, [text(i, 50)])) for i in range(10)]
        stayed = asyncio.create_task(ask(batcher, [text(99, 3)]))
        await asyncio.sleep(0.05)
        for task in left:
            task.cancel()
        await asyncio.wait(left)
        assert batcher._pending == 1 + 3  # their room in the queue is free at once
        engine.open.set()
        await asyncio.gather(first, stayed)
        assert engine.batches == [[1], [3]]

    with_batcher(test)


def test_stopping_leaves_nobody_waiting() -> None:
    async def test(engine: HandEngine, batcher: Batcher) -> None:
        tasks = [await hold(engine, batcher), *(asyncio.create_task(ask(batcher, [text(i, 60)])) for i in range(3))]
        await asyncio.sleep(0.05)
        await batcher.stop()
        for task in tasks:
            with pytest.raises(Refusal) as refusal:
                await task
            assert refusal.value.code == "stopping"
        assert batcher.trouble()

    with_batcher(test)
