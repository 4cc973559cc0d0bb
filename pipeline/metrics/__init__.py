"""What a run is judged by, computed from counts that add up: over batches, over ranks, over machines.

Every figure follows from one flat vector of sums (`counts`), so the raw DDP script adds the ranks' vectors with a
single all-reduce and gets the same numbers as one process, exactly: a mean of per-rank means would not do that.
The same formulas stand behind the `evaluate` module in `pipeline/metrics/text_classification`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

ECE_BINS = 15  # as in Guo et al., "On Calibration of Modern Neural Networks", ICML 2017


def log_softmax(logits: np.ndarray) -> np.ndarray:
    """Row-wise log-softmax in float64; `(rows, classes)` to `(rows, classes)`."""
    shifted = logits.astype(np.float64) - logits.max(axis=1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))


def counts(logits: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """The sums all figures follow from.

    Args:
        logits: `(rows, classes)` floats, unnormalised.
        labels: `(rows,)` whole numbers in `[0, classes)`.

    Returns:
        float64 vector: the confusion matrix (`classes * classes`, row = true), then the summed negative
        log-likelihood in nats (1), then rows, summed confidence and hits of each calibration bin (`3 * ECE_BINS`).
        Vectors of disjoint sets of rows may be added.
    """
    classes = logits.shape[1]
    labels = np.asarray(labels, dtype=np.int64)
    log_probabilities = log_softmax(logits)
    predicted = logits.argmax(axis=1)
    confusion = np.bincount(labels * classes + predicted, minlength=classes * classes)
    nll = -log_probabilities[np.arange(len(labels)), labels].sum()
    confidence = np.exp(log_probabilities.max(axis=1))
    # Bins are open on the left, closed on the right: (0, 1/15], (1/15, 2/15], ...
    bins = np.clip(np.ceil(confidence * ECE_BINS).astype(int) - 1, 0, ECE_BINS - 1)
    calibration = [np.bincount(bins, weights=w, minlength=ECE_BINS) for w in (np.ones(len(labels)), confidence, predicted == labels)]
    return np.concatenate([confusion, [nll], *calibration]).astype(np.float64)


def counts_size(classes: int) -> int:
    """Length of the vector that `counts` returns for that many classes."""
    return classes * classes + 1 + 3 * ECE_BINS


def from_counts(vector: np.ndarray, label_names: Sequence[str]) -> dict[str, Any]:
    """The figures, from the (added) vector of `counts`.

    Returns:
        accuracy, macro_f1 (mean of the classes' F1; a class nobody has and nobody predicts counts 0, as in
        scikit-learn with zero_division=0), nll (nats per row), ece (expected calibration error, Guo et al. 2017, 15
        equal-width bins), examples, per_class {name: precision, recall, f1, support}, confusion_matrix (row = true,
        column = predicted).
    """
    classes = len(label_names)
    confusion = vector[: classes * classes].reshape(classes, classes)
    examples = confusion.sum()
    _, confidence, hits = vector[classes * classes + 1 :].reshape(3, ECE_BINS)
    true_positive = confusion.diagonal()
    support, predicted = confusion.sum(axis=1), confusion.sum(axis=0)

    def ratio(top: np.ndarray, bottom: np.ndarray) -> np.ndarray:
        return np.divide(top, bottom, out=np.zeros_like(top, dtype=float), where=bottom > 0)

    precision, recall = ratio(true_positive, predicted), ratio(true_positive, support)
    f1 = ratio(2 * true_positive, support + predicted)
    return {
        "accuracy": float(true_positive.sum() / examples),
        "macro_f1": float(f1.mean()),
        "nll": float(vector[classes * classes] / examples),
        "ece": float(np.abs(confidence - hits).sum() / examples),
        "examples": int(examples),
        "per_class": {
            name: {"precision": float(precision[i]), "recall": float(recall[i]), "f1": float(f1[i]), "support": int(support[i])}
            for i, name in enumerate(label_names)
        },
        "confusion_matrix": confusion.astype(int).tolist(),
    }


def compute_metrics(logits: np.ndarray, labels: np.ndarray, label_names: Sequence[str]) -> dict[str, Any]:
    """All figures of `from_counts` for `(rows, classes)` logits and `(rows,)` labels, through the `evaluate` library."""
    from pipeline.metrics.text_classification.text_classification import TextClassification

    # keep_in_memory: no files, no locks between ranks. Every rank that calls this holds all the rows.
    module = TextClassification(keep_in_memory=True)
    return module.compute(predictions=logits, references=labels, label_names=list(label_names))
