"""The tables and pictures of `benchmarks.bench`, one column or one table a machine."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from benchmarks.bench import CHECKPOINT_STEPS, MATMUL, PLAIN
from benchmarks.common import caption, machine, provenance_lines, save
from pipeline.speed import FIRST_STEPS

NOT = "not measured"
SINGLE = (PLAIN, "raw, 1 process", "Trainer, 1 process")
DOUBLE = ("raw, 1 process of 1 thread", "raw, 1 process", "raw, 2 processes", "Trainer, 1 process", "Trainer, 2 processes")
TITLES = {
    PLAIN: "The loop most tutorials begin with: one process, padded to 128 tokens, fp32",
    "raw, 1 process": "Raw script, 1 process",
    "Trainer, 1 process": "Trainer, 1 process",
    "raw, 1 process of 1 thread": "Raw script, 1 process of 1 thread",
    "raw, 2 processes": "Raw script, 2 processes",
    "Trainer, 2 processes": "Trainer, 2 processes",
}
RATIOS = {
    "defaults_against_plain": "The defaults (length grouping, low precision, fused AdamW) against that loop, 1 process",
    "trainer_against_raw_1": "Trainer against the raw script, 1 process",
    "trainer_against_raw": "Trainer against the raw script, 2 processes",
    "two_against_one_thread": "2 processes of 1 thread against 1 of 1 thread, raw script: what a second core brings",
    "two_against_one": "2 processes against 1, raw script, the same cores (one GPU each where there are GPUs)",
    "two_against_one_trainer": "2 processes against 1, Trainer, the same",
    "checkpoint_share": f"A checkpoint with its manifest every {CHECKPOINT_STEPS} steps, from the one measured in each run: share of the seconds, 2 processes",
}
# Machines that have a column though nobody has measured on them: label -> name, options.
AWAITED = {"t4x2": ("2x T4 (Kaggle)", "--label t4x2 --model distilbert/distilbert-base-uncased")}
COLOURS = {"plain": "#9aa5b1", "raw": "#0072b2", "Trainer": "#e69f00"}  # Okabe and Ito's, and a grey
INK = "#1f2933"


def columns(machines: Mapping[str, Mapping[str, Any]]) -> dict[str, tuple[str, Mapping[str, Any] | None]]:
    """By label: the machine's name and its results, None for those that are awaited."""
    known: dict[str, tuple[str, Mapping[str, Any] | None]] = {label: (machine(results), results) for label, results in machines.items()}
    return known | {label: (name, None) for label, (name, _) in AWAITED.items() if label not in known}


def side_by_side(machines: Mapping[str, Mapping[str, Any]], names: Sequence[str], ratios: Sequence[str]) -> list[str]:
    """One table: samples a second of the configurations and their ratios, a column for each machine."""
    every = columns(machines)
    lines = ["| | " + " | ".join(name for name, _ in every.values()) + " |", "|---|" + "---|" * len(every)]

    def row(title: str, cell: Callable[[Mapping[str, Any]], str]) -> str:
        return f"| {title} | " + " | ".join(cell(results) if results else NOT for _, results in every.values()) + " |"

    lines.append(row("Model, precision", lambda r: f"{r['model']}, {precision(r)}"))
    lines += [row(f"{TITLES[name]}, samples/s", lambda r, name=name: samples(r, name)) for name in names]  # type: ignore[misc]
    lines += [row(RATIOS[name], lambda r, name=name: ratio_cell(r, name)) for name in ratios]  # type: ignore[misc]
    lines.append(row("Measured on", lambda r: r["date"][:10]))
    return lines


def how_to_measure(machines: Mapping[str, Mapping[str, Any]], target: str = "bench") -> list[str]:
    """A line for each machine that is awaited, with the command that measures on it."""
    awaited = [words for label, words in AWAITED.items() if label not in machines]
    how = "one run of the notebook in benchmarks/kaggle, or on such a machine"
    return [f'{name}: {NOT}. By {how} `make {target} ARGS="{options}" && make bench-report`.' for name, options in awaited]


def precision(results: Mapping[str, Any]) -> str:
    """What the entries computed in."""
    runs = next(runs for name, runs in results["runs"].items() if name not in (PLAIN, MATMUL))
    return runs[0]["topology"]["precision"]


def samples(results: Mapping[str, Any], name: str) -> str:
    rates = [run["samples_per_second"] for run in results["runs"].get(name, [])]
    return f"{statistics.median(rates):.1f} ({min(rates):.1f} to {max(rates):.1f})" if rates else NOT


def ratio_cell(results: Mapping[str, Any], name: str) -> str:
    row = results["ratios"].get(name)
    if row is None:
        return NOT

    def number(value: float) -> str:
        return f"{value:.1%}" if name == "checkpoint_share" else f"{value:.2f}"

    sense = "at most" if name == "checkpoint_share" else "at least"
    bound = "" if row["bound"] is None else f"; accepted: {sense} {number(row['bound'])}{'' if row['held'] else ', NOT held'}"
    return f"{number(row['median'])} ({number(row['lowest'])} to {number(row['highest'])}{bound})"


