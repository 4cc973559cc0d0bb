"""Where two traced runs first part: order of the data, initial weights, forward, gradient, clipping, or optimizer step.

    python -m benchmarks.parity --compare outputs/a outputs/b        # of runs with --trace true --logging_steps 1

Reads what `pipeline/trace.py` wrote, step by step and in each step in the order in which a step is made: the first difference is the
cause, all that come after it only follow.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.errors import UserError

SAME_LOSS = 1e-6  # relative; Trainer adds its losses up in fp32 even where the model computes in fp64
ROUNDING = {"fp32": 1e-5, "fp64": 1e-12}  # relative; ten times and more what adding in another order left in twelve steps of a real encoder
PARALLEL = 0.1  # two gradients are of one direction if making them equally long takes all but this share of their distance away

Tensors = Mapping[str, Mapping[str, Any]]  # name -> fingerprint


@dataclass(frozen=True)
class Trace:
    """All ranks' lines of one run, and what its run.json says of each step."""

    name: str
    initial: Tensors  # the weights before the first of the steps
    steps: dict[int, list[dict[str, Any]]]  # by step, each rank's line
    logged: dict[int, dict[str, float]]  # by step: loss and grad_norm (before clipping) of the steps that were logged
    precision: str | None

    @property
    def layout(self) -> tuple[int, int]:
        """Processes, and micro-batches of each per step, as they were at first."""
        ranks = self.steps[min(self.steps)]
        return len(ranks), len(ranks[0]["rows"])


@dataclass(frozen=True)
class Parting:
    """Where two runs first differ. `stage` is one of: order of the data, initial weights, forward, gradient, clipping, optimizer step."""

    step: int
    stage: str
    detail: str

    def __str__(self) -> str:
        return f"step {self.step}, {self.stage}: {self.detail}"


def read(folder: str | Path) -> Trace:
    """The trace of the run in this output folder. Raises UserError where there is none."""
    folder = Path(folder)
    paths = sorted((folder / "trace").glob("rank-*.jsonl"), key=lambda path: int(path.stem.removeprefix("rank-")))
    if not paths:
        raise UserError(f"{folder} holds no trace. Give the output folder of a run that was trained with --trace true --logging_steps 1.")
    lines = [[json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] for path in paths]
    # A step that was traced again after a resume counts as it was the last time.
    ranks = [{line["step"]: line for line in of_rank if "step" in line} for of_rank in lines]
    numbers = sorted(set().union(*ranks))
    if not numbers:
        raise UserError(f"The trace in {folder} holds no step: the run ended before its first.")
    record = json.loads((folder / "run.json").read_text(encoding="utf-8")) if (folder / "run.json").is_file() else {}
    return Trace(
        name=str(folder),
        initial=lines[0][0]["weights"],
        # A rank may have no line for a step: a run may go on with more or fewer processes.
        steps={step: [rank[step] for rank in ranks if step in rank] for step in numbers},
        logged={entry["step"]: entry for entry in record.get("history", [])},
        precision=record.get("topology", {}).get("precision"),
    )


def default_tolerance(a: Trace, b: Trace) -> float:
    """0 for two runs cut up alike (the same bits are expected), else what rounding explains in their precision."""
    if a.layout == b.layout and a.precision == b.precision:
        return 0.0
    return max(ROUNDING.get(str(trace.precision), 1e-2) for trace in (a, b))


def first_parting(a: Trace, b: Trace, tolerance: float | None = None) -> Parting | None:
    """Where the two runs first differ by more than `tolerance`, or None where they do not in the steps both have.

    `tolerance` is relative: the distance of two sets of tensors (all logits of a global batch, the whole gradient, all
    weights) over the norm of the larger. 0: the same bits. None: see `default_tolerance`.
    """
    tolerance = default_tolerance(a, b) if tolerance is None else tolerance
    both = sorted(a.steps.keys() & b.steps.keys())
    if not both:
        raise UserError(f"{a.name} and {b.name} have no step in common: trace both from the same step on.")
    for step in both:
        for stage, detail in _differences(a, b, step, tolerance, first=step == both[0]):
            return Parting(step, stage, detail)
    return None


