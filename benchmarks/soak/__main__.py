"""The service under load while it is swapped, broken, starved and killed: `make soak`, or `make soak SOAK=full`.

    python -m benchmarks.soak                # a minute: 8 commits, 3 of them bad, and the cheaper faults
    python -m benchmarks.soak --full         # ten minutes: 20 commits, 3 of them bad, and every fault

Callers on 16 connections send texts without a pause in their service; every commit answers each text in a way of its
own, so each answer shows which commit gave it. Ends with a table, and with exit code 1 where anything did not hold.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import tempfile
from collections.abc import Awaitable, Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.common import ROOT, provenance, provenance_lines, write_results
from benchmarks.soak.events import STALL_SECONDS, Events
from benchmarks.soak.load import Load, Truth
from benchmarks.soak.releases import BAD, Releases
from benchmarks.soak.world import Line, ServiceProcess
from benchmarks.tiny_release import tiny_release
from pipeline.assets import fetch
from pipeline.errors import run_entry
from pipeline.local_hub.process import HubProcess

PAGE = ROOT / "benchmarks" / "soak.md"
CONNECTIONS = 16
TOLERANCE = {"onnxruntime": 1e-3, "auto": 0.02}  # of a probability: fp32; bf16, which auto may choose


def plan(events: Events, full: bool, make: Callable[[str], ServiceProcess]) -> Iterator[tuple[str, Callable[[], Awaitable[str]]]]:
    """The events in their order, with their names."""
    good, (golden, half, task) = ("another commit", events.swap), ((f"bad commit: {kind}", partial(events.refusal, kind)) for kind in BAD)
    killed = ("SIGKILL while a commit is taken, restart without a Hub", events.sigkill)
    cut = ("Hub cut in the middle of a download", events.hub_cut)
    fails = ("engine fails on one text", events.one_text_fails)
    if not full:
        # The commits of `cut` and `killed` are the fourth and fifth good ones. SIGTERM comes while the newest commit is a bad one.
        yield from (good, golden, good, fails, half, cut, good, task, ("SIGTERM", events.sigterm), killed)
        return
    yield from (
        good,
        good,
        golden,
        good,
        fails,
        ("only the README changed", events.only_readme),
        good,
        good,
        ("rollback", events.roll_back),
    )
    yield from (
        good,
        half,
        cut,
        ("Hub answers 429", partial(events.hub_refuses, 429)),
        ("Hub answers 500", partial(events.hub_refuses, 500)),
    )
    yield from (("Hub stalls", events.hub_stalls), ("Hub slow", events.hub_slow), ("Hub gone", events.hub_gone), good, task)
    yield from (("SIGTERM", events.sigterm), good, killed, ("engine dies, once", events.engine_dies), good)
    yield from (("engine dies, for good", events.engine_dies_for_good), ("engine hangs for a while", events.engine_hangs_a_while), good)
    yield from (("engine hangs, once", events.engine_hangs), ("engine hangs, again", events.engine_hangs_again))
    yield from (("disk full", partial(events.disk_full, make)), good, ("SIGTERM", events.sigterm))


async def soak(base: Path, work: Path, full: bool, say: Callable[[str], None] = print) -> dict[str, Any]:
    """All of it, on variants of the release in `base`; returns the results. `work` is a folder for what is made."""
    releases = Releases(base, work / "releases")
    engine = "auto" if full else "onnxruntime"
    with HubProcess(work / "hub", faults=True) as hub:
        line = Line(hub.url)
        await line.up()
        repo = f"{hub.user}/soak"
        options = ["--model", repo, "--engine", engine, "--watch_seconds", "0.2", "--stall_seconds", str(STALL_SECONDS)]

        def make(name: str) -> ServiceProcess:
            return ServiceProcess(work / name, {**hub.env, "HF_ENDPOINT": line.url}, options)

        events = Events(hub, line, make("service"), releases, repo)
        try:
            events.api.create_repo(repo)
            folder, truth = releases.good()
            events.current = events.api.upload_folder(repo_id=repo, folder_path=folder).oid
            say(f"ready after {await events.service.start():.1f} s; load begins")
            events.load = Load(("127.0.0.1", events.service.port), releases.texts, Truth(TOLERANCE[engine]), CONNECTIONS)
            events.learn(events.current, truth)
            for name, event in plan(events, full, make):
                await events.run(name, event, say)
            await events.load.stop()
        finally:
            events.service.kill()
            if events.other:
                events.other.kill()
            await line.down()
    return {
        "full": full,
        "connections": CONNECTIONS,
        "separation": releases.separation,
        "tolerance": TOLERANCE[engine],
        "unknown_commits": events.load.truth.unknown(),
        **events.summary(),
    }


def table(results: Mapping[str, Any]) -> list[str]:
    """The events as rows of a Markdown table."""
    lines = [
        "| event | what happened | held | seconds | answers | slowest, ms | refused | turned away |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in results["rows"]:
        held = {True: "yes", False: "**no**", None: "not run"}[row["held"]]
        refused = ", ".join(f"{count} {code}" for code, count in row["refused"].items()) or "none"
        happened = row["happened"].replace("|", "/")
        cells = (
            row["event"],
            happened,
            held,
            row["seconds"],
            row["answers"],
            f"{row['slowest_ms']:.0f}",
            refused,
            row["turned_away"] or "none",
        )
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return lines


def page(results: Mapping[str, Any]) -> str:
    """The page of a result, in Markdown."""
    rows = results["rows"]
    memory = "; ".join(f"{process[0]:.0f} to {process[-1]:.0f} MiB" for process in results["memory_mib"] if process)
    lines = [
        "# The service while everything happens to it",
        "",
        f"{provenance_lines(results)}",
        "",
        f"{sum(row['held'] is True for row in rows)} of {len(rows)} events held, {sum(row['held'] is None for row in rows)} could not be run. "
        f"{sum(row['answers'] for row in rows)} requests on {results['connections']} connections were answered, each by the commit that it names: the "
        f"commits' answers to any text differ by {results['separation']:.2f} or more in some probability, and {results['tolerance']} is allowed. "
        "Refused are requests with a documented answer (429, 503, and 422 for the text that the engine fails on); turned away those that came "
        "when no process listened, or when it was killed.",
        "",
        *table(results),
        "",
        f"Resident memory of each process of the service after its first and after its last event: {memory}.",
    ]
    return "\n".join(lines) + "\n"


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.soak", description=__doc__.split("\n\n")[0], allow_abbrev=False)
    parser.add_argument("--full", action="store_true", help="20 commits and every fault; writes benchmarks/results/soak.json and soak.md.")
    arguments = parser.parse_args(argv)
    provenance()
    with tempfile.TemporaryDirectory(prefix="soak-") as folder:
        base = tiny_release(fetch().encoder, Path(folder) / "base")
        results = asyncio.run(soak(base, Path(folder), arguments.full, partial(print, flush=True)))
    print("", *table(results), sep="\n")
    if arguments.full:
        path = write_results("soak", results)
        PAGE.write_text(page(json.loads(path.read_text(encoding="utf-8"))), encoding="utf-8")
    return 0 if results["held"] and not results["unknown_commits"] else 1


if __name__ == "__main__":
    sys.exit(run_entry(main))
