"""A step of several ranks as it went by: what each computed, and under it its all-reduces, from real time stamps.

python -m benchmarks.explain --timeline        # measure it again: results/timeline.json and docs/images/timeline.png
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.common import caption, save
from benchmarks.explain.page import COLOURS, TITLES

COLOURS = COLOURS | {"all-reduce": "#f58518"}


def choose(steps: Sequence[Sequence[Sequence[Sequence[Any]]]]) -> list[list[list[Any]]]:
    """Of all recorded steps, `(ranks, steps, spans)`, the one of median length; spans in seconds from its first rank's begin."""

    def length(step: int) -> float:
        return max(span[2] for rank in steps for span in rank[step]) - min(span[1] for rank in steps for span in rank[step])

    step = sorted(range(len(steps[0])), key=length)[(len(steps[0]) - 1) // 2]
    zero = min(span[1] for rank in steps for span in rank[step])
    return [[[part, round(begin - zero, 6), round(end - zero, 6), *size] for part, begin, end, *size in rank[step]] for rank in steps]


def plot(results: Mapping[str, Any], path: Path) -> None:
    """Two lanes a rank: the process's own work, and its all-reduces, from the full bucket to the average's return."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    ranks = results["ranks"]
    figure, axes = pyplot.subplots(figsize=(11, 0.9 + 1.35 * len(ranks)), layout="constrained")
    shortest = 0.04 * max(span[2] for spans in ranks for span in spans) * 1e3
    ticks = []
    for r, spans in enumerate(ranks):
        work, talk = 2.6 * r, 2.6 * r + 1
        ticks += [(work, f"rank {r}: computes"), (talk, "all-reduces")]
        reduces = sorted((span for span in spans if span[0] == "all-reduce"), key=lambda span: span[1])
        ready = max(span[1] for span in reduces)  # the last bucket is full: backward has nothing left but to wait
        for part, begin, end, *size in spans:
            start, width = begin * 1e3, (end - begin) * 1e3
            # Two all-reduces may be under way at once: neighbours lie side by side.
            y, height = (talk - 0.2 + 0.4 * (reduces.index([part, begin, end, *size]) % 2), 0.38) if size else (work, 0.8)
            axes.barh(y, width, left=start, height=height, color=COLOURS[part], edgecolor="white", linewidth=0.8)
            text = f"{size[0] / 1e6:.0f} MB" if size else TITLES[part].removeprefix("clipping and ")
            if part == "backward" and begin < ready < end:
                axes.fill_between([start, ready * 1e3], work, talk + 0.45, color=COLOURS[part], alpha=0.08, linewidth=0)  # what hides
                axes.barh(y, (end - ready) * 1e3, left=ready * 1e3, height=height, color="white", edgecolor=COLOURS[part], hatch="////")
                width = (ready - begin) * 1e3
            if width > shortest * (1.0 if size else 1.6):
                colour = "white" if part in ("forward", "backward") else "black"
                axes.text(start + width / 2, y, text, ha="center", va="center", fontsize=9.5, color=colour)
    axes.set_yticks([y for y, _ in ticks], [name for _, name in ticks])
    axes.set_ylim(2.6 * len(ranks) - 1.0, -0.6)
    axes.set_xlim(left=0)
    axes.set_xlabel("milliseconds from the step's begin; hatched: backward is done but for waiting")
    axes.set_title(
        "One training step: buckets of gradients are all-reduced while backward still computes earlier layers, all but the last",
        loc="left",
        fontsize=11,
    )
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="x", alpha=0.25)
    axes.set_axisbelow(True)
    caption(figure, results)
    save(figure, path, results, dpi=120)
    pyplot.close(figure)