def _differences(a: Trace, b: Trace, step: int, tolerance: float, *, first: bool) -> Iterator[tuple[str, str]]:
    """The stages of one step in which the runs differ, in the order in which a step does them."""
    ranks_a, ranks_b = a.steps[step], b.steps[step]
    rows_a, rows_b = _rows(ranks_a), _rows(ranks_b)
    if [row for row, _ in rows_a] != [row for row, _ in rows_b]:
        shared = Counter(row for row, _ in rows_a) & Counter(row for row, _ in rows_b)
        yield "order of the data", f"the global batches of {len(rows_a)} and {len(rows_b)} rows share {shared.total()}"
    elif a.layout == b.layout and tolerance == 0 and _dealt(ranks_a) != _dealt(ranks_b):
        yield "order of the data", "the same global batch, but its rows are dealt to ranks and micro-batches in another way"
    if first and (found := _furthest(a.initial, b.initial, tolerance)):
        yield "initial weights", found
    logits_a, logits_b = ([value for _, logits in rows for value in logits] for rows in (rows_a, rows_b))
    if not math.dist(logits_a, logits_b) <= tolerance * max(math.hypot(*logits_a), math.hypot(*logits_b)):
        gap = max(abs(x - y) for x, y in zip(logits_a, logits_b, strict=True))
        yield "forward", f"the same rows and weights, but logits up to {gap:.2g} apart"
    yield from _gradient_differences(a, b, step, tolerance)
    for trace, ranks in ((a, ranks_a), (b, ranks_b)):
        if name := _unequal(ranks, "weights"):
            yield "optimizer step", f"the ranks of {trace.name} hold different weights in {name}"
    if found := _furthest(ranks_a[0]["weights"], ranks_b[0]["weights"], tolerance):
        yield "optimizer step", f"the same gradient, but after the step {found}"


def _gradient_differences(a: Trace, b: Trace, step: int, tolerance: float) -> Iterator[tuple[str, str]]:
    """Gradient (loss, backward, averaging over ranks) or clipping: the logged norm before clipping tells them apart."""
    ranks_a, ranks_b = a.steps[step], b.steps[step]
    for trace, ranks in ((a, ranks_a), (b, ranks_b)):
        if name := _unequal(ranks, "gradient"):
            yield "gradient", f"the ranks of {trace.name} hold different gradients of {name}: they are not averaged over ranks"
    one, other = ranks_a[0]["gradient"], ranks_b[0]["gradient"]
    logged_a, logged_b = a.logged.get(step, {}), b.logged.get(step, {})
    for name, words, within in (("loss", "losses", SAME_LOSS), ("grad_norm", "norms before clipping", tolerance)):
        x, y = logged_a.get(name), logged_b.get(name)
        if x is not None and y is not None and not abs(x - y) <= within * max(abs(x), abs(y)):
            yield "gradient", f"the same logits, but {words} {x:.9g} and {y:.9g}"
    found = _furthest(one, other, tolerance)
    if found and _parallel(one, other):
        known = "grad_norm" in logged_a and "grad_norm" in logged_b
        doubt = "" if known else " (or the loss is scaled: the norms before clipping, with --logging_steps 1 in both runs, would tell)"
        yield "clipping", f"one direction, but the norms that the optimizer sees are {_norm(one):.6g} and {_norm(other):.6g}{doubt}"
    elif found:
        yield "gradient", f"the same logits, but {found}"


def _rows(ranks: list[dict[str, Any]]) -> list[tuple[str, list[float]]]:
    """`(row, its logits)` of the global batch, sorted: the same whatever rank and micro-batch a row was on."""
    return sorted((row, logits) for rank in ranks for micro in rank["rows"] for row, logits in micro)


def _dealt(ranks: list[dict[str, Any]]) -> list[list[list[str]]]:
    return [[[row for row, _ in micro] for micro in rank["rows"]] for rank in ranks]


def _unequal(ranks: list[dict[str, Any]], kind: str) -> str | None:
    """The first tensor that is not the same bits on all ranks of one run, if any."""
    return next(
        (name for name, tensor in ranks[0][kind].items() if any(rank[kind][name]["sha256"] != tensor["sha256"] for rank in ranks)), None
    )


def _norm(tensors: Tensors) -> float:
    return math.hypot(*(tensor["norm"] for tensor in tensors.values()))


def _furthest(a: Tensors, b: Tensors, tolerance: float) -> str | None:
    """Words on the tensor that differs most, where all together differ by more than the tolerance; else None."""
    if a.keys() != b.keys():
        return f"tensors that only one of them has: {', '.join(sorted(a.keys() ^ b.keys())[:3])}"
    gaps = {name: math.dist(a[name]["sketch"], b[name]["sketch"]) for name in a if a[name]["sha256"] != b[name]["sha256"]}
    if not gaps or math.hypot(*gaps.values()) <= tolerance * max(_norm(a), _norm(b)):
        return None
    name = max(gaps, key=lambda name: gaps[name])
    return f"{len(gaps)} of {len(a)} tensors differ, most {name} (by about {gaps[name]:.2g}, of norm {a[name]['norm']:.3g})"


def _parallel(a: Tensors, b: Tensors) -> bool:
    """Whether the two gradients differ by one factor, as clipping makes them; differences of rounding are none."""
    if a.keys() != b.keys() or not _norm(a) or not _norm(b):
        return False
    factor = _norm(b) / _norm(a)
    distance = math.hypot(*(math.dist(a[name]["sketch"], b[name]["sketch"]) for name in a))
    rest = math.hypot(*(math.dist([factor * x for x in a[name]["sketch"]], b[name]["sketch"]) for name in a))
    # A factor that differs from 1 by less is the rounding of the gradients themselves, and the sketches' own.
    return rest <= PARALLEL * distance and distance > 1e-9 * _norm(a)
