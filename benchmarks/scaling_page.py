"""The scaling model's curves and its check, as a section of a page and a picture, made from benchmarks/results/scaling.json alone."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.common import caption, named, provenance_lines, save
from benchmarks.explain.page import label


def _speed(curve: Mapping[str, Any]) -> str:
    return "ranks as fast as measured" if curve["faster"] == 1 else f"assumed {curve['faster']:g} times faster"


def sentence(results: Mapping[str, Any]) -> str:
    """The headline: what the fastest and a common link would leave of 64 ranks, and how far off the check was."""
    curve, last = results["curves"][-1], results["ranks"][-1]
    left = ", ".join(f"{curve['efficiency'][name][-1]:.0%} over {name}" for name in ("NVLink 3 (A100)", "100 Gb/s Ethernet"))
    checked, *_, informed = results["held_out"]
    return (
        f"Predicted for {last} ranks {curve['faster']:g} times as fast as the one measured, {curve['rows']:g} rows each: an efficiency of {left}; "
        f"checked at {results['measured']['ranks']} ranks here: {checked['predicted']:.2f}x predicted, {checked['measured']:.2f}x measured; "
        f"knowing how ranks and hidden all-reduces slow each other down, {informed['predicted']:.2f}x."
    )


def section(results: Mapping[str, Any], machine: str = "") -> str:
    """The section of a page, in Markdown, from its heading on; `machine` is the label of another than the first."""
    model, source, links = results["model"], results["from"], results["links"]
    here = results["measured"]["link"]
    ranks = results["measured"]["ranks"]
    lines = [
        f"## More ranks: predictions{f', from {machine}' * bool(machine)}",
        "",
        f"**Predictions**, but for the crosses (that of fixed rows a rank: one rank's parts over a measured step of both). They are made from parts that were measured at 1 and {ranks} ranks. {provenance_lines(source)} "
        f"`python -m benchmarks.scaling` has the formula. What goes into it: {model['per_row'] * 1e3:.2f} ms a row, "
        f"{model['fixed'] * 1e3:.1f} ms a batch and {model['once'] * 1e3:.1f} ms a step; {sum(model['buckets']) / 1e6:.0f} MB of gradients, "
        f"{model['buckets'][-1] / 1e6:.0f} MB of them in the last bucket; of the other buckets {_hidden(model['hidden'])}; "
        f"{here}: {links[here]['latency'] * 1e6:.0f} µs and {links[here]['bandwidth'] / 1e9:.2f} GB/s, "
        f"{results['fit']['error']:+.0%} off for the {results['fit']['bytes'] / 2**20:.0f} MiB timed.",
        "",
        f"A rank here is {label({**source['about'], 'processes': 1})}, so slow that most links look alike; the lower half assumes ranks that compute "
        f"{results['curves'][-1]['faster']:g} times as fast, which nobody measured. The links are at their line rates, each rank has one of its own. "
        "Contention, and what hidden all-reduces take from backward, are this machine's: the crosses have them, the curves do not.",
        "",
        f"![Predicted efficiency]({named('scaling', machine)}.png)",
        "",
    ]
    for curve in results["curves"]:
        if curve["fixed"] == "rows per rank":
            continue  # in the picture
        lines += [f"Predicted efficiency, global batch of {curve['rows']:g} rows whatever the ranks, {_speed(curve)}:", ""]
        lines += [
            "| link | " + " | ".join(f"{n} ranks" for n in results["ranks"][1:]) + " |",
            "|---|" + "---|" * (len(results["ranks"]) - 1),
        ]
        for name, values in curve["efficiency"].items():
            lines += [f"| {name} | " + " | ".join(f"{value:.0%}" for value in values[1:]) + " |"]
        lines += [""]
    lines += [
        f"The check: the speed-up at {ranks} ranks. The first row holds it out: no step of several ranks was measured for it. The others add what only "
        "several ranks tell, so they show what the first one lacks. (The curves know more: the share that is hidden, and the straggler.)",
        "",
        "| known | predicted | measured | error |",
        "|---|---|---|---|",
        *(f"| {row['known']} | {row['predicted']:.2f}x | {row['measured']:.2f}x | {row['error']:+.1%} |" for row in results["held_out"]),
    ]
    strict, *_, informed = (abs(row["error"]) for row in results["held_out"])
    if informed > strict:
        lines += ["", "The last knows most and is further off than the first, whose errors cancel each other."]
    return "\n".join(lines) + "\n"


def _hidden(share: float) -> str:
    if share < 0:
        return f"none is hidden: talking under backward takes {1 - share:.1f} times as long as on its own, for it needs the same cores"
    if share >= 1:
        return "all of the time is hidden under backward, for what is left over is no more than the last bucket should take"
    return f"{share:.0%} of the time is hidden under backward"


def plot(results: Mapping[str, Any], path: Path) -> None:
    """Four panels: a fixed global batch and fixed rows per rank, at the measured speed of a rank and at the assumed one."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.ticker import PercentFormatter, ScalarFormatter

    figure, axes = pyplot.subplots(2, 2, figsize=(11, 8), sharex=True, sharey=True, layout="constrained")
    for i, (panel, curve) in enumerate(zip(axes.flat, results["curves"], strict=True)):
        for c, (name, values) in enumerate(curve["efficiency"].items()):
            first = name == results["measured"]["link"]
            panel.plot(results["ranks"], values, "-o" if first else "--o", color="black" if first else f"C{c - 1}", markersize=3.5,
                       linewidth=2.2 if first else 1.4, label=f"{name}, predicted" if i == 0 else None)  # fmt: skip
        if curve["faster"] == 1:
            n, value = results["measured"]["ranks"], results["measured"][curve["fixed"]]
            whole = curve["fixed"] == "global batch"
            panel.plot([1, n], [1, value], "X", color="#e45756", markersize=11, markeredgecolor="white" if whole else "#e45756", zorder=5,
                       fillstyle="full" if whole else "none", label="measured" if whole else "one rank's parts over a measured step")  # fmt: skip
        fixed = f"global batch {curve['rows']:g}" if curve["fixed"] == "global batch" else f"{curve['rows']:g} rows per rank"
        panel.set_title(f"{fixed}, {_speed(curve)}", fontsize=10.5, loc="left")
        panel.set_xscale("log", base=2)
        panel.set_xticks(results["ranks"])
        panel.xaxis.set_major_formatter(ScalarFormatter())
        panel.yaxis.set_major_formatter(PercentFormatter(1.0))
        panel.set_ylim(0, 1.05)
        panel.grid(alpha=0.25)
        panel.spines[["top", "right"]].set_visible(False)
    for panel in axes[1]:
        panel.set_xlabel("ranks")
    for panel in axes[:, 0]:
        panel.set_ylabel("efficiency")
    figure.suptitle("Predicted efficiency of a rank", fontweight="bold", x=0.01, ha="left")
    figure.legend(loc="outside lower center", ncols=4, frameon=False, fontsize=9)
    caption(figure, results)
    save(figure, path, results, dpi=120)
    pyplot.close(figure)
