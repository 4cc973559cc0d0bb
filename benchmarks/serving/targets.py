"""What the serving benchmark is held against: every bound, and its figure computed from the results."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from benchmarks.common import ratio
from benchmarks.serving.servers import SERVERS

PEERS = [name for name, server in SERVERS.items() if server.is_peer]
FP32_PEERS = [name for name in PEERS if SERVERS[name].dtype == "float32"]
AT_LEAST, AT_MOST = "at least", "at most"


@dataclass(frozen=True)
class Target:
    """One bound, or None and the reason why there is none.

    `figure` is None where the results do not have it; a bound meant for a CPU with AMX is told elsewhere, not judged.
    """

    title: str
    sense: str
    bound: float | None
    unit: str
    figure: float | None
    lowest: float | None = None
    highest: float | None = None
    judged: bool = True
    reason: str = ""

    @property
    def held(self) -> bool | None:
        if self.figure is None or self.bound is None or not self.judged:
            return None
        return self.figure >= self.bound if self.sense == AT_LEAST else self.figure <= self.bound


def throughput(results: Mapping[str, Any], name: str, connections: int) -> list[float] | None:
    """Answers per second by round."""
    row = _part(results, "table").get("cells", {}).get(name, {}).get(str(connections))
    return row["throughput"] if row else None


def best(results: Mapping[str, Any], names: list[str], connections: int) -> str | None:
    """The server of these with the highest median throughput."""
    rows = {name: row for name in names if (row := throughput(results, name, connections))}
    return max(rows, key=lambda name: statistics.median(rows[name])) if rows else None


def targets(results: Mapping[str, Any]) -> list[Target]:
    """All bounds with what was measured, in the order of the page."""
    return [*_table(results), *_start(results), *_neighbour(results), *_overload(results), *_endurance(results)]


def _part(results: Mapping[str, Any], name: str) -> dict[str, Any]:
    return results["parts"].get(name, {})


def _over(
    title: str, bound: float, figures: list[float] | None, base: list[float] | None, sense: str = AT_LEAST, judged: bool = True
) -> Target:
    """A ratio round by round."""
    if not figures or not base or min(base) <= 0:
        return Target(title, sense, bound, "x", None)
    over = ratio(figures, base)
    return Target(title, sense, bound, "x", over["median"], over["lowest"], over["highest"], judged)


def _spread(title: str, bound: float, unit: str, figures: list[float | None] | None) -> Target:
    """A median that may be at most `bound`; a round without any answer (None) counts as endless."""
    if not figures:
        return Target(title, AT_MOST, bound, unit, None)
    known = [math.inf if figure is None else figure for figure in figures]
    return Target(title, AT_MOST, bound, unit, statistics.median(known), min(known), max(known))


def _table(results: Mapping[str, Any]) -> Iterator[Target]:
    part = _part(results, "table")
    amx = "amx_bf16" in part["provenance"]["hardware"]["cpu_flags"] if part else True
    cells = part.get("cells", {}).get("ours", {})
    any_peer, fp32_peer = best(results, PEERS, 32), best(results, FP32_PEERS, 32)

    def named(what: str, peer: str | None) -> str:
        return f"{what} ({SERVERS[peer].title})" if peer else what

    def against(title: str, bound: float, name: str, peer: str | None, connections: int, judged: bool = True) -> Target:
        base = throughput(results, peer, connections) if peer else None
        return _over(title, bound, throughput(results, name, connections), base, judged=judged)

    yield against(named("Throughput at 32 over the best peer", any_peer), 1.6, "ours", any_peer, 32, amx)
    yield against(named("Throughput at 32 over the best fp32 peer", fp32_peer), 3.3, "ours", fp32_peer, 32, amx)
    yield against(named("The same with bf16 switched off", fp32_peer), 1.4, "ours-fp32", fp32_peer, 32)
    yield _spread("p99 at 32", 150, "ms", cells.get("32", {}).get("p99_ms"))
    yield against("Throughput at 1 over the naive server", 2.0, "ours", "naive", 1, amx)
    yield _spread("p50 at 1", 6, "ms", cells.get("1", {}).get("p50_ms"))
    errors = [sum(round_.values()) for row in cells.values() for round_ in row["errors"]]
    yield Target("Errors of this service at any concurrency", AT_MOST, 0, "", float(sum(errors)) if errors else None)


def _start(results: Mapping[str, Any]) -> Iterator[Target]:
    servers = _part(results, "start").get("servers", {})
    for name, bound in (("ours", 1.5), ("ours-onnxruntime", 1.5), ("ours-openvino", 1.5), ("ours-fp32", 1.5), ("ours-torch", 5.0)):
        yield _spread(f"First answer, {SERVERS[name].title}", bound, "s", servers.get(name, {}).get("first_answer_s"))
    for name in ("ours", "ours-onnxruntime", "ours-openvino", "ours-fp32"):
        yield Target(f"Peak memory, {SERVERS[name].title}", AT_MOST, 400, "MiB", servers.get(name, {}).get("peak_rss_mib"))
    first = servers.get("ours", {}).get("first_peak_rss_mib")
    reason = "the service and, once for a release on a machine, a child process that tries an engine"
    yield Target("Peak memory of the very first start, this service", AT_MOST, None, "MiB", first, reason=reason)


def _neighbour(results: Mapping[str, Any]) -> Iterator[Target]:
    row = _part(results, "neighbour").get("cells", {}).get("ours", {})
    alone, disturbed = (row.get(how, {}).get("throughput") for how in ("alone", "disturbed"))
    yield _over("Throughput at 32 beside a process that holds one core, over that without", 1 / 3, disturbed, alone)


def _overload(results: Mapping[str, Any]) -> Iterator[Target]:
    cells = _part(results, "overload").get("cells", {})
    once, twice = cells.get("1", {}), cells.get("2", {})
    p99 = [math.inf if value is None else value for value in twice.get("p99_ms", [])]
    # A round without a single accepted answer at capacity says nothing about twice that.
    yield _over("Accepted p99 at twice capacity over that at capacity", 2, p99, [value or 0 for value in once.get("p99_ms", [])], AT_MOST)
    yield _over("Memory at twice capacity over that at capacity", 1.05, twice.get("rss_mib"), once.get("rss_mib"), AT_MOST)


def growth(part: Mapping[str, Any]) -> float | None:
    """Highest memory after the first requests over that just after them, less one; None where there were too few requests."""
    samples = part["samples"]
    later = [rss for count, rss in zip(samples["requests"], samples["rss_mib"], strict=True) if count >= part["settled_after"]]
    return max(later) / later[0] - 1 if len(later) > 1 else None


def _endurance(results: Mapping[str, Any]) -> Iterator[Target]:
    part = _part(results, "endurance")
    figure = growth(part) if part else None
    count = f"{part['requests']:,}" if part else "200,000"
    yield Target(f"Growth of memory over {count} requests, after the first 10,000", AT_MOST, 0.05, "share", figure)
