"""Accuracy, macro F1, per-class scores, confusion matrix, likelihood and calibration as one `evaluate` module.

    evaluate.load("pipeline/metrics/text_classification").compute(predictions=logits, references=labels)

It lives in the repository, so it needs no network and no further package.
"""

from __future__ import annotations

from typing import Any

import datasets
import evaluate

from pipeline.metrics import counts
from pipeline.metrics import from_counts

_DESCRIPTION = "Figures of a single-label text classifier from its logits, each row counted once."


class TextClassification(evaluate.Metric):
    """`compute(predictions=(rows, classes) logits, references=(rows,) labels, label_names=None)`."""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation="",
            inputs_description="predictions: logits (rows, classes); references: labels (rows,); label_names: optional.",
            features=datasets.Features(
                {"predictions": datasets.Sequence(datasets.Value("float64")), "references": datasets.Value("int64")}
            ),
        )

    def _compute(self, predictions: Any, references: Any, label_names: list[str] | None = None) -> dict[str, Any]:
        import numpy as np

        logits, labels = np.asarray(predictions, dtype=np.float64), np.asarray(references, dtype=np.int64)
        names = label_names or [str(i) for i in range(logits.shape[1])]
        return from_counts(counts(logits, labels), names)
