"""Callers who know the right answer: requests over keep-alive connections, every answer held against its commit.

What is not an answer of the commit that it names is kept in `wrong`; a request without any answer, or with one that the
service does not document, in `lost`; documented refusals in `refused`.
"""

from __future__ import annotations

import asyncio
import json
import random
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from benchmarks.soak.releases import Probabilities

TIMEOUT_SECONDS = 30.0  # far beyond the service's deadline for a request
REFUSALS = {(429, "overloaded"), *((503, code) for code in ("loading", "too_slow", "engine_down", "stopping"))}
POISON = "zebra"  # one token that no other text holds
AT_ONCE_SECONDS = 0.25  # a request that fails sooner met a closed connection


class Connection:
    """One keep-alive connection with at most one request on it."""

    def __init__(self, address: tuple[str, int]) -> None:
        self.address = address
        self._streams: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None

    @property
    def is_open(self) -> bool:
        return self._streams is not None

    async def open(self) -> None:
        self._streams = await asyncio.open_connection(*self.address)

    async def ask(self, method: str, path: str, body: Any = None, **headers: str) -> tuple[int, dict[str, str], bytes]:
        """Status, headers with names in lower case, body. Raises OSError, EOFError or ValueError where no whole answer comes."""
        if self._streams is None:
            await self.open()
        assert self._streams
        reader, writer = self._streams
        data = b"" if body is None else json.dumps(body).encode()
        head = {
            "Host": f"{self.address[0]}:{self.address[1]}",
            "Content-Type": "application/json",
            "Content-Length": str(len(data)),
            **headers,
        }
        lines = [f"{method} {path} HTTP/1.1", *(f"{name}: {value}" for name, value in head.items())]
        writer.write("\r\n".join(lines).encode() + b"\r\n\r\n" + data)
        first, *rest = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
        found = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in rest if line)}
        content = await reader.readexactly(int(found["content-length"]))
        if found.get("connection", "").lower() == "close":
            self.close()
        return int(first.split()[1]), found, content

    def close(self) -> None:
        if self._streams:
            self._streams[1].transport.abort()
        self._streams = None


@dataclass(frozen=True)
class Lost:
    """A request without an answer, or with one that is not documented. Times on the monotonic clock."""

    sent: float
    ended: float
    what: str
    connected: bool  # there was somebody to take it

    @property
    def turned_away(self) -> bool:
        """Nobody listened, or the connection turned out to be closed: the request was never begun."""
        return not self.connected or self.ended - self.sent < AT_ONCE_SECONDS


@dataclass
class Tally:
    """What came back."""

    answers: int = 0
    texts: int = 0
    slowest: float = 0.0  # seconds, of an answer with predictions
    commits: Counter[str] = field(default_factory=Counter)
    refused: Counter[str] = field(default_factory=Counter)  # by code
    lost: list[Lost] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)


class Truth:
    """What each commit answers to each text; None for one that must never answer."""

    def __init__(self, tolerance: float) -> None:
        self.tolerance = tolerance
        self._known: dict[str, Probabilities | None] = {}
        self._waiting: dict[str, list[tuple[Sequence[int], Probabilities]]] = {}

    def learn(self, commit: str, probabilities: Probabilities | None) -> list[str]:
        """From now on `commit` can be judged; what is wrong with its answers so far."""
        self._known[commit] = probabilities
        return [fault for rows, found in self._waiting.pop(commit, []) if (fault := self.judge(commit, rows, found))]

    def judge(self, commit: str, rows: Sequence[int], found: Probabilities) -> str | None:
        """What is wrong with answers `found`, (texts, classes), to the texts `rows`. Those of a commit not yet known wait."""
        if commit not in self._known:
            self._waiting.setdefault(commit, []).append((rows, found))
            return None
        expected = self._known[commit]
        if expected is None:
            return f"an answer in the name of {commit[:8]}, which is bad"
        off = np.abs(found - expected[rows]).max()
        if off <= self.tolerance:
            return None
        for other, known in self._known.items():
            if known is not None and np.abs(found - known[rows]).max() <= self.tolerance:
                return f"an answer in the name of {commit[:8]} is that of {other[:8]}"
        return f"an answer in the name of {commit[:8]} is off by {off:.3f}"

    def unknown(self) -> list[str]:
        """Commits that answered and that nobody published."""
        return sorted(self._waiting)


