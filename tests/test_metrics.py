"""Figures from counts that add up, against formulas written out the long way."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.metrics import ECE_BINS, compute_metrics, counts, counts_size, from_counts

NAMES = ["a", "b", "c"]


def long_way(logits: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    rows = [[math.exp(x - max(row)) for x in row] for row in logits.tolist()]
    probabilities = [[x / sum(row) for x in row] for row in rows]
    predicted = [row.index(max(row)) for row in probabilities]
    f1 = []
    for k in range(len(NAMES)):
        hit = sum(p == y == k for p, y in zip(predicted, labels, strict=True))
        either = sum(p == k for p in predicted) + sum(y == k for y in labels)
        f1.append(2 * hit / either if either else 0.0)
    ece = 0.0
    for b in range(ECE_BINS):
        inside = [i for i, row in enumerate(probabilities) if b / ECE_BINS < max(row) <= (b + 1) / ECE_BINS]
        if inside:
            confidence = sum(max(probabilities[i]) for i in inside) / len(inside)
            accuracy = sum(predicted[i] == labels[i] for i in inside) / len(inside)
            ece += len(inside) / len(labels) * abs(confidence - accuracy)
    return {
        "accuracy": sum(p == y for p, y in zip(predicted, labels, strict=True)) / len(labels),
        "macro_f1": sum(f1) / len(f1),
        "nll": -sum(math.log(row[y]) for row, y in zip(probabilities, labels, strict=True)) / len(labels),
        "ece": ece,
    }


@settings(max_examples=50, deadline=None)
@given(seed=st.integers(0, 10**6), rows=st.integers(1, 60), scale=st.floats(0.1, 8))
def test_figures_are_right_and_shards_add_up(seed: int, rows: int, scale: float) -> None:
    draw = np.random.default_rng(seed)
    logits, labels = draw.normal(scale=scale, size=(rows, 3)), draw.integers(0, 3, rows)
    whole = from_counts(counts(logits, labels), NAMES)
    for name, value in long_way(logits, labels).items():
        assert whole[name] == pytest.approx(value, abs=1e-9), name
    cut = draw.integers(0, rows + 1)
    parts = [counts(logits[s], labels[s]) for s in (slice(0, cut), slice(cut, None)) if len(labels[s])]
    again = from_counts(np.sum(parts, axis=0), NAMES)
    assert again["confusion_matrix"] == whole["confusion_matrix"]
    assert all(abs(again[k] - whole[k]) < 1e-12 for k in ("accuracy", "macro_f1", "nll", "ece"))


def test_through_the_evaluate_library_without_a_network() -> None:
    import evaluate

    logits, labels = np.eye(3)[[0, 1, 2, 0]] * 4, np.array([0, 1, 2, 1])
    figures = compute_metrics(logits, labels, NAMES)
    assert figures["accuracy"] == 0.75 and figures["examples"] == 4
    assert figures["confusion_matrix"] == [[1, 0, 0], [1, 1, 0], [0, 0, 1]]
    assert figures["per_class"]["b"] == {"precision": 1.0, "recall": 0.5, "f1": pytest.approx(2 / 3), "support": 2}
    folder = Path(__file__).resolve().parent.parent / "pipeline" / "metrics" / "text_classification"
    assert evaluate.load(str(folder)).compute(predictions=logits, references=labels)["accuracy"] == 0.75
    assert len(counts(logits, labels)) == counts_size(3)


def test_extreme_logits_stay_finite() -> None:
    figures = from_counts(counts(np.array([[1e4, -1e4, 0.0], [-1e4, 1e4, 0.0]]), np.array([1, 1])), NAMES)
    assert figures["nll"] == pytest.approx(1e4)
    assert figures["accuracy"] == 0.5
