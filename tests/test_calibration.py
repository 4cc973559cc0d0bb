"""The temperature: found where it is known, folded in without changing a label."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    DistilBertConfig,
    DistilBertForSequenceClassification,
    RobertaConfig,
    RobertaForSequenceClassification,
)

from pipeline.calibration import COLDEST, MIN_ROWS, fit_temperature, fold_temperature
from pipeline.errors import UserError
from pipeline.metrics import compute_metrics, log_softmax


def calibrated(rows: int, classes: int = 5) -> tuple[np.ndarray, np.ndarray]:
    """Logits whose softmax is, by construction, the true probability of the label."""
    random = np.random.default_rng(0)
    logits = 2 * random.normal(size=(rows, classes))
    chances = np.exp(log_softmax(logits))
    return logits, np.array([random.choice(classes, p=p) for p in chances])


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.5])
def test_finds_the_temperature_it_was_given(temperature: float) -> None:
    logits, labels = calibrated(20_000)
    assert fit_temperature(temperature * logits, labels) == pytest.approx(temperature, rel=0.03)


def test_is_the_minimum_and_improves_calibration() -> None:
    logits, labels = calibrated(3000)
    logits = 3 * logits
    best = fit_temperature(logits, labels)

    def nll(temperature: float) -> float:
        return compute_metrics(logits / temperature, labels, list("abcde"))["nll"]

    assert all(nll(best) < nll(best * factor) for factor in (0.9, 0.97, 1.03, 1.1))
    before, after = (compute_metrics(logits / t, labels, list("abcde")) for t in (1, best))
    assert after["ece"] < before["ece"] / 3 and after["accuracy"] == before["accuracy"]


def test_few_rows_and_no_errors_stay_sane() -> None:
    logits, labels = calibrated(MIN_ROWS - 1)
    assert fit_temperature(logits, labels) == 1.0
    perfect = np.eye(4)[np.arange(40) % 4]  # without a single error: any maximum-likelihood fit would want T = 0
    assert fit_temperature(perfect, np.arange(40) % 4) == COLDEST
    assert COLDEST < fit_temperature(8 * perfect, np.arange(40) % 4) < 10


def test_a_diverged_model_is_named_as_such() -> None:
    logits, labels = calibrated(50)
    logits[3, 1] = np.nan
    with pytest.raises(UserError, match="diverged"):
        fit_temperature(logits, labels)


SMALL = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16, "vocab_size": 50, "num_labels": 3}


@pytest.mark.parametrize(
    "model",
    [
        DistilBertForSequenceClassification(DistilBertConfig(dim=16, n_layers=1, n_heads=2, hidden_dim=16, vocab_size=50, num_labels=3)),
        BertForSequenceClassification(BertConfig(**SMALL)),
        RobertaForSequenceClassification(RobertaConfig(**SMALL, max_position_embeddings=40)),
        # As many labels as hidden units: the layer before the last has the same shape.
        DistilBertForSequenceClassification(DistilBertConfig(dim=16, n_layers=1, n_heads=2, hidden_dim=16, vocab_size=50, num_labels=16)),
    ],
    ids=["distilbert", "bert", "roberta", "distilbert-16-labels"],
)
def test_folding_divides_the_logits(model: torch.nn.Module) -> None:
    model.eval()
    ids = torch.randint(3, 50, (6, 12))
    with torch.no_grad():
        before = model(input_ids=ids).logits
        fold_temperature(model, 1.7)
        after = model(input_ids=ids).logits
    torch.testing.assert_close(after, before / 1.7)
    assert (after.argmax(1) == before.argmax(1)).all()


@pytest.mark.parametrize("temperature", [0.0, -1.0, float("nan"), float("inf")])
def test_refuses_what_is_no_temperature(temperature: float) -> None:
    with pytest.raises(ValueError, match="temperature"):
        fold_temperature(BertForSequenceClassification(BertConfig(**SMALL)), temperature)
