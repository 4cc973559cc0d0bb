"""The serving benchmark: its page is that of its results, its generator counts right, its targets are computed right."""

from __future__ import annotations

import asyncio
import json
import socket
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from launching import ROOT, alive, family, launch, started, wait_until
from serving import LABELS, make_release, make_text

from benchmarks import bench_serve
from benchmarks.serving import load
from benchmarks.serving.load import Load, percentile
from benchmarks.serving.page import page
from benchmarks.serving.targets import Target, targets
from pipeline.errors import UserError

SLOW_SECONDS = 0.15
QUICK = ("--quick", "--seconds", "0.5", "--rounds", "1", "--servers", "ours-onnxruntime")


def test_the_page_is_that_of_the_results() -> None:
    path = ROOT / "benchmarks" / "results" / "bench_serve.json"
    if not path.exists():  # nothing measured yet, so no page either
        assert not bench_serve.PAGE.exists()
        return
    assert bench_serve.PAGE.read_text(encoding="utf-8") == page(json.loads(path.read_text(encoding="utf-8")))


# -- the load generator ---------------------------------------------------------------------------------------------------


class Scripted:
    """A real HTTP server whose answer a text names: ok, slow, queued, refused, unlabelled, dropped, closing, halves, silent."""

    def __init__(self) -> None:
        self.seen: Counter[str] = Counter()
        self.open = self.most_open = 0
        self.loop = asyncio.new_event_loop()
        self.ready = threading.Event()
        self.thread = threading.Thread(target=self._run, daemon=True)
        self.thread.start()
        assert self.ready.wait(10)

    def _run(self) -> None:
        asyncio.set_event_loop(self.loop)
        self.one_at_a_time = asyncio.Lock()
        server = self.loop.run_until_complete(asyncio.start_server(self._serve, "127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/predict"
        self.ready.set()
        self.loop.run_forever()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.open += 1
        self.most_open = max(self.most_open, self.open)
        try:
            while True:
                head = (await reader.readuntil(b"\r\n\r\n")).decode()
                length = next(int(line.split(":")[1]) for line in head.splitlines() if line.lower().startswith("content-length"))
                kind = json.loads(await reader.readexactly(length))["text"].split()[0]
                self.seen[kind] += 1
                if not await self._answer(kind, writer):
                    return
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            self.open -= 1
            writer.close()

    async def _answer(self, kind: str, writer: asyncio.StreamWriter) -> bool:
        if kind == "dropped":
            return False
        if kind == "silent":
            await asyncio.sleep(3600)
        if kind == "slow":
            await asyncio.sleep(SLOW_SECONDS)
        if kind == "queued":
            async with self.one_at_a_time:
                await asyncio.sleep(0.02)
        status = {"refused": "429 Too Many Requests"}.get(kind, "200 OK")
        body = b'{"answer": 1}' if kind == "unlabelled" else b'{"label": "World", "confidence": 1.0}'
        close = "Connection: close\r\n" * (kind == "closing")
        whole = f"HTTP/1.1 {status}\r\n{close}content-length: {len(body)}\r\n\r\n".encode() + body
        for piece in (whole[:40], whole[40:-3], whole[-3:]) if kind == "halves" else (whole,):
            writer.write(piece)
            await writer.drain()
            await asyncio.sleep(0.005 * (kind == "halves"))
        return kind != "closing"

    def stop(self) -> None:
        async def end() -> None:
            others = asyncio.all_tasks() - {asyncio.current_task()}
            for task in others:
                task.cancel()
            await asyncio.gather(*others, return_exceptions=True)

        asyncio.run_coroutine_threadsafe(end(), self.loop).result(10)
        self.loop.call_soon_threadsafe(self.loop.stop)
        self.thread.join(10)


@pytest.fixture
def scripted() -> Iterator[Scripted]:
    server = Scripted()
    yield server
    server.stop()


def rows(**kinds: int) -> list[dict[str, Any]]:
    return [{"text": f"{kind} {i}", "label": "World" if i % 2 else "Sports"} for kind, count in kinds.items() for i in range(count)]


def test_the_generator_counts_every_kind_of_answer(scripted: Scripted, tmp_path: Path) -> None:
    """As the benchmark runs it: a process. One connection, so that every row is sent exactly once."""
    kinds = {"ok": 60, "halves": 20, "closing": 18, "slow": 2, "refused": 5, "unlabelled": 4, "dropped": 3}
    texts = tmp_path / "texts.jsonl"
    texts.write_text("".join(json.dumps(row) + "\n" for row in rows(**kinds)), encoding="utf-8")
    command = [sys.executable, "-m", "benchmarks.serving.load", "--url", scripted.url, "--texts", str(texts), "--connections", "1", "--warmup", "0",
               "--seconds", "60", "--requests", str(sum(kinds.values())), "--report_every", "50"]  # fmt: skip
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=90, check=True)
    *progress, result = [json.loads(line) for line in done.stdout.splitlines()]
    assert progress == [{"requests": 50}, {"requests": 100}]
    assert {kind: scripted.seen[kind] for kind in kinds} == kinds
    assert result["errors"] == {"429": 5, "no label": 4, "connection": 3}
    assert result["answers"] == 100 and result["right"] == 0.5  # every second row's label is the one that is answered
    assert result["throughput"] == pytest.approx(100 / result["seconds"])
    # Of 100 latencies the 99th is one of the two slow ones, whatever the machine's speed.
    assert result["p50_ms"] <= result["p99_ms"] <= result["max_ms"] and result["p99_ms"] >= 1000 * SLOW_SECONDS
    assert result["generator_us"] > 0 and 0 < result["generator_cores"] < 1


def test_a_closed_loop_keeps_its_connections_and_leaves_out_the_warm_up(scripted: Scripted) -> None:
    result = asyncio.run(Load(scripted.url, rows(slow=7), 0).run(connections=5, seconds=1.0, warmup=0.5))
    assert scripted.most_open == 5
    assert 0 < result["answers"] < scripted.seen["slow"] and result["errors"] == {}
    assert result["p50_ms"] >= 1000 * SLOW_SECONDS


def test_an_open_loop_counts_from_the_arrival_and_waits_for_the_answers(scripted: Scripted) -> None:
    """Some 100 arrivals in a second at a server that answers 50: the last of them wait for a second, and all are counted."""
    result = asyncio.run(Load(scripted.url, rows(queued=50), 1).run(connections=2, seconds=1.0, rate=100))
    assert result["answers"] == scripted.seen["queued"] and result["answers"] > 60 and result["errors"] == {}
    assert scripted.most_open > 2
    assert result["max_ms"] >= 20 * result["answers"] - 1000 * 1.1  # the queue's work, less the time in which it arrived
    assert result["generator_late_p99_ms"] >= 0


def test_nobody_there_and_no_answer_are_errors(scripted: Scripted, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))  # bound, not listening
        result = asyncio.run(Load(f"http://127.0.0.1:{unused.getsockname()[1]}/predict", rows(ok=1), 0).run(connections=2, seconds=0.3))
    assert set(result["errors"]) == {"connection"} and result["answers"] == 0 and result["p99_ms"] is None
    monkeypatch.setattr(load, "TIMEOUT_SECONDS", 0.3)
    result = asyncio.run(Load(scripted.url, rows(silent=1), 0).run(connections=1, seconds=30, requests=1))
    assert result["errors"] == {"timeout": 1}


