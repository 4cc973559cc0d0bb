"""What the soak plays with: a Hub, the line to it, and the service as a process that is started again where it ends."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import psutil

from benchmarks.common import ROOT, kill
from benchmarks.soak.load import Connection

PATIENCE_SECONDS = 90.0  # for whatever has to come about
ADMIN_KEY = "soak"
MIB = 1 << 20


class NotHeld(Exception):
    """Something did not hold; its text says what."""


async def until(what: Callable[[], Any], said: str, seconds: float = PATIENCE_SECONDS) -> float:
    """Waits for `what()` to be true, or its result where it is awaitable; returns the seconds it took. Raises NotHeld."""
    began = time.monotonic()
    while True:
        found = what()
        if found if not asyncio.iscoroutine(found) else await found:
            return time.monotonic() - began
        if time.monotonic() - began > seconds:
            raise NotHeld(f"not within {seconds:.0f} s: {said}")
        await asyncio.sleep(0.02)


class Line:
    """A TCP line to the Hub that can be cut, slow or down. The Hub's answers name the address that it was asked at, so all go this way."""

    def __init__(self, hub_url: str) -> None:
        host, _, port = hub_url.removeprefix("http://").partition(":")
        self._hub = host, int(port)
        self._server: asyncio.Server | None = None
        self._pipes: set[asyncio.Task[None]] = set()
        self.port = 0
        self.cut_after: int | None = None  # bytes that come from the Hub before the connection breaks
        self.bytes_per_second: float | None = None  # from the Hub; 0: nothing comes
        self.cuts = 0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    async def up(self) -> None:
        if self._server is None:
            self._server = await asyncio.start_server(self._connected, "127.0.0.1", self.port)
            self.port = self._server.sockets[0].getsockname()[1]

    async def down(self) -> None:
        """Connections are refused, and those there are break."""
        if self._server is not None:
            self._server.close()
            self._server = None
        for pipe in list(self._pipes):
            pipe.cancel()
        if self._pipes:
            await asyncio.wait(self._pipes)

    async def heal(self) -> None:
        self.cut_after = self.bytes_per_second = None
        await self.up()

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task
        self._pipes.add(task)
        try:
            hub_reader, hub_writer = await asyncio.open_connection(*self._hub)
            try:
                there = asyncio.create_task(_copy(reader, hub_writer))
                await self._back(hub_reader, writer)
                there.cancel()
            finally:
                hub_writer.transport.abort()
        except (OSError, asyncio.CancelledError):
            pass
        finally:
            writer.transport.abort() if self._broken else writer.close()
            self._pipes.discard(task)

    @property
    def _broken(self) -> bool:
        return self._server is None or self.cut_after is not None

    async def _back(self, hub: asyncio.StreamReader, service: asyncio.StreamWriter) -> None:
        seen = 0
        while data := await hub.read(1 << 14):
            seen += len(data)
            if self.cut_after is not None and seen > self.cut_after:
                self.cuts += 1
                return
            while self.bytes_per_second == 0:
                await asyncio.sleep(0.05)
            if self.bytes_per_second:
                await asyncio.sleep(len(data) / self.bytes_per_second)
            service.write(data)
            await service.drain()


async def _copy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    with contextlib.suppress(OSError):
        while data := await reader.read(1 << 16):
            writer.write(data)
            await writer.drain()