def details(results: Mapping[str, Any], names: Sequence[str]) -> list[str]:
    """One machine's table: medians of the rounds."""
    lines = [
        "| | samples/s | tokens/s | padding | step, p50 / p90 / p99, ms | peak memory a rank, GiB | GFLOP/s on texts | with padding | share of peak "
        "| test accuracy |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for name in names:
        if not (runs := results["runs"].get(name)):
            lines.append(f"| {TITLES[name]} |" + f" {NOT} |" * 9)
            continue

        def middle(key: str, runs: list[dict[str, Any]] = runs) -> float:
            return statistics.median(run[key] for run in runs)

        steps = " / ".join(f"{1000 * statistics.median(run['step_seconds'][p] for run in runs):.0f}" for p in ("p50", "p90", "p99"))
        peaks = [max(run["peak_memory_gib"]) for run in runs if None not in run["peak_memory_gib"]]
        scores = sorted({run["accuracy"] for run in runs if "accuracy" in run})
        lines.append(
            f"| {TITLES[name]} | {middle('samples_per_second'):.1f} | {middle('tokens_per_second'):.0f} | {middle('padded_share'):.1%} | {steps} "
            f"| {f'{max(peaks):.2f}' if peaks else NOT} | {middle('flops_per_second') / 1e9:.0f} | {middle('flops_per_second_with_padding') / 1e9:.0f} "
            f"| {middle('share_of_peak'):.1%} | {', '.join(f'{score:.3f}' for score in scores) or 'not scored'} |"
        )
    return lines


def about(results: Mapping[str, Any]) -> list[str]:
    """Provenance, settings and the peak, in words."""
    settings, peaks = results["settings"], results["runs"][MATMUL]
    rates = ", ".join(f"{statistics.median(p[name] for p in peaks) / 1e9:.0f} GFLOP/s in {name}" for name in peaks[0])
    where = "one GPU" if results["device"] == "cuda" else "all cores"
    return [
        provenance_lines(results),
        f"{settings['rounds']} round{'s' * (settings['rounds'] > 1)} in turns; an entry takes {settings['steps']} steps of {settings['rows_a_step']} rows, the plain loop "
        f"{settings['plain_steps']}, and the first {FIRST_STEPS} of each are not counted: p99 is of {settings['steps'] - FIRST_STEPS} and {settings['plain_steps'] - FIRST_STEPS} steps a round, so nearly the slowest one. "
        f"Runs begin cold, and the first batch of a shape takes longer; `make explain` measures steps that were taken before. {results['minutes_in_all']} minutes in all. {results['model']} on AG News (drawn from {results['dataset_rows']['train']:,} training rows), at most {settings['max_length']} "
        f"tokens. Ranks talk through {results['interconnect']}. Matrix-multiply peak of {where}, measured in the same rounds, to which all shares refer: {rates}.",
    ]


def plot(results: Mapping[str, Any], names: Sequence[str], path: Path) -> None:
    """Samples a second of the configurations: a bar to the median, a dot each round; beside it the share of the peak."""
    names = [name for name in names if name in results["runs"]]
    figure = Figure(figsize=(10, 1.2 + 0.5 * len(names)), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True, width_ratios=(3, 2))
    for i, name in enumerate(names):
        colour = COLOURS[name.split()[0].rstrip(",")]
        for panel, values, form in (
            (left, [run["samples_per_second"] for run in results["runs"][name]], "{:.1f}"),
            (right, [100 * run["share_of_peak"] for run in results["runs"][name]], "{:.1f}%"),
        ):
            panel.barh(i, statistics.median(values), height=0.62, color=colour, alpha=0.85)
            panel.plot(values, [i] * len(values), "o", color=INK, markersize=3)
            panel.annotate(
                form.format(statistics.median(values)), (max(values), i), (6, 0), textcoords="offset points", va="center", fontsize=9
            )
    left.set_yticks(range(len(names)), [TITLES[name].split(":")[0] for name in names])
    left.invert_yaxis()
    left.set_title("samples a second", fontsize=10, color=INK)
    right.set_title("% of the matrix-multiply peak", fontsize=10, color=INK)
    for panel in (left, right):
        panel.margins(x=0.16)
        panel.set_xlim(left=0)
        panel.spines[["top", "right", "left"]].set_visible(False)
        panel.tick_params(length=0, colors=INK)
        panel.grid(axis="x", alpha=0.25)
        panel.set_axisbelow(True)
    settings = results["settings"]
    figure.suptitle(
        f"{results['model']} on AG News, {settings['rows_a_step']} rows a step: median and each round",
        fontsize=9,
        color=INK,
        x=0.01,
        ha="left",
    )
    caption(figure, results)
    save(figure, path, results, dpi=150, facecolor="white")
