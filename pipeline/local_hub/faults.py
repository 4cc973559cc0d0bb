"""What a Hub does on a bad day, on purpose: for tests of whatever must survive it.

    with HubProcess(faults=True) as hub:
        hub.fault(Fault("stall"))                                       every request from now on
        hub.fault(Fault("status", status=429, retry_after=2, times=3))  the next three
        hub.fault(Fault("cut", method="PUT", after=1))                  every upload but the first
        hub.heal()

The switch is the file ROOT/fault.json, read when it changes. Only a server started with the hidden option `--faults`
looks at it, so no Hub misbehaves by accident. (A Hub that is gone altogether is `HubProcess.vanish`, a token that is
no longer good `HubProcess.revoke`.)
"""

from __future__ import annotations

import asyncio
import json
import re
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from pipeline.local_hub.errors import HubError


@dataclass(frozen=True)
class Fault:
    """One fault and the requests it hits.

    refuse: the connection is closed without an answer. stall: no answer until healed, then the request goes on.
    cut: the connection is closed after `bytes` bytes of the body; a smaller body passes. lost: the request is carried
    out, its answer is not delivered. status: refused with `status`.
    """

    kind: Literal["refuse", "stall", "cut", "lost", "status"]
    method: str = ""  # regular expressions, found anywhere in it; empty: all
    path: str = ""
    after: int = 0  # matching requests that pass first
    times: int | None = None  # requests hit then; None: all
    bytes: int = 1000
    status: int = 503
    retry_after: int | None = None  # seconds


class Switch:
    """The file that says which fault is on."""

    def __init__(self, root: Path) -> None:
        self.path, self.log = root / "fault.json", root / "faults.log"

    def set(self, fault: Fault) -> None:
        fresh = self.path.with_suffix(".new")
        fresh.write_text(json.dumps(asdict(fault)))
        fresh.replace(self.path)

    def clear(self) -> None:
        self.path.unlink(missing_ok=True)

    def read(self) -> tuple[object, Fault | None]:
        """Something that changes with every `set`, and the fault; (None, None) when all is well."""
        try:
            facts = self.path.stat()
            return (facts.st_mtime_ns, facts.st_ino), Fault(**json.loads(self.path.read_text()))
        except FileNotFoundError:
            return None, None


class Faults:
    """ASGI middleware in front of the whole Hub."""

    def __init__(self, app: ASGIApp, root: Path) -> None:
        self.app, self.switch = app, Switch(root)
        self._since: object = None  # when the fault was set
        self._seen = 0  # matching requests since then

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or (fault := self._due(scope)) is None:
            await self.app(scope, receive, send)
        elif fault.kind == "status":
            await self._answer(fault, scope, receive, send)
        elif fault.kind == "stall":
            while self.switch.read()[1] == fault:
                await asyncio.sleep(0.05)
            await self.app(scope, receive, send)
        elif fault.kind == "refuse":
            await _hang_up(receive)
        elif fault.kind == "lost":
            await self.app(scope, receive, _swallow)
            await _hang_up(receive)
        else:
            await self.app(scope, _cutting(receive, fault.bytes), send)

    def _due(self, scope: Scope) -> Fault | None:
        since, fault = self.switch.read()
        if since != self._since:
            self._since, self._seen = since, 0
        path = scope["raw_path"].decode("ascii", "replace")
        if fault is None or not re.search(fault.method, scope["method"]) or not re.search(fault.path, path):
            return None
        self._seen += 1
        if self._seen <= fault.after or (fault.times is not None and self._seen > fault.after + fault.times):
            return None
        with self.switch.log.open("a") as log:
            log.write(f"{fault.kind} {scope['method']} {path}\n")
        return fault

    async def _answer(self, fault: Fault, scope: Scope, receive: Receive, send: Send) -> None:
        while (await receive()).get("more_body"):  # else the client sees a broken pipe instead of the answer
            pass
        headers = {} if fault.retry_after is None else {"Retry_After": str(fault.retry_after)}
        await HubError(fault.status, "The local Hub was told to refuse this.", **headers).response()(scope, receive, send)


async def _hang_up(receive: Receive) -> None:
    """Close the connection under the request. ASGI has no word for it, so this reaches for uvicorn's transport."""
    cycle: Any = getattr(receive, "__self__", None)
    assert cycle is not None and hasattr(cycle, "transport"), "faults work under uvicorn, outside of other middleware"
    cycle.transport.abort()
    while not cycle.disconnected:
        await asyncio.sleep(0)


async def _swallow(message: Message) -> None:
    pass


def _cutting(receive: Receive, limit: int) -> Receive:
    seen = 0

    async def cut() -> Message:
        nonlocal seen
        message = await receive()
        seen += len(message.get("body", b""))
        if seen <= limit:
            return message
        await _hang_up(receive)
        return {"type": "http.disconnect"}

    return cut