def test_percentiles_are_of_the_nearest_rank() -> None:
    hundred = [float(i) for i in range(1, 101)]
    assert [percentile(hundred, share) for share in (0.0, 0.5, 0.99, 1.0)] == [1.0, 50.0, 99.0, 100.0]
    assert percentile([7.0], 0.99) == 7.0 and percentile([], 0.5) is None


# -- targets and page -----------------------------------------------------------------------------------------------------


def cell(throughput: list[float], p50: float = 5.0, p99: float | None = 100.0, errors: int = 0) -> dict[str, Any]:
    n = len(throughput)
    return {
        "throughput": throughput, "p50_ms": [p50] * n, "p99_ms": [p99] * n, "errors": [{"500": errors} if errors else {}] * n, "right": [0.9] * n,
        "generator_us": [100.0] * n, "generator_cores": [0.02] * n,
    }  # fmt: skip


def made_up(flags: tuple[str, ...] = ("amx_bf16",)) -> dict[str, Any]:
    """Results of all parts with figures whose ratios are known."""
    versions = {"torch": "1", "transformers": "1", "accelerate": "1", "python": "3"}
    hardware = {"cpu": "A CPU", "cpu_flags": list(flags), "cores": 2, "memory_gib": 8.0, "gpus": []}
    head = {
        "date": "2026-01-02T03:04:05+00:00", "load_before": 0.1, "model": "m", "dataset": "ag_news", "texts": 3800, "peers": {"mosec": "1"},
        "engines": {"ours": {"engine": "openvino", "precision": "bf16"}}, "left_out": {"litserve": "no wheel"}, "rounds": 3, "seconds": 5.0,
        "provenance": {"command": "python -m x", "versions": versions, "hardware": hardware, "code": {"commit": "a" * 40, "dirty": False}},
    }  # fmt: skip
    cells = {
        "ours": {"1": cell([200.0, 210.0, 190.0]), "32": cell([400.0, 330.0, 500.0], p99=149.0)},
        "ours-fp32": {"1": cell([150.0] * 3), "32": cell([150.0] * 3)},
        "naive": {"1": cell([100.0] * 3), "32": cell([60.0] * 3)},
        "mosec": {"1": cell([50.0] * 3), "32": cell([100.0, 110.0, 100.0])},
        "mosec-bf16": {"1": cell([50.0] * 3), "32": cell([200.0, 220.0, 250.0], errors=2)},
    }
    samples = {"requests": [1000, 10_000, 50_000], "rss_mib": [300.0, 200.0, 209.0], "uss_mib": [1.0, 1.0, 1.0]}
    loads = {"1": cell([400.0] * 3, p99=100.0), "2": cell([400.0] * 3, p99=201.0)}
    for row in loads.values():
        row |= {"refused_share": [0.5] * 3, "rss_mib": [200.0] * 3}
    result = {"seconds": 99.0, "errors": {}, "p99_ms": 100.0}
    weight = {"first_answer_s": [1.0, 1.6, 1.4], "peak_rss_mib": 401.0, "uss_mib": 300.0, "processes": 1, "first_peak_rss_mib": 500.0}
    return {"format": 1, "parts": {
        "table": {**head, "concurrency": [1, 32], "cells": cells},
        "start": {**head, "starts": 3, "servers": {"ours": weight}},
        "neighbour": {**head, "concurrency": 32, "cells": {"ours": {"alone": cell([300.0] * 3), "disturbed": cell([99.0] * 3)}}},
        "overload": {**head, "capacity": 400.0, "cells": loads},
        "endurance": {**head, "requests": 50_000, "concurrency": 32, "settled_after": 10_000, "samples": samples, "result": result},
    }}  # fmt: skip


