"""The page benchmarks/parity.md, made from results/parity.json by the command that wrote it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.common import provenance_lines

SCORES = ("accuracy", "macro_f1", "nll", "ece")


def page(results: Mapping[str, Any]) -> str:
    """Markdown of the results of `benchmarks.parity.measure`, with their provenance."""
    settings, evaluation = results["settings"], results["evaluation"]
    with_dropout = [pair for pair in results["pairs"] if pair["a"]["dropout"]]
    without = [pair for pair in results["pairs"] if not pair["a"]["dropout"]]
    once = "Each example is counted once." if evaluation["each_once"] else "NOT every example is counted once."
    rows = (
        [score["entry"], score["processes"], *(f"{score['test'][name]:.12f}" for name in SCORES)]
        for score in sorted(evaluation["scored"], key=lambda score: (score["entry"] != "trainer", score["processes"]))
    )
    scores = "\n".join(line(row) for row in rows)
    return f"""# Parity: one process or two, Trainer or by hand, the same result

{provenance_lines(results)} {len(results["runs"])} training runs on the CPU, one thread a process, {results["seconds"]} s in all.

all-MiniLM-L6-v2 (22.7 M parameters) learns {settings["train_rows"]} stories of Reuters R8, at most {settings["max_length"]} tokens each: \
{settings["steps"]} optimizer steps, which is more than one epoch, {settings["global_batch_size"]} rows a step, length grouping on. What \
differs is who cuts the global batch, and into how many parts. The tables give the largest difference of any one weight after the \
last step, and of the logged loss and gradient norm (before clipping) of any step. `python -m benchmarks.parity --compare A B` says \
where two runs of your own part.

## Trainer against the raw script, dropout on

The same number of processes and the same accumulation: the same bits.

{table(with_dropout)}

## Other numbers of processes, other accumulation, dropout off

Each against Trainer with one process and accumulation 1. Dropout is off here because dropout masks belong to a rank: each rank draws \
its own, for its own rows, so with dropout two processes drop other places than one does, and their results differ as those of two \
seeds do. What is left without it is rounding, since sums are added in another order. Adam amplifies it, for it divides a gradient by \
its own size; fp64 shows that there is nothing else. (Losses are added up in fp32 whatever the precision.)

{table(without)}

## Evaluation

The same weights scored by one process and by two, on {evaluation["scored"][0]["examples"]} test rows, a prime number. Accepted: \
{number(evaluation["bound"])}. {once}

| entry | processes | accuracy | macro F1 | negative log-likelihood | calibration error |
|---|---|---|---|---|---|
{scores}
| largest difference | | {" | ".join(number(evaluation["apart"][name]) for name in SCORES)} |
"""


def table(pairs: Sequence[Mapping[str, Any]]) -> str:
    """A line for each pair: the second run's place in the matrix, its differences from the first, and what is accepted."""
    head = "| precision | entry | processes | accumulation | weights | loss | gradient norm | accepted | holds |"
    lines = [head, "|---" * (head.count("|") - 1) + "|"]
    for pair in pairs:
        run, apart, bound = pair["b"], pair["apart"], pair["bound"]
        cells = [run["precision"], run["entry"], run["processes"], run["accumulation"], *(number(apart[name]) for name in bound)]
        accepted = ", ".join(number(value) for value in bound.values())
        verdict = "yes" if pair["holds"] else f"NO: they part at {pair['parting']}"
        lines.append(line([*cells, accepted, verdict]))
    return "\n".join(lines)


def line(cells: Sequence[Any]) -> str:
    return f"| {' | '.join(map(str, cells))} |"


def number(value: float) -> str:
    return "0" if value == 0 else f"{value:.2g}"
