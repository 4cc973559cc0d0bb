"""The short way of a prediction, from the edge straight to the service.

FastAPI documents these routes. Its own way to a handler (nested layers and exit stacks, JSON through Python objects,
answers validated and encoded again) takes several times as long as what is done here, on cores that the engine needs.
"""

from __future__ import annotations

import asyncio
import hmac
from collections.abc import Awaitable, Callable, Mapping, Sequence
from types import TracebackType
from typing import Any, get_type_hints

from fastapi import Response
from fastapi.routing import APIRoute
from starlette.types import Receive, Scope, Send

from serve.answers import refused
from serve.batcher import overload
from serve.errors import Refusal
from serve.schemas import Body
from serve.service import Service
from serve.validation import check_content, read

# A watch costs a task and a wake-up; most answers are there before one is needed.
WATCH_AFTER_SECONDS = 0.05
# Shorter than the time for which the end of the process waits for requests: a caller who sends nothing must not hold it up.
QUIET_SECONDS = 5.0


class PredictionRoute(APIRoute):
    """POST `path`: `endpoint(body)`, `body` a `schemas.Body`, gives the ready answer or raises Refusal."""

    def __init__(self, path: str, endpoint: Callable[[Any], Awaitable[Response]], service: Service, **documented: Any) -> None:
        super().__init__(path, endpoint, methods=["POST"], **documented)
        self.answer, self.service = endpoint, service
        self.body: type[Body] = get_type_hints(endpoint)["body"]
        self.keys = service.settings.keys()
        self.app = self.respond  # also for who comes FastAPI's way

    async def respond(self, scope: Scope, receive: Receive, send: Send) -> None:
        settings = self.service.settings
        try:
            headers = dict(scope["headers"])
            if self.keys:
                check_key(headers.get(b"x-api-key"), self.keys)
            if (seconds := self.service.overloaded()) is not None:  # as cheaply as can be: before the body is read
                raise overload(seconds)
            check_content(headers)
            body = read(self.body, await read_body(receive, settings.max_body_bytes, settings.deadline_seconds))
            with _Watch(receive):
                response = await self.answer(body)
        except Refusal as error:
            response = refused(error)
        await response(scope, receive, send)


def check_key(given: bytes | None, keys: Sequence[bytes]) -> None:
    """Raises Refusal (401) unless `given` is one of `keys`, in a time that does not tell how much of it is right."""
    if given is None:
        raise Refusal(401, "api_key_missing", "This asks for a key; send it as the header X-API-Key.")
    if not sum(hmac.compare_digest(given, key) for key in keys):  # `any` would stop at the right one
        raise Refusal(401, "api_key_wrong", "The key in the header X-API-Key is not one that is allowed here.")


async def read_body(receive: Receive, limit: int, seconds: float) -> bytes:
    """At most `limit` bytes, all there within `seconds`, without a break of QUIET_SECONDS.

    Raises Refusal; what comes after it the server throws away.
    """
    now = asyncio.get_running_loop().time
    end, parts, size = now() + seconds, list[bytes](), 0
    try:
        async with asyncio.timeout(min(seconds, QUIET_SECONDS)) as limited:
            while True:
                message = await receive()
                parts.append(message.get("body", b""))
                size += len(parts[-1])
                if not message.get("more_body") or size > limit:
                    break
                limited.reschedule(min(end, now() + QUIET_SECONDS))
    except TimeoutError:
        least = f"The body was not there within {seconds:g} s, or nothing of it came for {QUIET_SECONDS:g} s; send it faster."
        raise Refusal(408, "body_too_slow", least) from None
    if message["type"] == "http.disconnect":
        raise Refusal(499, "gone", "The caller hung up.")  # nobody reads this; it is counted
    if size > limit:
        raise Refusal(413, "too_large", f"The request is larger than {limit} bytes, the most that is allowed.")
    return b"".join(parts)


class _Watch:
    """Cancels what it holds when the caller hangs up, so that no engine time is spent on nobody."""

    def __init__(self, receive: Receive) -> None:
        self.receive = receive
        self.caller: asyncio.Task[Any] | None = asyncio.current_task()
        self.task: asyncio.Task[None] | None = None
        self.gone = False

    def __enter__(self) -> None:
        self.loop = asyncio.get_running_loop()
        self.timer = self.loop.call_later(WATCH_AFTER_SECONDS, self._start)

    def _start(self) -> None:
        self.task = self.loop.create_task(self._watch())

    async def _watch(self) -> None:
        while (await self.receive())["type"] != "http.disconnect":
            pass
        self.gone = True
        if self.caller:
            self.caller.cancel()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.timer.cancel()
        if self.task:
            self.task.cancel()
        if self.gone and self.caller and self.caller.uncancel() == 0 and kind is asyncio.CancelledError:
            raise Refusal(499, "gone", "The caller hung up.") from None


def direct(routes: Mapping[str, PredictionRoute], app: Callable[[Scope, Receive, Send], Awaitable[None]]) -> Any:
    """ASGI: what is POSTed to one of `routes`, by path, goes there; the rest to `app`."""

    async def dispatch(scope: Scope, receive: Receive, send: Send) -> None:
        route = routes.get(scope["path"]) if scope["type"] == "http" and scope["method"] == "POST" else None
        if route is None:
            return await app(scope, receive, send)
        scope["route"] = route
        await route.respond(scope, receive, send)

    return dispatch
