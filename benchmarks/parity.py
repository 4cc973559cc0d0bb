"""The parity matrix: Trainer and the raw script, 1 and 2 processes, accumulation 1 and 2, learn the same; and if not, where they part.

    make parity                                                     # all of it: results/parity.json and parity.md
    python -m benchmarks.parity --quick                             # the fewest runs that show each claim; writes nothing
    python -m benchmarks.parity --compare outputs/a outputs/b       # two runs of your own, trained with --trace true --logging_steps 1

The real encoder learns real texts for 12 steps, over the end of an epoch, with length grouping and one global batch,
launched as a user does. Exit code 1 where a bound is broken (or the compared runs part), else 0.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
from safetensors.torch import load_file

from benchmarks.common import ROOT, Launch, provenance, run_all, write_results
from benchmarks.parity_page import SCORES, number, page, table
from benchmarks.parting import default_tolerance, first_parting, read
from pipeline.assets import fetch
from pipeline.errors import run_entry

PAGE = ROOT / "benchmarks" / "parity.md"
GLOBAL_BATCH, STEPS, TEST_ROWS = 16, 12, 101  # 101 is prime: no number of processes or batch size divides it
SCORES_BOUND = 1e-9


@dataclass(frozen=True)
class Bound:
    """Largest differences accepted: of any one weight after the last step, and of the loss and gradient norm of any step."""

    weights: float
    loss: float
    grad_norm: float


# Rounding, which Adam amplifies: it divides a gradient by its own size, also where that is nothing but rounding. (The
# losses of fp64 runs are added up in fp32 by Trainer, so theirs are no closer.)
BOUNDS = {"same": Bound(0, 0, 0), "fp32": Bound(5e-6, 1e-6, 1e-6), "fp64": Bound(1e-12, 1e-6, 1e-6)}


@dataclass(frozen=True)
class Case:
    """One run of the matrix."""

    entry: str  # trainer or raw
    processes: int
    accumulation: int
    precision: str
    dropout: bool
    extra: tuple[str, ...] = ()  # further options, for planting faults

    @property
    def layout(self) -> tuple[int, int]:
        return self.processes, self.accumulation

    @property
    def name(self) -> str:
        words = [self.entry, f"{self.processes}x{self.accumulation}", self.precision, *(["dropout"] if self.dropout else []), *self.extra]
        return "-".join(word.removeprefix("--") for word in words)

    def launch(self, folder: Path, settings: Mapping[str, Any], *more: str) -> Launch:
        options = dict(settings) | {
            "precision": self.precision,
            "global_batch_size": GLOBAL_BATCH,
            "max_per_device_batch_size": GLOBAL_BATCH // (self.processes * self.accumulation),  # the accumulation follows from it
        }
        if not self.dropout:
            options["dropout"] = 0
        arguments = [word for name, value in options.items() for word in (f"--{name}", str(value))]
        return Launch(self.entry, self.processes, folder, (*arguments, *self.extra, *more))


LAYOUTS = list(product((1, 2), (1, 2)))  # (processes, accumulation)
ALL = [Case(entry, *layout, "fp32", True) for layout in LAYOUTS for entry in ("trainer", "raw")] + [
    Case(entry, *layout, precision, False) for precision in ("fp32", "fp64") for layout in LAYOUTS for entry in ("trainer", "raw")
]
QUICK = [Case("trainer", 1, 1, "fp32", True), Case("raw", 1, 1, "fp32", True)] + [
    Case(*case, "fp64", False) for case in (("trainer", 1, 1), ("trainer", 2, 1), ("raw", 2, 2))
]


def pairs(cases: Sequence[Case]) -> list[tuple[Case, Case]]:
    """What is compared: with dropout the two entries of one layout, without it every run and the first of its precision."""
    found = []
    for case in cases:
        like = [c for c in cases if (c.precision, c.dropout) == (case.precision, case.dropout)]
        if case.dropout:
            like = [c for c in like if c.layout == case.layout]
        if like[0] != case:
            found.append((like[0], case))
    return found


def shared_options(model: Path, r8: Path, folder: Path) -> dict[str, Any]:
    """The options of all runs. Writes Reuters R8 into `folder` as two files, the test rows cut to `TEST_ROWS`."""
    folder.mkdir(parents=True, exist_ok=True)
    files = {split: folder / f"{split}.jsonl" for split in ("train", "test")}
    for split, count in (("train", None), ("test", TEST_ROWS)):
        table = pq.read_table(r8 / "data" / f"{split}.parquet")
        names = json.loads(table.schema.metadata[b"huggingface"])["info"]["features"]["label"]["names"]
        lines = [json.dumps({"text": row["text"], "label": names[row["label"]]}) for row in table.to_pylist()[:count]]
        files[split].write_text("\n".join(lines) + "\n", encoding="utf-8")
    # 8 steps an epoch, and rows left over that sit it out.
    return {"model": model, "dataset": files["train"], "test_file": files["test"], "max_train_samples": 8 * GLOBAL_BATCH + 3,
            "validation_share": 0.005, "max_length": 64, "max_steps": STEPS, "cpu_threads": 1, "logging_steps": 1, "save_total_limit": 1,
            "onnx": "false"}  # fmt: skip


def measure(
    cases: Sequence[Case], rescored: Sequence[Case], settings: Mapping[str, Any], folder: Path, bounds: Mapping[str, Bound] = BOUNDS
) -> dict[str, Any]:
    """Run the cases in `folder`, compare their `pairs`, and score the weights of the `rescored` on the other number of processes.

    Returns what becomes results/parity.json, without provenance. A pair beyond its bound is run again with traces, and
    says where it first parts.
    """
    start = time.monotonic()
    environment = {"HF_HOME": str(folder.resolve() / "home"), "TOKENIZERS_PARALLELISM": "false"}
    # Those with one process first: as many as there are cores run side by side.
    launches = {case.launch(folder / case.name, settings): case for case in sorted(cases, key=lambda case: case.processes)}
    runs: dict[Case, dict[str, Any]] = {}
    for launch, record, seconds in run_all(list(launches), environment):
        case = launches[launch]
        runs[case] = record
        thin(launch.folder, record["steps"], whole=case in rescored)
        losses = [entry["loss"] for entry in record["history"]]
        print(f"[{len(runs)}/{len(cases)}] {case.name}: loss {losses[0]:.4f} to {losses[-1]:.4f}, {seconds:.0f} s", flush=True)

    scored = [score(case, case.processes, runs[case]) for case in rescored]
    again = {}
    for case in rescored:
        copy, others = folder / f"{case.name}-scored-again", 3 - case.processes
        shutil.copytree(folder / case.name, copy)
        again[replace(case, processes=others, accumulation=1).launch(copy, settings)] = case
    for launch, record, seconds in run_all(list(again), environment):
        scored.append(score(again[launch], launch.processes, record))
        print(f"{again[launch].name} scored again by {launch.processes} process(es), {seconds:.0f} s", flush=True)

    compared = []
    for a, b in pairs(cases):
        apart = differences(folder / a.name, folder / b.name, runs[a]["history"], runs[b]["history"])
        bound = asdict(bounds["same" if a.layout == b.layout else a.precision])
        pair = {"a": asdict(a), "b": asdict(b), "apart": apart, "bound": bound, "holds": all(apart[name] <= bound[name] for name in bound)}
        if not pair["holds"]:
            pair["parting"] = explain(a, b, settings, folder, environment)
        compared.append(pair)
    of_all = runs[cases[0]]
    return {
        "settings": {"global_batch_size": GLOBAL_BATCH, "steps": of_all["steps"], "max_length": of_all["config"]["max_length"],
                     "train_rows": of_all["data"]["rows"]["train"]},
        "seconds": round(time.monotonic() - start),
        "runs": [{"name": case.name, "losses": [entry["loss"] for entry in runs[case]["history"]]} for case in cases],
        "pairs": compared,
        "evaluation": judge_scores(scored),
    }  # fmt: skip


def thin(folder: Path, step: int, *, whole: bool) -> None:
    """Keep what is compared, the last weights: 24 whole runs are 20 GB. A run that will be scored again stays whole."""
    shutil.copyfile(folder / f"checkpoint-{step}" / "model.safetensors", folder / "last.safetensors")
    for part in [] if whole else [*folder.glob("checkpoint-*"), folder / "release"]:
        shutil.rmtree(part)


def differences(a: Path, b: Path, history_a: list[dict[str, float]], history_b: list[dict[str, float]]) -> dict[str, float]:
    """The largest absolute differences of two runs: of the last weights, and of any step's logged loss and gradient norm."""
    assert [entry["step"] for entry in history_a] == [entry["step"] for entry in history_b], "the runs logged other steps"
    one, other = load_file(a / "last.safetensors"), load_file(b / "last.safetensors")
    assert one.keys() == other.keys(), "the runs have other tensors"
    apart = {"weights": largest(float((one[name].double() - other[name].double()).abs().max()) for name in one)}
    for name in ("loss", "grad_norm"):
        apart[name] = largest(abs(x[name] - y[name]) for x, y in zip(history_a, history_b, strict=True))
    return apart


