"""The load generator: a process of its own that sends texts to a server and tells what came back, as JSON on stdout.

    python -m benchmarks.serving.load --url http://127.0.0.1:8000/predict --texts texts.jsonl --connections 32 --seconds 6
    python -m benchmarks.serving.load --url ... --texts ... --rate 400 --seconds 20       # open loop, Poisson arrivals

Closed loop: every connection sends its next request when the last one is answered. Open loop: requests arrive when they
arrive, however slow the server is, and a latency counts from the arrival, not from when a connection was free. Each line
of the texts is {"text": ..., "label": name or null}. Requests are bytes prepared beforehand and connections are kept
alive, so that the generator takes little of the cores it shares with the server; what it takes is measured and told.
Only the standard library is imported: it starts in a tenth of a second.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import itertools
import json
import math
import random
import re
import resource
import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

LENGTH = re.compile(rb"\r\ncontent-length: *(\d+)", re.IGNORECASE)
LABEL = re.compile(rb'"label" ?: ?"([^"]+)"')
TIMEOUT_SECONDS = 30.0
MOST_CONNECTIONS = 4096  # of an open loop; an arrival beyond them is an error
PAUSE_SECONDS = 0.05  # after an error, so that a refusing server is not asked in a tight loop


class Connection(asyncio.Protocol):
    """One keep-alive connection with at most one request on it."""

    def __init__(self) -> None:
        self.transport: asyncio.Transport
        self.answer: asyncio.Future[tuple[str, bytes]] | None = None  # (status or kind of failure, body)
        self.buffer = b""
        self.failure = "connection"
        self.asked = self.answered = 0.0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self.transport = transport

    def ask(self, request: bytes) -> asyncio.Future[tuple[str, bytes]]:
        self.answer = asyncio.get_running_loop().create_future()
        self.asked = time.perf_counter()
        self.transport.write(request)
        return self.answer

    def data_received(self, data: bytes) -> None:
        self.buffer += data
        head, blank, rest = self.buffer.partition(b"\r\n\r\n")
        if not blank or self.answer is None:
            return
        length = LENGTH.search(head)
        if length is None:
            self.fail("no content-length")
        elif len(rest) >= int(length[1]):
            self.buffer = b""
            self._settle(head[9:12].decode("ascii", "replace"), rest)
            if b"connection: close" in head.lower():
                self.transport.close()

    def connection_lost(self, error: Exception | None) -> None:
        self._settle(self.failure, b"")

    def fail(self, kind: str) -> None:
        self.failure = kind
        self.transport.abort()

    @property
    def waits_since(self) -> float | None:
        return self.asked if self.answer is not None and not self.answer.done() else None

    def _settle(self, outcome: str, body: bytes) -> None:
        if self.answer is not None and not self.answer.done():
            self.answered = time.perf_counter()
            self.answer.set_result((outcome, body))


@dataclass
class Tally:
    """What came back within the measured time. Seconds."""

    latencies: list[float] = field(default_factory=list)  # of answers with a label
    errors: Counter[str] = field(default_factory=Counter)  # by status or kind
    late: list[float] = field(default_factory=list)  # open loop: from arrival to sending
    right: int = 0  # the label is that of the row
    judged: int = 0  # the row has one

    @property
    def total(self) -> int:
        return len(self.latencies) + self.errors.total()


class Load:
    def __init__(self, url: str, rows: Sequence[dict[str, Any]], seed: int) -> None:
        """`rows` are {"text", "label"}; sent in an order that `seed` decides, again from the start after the last."""
        parts = urlsplit(url)
        assert parts.hostname and parts.port
        self.address = parts.hostname, parts.port
        order = random.Random(seed).sample(range(len(rows)), len(rows))
        self.requests = [(_request(parts.netloc, parts.path, rows[i]["text"]), _bytes(rows[i].get("label"))) for i in order]
        self.rows = itertools.cycle(self.requests)
        self.arrivals = random.Random(seed + 1)
        self.connections: set[Connection] = set()
        self.tally = Tally()
        self.recording = False
        self.over = asyncio.Event()
        self.most, self.report_every = 0, 0

    async def run(
        self, connections: int, seconds: float, warmup: float = 0.0, rate: float = 0.0, requests: int = 0, report_every: int = 0
    ) -> dict[str, Any]:
        """Load for `warmup` + `seconds`, or until `requests` are through; with `rate` (1/s) as an open loop."""
        self.most, self.report_every = requests, report_every
        watch = asyncio.create_task(self._watch())
        first = [await self._open() for _ in range(connections)]
        gc.collect()
        gc.freeze()  # the prepared requests are never garbage
        if rate:
            workers = [asyncio.create_task(self._arrivals([c for c in first if c], rate))]
        else:
            workers = [asyncio.create_task(self._repeat(connection)) for connection in first]
        await asyncio.sleep(warmup)
        self.tally, self.recording = Tally(), True
        began, cpu = time.perf_counter(), time.process_time()
        try:
            await asyncio.wait_for(self.over.wait(), seconds)
        except TimeoutError:
            self.over.set()
        if not rate:  # of a closed loop, what is answered in time counts
            self.recording = False
        took, cpu = time.perf_counter() - began, time.process_time() - cpu
        # Of an open loop, what arrived in time counts, so its answers are waited for.
        await asyncio.wait(workers, timeout=TIMEOUT_SECONDS + 5)
        watch.cancel()
        for connection in self.connections:
            connection.transport.abort()
        return summary(self.tally, took, cpu)

    async def _open(self) -> Connection | None:
        try:
            _, connection = await asyncio.get_running_loop().create_connection(Connection, *self.address)
        except OSError:
            return None
        self.connections.add(connection)
        return connection

    async def _repeat(self, connection: Connection | None) -> None:
        """One connection's closed loop."""
        while not self.over.is_set():
            if connection is None or connection.transport.is_closing():
                self.connections.discard(connection)  # type: ignore[arg-type]
                connection = await self._open()
            outcome = await self._ask(connection)
            if outcome != "200":
                await asyncio.sleep(PAUSE_SECONDS)

    async def _ask(self, connection: Connection | None, arrived: float | None = None) -> str:
        request, label = next(self.rows)
        recorded = self.recording  # of an open loop, the arrival counts
        if connection is None:
            outcome, body = "connection", b""
        else:
            outcome, body = await connection.ask(request)
        if self.recording if arrived is None else recorded:
            self._record(outcome, body, label, connection, arrived)
        return outcome

    def _record(self, outcome: str, body: bytes, label: bytes | None, connection: Connection | None, arrived: float | None) -> None:
        tally = self.tally
        if connection is not None and arrived is not None:
            tally.late.append(connection.asked - arrived)
        found = LABEL.search(body) if outcome == "200" and body[:1] == b"{" and body[-1:] == b"}" else None
        if found and connection is not None:
            tally.latencies.append(connection.answered - (connection.asked if arrived is None else arrived))
            if label is not None:
                tally.judged += 1
                tally.right += found[1] == label
        else:
            tally.errors["no label" if outcome == "200" else outcome] += 1
        if self.report_every and tally.total % self.report_every == 0:
            print(json.dumps({"requests": tally.total}), flush=True)
        if self.most and tally.total >= self.most:
            self.recording = False
            self.over.set()

    async def _arrivals(self, idle: list[Connection], rate: float) -> None:
        """An open loop: exponential gaps between arrivals, so a Poisson process. Ends when all are answered."""
        under_way: set[asyncio.Task[None]] = set()
        arrival = time.perf_counter()
        while not self.over.is_set():
            arrival += self.arrivals.expovariate(rate)
            if (wait := arrival - time.perf_counter()) > 0:
                await asyncio.sleep(wait)
            task = asyncio.create_task(self._one(idle, arrival))
            under_way.add(task)
            task.add_done_callback(under_way.discard)
        if under_way:
            await asyncio.wait(under_way)

    async def _one(self, idle: list[Connection], arrived: float) -> None:
        connection = None
        while idle and connection is None:
            connection = idle.pop()
            if connection.transport.is_closing():
                self.connections.discard(connection)
                connection = None
        if connection is None and len(self.connections) < MOST_CONNECTIONS:
            connection = await self._open()
        await self._ask(connection, arrived)
        if connection is not None:
            idle.append(connection)

    async def _watch(self) -> None:
        """Ends what is not answered in time."""
        while True:
            await asyncio.sleep(1)
            for connection in self.connections:
                since = connection.waits_since
                if since is not None and time.perf_counter() - since > TIMEOUT_SECONDS:
                    connection.fail("timeout")


