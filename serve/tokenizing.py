"""Tokenising off the event loop. Requests that arrive while a call runs share the next one: a thread is woken once for all."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass

from serve.errors import Refusal
from serve.text import TextTokenizer, Tokens
from serve.worker import Worker


@dataclass(eq=False, slots=True)
class _Request:
    tokenizer: TextTokenizer
    texts: Sequence[str]
    answer: asyncio.Future[list[Tokens]]


class Tokenizing:
    """Two of them: texts of more than LONG characters queue apart, not in front of the others."""

    LONG = 20_000  # about 20 ms

    def __init__(self) -> None:
        self._queues = {is_long: _Queue() for is_long in (False, True)}

    async def encode(self, tokenizer: TextTokenizer, texts: Sequence[str]) -> list[Tokens]:
        """The texts as `tokenizer` reads them, in their order. Raises Refusal where it fails on one."""
        return await self._queues[sum(map(len, texts)) > self.LONG].encode(tokenizer, texts)

    def stop(self) -> None:
        for queue in self._queues.values():
            queue.worker.stop()


class _Queue:
    def __init__(self) -> None:
        self.worker = Worker("tokenizer")
        self._waiting: list[_Request] = []
        self._task: asyncio.Task[None] | None = None

    async def encode(self, tokenizer: TextTokenizer, texts: Sequence[str]) -> list[Tokens]:
        loop = asyncio.get_running_loop()
        request = _Request(tokenizer, texts, loop.create_future())
        self._waiting.append(request)
        if self._task is None or self._task.done():
            self._task = loop.create_task(self._drain())
        return await request.answer

    async def _drain(self) -> None:
        while self._waiting:
            requests, self._waiting = self._waiting, []
            while requests:
                # A new model may bring another tokenizer: those of one go together.
                tokenizer = requests[0].tokenizer
                await self._encode([one for one in requests if one.tokenizer is tokenizer and not one.answer.done()])
                requests = [one for one in requests if one.tokenizer is not tokenizer]

    async def _encode(self, requests: list[_Request]) -> None:
        if not requests:  # all of them hung up
            return
        try:
            tokens = await self.worker.run(requests[0].tokenizer.encode, [text for one in requests for text in one.texts])
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
