"""What is measured: the parts of the serving benchmark. Each returns what goes into the results, JSON all through."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.common import ROOT, interleave
from benchmarks.serving.servers import SERVERS, Running, Scales, ServerError, rss_mib, uss_mib
from pipeline.errors import UserError

LOADED = 32  # connections where one load stands for a busy service
FULL = 128  # connections that fill every batch
NEIGHBOUR = "import time\nend = time.monotonic() + {seconds}\nwhile time.monotonic() < end: pass"
ENDURANCE_EVERY, ENDURANCE_SETTLED = 1000, 10_000


@dataclass
class Bench:
    """What all parts share: the release, the texts, the servers to compare, how long and how often."""

    model: Path
    texts: Path  # JSON lines for the load generator
    folder: Path  # for logs, and what our service remembers between starts
    servers: list[str]
    rounds: int
    seconds: float
    warmup: float
    starts: int
    concurrency: list[int]
    requests: int
    overload_seconds: float
    left_out: dict[str, str] = field(default_factory=dict)
    engines: dict[str, dict[str, Any]] = field(default_factory=dict)

    def start(self, name: str) -> Running:
        return Running(SERVERS[name], self.model, self.folder)

    def ready(self, running: Running) -> float:
        """Waits until it answers and has chosen its engine; returns the seconds to the first answer."""
        seconds = running.first_answer()
        about = running.settle()
        if about:
            self.engines[running.server.name] = {
                key: about.get(key) for key in ("engine", "precision", "threads", "versions", "rejected_engines")
            }
        return seconds

    @contextmanager
    def held(self, names: Sequence[str]) -> Iterator[dict[str, Running]]:
        """These servers, started and held still; who does not start is left out, and the results say why."""
        with ExitStack() as stack:
            running: dict[str, Running] = {}
            for name in names:
                say(f"starting {name}")
                with ExitStack() as attempt:
                    server = attempt.enter_context(self.start(name))
                    try:
                        self.ready(server)
                    except ServerError as error:
                        self.leave_out(name, str(error))
                        continue
                    server.hold()
                    running[name] = server
                    stack.enter_context(attempt.pop_all())
            if not running:
                raise UserError(f"no server could be started: {'; '.join(self.left_out.values())}")
            yield running

    def leave_out(self, name: str, reason: str) -> None:
        self.left_out[name] = reason.replace(str(self.model), "MODEL")
        say(f"{name} is left out: {self.left_out[name]}")

    def load(self, running: Running, *options: str | float, seconds: float = 0, warmup: float | None = None) -> dict[str, Any]:
        """The generator's result. Raises ServerError where the server ends meanwhile."""
        command = self.generator(running, *options, seconds=seconds, warmup=warmup)
        limit = (seconds or self.seconds) + 120
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=limit, check=False)
        if done.returncode:
            raise RuntimeError(f"the load generator failed: {done.stderr[-2000:]}")
        if running.process.poll() is not None:
            raise ServerError(f"{running.server.name} ended under load with code {running.process.returncode}.")
        return json.loads(done.stdout)

    def generator(self, running: Running, *options: str | float, seconds: float = 0, warmup: float | None = None) -> list[str]:
        return [sys.executable, "-m", "benchmarks.serving.load", "--url", running.url, "--texts", str(self.texts), "--seconds",
                str(seconds or self.seconds), "--warmup", str(self.warmup if warmup is None else warmup), *map(str, options)]  # fmt: skip


def say(line: str) -> None:
    print(f"{time.strftime('%H:%M:%S')}  {line}", flush=True)


def columns(cells: Sequence[dict[str, Any]]) -> dict[str, list[Any]]:
    """A list of rounds to a list per figure, rounded to what is meaningful."""
    return {key: [_round(cell[key]) for cell in cells] for key in cells[0]}


def _round(value: Any) -> Any:
    return float(f"{value:.5g}") if isinstance(value, float) else value


def in_turns(variants: dict[str, Callable[[], dict[str, Any]]], rounds: int) -> dict[str, dict[str, list[Any]]]:
    """Every variant once a round, each round beginning with another; the figures by variant."""
    return {name: columns(cells) for name, cells in interleave(variants, rounds).items()}


def table(bench: Bench) -> dict[str, Any]:
    """Closed loops: throughput, latencies and errors of every server at every concurrency."""
    cells: dict[str, dict[str, Any]] = {}
    with bench.held(bench.servers) as servers:
        for connections in bench.concurrency:

            def cell(name: str, connections: int = connections) -> dict[str, Any]:
                server = servers[name]
                server.go_on()
                result = bench.load(server, "--connections", connections, "--seed", connections)
                server.hold()
                say(
                    f"{name:17} c={connections:<4} {result['throughput']:7.1f}/s  p99 {result['p99_ms'] or 0:7.1f} ms  errors {result['errors']}"
                )
                return result

            rows = in_turns({name: lambda name=name: cell(name) for name in servers}, bench.rounds)  # type: ignore[misc]
            for name, row in rows.items():
                cells.setdefault(name, {})[str(connections)] = row
    return {"rounds": bench.rounds, "seconds": bench.seconds, "concurrency": bench.concurrency, "cells": cells}