class Load:
    """`connections` callers, each with a pause of `pause` seconds on average between its requests."""

    def __init__(self, address: tuple[str, int], texts: Sequence[str], truth: Truth, connections: int = 16, pause: float = 0.05) -> None:
        self.address, self.texts, self.truth = address, texts, truth
        self.connections, self.pause = connections, pause
        self.tally = Tally()  # since it was last taken
        self.poison = False  # whether the text that an engine cannot take is among those asked
        self.waiting = 0  # requests that are sent and not answered
        self._over = False
        self._callers = [asyncio.create_task(self._call(random.Random(number))) for number in range(connections)]

    def take(self) -> Tally:
        """What came back since the last time."""
        taken, self.tally = self.tally, Tally()
        return taken

    def learn(self, commit: str, probabilities: Probabilities | None) -> None:
        self.tally.wrong += self.truth.learn(commit, probabilities)

    async def answered(self, commit: str, requests: int = 16) -> None:
        """Returns when `requests` more answers came from `commit`."""
        aim = self.tally.commits[commit] + requests
        while self.tally.commits[commit] < aim:
            await asyncio.sleep(0.01)

    async def stop(self) -> None:
        self._over = True
        await asyncio.gather(*self._callers)

    async def _call(self, draw: random.Random) -> None:
        connection = Connection(self.address)
        try:
            while not self._over:
                await asyncio.sleep(draw.uniform(0, 2 * self.pause))
                await self._ask(connection, draw)
        finally:
            connection.close()

    async def _ask(self, connection: Connection, draw: random.Random) -> None:
        is_poison = self.poison and draw.random() < 0.1
        rows = [] if is_poison else [draw.randrange(len(self.texts)) for _ in range(draw.choice((1, 1, 1, 1, 2, 8)))]
        texts = [POISON] if is_poison else [self.texts[row] for row in rows]
        path, body = ("/predict", {"text": texts[0]}) if len(texts) == 1 else ("/predict/batch", {"texts": texts})
        sent, connected = time.monotonic(), connection.is_open
        self.waiting += 1
        try:
            async with asyncio.timeout(TIMEOUT_SECONDS):
                if not connected:
                    await connection.open()
                    connected = True
                status, headers, content = await connection.ask("POST", path, body)
        except (OSError, EOFError, ValueError) as error:  # TimeoutError is an OSError
            self.tally.lost.append(Lost(sent, time.monotonic(), type(error).__name__, connected))
            connection.close()
            return
        finally:
            self.waiting -= 1
        self._judge(status, headers, content, rows, time.monotonic() - sent, sent)

    def _judge(self, status: int, headers: dict[str, str], content: bytes, rows: Sequence[int], seconds: float, sent: float) -> None:
        tally = self.tally
        try:
            answer = json.loads(content)
            if status == 200:
                predictions = answer.get("predictions", [answer])
                found = np.array([list(one["probabilities"].values()) for one in predictions])
                commit = answer["revision"]
            else:
                code = str(answer["code"])
        except (ValueError, KeyError, TypeError, AttributeError):
            tally.lost.append(Lost(sent, sent + seconds, f"status {status} and a body that is none of the service's", True))
            return
        if not rows and (status, None if status == 200 else code) != (422, "text_fails"):
            tally.wrong.append(f"the text that the engine fails on got {status}")
        elif not rows:
            tally.refused[code] += 1
        elif status != 200:
            if (status, code) in REFUSALS:
                tally.refused[code] += 1
            else:
                tally.lost.append(Lost(sent, sent + seconds, f"{status} {code}", True))
        else:
            tally.answers += 1
            tally.texts += len(rows)
            tally.commits[commit] += 1
            tally.slowest = max(tally.slowest, seconds)
            if commit != headers.get("x-model-revision"):
                tally.wrong.append("the header names another commit than the body")
            elif len(found) != len(rows):
                tally.wrong.append(f"{len(found)} answers to {len(rows)} texts")
            elif fault := self.truth.judge(commit, rows, found):
                tally.wrong.append(fault)