def find(found: list[Target], start: str) -> Target:
    (target,) = [target for target in found if target.title.startswith(start)]
    return target


def test_targets_are_computed_round_by_round() -> None:
    found = targets(made_up())
    best = find(found, "Throughput at 32 over the best peer")
    assert "mosec, bf16" in best.title and best.held
    assert (best.figure, best.lowest, best.highest) == (2.0, 1.5, 2.0)  # the median of 400/200, 330/220 and 500/250
    fp32 = find(found, "Throughput at 32 over the best fp32 peer")
    assert "(mosec)" in fp32.title and (fp32.figure, fp32.held) == (4.0, True)
    assert find(found, "The same with bf16").held
    assert find(found, "p99 at 32").held and find(found, "p50 at 1").held
    assert find(found, "Errors of this service").figure == 0  # the peer's errors are not ours
    assert (find(found, "Throughput at 1 over").figure, find(found, "Throughput at 1 over").held) == (2.0, True)
    start = next(t for t in found if t.title == "First answer, this service")
    assert (start.figure, start.held) == (1.4, True)
    memory = next(t for t in found if t.title == "Peak memory, this service")
    assert (memory.figure, memory.held) == (401.0, False)
    assert not find(found, "Throughput at 32 beside").held  # 0.33 is less than a third
    assert not find(found, "Accepted p99 at twice").held and find(found, "Memory at twice").held
    growth = find(found, "Growth of memory over 50,000 requests")
    assert growth.figure == pytest.approx(0.045) and growth.held  # what came before the first 10,000 does not count
    assert find(found, "First answer, this service, torch").held is None


def test_what_needs_amx_is_not_judged_without() -> None:
    found = targets(made_up(flags=()))
    assert find(found, "Throughput at 32 over the best peer").held is None
    assert find(found, "The same with bf16").held