def start(bench: Bench) -> dict[str, Any]:
    """Seconds from the process's start to its first answer, and peak memory from start to the end of a load.

    A first start of each, with nothing remembered, is weighed apart: our service tries its engines then, in processes of
    their own. It also brings every file into the page cache, so that the starts after it find them there.
    """
    memory: dict[str, dict[str, float]] = {}
    for name in bench.servers:
        try:
            with bench.start(name) as running, Scales(running) as scales:
                bench.ready(running)
                first = {"first_peak_rss_mib": scales.peak()}
            with bench.start(name) as running, Scales(running) as scales:
                bench.ready(running)
                for connections in (LOADED, FULL):
                    bench.load(running, "--connections", connections)
                family = running.family()
                memory[name] = {**first, "peak_rss_mib": scales.peak(), "uss_mib": uss_mib(family), "processes": len(family)}
                say(f"{name:17} peak {memory[name]['peak_rss_mib']:.0f} MiB")
        except ServerError as error:
            bench.leave_out(name, str(error))

    def once(name: str) -> dict[str, Any]:
        with bench.start(name) as running:
            seconds = running.first_answer()
        say(f"{name:17} first answer after {seconds:.2f} s")
        return {"first_answer_s": seconds}

    rows = in_turns({name: lambda name=name: once(name) for name in memory}, bench.starts)  # type: ignore[misc]
    return {
        "starts": bench.starts,
        "servers": {name: rows[name] | {key: _round(value) for key, value in memory[name].items()} for name in memory},
    }


@contextmanager
def neighbour_process(seconds: float) -> Iterator[None]:
    """A process that keeps one core busy, at most for `seconds`."""
    process = subprocess.Popen([sys.executable, "-c", NEIGHBOUR.format(seconds=seconds)])
    try:
        yield
    finally:
        process.kill()
        process.wait()


def neighbour(bench: Bench) -> dict[str, Any]:
    """Closed loop alone and beside a process that holds one core, in turns."""
    with bench.held(bench.servers) as servers:

        def cell(name: str, disturbed: bool) -> dict[str, Any]:
            server = servers[name]
            server.go_on()
            with neighbour_process(bench.seconds + bench.warmup + 60) if disturbed else ExitStack():
                result = bench.load(server, "--connections", LOADED)
            server.hold()
            say(
                f"{name:17} {'beside a busy process' if disturbed else 'alone':22} {result['throughput']:7.1f}/s  p99 {result['p99_ms'] or 0:.1f} ms"
            )
            return result

        pairs = {(name, disturbed): None for name in servers for disturbed in (False, True)}
        rows = in_turns({f"{name} {int(on)}": lambda name=name, on=on: cell(name, on) for name, on in pairs}, bench.rounds)  # type: ignore[misc]
    return {
        "rounds": bench.rounds,
        "seconds": bench.seconds,
        "concurrency": LOADED,
        "cells": {name: {"alone": rows[f"{name} 0"], "disturbed": rows[f"{name} 1"]} for name in servers},
    }


def overload(bench: Bench) -> dict[str, Any]:
    """Our service in an open loop at its capacity and at twice that. Capacity is what a closed loop of many callers gets."""
    with bench.start("ours") as running:
        bench.ready(running)
        capacity = bench.load(running, "--connections", FULL, seconds=bench.overload_seconds)["throughput"]
        if not capacity:
            raise ServerError("this service answered nothing at 128 connections.")
        say(f"capacity {capacity:.0f}/s")

        def cell(times: int) -> dict[str, Any]:
            with Scales(running) as scales:
                options = ("--connections", FULL, "--rate", times * capacity)
                result = bench.load(running, *options, seconds=bench.overload_seconds, warmup=bench.overload_seconds / 2)
            say(f"{times} x capacity: accepted {result['throughput']:.1f}/s  p99 {result['p99_ms'] or 0:.1f} ms  errors {result['errors']}")
            refused = result["errors"].get("429", 0)
            total = result["answers"] + sum(result["errors"].values())
            return result | {"refused_share": refused / max(1, total), "rss_mib": max(scales.rss)}

        rows = in_turns({str(times): lambda times=times: cell(times) for times in (1, 2)}, bench.rounds)  # type: ignore[misc]
    return {"rounds": bench.rounds, "seconds": bench.overload_seconds, "capacity": _round(capacity), "cells": rows}


def endurance(bench: Bench) -> dict[str, Any]:
    """Memory of our service over many requests, weighed every thousand."""
    with bench.start("ours") as running:
        bench.ready(running)
        options = ("--connections", LOADED, "--requests", bench.requests, "--report_every", ENDURANCE_EVERY)
        command = bench.generator(running, *options, seconds=4 * 3600, warmup=0)
        samples: list[tuple[int, float, float]] = []
        result: dict[str, Any] = {}
        with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as generator:
            try:
                assert generator.stdout
                for line in generator.stdout:
                    result = json.loads(line)
                    if "requests" in result:
                        family = running.family()
                        samples.append((result["requests"], round(rss_mib(family), 1), round(uss_mib(family), 1)))
                        if len(samples) % 20 == 1:
                            say(f"{samples[-1][0]} requests, {samples[-1][1]:.0f} MiB")
            finally:
                generator.kill()
        if "throughput" not in result:
            raise RuntimeError("the load generator ended early.")
        if running.process.poll() is not None:
            raise ServerError(f"{running.server.name} ended under load with code {running.process.returncode}.")
    names = ("requests", "rss_mib", "uss_mib")
    return {
        "requests": bench.requests,
        "concurrency": LOADED,
        "settled_after": ENDURANCE_SETTLED,
        "samples": {name: [sample[i] for sample in samples] for i, name in enumerate(names)},
        "result": {key: _round(value) for key, value in result.items()},
    }


PARTS: dict[str, Callable[[Bench], dict[str, Any]]] = {
    "table": table,
    "start": start,
    "neighbour": neighbour,
    "overload": overload,
    "endurance": endurance,
}