def largest(values: Iterable[float]) -> float:
    """Their maximum, and infinity where one is not a number: `max` would pass it over."""
    return max(math.inf if math.isnan(value) else value for value in values)


def explain(a: Case, b: Case, settings: Mapping[str, Any], folder: Path, environment: dict[str, str]) -> str:
    """Run a pair again with traces and say in words where it first parts."""
    print(f"{a.name} and {b.name} are beyond their bound: running both again, traced.", flush=True)
    launches = [case.launch(folder / "traced" / case.name, settings, "--trace", "true") for case in (a, b)]
    missing = [launch for launch in launches if not launch.folder.exists()]
    for launch, record, _ in run_all(missing, environment):
        thin(launch.folder, record["steps"], whole=False)
    parting = first_parting(read(launches[0].folder), read(launches[1].folder))
    return str(parting) if parting else "at no step by more than rounding explains: it adds up"


def score(case: Case, processes: int, record: Mapping[str, Any]) -> dict[str, Any]:
    test = record["test"]
    return {"entry": case.entry, "processes": processes, "weights_sha256": record["weights_sha256"], "examples": test["examples"],
            "counted": sum(map(sum, test["confusion_matrix"])), "test": {name: test[name] for name in SCORES}}  # fmt: skip


def judge_scores(scored: list[dict[str, Any]]) -> dict[str, Any]:
    """Whether the same weights got the same figures on any number of processes, each example counted once."""
    apart = dict.fromkeys(SCORES, 0.0)
    for weights in {score["weights_sha256"] for score in scored}:
        alike = [score["test"] for score in scored if score["weights_sha256"] == weights]
        for name in SCORES:
            apart[name] = max(apart[name], max(test[name] for test in alike) - min(test[name] for test in alike))
    by_entry = {score["entry"]: {s["weights_sha256"] for s in scored if s["entry"] == score["entry"]} for score in scored}
    once = all(score["counted"] == score["examples"] == scored[0]["examples"] for score in scored)
    holds = once and all(len(hashes) == 1 for hashes in by_entry.values()) and max(apart.values()) <= SCORES_BOUND
    return {"scored": scored, "apart": apart, "bound": SCORES_BOUND, "each_once": once, "holds": holds}


