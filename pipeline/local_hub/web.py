"""From HTTP to a plain function and back: routing, the caller's rights, bodies within limits, refusals, pages.

A handler is a synchronous function of a `Call` registered with `@route`; it runs in a worker thread, off the event
loop. Revisions and paths arrive percent-encoded (dev%2Fx is one segment), so routes match the raw path.
"""

from __future__ import annotations

import errno
import json
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import islice
from typing import IO, Any, Protocol, TypeVar
from urllib.parse import parse_qs, unquote, urlencode

from starlette.concurrency import run_in_threadpool
from starlette.convertors import Convertor, register_url_convertor
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from pipeline.local_hub.accounts import Accounts, Caller
from pipeline.local_hub.errors import HubError, bad_request, repo_not_found
from pipeline.local_hub.store import Repository, Store

MIB = 1 << 20
JSON_LIMIT = 32 * MIB
ANONYMOUS_LIMIT = MIB  # nobody in particular has little to send
PAGE_SIZE = 1000

ROUTES: list[Route] = []
T = TypeVar("T")


class Writable(Protocol):
    def write(self, data: bytes, /) -> object: ...


class _Kind(Convertor[str]):
    regex = "models|datasets|spaces"

    def convert(self, value: str) -> str:
        return value

    def to_string(self, value: str) -> str:
        return value


register_url_convertor("kind", _Kind())


class RawPath:
    """ASGI middleware: route on the path as it was sent; the server has already decoded %2F in the other one."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            scope["path"] = scope["raw_path"].decode("ascii", "replace").rstrip("/") or "/"
        await self.app(scope, receive, send)


@dataclass
class Call:
    """One request as a handler sees it."""

    request: Request
    store: Store
    caller: Caller
    body: IO[bytes]

    def path(self, name: str) -> str:
        return unquote(self.request.path_params.get(name, ""))

    def query(self, name: str) -> str:
        return self.request.query_params.get(name, "")

    def flag(self, name: str) -> bool:
        return self.query(name).lower() in ("true", "1")

    @property
    def base(self) -> str:
        """http://host:port as the client wrote it: it refuses URLs of any other host."""
        return str(self.request.base_url).rstrip("/")

    def json(self) -> dict[str, Any]:
        try:
            found = json.loads(self.body.read() or b"{}")
            json.dumps(found, ensure_ascii=False).encode()  # half a surrogate pair is JSON, but no text we could answer with
        except (ValueError, RecursionError) as error:
            raise bad_request("The body is not JSON.") from error
        if not isinstance(found, dict):
            raise bad_request("The body is not a JSON object.")
        return found

    def form(self) -> dict[str, list[str]]:
        return parse_qs(self.body.read().decode("utf-8", "replace"))

    def listed(self, body: dict[str, Any], name: str) -> list[dict[str, Any]]:
        """The list of objects `name` of a body; empty when absent."""
        found = body.get(name) or []
        if not isinstance(found, list) or not all(isinstance(item, dict) for item in found):
            raise bad_request(f"{name} is a list of objects.")
        return found

    @property
    def repo(self) -> Repository:
        return self.repository(self.path("kind") or "models", self.path("ns"), self.path("name"))

    def repository(self, kind: str, namespace: str, name: str) -> Repository:
        """The repository if the caller may see it. Raises HubError RepoNotFound, or a 307 to the id in its own case."""
        asked = f"{namespace}/{name}" if namespace else name
        repo = self.store.find(kind, namespace, name)
        if repo is None or (repo.meta()["private"] and not self.caller.member_of(repo.namespace)):
            raise repo_not_found(asked, anonymous=self.caller.user is None)
        path = self.request.scope["path"]
        if repo.id != asked and f"/{asked}" in path:
            path = path.replace(f"/{asked}", f"/{repo.id}", 1)
            query = self.request.scope["query_string"].decode("ascii", "replace")
            raise HubError(307, f"This repository is called {repo.id}", Location=f"{path}?{query}" if query else path)
        return repo

    def writable(self, repo: Repository) -> Repository:
        self.caller.require_write(repo.namespace)
        return repo

    def page(self, items: Iterable[Any], path: str, largest: int = PAGE_SIZE) -> tuple[list[Any], dict[str, str]]:
        """One page of `items` and, when more follow, the `Link` header to the next page, which is at `path`."""
        try:
            start, size = int(self.query("cursor") or 0), int(self.query("limit") or largest)
        except ValueError as error:
            raise bad_request("cursor and limit are whole numbers.") from error
        if not 0 <= start < 1 << 32 or size < 1:
            raise bad_request("cursor is at least 0 and limit at least 1.")
        size = min(size, largest)
        found = list(islice(items, start, start + size + 1))
        if len(found) <= size:
            return found, {}
        kept = [(key, value) for key, value in self.request.query_params.multi_items() if key != "cursor"]
        link = f"{self.base}{path}?{urlencode([*kept, ('cursor', start + size)])}"
        return found[:size], {"Link": f'<{link}>; rel="next"'}


def route(method: str, *paths: str, limit: int = JSON_LIMIT) -> Callable[[Callable[[Call], Any]], Callable[[Call], Any]]:
    """Register a handler. It returns a Response or what JSON can hold; `limit` is the largest body, in bytes."""

    def register(handler: Callable[[Call], Any]) -> Callable[[Call], Any]:
        async def endpoint(request: Request) -> Response:
            accounts: Accounts = request.app.state.accounts

            caller = await in_thread(accounts.authenticate, request.headers.get("Authorization"))
            with tempfile.SpooledTemporaryFile(max_size=MIB, dir=request.app.state.store.temp) as body:
                await receive(request, body, limit if caller.user else ANONYMOUS_LIMIT)
                body.seek(0)
                answer = await in_thread(handler, Call(request, request.app.state.store, caller, body))
            return answer if isinstance(answer, Response) else JSONResponse(answer)

        ROUTES.extend(Route(path, endpoint, methods=[method]) for path in paths)
        return handler

    return register


async def receive(request: Request, into: Writable, limit: int) -> int:
    """Stream the body into `into`, a MiB at a time; returns its bytes. Raises HubError 413 above `limit` bytes."""
    buffer, total = bytearray(), 0
    async for chunk in request.stream():
        total += len(chunk)
        if total > limit:
            raise HubError(413, f"The body is larger than the {limit} bytes allowed here.")
        buffer += chunk
        if len(buffer) >= MIB:
            await in_thread(into.write, bytes(buffer))
            buffer.clear()
    if buffer:
        await in_thread(into.write, bytes(buffer))
    return total


async def in_thread(function: Callable[..., T], *arguments: Any) -> T:
    """Run blocking work off the event loop; the disk's troubles become refusals."""
    try:
        return await run_in_threadpool(function, *arguments)
    except OSError as error:
        raise _disk_error(error) from error


def _disk_error(error: OSError) -> Exception:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return HubError(507, "The Hub's disk is full: free some space there and try again.")
    if isinstance(error, FileNotFoundError):
        return HubError(404, "The repository was deleted or moved meanwhile.", "RepoNotFound")
    return error


async def refuse(request: Request, error: Exception) -> Response:
    assert isinstance(error, HubError)
    return error.response()


async def no_such_route(request: Request, error: Exception) -> Response:
    status = getattr(error, "status_code", 404)
    return HubError(status, f"The local Hub does not offer {request.method} {request.scope['path']}").response()


async def gone(request: Request, error: Exception) -> Response:
    """The client hung up in the middle of its upload: nobody to answer, and nothing worth a traceback."""
    return Response(status_code=400)