def _request(host: str, path: str, text: str) -> bytes:
    body = json.dumps({"text": text}).encode()
    return f"POST {path} HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body


def _bytes(label: str | None) -> bytes | None:
    return None if label is None else json.dumps(label)[1:-1].encode()


def percentile(ordered: Sequence[float], share: float) -> float | None:
    """The nearest-rank percentile of sorted values: the smallest that at least `share` of them do not exceed."""
    return ordered[max(0, math.ceil(share * len(ordered)) - 1)] if ordered else None


def summary(tally: Tally, seconds: float, cpu_seconds: float) -> dict[str, Any]:
    """Answers are those with status 200 and a label; latencies in ms over all of them, and none where there is none."""
    ordered = sorted(1000 * latency for latency in tally.latencies)
    return {
        "seconds": seconds,
        "answers": len(ordered),
        "throughput": len(ordered) / seconds,
        "p50_ms": percentile(ordered, 0.5),
        "p99_ms": percentile(ordered, 0.99),
        "max_ms": percentile(ordered, 1.0),
        "errors": dict(tally.errors),
        "right": tally.right / tally.judged if tally.judged else None,
        "generator_us": 1e6 * cpu_seconds / max(1, tally.total),
        "generator_cores": cpu_seconds / seconds,
        "generator_late_p99_ms": percentile(sorted(1000 * late for late in tally.late), 0.99),
    }


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.serving.load", allow_abbrev=False)
    parser.add_argument("--url", required=True, help="With port and path: http://127.0.0.1:8000/predict.")
    parser.add_argument("--texts", required=True, type=Path, help="JSON lines of text and label.")
    parser.add_argument("--connections", type=int, default=32, help="At once; of an open loop, opened beforehand.")
    parser.add_argument("--seconds", type=float, default=6.0, help="Measured, after the warm-up.")
    parser.add_argument("--warmup", type=float, default=1.5, help="Seconds of the same load before.")
    parser.add_argument("--rate", type=float, default=0.0, help="Arrivals per second of an open loop; 0: closed loop.")
    parser.add_argument("--requests", type=int, default=0, help="Stop after so many; 0: after --seconds.")
    parser.add_argument("--report_every", type=int, default=0, help="A line of progress after so many requests; 0: none.")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(argv)
    rows = [json.loads(line) for line in options.texts.read_text(encoding="utf-8").splitlines()]
    most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))  # a connection is a file

    async def load() -> dict[str, Any]:
        return await Load(options.url, rows, options.seed).run(
            options.connections, options.seconds, options.warmup, options.rate, options.requests, options.report_every
        )

    print(json.dumps(asyncio.run(load())), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
