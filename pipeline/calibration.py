"""Confidence that means what it says: a temperature fitted on validation rows, folded into the released weights.

Dividing the logits by a temperature T changes no label, only how sure the model claims to be (Guo et al., "On
Calibration of Modern Neural Networks", ICML 2017). Dividing the last layer's weight and bias by T does the same inside
the model, so every client (transformers, ONNX Runtime, a browser, the service) gives the same confidence and none of
them has to know about T.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import nn

from pipeline.errors import UserError
from pipeline.metrics import log_softmax

MIN_ROWS = 20  # with fewer validation rows the fit is noise: leave the model as it is
COLDEST, HOTTEST = 0.2, 10.0  # allowed temperatures


def fit_temperature(logits: np.ndarray, labels: np.ndarray) -> float:
    """The T for which softmax(logits / T) has the least negative log-likelihood on the given rows.

    Args:
        logits: `(rows, classes)` floats, unnormalised.
        labels: `(rows,)` whole numbers in `[0, classes)`.

    Returns:
        T within [0.2, 10]; 1.0 with fewer than 20 rows.

    Raises:
        UserError: logits that are not finite; no temperature repairs a model that diverged.
    """
    z = np.asarray(logits, dtype=np.float64)
    labels = np.asarray(labels, dtype=np.int64)
    if not np.isfinite(z).all():
        raise UserError("Logits hold NaN or infinity: training diverged. Lower --learning_rate, or use --precision fp32.")
    rows = len(labels)
    if rows < MIN_ROWS:
        return 1.0
    # One imagined row's worth of doubt, spread over all labels and rows: without it a validation set without a single
    # error would ask for infinite confidence.
    doubt = 1 / (rows + 1)
    target = (1 - doubt) * z[np.arange(rows), labels].mean() + doubt * z.mean()

    def slope(beta: float) -> float:
        """Derivative of the NLL by beta = 1/T. The NLL is convex in beta, so the slope crosses zero once."""
        return float((np.exp(log_softmax(beta * z)) * z).sum(axis=1).mean() - target)

    low, high = 1 / HOTTEST, 1 / COLDEST
    if slope(low) >= 0:
        return HOTTEST
    if slope(high) <= 0:
        return COLDEST
    for _ in range(60):  # bisection: 60 halvings exhaust float64
        middle = (low + high) / 2
        low, high = (low, middle) if slope(middle) > 0 else (middle, high)
    return 2 / (low + high)


def final_layer(model: Any) -> nn.Linear:
    """The layer that makes the logits: the last `nn.Linear` with `num_labels` outputs.

    Raises ValueError when there is none, which no sequence classification model of transformers shows.
    """
    labels = model.config.num_labels
    found = [m for m in model.modules() if isinstance(m, nn.Linear) and m.out_features == labels]
    if not found:
        raise ValueError(f"{type(model).__name__} has no linear layer with {labels} outputs to fold a temperature into.")
    return found[-1]


@torch.no_grad()
def fold_temperature(model: nn.Module, temperature: float) -> None:
    """Divide the final layer's weight and bias by `temperature` in place, and so all logits from now on.

    Raises ValueError for a temperature that is not a finite number above 0.
    """
    if not (math.isfinite(temperature) and temperature > 0):
        raise ValueError(f"temperature is {temperature}: allowed is a finite number above 0.")
    layer = final_layer(model)
    layer.weight.div_(temperature)
    if layer.bias is not None:
        layer.bias.div_(temperature)
