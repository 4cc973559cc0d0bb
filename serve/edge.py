"""What happens to every request at the edge: the limit on its size, the revision in its answer, its count and time.

Plain ASGI: the usual base class for middleware copies every body through a queue and hides that a caller went away.
"""

from __future__ import annotations

import time
from collections.abc import Callable

from starlette.datastructures import MutableHeaders
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serve.metrics import Metrics


class Edge:
    def __init__(self, app: ASGIApp, *, metrics: Metrics, max_body_bytes: int, revision: Callable[[], str | None]) -> None:
        self.app, self.metrics, self.max_body_bytes, self.revision = app, metrics, max_body_bytes, revision

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        started, status, size = time.perf_counter(), 499, 0  # 499: no answer was sent, the caller had gone

        async def limited() -> Message:
            nonlocal size
            message = await receive()
            size += len(message.get("body", b""))
            if size <= self.max_body_bytes:
                return message
            # Read on a little, and throw it away: an answer to a caller who is still sending would be lost with the
            # connection's reset.
            while message.get("more_body") and size < 16 * self.max_body_bytes:
                message = await receive()
                size += len(message.get("body", b""))
            raise HTTPException(413, f"The request is larger than {self.max_body_bytes} bytes, the most that is allowed.")

        async def stamped(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                headers = MutableHeaders(scope=message)
                headers["X-Content-Type-Options"] = "nosniff"
                if "X-Model-Revision" not in headers and (revision := self.revision()):
                    headers["X-Model-Revision"] = revision
            await send(message)

        try:
            await self.app(scope, limited, stamped)
        except Exception:
            status = 500  # answered further out
            raise
        finally:
            # Only routes that exist, or a caller who tries paths would fill the memory.
            route = getattr(scope.get("route"), "path", "other")
            self.metrics.requests.labels(route, status).inc()
            self.metrics.latency.labels(route).observe(time.perf_counter() - started)
