"""The two pictures of a model card, drawn from the run record: confusion matrix and training curve."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

INK, GREY, LOSS, ACCURACY, F1 = "#1f2933", "#9aa5b1", "#3e6fb0", "#d1495b", "#2f8f6b"
STYLE: dict[str, Any] = {"dpi": 150, "facecolor": "white", "bbox_inches": "tight", "metadata": {"Software": None}}


def card_images(record: Mapping[str, Any], folder: Path) -> list[Path]:
    """Write confusion_matrix.png and, where losses were logged, training_curve.png into `folder`; returns their paths."""
    paths = [folder / "confusion_matrix.png"]
    test = record["test"]
    confusion_matrix(np.array(test["confusion_matrix"]), record["data"]["label_names"]).savefig(paths[0], **STYLE)
    if record.get("history"):
        paths.append(folder / "training_curve.png")
        training_curve(record).savefig(paths[1], **STYLE)
    return paths


def confusion_matrix(matrix: np.ndarray, labels: list[str]) -> Figure:
    """`(classes, classes)` counts, row = true class: coloured by the share of the row, with counts where they fit."""
    classes = len(labels)
    side = min(max(3.2, 0.62 * classes + 1.6), 14)
    figure = Figure(figsize=(side, side))
    axes = figure.subplots()
    shares = matrix / np.maximum(matrix.sum(axis=1, keepdims=True), 1)
    image = axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    names = [name if len(name) <= 22 else f"{name[:11]}…{name[-10:]}" for name in labels]
    small = 9 if classes <= 12 else 7
    axes.set_xticks(range(classes), names, rotation=40 if classes <= 20 else 90, ha="right", rotation_mode="anchor", fontsize=small)
    axes.set_yticks(range(classes), names, fontsize=small)
    axes.set_xlabel("predicted", color=INK)
    axes.set_ylabel("true", color=INK)
    axes.tick_params(length=0, colors=INK)
    axes.set_xticks(np.arange(classes - 1) + 0.5, minor=True)
    axes.set_yticks(np.arange(classes - 1) + 0.5, minor=True)
    axes.grid(which="minor", color="white", linewidth=1.5)
    axes.tick_params(which="minor", length=0)
    axes.spines[:].set_visible(False)
    if classes <= 20:
        for (i, j), n in np.ndenumerate(matrix):
            colour = "white" if shares[i, j] > 0.55 else INK if n else GREY
            axes.text(j, i, f"{n:,}", ha="center", va="center", color=colour, fontsize=small, weight="bold" if i == j else "normal")
    right, rows = int(matrix.trace()), int(matrix.sum())
    axes.set_title(f"{right:,} of {rows:,} test texts right ({right / max(rows, 1):.1%})", fontsize=10, color=INK, pad=10)
    bar = figure.colorbar(image, ax=axes, fraction=0.046, pad=0.03, format=lambda share, _: f"{share:.0%}")
    bar.outline.set_visible(False)  # type: ignore[operator]
    bar.ax.tick_params(labelsize=7, colors=INK, length=0)
    bar.set_label("share of the true class", fontsize=8, color=INK)
    return figure


def training_curve(record: Mapping[str, Any]) -> Figure:
    """Losses by step; beside them, where there are several evaluations, accuracy and macro F1 on the validation share."""
    history, evaluations, best = record["history"], record.get("epochs") or [], record.get("best")
    panels = 2 if len(evaluations) > 1 else 1  # a curve of one point says less than the number in the text
    figure = Figure(figsize=(9, 3.2), layout="constrained")
    left, *others = figure.subplots(1, panels, squeeze=False)[0]
    dots: dict[str, Any] = {"markersize": 5, "linewidth": 1.4}
    left.plot([h["step"] for h in history], [h["loss"] for h in history], color=LOSS, linewidth=1.4, label="training")
    if evaluations:
        left.plot([e["step"] for e in evaluations], [e["nll"] for e in evaluations], "o--", color=ACCURACY, label="validation", **dots)
    left.set(xlabel="optimizer step", ylabel="cross-entropy (nats)", title="Loss")
    left.set_ylim(bottom=0)
    for right in others:
        for key, colour, mark, name in (("accuracy", ACCURACY, "o-", "accuracy"), ("macro_f1", F1, "s--", "macro F1")):
            right.plot([e["step"] for e in evaluations], [e[key] for e in evaluations], mark, color=colour, label=name, **dots)
        right.set(xlabel="optimizer step", title="Validation")
        right.set_xlim(left.get_xlim())
        # At least five points of room: a difference of a thousandth should not look like a cliff.
        scores = [e[key] for e in evaluations for key in ("accuracy", "macro_f1")]
        middle, half = (min(scores) + max(scores)) / 2, max((max(scores) - min(scores)) * 0.6, 0.025)
        right.set_ylim(middle - half, middle + half)
    for axes in (left, *others):
        if best and evaluations:
            axes.axvline(best["step"], color=GREY, linestyle=":", linewidth=1.2, label="released weights", zorder=0)
        axes.grid(axis="y", color="#e4e7eb", linewidth=0.8)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
        axes.spines[["left", "bottom"]].set_color(GREY)
        axes.tick_params(colors=INK, labelsize=8)
        axes.title.set(color=INK, fontsize=10)
        axes.xaxis.label.set(color=INK, fontsize=9)
        axes.yaxis.label.set(color=INK, fontsize=9)
        if axes.get_legend_handles_labels()[0]:
            axes.legend(frameon=False, fontsize=8, labelcolor=INK)
    return figure