def test_a_round_without_answers_holds_no_bound() -> None:
    results = made_up()
    cells = results["parts"]["table"]["cells"]
    cells["ours"]["32"] = cell([0.0, 0.0, 0.0], p99=None, errors=3)
    found = targets(results)
    assert find(found, "p99 at 32").held is False and find(found, "Throughput at 32 over the best peer").held is False
    assert find(found, "Errors of this service").figure == 9
    assert "| this service |" in page(results)


def test_the_page_has_every_part_and_no_verdict_of_its_own() -> None:
    results = made_up()
    text = page(results)
    assert text.count("| yes |") == sum(target.held is True for target in targets(results))
    assert text.count("| no |") == sum(target.held is False for target in targets(results)) > 0
    assert text.count("Measured on 2026-01-02") == 5 and "Left out: LitServe (no wheel)" in text
    for name in list(results["parts"]):
        alone = page({"format": 1, "parts": {name: results["parts"][name]}})
        assert alone.count("Measured on") == 1 and "| not measured |" in alone


# -- the whole, as a person runs it ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def arguments(encoder_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    from datasets import ClassLabel, Dataset, Features, Value

    folder = tmp_path_factory.mktemp("texts")
    features = Features({"text": Value("string"), "label": ClassLabel(names=LABELS)})
    columns = {"text": [make_text(5 + i % 20, i) for i in range(200)], "label": [i % 4 for i in range(200)]}
    (folder / "data").mkdir()
    Dataset.from_dict(columns, features=features).to_parquet(folder / "data" / "test.parquet")
    return ["--model", str(make_release(encoder_dir)), "--dataset", str(folder)]


@pytest.mark.timeout(300)
def test_parts_are_measured_and_merged(arguments: list[str], tmp_path: Path) -> None:
    """Real servers, real load; nothing is left running. A part that is measured later leaves the others as they are."""
    first = launch([*arguments, *QUICK, "--parts", "table,neighbour", "--out", str(tmp_path)], module="benchmarks.bench_serve")
    assert first.returncode in (0, 1), first.stderr
    path = tmp_path / "results" / "bench_serve.json"
    before = json.loads(path.read_text(encoding="utf-8"))["parts"]
    assert set(before) == {"table", "neighbour"}
    for row in before["table"]["cells"]["ours-onnxruntime"].values():
        assert row["answers"][0] > 0 and row["errors"] == [{}] and row["right"][0] is not None
    assert before["table"]["engines"]["ours-onnxruntime"]["engine"] == "onnxruntime"
    assert str(tmp_path) not in path.read_text(encoding="utf-8")  # where things lie here is nobody's business
    second = launch([*arguments, *QUICK, "--parts", "start", "--out", str(tmp_path)], module="benchmarks.bench_serve")
    assert second.returncode in (0, 1), second.stderr
    results = json.loads(path.read_text(encoding="utf-8"))
    assert {name: results["parts"][name] for name in before} == before
    start = results["parts"]["start"]["servers"]["ours-onnxruntime"]
    assert start["first_answer_s"][0] > 0 and 50 < start["uss_mib"] <= start["peak_rss_mib"]
    assert (tmp_path / "bench_serve.md").read_text(encoding="utf-8") == page(results)
    assert (tmp_path / "bench_serve.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.timeout(120)
def test_stopped_in_the_middle_it_leaves_no_server(arguments: list[str], tmp_path: Path) -> None:
    with started(
        [*arguments, *QUICK, "--seconds", "60", "--parts", "table", "--out", str(tmp_path)], module="benchmarks.bench_serve"
    ) as process:
        wait_until(process, lambda: len(family(process)) >= 3, 90)  # the server and the generator
        members = family(process)
        process.terminate()
        process.communicate(timeout=60)
    psutil.wait_procs(members, timeout=5)
    assert not alive(members)


def test_mistakes_end_in_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_serve, "RELEASE", tmp_path / "none")
    for given, expected in (
        ([], "make quickstart"),
        (["--model", str(tmp_path)], "no release"),
        (["--model", "no/such/id"], "Hub id"),
        (["--parts", "tabel"], "Did you mean 'table'?"),
        (["--servers", "mosec_bf16"], "Did you mean 'mosec-bf16'?"),
        (["--rounds", "0"], "more than 0"),
    ):
        with pytest.raises(UserError, match=expected.replace("?", r"\?")):
            bench_serve.main(given)
