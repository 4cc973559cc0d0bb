"""The service beside a naive server, LitServe and mosec: throughput, latency, start, memory, disturbance, overload.

    python -m benchmarks.bench_serve --model outputs/ag_news/release --dataset fancyzhx/ag_news    # some half an hour on two cores
    python -m benchmarks.bench_serve --quick                             # a look, a few minutes, written to outputs/bench_serve
    python -m benchmarks.bench_serve --parts table,start                 # these parts anew; the others stay as they are
    python -m benchmarks.bench_serve --parts endurance --requests 200000

The peers get an environment of their own, .cache/peers, made on demand; without it they are left out. A server's process
tree must fit into memory beside the others': some 8 GiB for all of them. Written to benchmarks/results/bench_serve.json,
each part with where and when it was measured, and, as a page with a plot, benchmarks/bench_serve.md. Exit code 1: a bound was not held.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import signal
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.common import ROOT, provenance
from benchmarks.serving import measure
from benchmarks.serving.measure import PARTS, Bench, say
from benchmarks.serving.page import PICTURE, page, plot
from benchmarks.serving.servers import SERVERS, make_peers_environment, peer_versions
from benchmarks.serving.targets import targets
from pipeline.checkpoint import write_json
from pipeline.errors import UserError, nearest, run_entry

NAME = "bench_serve"
QUIET_LOAD = 1.0  # the benchmark's own earlier parts leave about that; told, not refused
EXIT_STOPPED = 128 + signal.SIGTERM
PAGE = ROOT / "benchmarks" / f"{NAME}.md"
RELEASE = ROOT / "outputs" / "quickstart" / "run" / "release"
DEFAULT_PARTS = ["table", "start", "neighbour", "overload"]
# Each engine is started and weighed; the engines that `ours` chooses from need no line of their own in the other parts.
TABLE_SERVERS = ["ours", "ours-fp32", "ours-onnxruntime", "naive", "litserve", "litserve-bf16", "mosec", "mosec-bf16"]
PART_SERVERS = {"table": TABLE_SERVERS, "start": list(SERVERS), "neighbour": TABLE_SERVERS, "overload": ["ours"], "endurance": ["ours"]}


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog=f"python -m benchmarks.{NAME}", allow_abbrev=False)
    parser.add_argument("--model", default="", help="Release: folder or Hub id (default: the quickstart's, where there is one).")
    parser.add_argument("--dataset", default=os.environ.get("AG_NEWS_DIR", "fancyzhx/ag_news"), help="AG News: Hub id or folder.")
    parser.add_argument("--parts", default="", help=f"Of {', '.join(PARTS)}, with commas (default: all but endurance).")
    parser.add_argument("--servers", default="", help=f"Of {', '.join(SERVERS)} (default: all that a part compares).")
    parser.add_argument("--quick", action="store_true", help="One short round, to outputs/bench_serve.")
    parser.add_argument("--rounds", type=int, help="Default 3; --quick 1.")
    parser.add_argument("--seconds", type=float, help="Of one figure, after its warm-up; default 5.5, --quick 2.")
    parser.add_argument("--requests", type=int, default=200_000, help="Of the part endurance.")
    parser.add_argument("--out", type=Path, help="Folder of the page, with results/ in it (default: benchmarks).")
    options = parser.parse_args(argv)
    parts, servers = _names("--parts", options.parts, PARTS), _names("--servers", options.servers, SERVERS)
    rounds = _positive("--rounds", (1 if options.quick else 3) if options.rounds is None else options.rounds)
    seconds = _positive("--seconds", (2.0 if options.quick else 5.5) if options.seconds is None else options.seconds)
    _positive("--requests", options.requests)
    out = options.out or (ROOT / "outputs" / NAME if options.quick else PAGE.parent)
    model = find_model(options.model)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(EXIT_STOPPED))  # an exception, so that the servers are ended

    with tempfile.TemporaryDirectory(prefix="bench-serve-") as folder:
        bench = Bench(
            model=model, texts=Path(folder) / "texts.jsonl", folder=Path(folder), servers=[], rounds=rounds, seconds=seconds,
            warmup=0.5 if options.quick else 1.5, starts=1 if options.quick else 5, concurrency=[1, 32] if options.quick else [1, 8, 32, 128],
            requests=options.requests, overload_seconds=2 * seconds if options.quick else 20.0,
        )  # fmt: skip
        known = set(json.loads((model / "config.json").read_text(encoding="utf-8"))["id2label"].values())
        texts = write_texts(options.dataset, bench.texts, known)
        for name in parts or DEFAULT_PARTS:
            chosen = [server for server in PART_SERVERS[name] if not servers or server in servers]
            results = run_part(
                bench, name, chosen,
                {"model": model_name(options.model), "trained_from": trained_from(model), "dataset": Path(options.dataset).name, "texts": texts}, out,
            )  # fmt: skip
    found = targets(results)
    print((out / f"{NAME}.md").read_text(encoding="utf-8"))
    return 1 if any(target.held is False for target in found) else 0


def run_part(bench: Bench, name: str, servers: list[str], about: dict[str, Any], out: Path) -> dict[str, Any]:
    """Measure one part and put it in place of the same part in what is there; returns all results, page and plot written."""
    if not servers:
        raise UserError(f"--servers leaves none for the part {name}: it compares {', '.join(PART_SERVERS[name])}. Name one of these.")
    bench.left_out, bench.engines = {}, {}
    reason = make_peers_environment() if any(SERVERS[server].is_peer for server in servers) else None
    bench.servers = [server for server in servers if not (reason and SERVERS[server].is_peer)]
    for server in servers:
        if reason and SERVERS[server].is_peer:
            bench.leave_out(server, reason)
    versions = peer_versions() if any(SERVERS[server].is_peer for server in bench.servers) else {}
    provenance.cache_clear()
    head = {**without_paths(provenance()), "load_before": os.getloadavg()[0], **about, "peers": versions}
    say(f"part {name}: {', '.join(bench.servers)}")
    if head["load_before"] > QUIET_LOAD:
        say(
            f"the load average is {head['load_before']:.1f}: others use this machine, and peers with spinning threads will look worse than they are"
        )
    try:
        measured = PARTS[name](bench)
    except measure.ServerError as error:
        raise UserError(f"the part {name} could not be measured: {error} Mend that and run it again with --parts {name}.") from error
    path = out / "results" / f"{NAME}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    old = json.loads(path.read_text(encoding="utf-8"))["parts"] if path.exists() else {}
    write_json(path, {"format": 1, "parts": {**old, name: {**head, "engines": bench.engines, "left_out": bench.left_out, **measured}}})
    results: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    (out / f"{NAME}.md").write_text(page(results), encoding="utf-8")
    plot(results, out / PICTURE)
    return results


def without_paths(record: dict[str, Any]) -> dict[str, Any]:
    """The provenance with folders in its command by their last two names: where they lie here is of no use to a reader."""
    command = re.sub(r"(?<=[ =])[^ =]*/([^/ ]+/[^/ ]+)", r"\1", record["provenance"]["command"])
    return {**record, "provenance": {**record["provenance"], "command": command}}


def find_model(given: str) -> Path:
    """The release's folder; a Hub id is fetched once, so that all servers read the same files."""
    if not given and not RELEASE.is_dir():
        raise UserError(
            "no release was given, and there is no quickstart run here. Give --model FOLDER or --model owner/name, or make one with `make quickstart`."
        )
    folder = Path(given) if given else RELEASE
    if not folder.is_dir():
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import HFValidationError

        try:
            folder = Path(snapshot_download(given))
        except HFValidationError as error:
            raise UserError(f"--model is {given}: allowed is a release's folder or a Hub id (owner/name).") from error
    if not (folder / "golden.json").exists():
        raise UserError(
            f"{given or folder} is no release (no golden.json in it). Give the release/ folder of a finished run, or its Hub id."
        )
    return folder.resolve()