def holds(results: Mapping[str, Any]) -> bool:
    return results["evaluation"]["holds"] and all(pair["holds"] for pair in results["pairs"])


def compare(folder_a: str, folder_b: str, tolerance: float | None) -> int:
    """Say where two traced runs part. Returns 1 where they do, as `diff` does, else 0."""
    a, b = read(folder_a), read(folder_b)
    tolerance = default_tolerance(a, b) if tolerance is None else tolerance
    parting = first_parting(a, b, tolerance)
    measure = f"relative tolerance {tolerance:g}" if tolerance else "bit for bit"
    if parting:
        print(f"{folder_a} and {folder_b} part ({measure}) at {parting}.")
        return 1
    print(f"{folder_a} and {folder_b} do not part in the {len(a.steps.keys() & b.steps.keys())} steps that both traced ({measure}).")
    return 0


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.parity", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="the fewest runs that show each claim; writes no results")
    parser.add_argument("--compare", nargs=2, metavar=("A", "B"), help="output folders of two traced runs")
    parser.add_argument(
        "--tolerance", type=float, help="for --compare: largest relative difference; 0: the same bits; none: by layout and precision"
    )
    given = parser.parse_args(argv)
    if given.compare:
        return compare(given.compare[0], given.compare[1], given.tolerance)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # through `finally`, so that no run is left behind
    provenance()
    work = Path(tempfile.mkdtemp(prefix="parity-"))  # kept where a bound is broken
    cases = QUICK if given.quick else ALL
    assets = fetch()
    results = measure(cases, cases[:2], shared_options(assets.encoder, assets.r8, work / "data"), work)
    if not given.quick:
        path = write_results("parity", results)
        PAGE.write_text(page(json.loads(path.read_text(encoding="utf-8"))), encoding="utf-8")
    print(table(results["pairs"]))
    print(f"Evaluation apart by at most {number(max(results['evaluation']['apart'].values()))}, each example counted once: "
          f"{'yes' if results['evaluation']['each_once'] else 'NO'}.")  # fmt: skip
    if not holds(results):
        print(f"A bound is broken. The runs and their traces are in {work}.", file=sys.stderr)
        return 1
    print(
        f"All bounds hold, {results['seconds']} s."
        + ("" if given.quick else f" Written: {PAGE.relative_to(ROOT)} and results/parity.json beside it.")
    )
    shutil.rmtree(work)
    return 0


if __name__ == "__main__":
    sys.exit(run_entry(main))