class ServiceProcess:
    """The service on one port, in one process after another. Its log is one file, `log`."""

    def __init__(self, folder: Path, environment: dict[str, str], arguments: Sequence[str]) -> None:
        folder.mkdir(parents=True)
        self.flags, self.log, self.home = folder / "flags", folder / "log", folder / "home"
        self.flags.mkdir()
        self.home.mkdir()
        own = {"HF_HOME": str(self.home), "DISTRINEWS_ADMIN_KEY": ADMIN_KEY, "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
        self.environment = {**os.environ, **environment, **own}
        self.arguments = list(arguments)
        self.port = 0
        self.process: subprocess.Popen[str] | None = None
        self.memory: list[list[float]] = []  # of each process, MiB resident, in order of time

    async def start(self, prefix: Sequence[str] = (), seconds: float = PATIENCE_SECONDS) -> float:
        """Starts it, at the port it had before; returns the seconds until it is ready. Raises NotHeld."""
        began = time.monotonic()
        seen = self.log.stat().st_size if self.log.exists() else 0
        command = [*prefix, sys.executable, "-m", "benchmarks.soak.server", str(self.flags), *self.arguments, "--port", str(self.port)]
        with self.log.open("a", encoding="utf-8") as log:
            self.process = subprocess.Popen(command, cwd=ROOT, env=self.environment, stdout=log, stderr=log, text=True)
        self.memory.append([])
        await until(lambda: self.lives() and "listening on" in self.said(seen), "the service listens", seconds)
        if found := re.search(r"listening on http://[^:]+:(\d+)", self.said(seen)):
            self.port = int(found[1])
        await until(self.is_ready, "the service is ready", seconds)
        return time.monotonic() - began

    def lives(self) -> bool:
        """Raises NotHeld where it has ended though nobody asked it to."""
        assert self.process
        if self.process.poll() is not None:
            raise NotHeld(f"the service ended with code {self.process.returncode}: {self.said()[-300:]!r}")
        return True

    def said(self, since: int = 0) -> str:
        return self.log.read_bytes()[since:].decode("utf-8", "replace")

    async def end(self, number: int = signal.SIGTERM) -> tuple[int, float]:
        """Sends the signal; returns exit code and seconds it took. What it leaves of its children is ended. Raises NotHeld."""
        assert self.process
        children = psutil.Process(self.process.pid).children(recursive=True)
        self.process.send_signal(number)
        code, seconds = await self.exit()
        _, left = await asyncio.to_thread(psutil.wait_procs, children, 3)
        kill(left)
        if left:
            raise NotHeld(f"{len(left)} child process(es) of the service outlived it by 3 s")
        return code, seconds

    async def exit(self, seconds: float = PATIENCE_SECONDS) -> tuple[int, float]:
        """Waits for its end; returns exit code and seconds waited. Raises NotHeld."""
        process = self.process
        assert process
        took = await until(lambda: process.poll() is not None, "the service ends", seconds)
        return process.returncode, took

    def kill(self) -> None:
        """Whatever state it is in."""
        if self.process and self.process.poll() is None:
            children = psutil.Process(self.process.pid).children(recursive=True)
            self.process.kill()
            self.process.wait()
            kill(children)

    def weigh(self) -> None:
        if self.process and self.process.poll() is None:
            self.memory[-1].append(psutil.Process(self.process.pid).memory_info().rss / MIB)

    async def ask(self, method: str, path: str, **headers: str) -> tuple[int, Any]:
        """Status and JSON. Raises OSError, EOFError."""
        connection = Connection(("127.0.0.1", self.port))
        try:
            async with asyncio.timeout(60):
                status, _, content = await connection.ask(method, path, **headers)
            return status, json.loads(content)
        finally:
            connection.close()

    async def is_ready(self) -> bool:
        """Raises NotHeld where it has ended."""
        with contextlib.suppress(OSError, EOFError):
            return self.lives() and (await self.ask("GET", "/ready"))[0] == 200
        return False

    async def info(self) -> dict[str, Any]:
        found: dict[str, Any] = (await self.ask("GET", "/info"))[1]
        return found

    async def serves(self, commit: str) -> bool:
        return self.lives() and bool((await self.info()).get("commit") == commit)

    async def refuses(self, commit: str) -> bool:
        return self.lives() and commit in {one["commit"] for one in (await self.info())["updates"]["refused"]}

    async def hub_trouble(self) -> str | None:
        hub: str | None = (await self.info())["updates"]["hub"]
        return None if hub == "reachable" else hub