def model_name(given: str) -> str:
    """A Hub id as it is; of a folder, the last two names."""
    path = Path(given) if given else RELEASE
    return "/".join(path.resolve().parts[-2:]) if path.is_dir() else given


def trained_from(release: Path) -> dict[str, str] | None:
    """Encoder and training data by the release's own run.json, folders by their last name; None where it has none."""
    try:
        config = json.loads((release / "run.json").read_text(encoding="utf-8"))["config"]
    except (OSError, ValueError, KeyError):
        return None
    return {name: Path(config[name]).name for name in ("model", "dataset")}


def write_texts(dataset: str, path: Path, known: set[str]) -> int:
    """The test split as JSON lines of text and label name, null for a label that the release does not have; returns how many texts."""
    from datasets import load_dataset

    rows = load_dataset(dataset, split="test")
    if not {"text", "label"} <= set(rows.column_names):
        raise UserError(f"--dataset {dataset} has the columns {', '.join(rows.column_names)}: needed are text and label. Give AG News.")
    names = getattr(rows.features["label"], "names", None)
    texts = {row["text"]: names[row["label"]] if names and names[row["label"]] in known else None for row in rows}
    path.write_text("".join(json.dumps({"text": text, "label": label}) + "\n" for text, label in texts.items()), encoding="utf-8")
    return len(texts)


def _names(option: str, given: str, allowed: Sequence[str] | dict[str, Any]) -> list[str]:
    names = [name.strip() for name in given.split(",") if name.strip()]
    for name in names:
        if name not in allowed:
            raise UserError(f"{option} has {name}: allowed are {', '.join(allowed)}, with commas between.{nearest(name, allowed)}")
    return names


def _positive(option: str, value: Any) -> Any:
    if value <= 0:
        raise UserError(f"{option} is {value}: allowed is more than 0.")
    return value


if __name__ == "__main__":
    sys.exit(run_entry(main))
