"""The service under load while it is swapped, broken, starved and killed: `make soak`, or `make soak SOAK=full`.

    python -m benchmarks.soak                # a minute: 9 commits, 3 of them bad, and the cheaper faults
    python -m benchmarks.soak --full         # five minutes: 24 commits, 3 of them bad, and every fault; writes benchmarks/soak.md

Callers on 16 connections send texts all the while; every commit answers each text in a way of its own, so each answer
shows which commit gave it. Ends with a table, and with exit code 1 where anything did not hold.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import signal
import sys
import tempfile
from collections.abc import Awaitable, Callable, Mapping
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


Step = tuple[str, Callable[[], Awaitable[str]]]


def plan(events: Events, full: bool, make: Callable[[str], ServiceProcess]) -> list[Step]:
    """The events in their order, with their names."""
    good: Step = "another commit", events.swap
    golden, half, task = ((f"bad commit: {kind}", partial(events.refusal, kind)) for kind in BAD)
    one_text: Step = "engine fails on one text", events.one_text_fails
    cut: Step = "Hub cut in the middle of a download", events.hub_cut
    # It comes while the newest commit is a bad one: the start must not fall for it either.
    term: Step = "SIGTERM with every caller waiting", partial(events.sigterm, True)
    kill: Step = "SIGKILL while a commit is taken, restart without a Hub", events.sigkill
    if not full:  # `cut` and `kill` bring good commits, too: five after the one that it begins with
        return [good, golden, good, one_text, half, cut, good, task, term, kill]
    commits: list[Step] = [
        good,
        good,
        golden,
        good,
        one_text,
        ("only the README changed", events.only_readme),
        good,
        good,
        ("rollback", events.roll_back),
    ]
    hub: list[Step] = [
        cut,
        ("Hub answers 429", partial(events.hub_refuses, 429)),
        ("Hub answers 500", partial(events.hub_refuses, 500)),
        ("Hub stalls", events.hub_stalls),
        ("Hub slow", events.hub_slow),
        ("Hub gone", events.hub_gone),
    ]
    # An engine that dies or hangs is loaded anew once within a minute; then the process has to end.
    engine: list[Step] = [
        ("engine dies, once", events.engine_dies),
        ("engine dies, for good", events.engine_dies_for_good),
        ("engine hangs for a while", events.engine_hangs_a_while),
        good,
        ("engine hangs, once", events.engine_hangs),
        ("engine hangs, again", events.engine_hangs_again),
    ]
    disk: Step = "disk full", partial(events.disk_full, make)
    return [
        *commits,
        good,
        half,
        *hub,
        good,
        task,
        term,
        good,
        kill,
        ("process stands still", events.freeze),
        *engine,
        good,
        disk,
        good,
        ("SIGTERM", partial(events.sigterm, False)),
    ]


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
    versions = results["provenance"]["versions"]
    engines = ", ".join(f"{name} {versions[name]}" for name in ("openvino", "onnxruntime") if versions.get(name))
    memory = "; ".join(f"{process[0]:.0f} to {process[-1]:.0f} MiB" for process in results["memory_mib"] if process)
    lines = [
        "# The service while everything happens to it",
        "",
        f"{provenance_lines(results)} Engines: {engines}.",
        "",
        f"{sum(row['held'] is True for row in rows)} of {len(rows)} events held, {sum(row['held'] is None for row in rows)} could not be run. "
        f"{results['pushed']['good']} good commits, the first among them, and {results['pushed']['bad']} bad ones were pushed. "
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
    parser.add_argument("--full", action="store_true", help="24 commits and every fault; writes benchmarks/results/soak.json and soak.md.")
    arguments = parser.parse_args(argv)
    provenance()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as after Ctrl-C: no process is left behind
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
