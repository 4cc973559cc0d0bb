"""Tokenising off the event loop. Requests that arrive while a call runs share the next one: a thread is woken once for all.

A call cannot be stopped, so none is long: it takes one text request, or as many as LONG characters hold; and where MOST
characters wait already, further ones are refused.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass

from serve.batcher import overload
from serve.errors import Refusal
from serve.text import TextTokenizer, Tokens
from serve.worker import Worker


@dataclass(eq=False, slots=True)
class _Request:
    tokenizer: TextTokenizer
    texts: Sequence[str]
    answer: asyncio.Future[list[Tokens]]
    characters: int


LONG = 20_000  # characters; about 20 ms
MOST = 4_000_000  # characters, of which a second takes PACE or more
PACE = 600_000


class Tokenizing:
    """Two of them: texts of more than LONG characters queue apart, not in front of the others."""

    def __init__(self) -> None:
        self._queues = {is_long: _Queue() for is_long in (False, True)}

    async def encode(self, tokenizer: TextTokenizer, texts: Sequence[str]) -> list[Tokens]:
        """The texts as `tokenizer` reads them, in their order. Raises Refusal where it fails on one, or too many wait."""
        characters = sum(map(len, texts))
        return await self._queues[characters > LONG].encode(tokenizer, texts, characters)

    def trouble(self, stall_seconds: float) -> str | None:
        """Why texts are not read, or None."""
        began = min((queue.began for queue in self._queues.values() if queue.began is not None), default=None)
        if began is not None and time.monotonic() - began > stall_seconds:
            return f"the tokenizer has been busy with one call for more than {stall_seconds:g} s"
        return None

    def stop(self) -> None:
        for queue in self._queues.values():
            queue.worker.stop()


class _Queue:
    def __init__(self) -> None:
        self.worker = Worker("tokenizer")
        self.began: float | None = None  # when the call the tokenizer is in began
        self._characters = 0  # of all requests whose callers still wait
        self._waiting: list[_Request] = []
        self._task: asyncio.Task[None] | None = None

    async def encode(self, tokenizer: TextTokenizer, texts: Sequence[str], characters: int) -> list[Tokens]:
        # As at the engine: an idle tokenizer takes any request, whatever its size.
        if self._characters and self._characters + characters > MOST:
            raise overload(math.ceil(self._characters / PACE))
        loop = asyncio.get_running_loop()
        request = _Request(tokenizer, texts, loop.create_future(), characters)
        self._waiting.append(request)
        if self._task is None or self._task.done():
            self._task = loop.create_task(self._drain())
        self._characters += characters
        try:
            return await request.answer
        finally:
            self._characters -= characters

    async def _drain(self) -> None:
        while self._waiting:
            self._waiting = [one for one in self._waiting if not one.answer.done()]  # without callers who hung up
            count = characters = 0
            for one in self._waiting:
                characters += one.characters
                # A new model may bring another tokenizer: a call is for one.
                if one.tokenizer is not self._waiting[0].tokenizer or (count and characters > LONG):
                    break
                count += 1
            requests, self._waiting = self._waiting[:count], self._waiting[count:]
            await self._encode(requests)

    async def _encode(self, requests: list[_Request]) -> None:
        if not requests:  # all of them hung up
            return
        try:
            tokens = await self._call(requests)
        except Exception:  # one text's fault must not be the others'
            for one in requests if len(requests) > 1 else ():
                await self._encode([one])
            if len(requests) == 1 and not requests[0].answer.done():
                requests[0].answer.set_exception(Refusal(422, "text_fails", "The model's tokenizer fails on this text."))
            return
        for one in requests:
            mine, tokens = tokens[: len(one.texts)], tokens[len(one.texts) :]
            if not one.answer.done():
                one.answer.set_result(mine)

    async def _call(self, requests: list[_Request]) -> list[Tokens]:
        self.began = time.monotonic()
        try:
            return await self.worker.run(requests[0].tokenizer.encode, [text for one in requests for text in one.texts])
        finally:
            self.began = None
