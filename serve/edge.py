"""What happens to every request at the edge: its id, the headers of its answer, its count and time, its line in the log.

Plain ASGI, outside of every other layer, so that the answer to a defect passes here too. The usual base class for
middleware copies every body through a queue and hides that a caller went away.
"""

from __future__ import annotations

import itertools
import logging
import re
import secrets
import time
from collections.abc import Callable

from prometheus_client import Counter, Histogram
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serve.answers import defect
from serve.logs import request_id
from serve.metrics import Metrics

log = logging.getLogger("serve")

_OWN_ID = re.compile(rb"[A-Za-z0-9._-]{1,64}")
_ALWAYS = [(b"x-content-type-options", b"nosniff"), (b"referrer-policy", b"no-referrer")]


class Edge:
    """`revision` gives the commit that serves; `access_log`: which answers get a line, none, errors (500 and above) or all."""

    def __init__(self, app: ASGIApp, *, metrics: Metrics, revision: Callable[[], str | None], access_log: str = "errors") -> None:
        self.app, self.metrics, self.revision = app, metrics, revision
        self.log_from = {"none": 1000, "errors": 500, "all": 0}[access_log]
        # Finding a labelled series takes longer than counting in it.
        self._counters: dict[tuple[str, int], Counter] = {}
        self._latencies: dict[str, Histogram] = {}
        start = secrets.token_hex(4)  # of this process; the random numbers of the system are too slow for every request
        self._ids = (f"{start}-{number}".encode() for number in itertools.count(1))

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        started, status = time.perf_counter(), 499  # 499: no answer was sent, the caller had gone
        identity = self._identify(scope)
        request_id.set(identity.decode())

        async def stamped(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                headers = [*message["headers"], *_ALWAYS, (b"x-request-id", identity)]
                if (commit := self.revision()) and not any(name == b"x-model-revision" for name, _ in headers):
                    headers.append((b"x-model-revision", commit.encode()))
                message["headers"] = headers
            await send(message)

        try:
            await self.app(scope, receive, stamped)
        except Exception as error:  # a defect of ours; the server would log its whole trace, with values in it
            log.error("a request met a defect", exc_info=error)
            if status == 499:
                await defect()(scope, receive, stamped)
        finally:
            # Only routes that exist, or a caller who tries paths would fill the memory.
            self._count(scope["method"], getattr(scope.get("route"), "path", "other"), status, time.perf_counter() - started)

    def _identify(self, scope: Scope) -> bytes:
        """The caller's own X-Request-ID if it is harmless, else a new one."""
        for name, value in scope["headers"]:
            if name == b"x-request-id" and _OWN_ID.fullmatch(value):
                return bytes(value)
        return next(self._ids)

    def _count(self, method: str, route: str, status: int, seconds: float) -> None:
        if (counter := self._counters.get((route, status))) is None:
            counter = self._counters[route, status] = self.metrics.requests.labels(route, status)
        counter.inc()
        if (latency := self._latencies.get(route)) is None:
            latency = self._latencies[route] = self.metrics.latency.labels(route)
        latency.observe(seconds)
        if status >= self.log_from and not (route == "/ready" and self.log_from):  # red is its answer, not an error
            level = logging.ERROR if status == 500 else logging.WARNING if status > 500 else logging.INFO
            milliseconds = round(1000 * seconds, 1)
            log.log(
                level, "%s %s %d in %s ms", method, route, status, milliseconds,
                extra={"route": route, "status": status, "milliseconds": milliseconds},
            )  # fmt: skip
