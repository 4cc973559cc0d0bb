"""The proof that an engine gives a release's own answers: its golden examples, computed by training in fp32."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from serve.engine import Batch, Engine
from serve.settings import Settings
from serve.text import softmax


@dataclass(frozen=True)
class Proof:
    """How an engine did on golden examples."""

    examples: int
    agreement: float  # share with the same label, 0-1
    max_probability_change: float
    seconds: float
    tokens_per_second: float

    def complaint(self, settings: Settings) -> str | None:
        """What is wrong, or None when the engine may serve."""
        if self.agreement >= settings.min_agreement and self.max_probability_change <= settings.max_probability_change:
            return None
        return (
            f"{self.agreement:.1%} of {self.examples} golden labels agree (allowed: at least {settings.min_agreement:.1%}), "
            f"a probability is off by {self.max_probability_change:.3f} (allowed: at most {settings.max_probability_change})"
        )


def prove(engine: Engine, golden: Batch, expected: npt.NDArray[np.float64]) -> Proof:
    """Compares the engine's answers to token ids `golden` with the logits `expected`, (examples, classes), of training."""
    started = time.perf_counter()
    actual = np.empty_like(expected)
    for rows in by_length(golden, engine.batch_tokens):
        actual[rows] = engine.logits([golden[row] for row in rows])
    seconds = time.perf_counter() - started
    change = np.abs(softmax(actual) - softmax(expected)).max()
    return Proof(
        examples=len(golden),
        agreement=float((actual.argmax(axis=1) == expected.argmax(axis=1)).mean()),
        # Not a number is as wrong as can be, and no comparison with it would say so.
        max_probability_change=float(change) if np.isfinite(change) else 1.0,
        seconds=seconds,
        tokens_per_second=sum(map(len, golden)) / seconds,
    )


def by_length(texts: Batch, batch_tokens: int) -> Iterator[list[int]]:
    """Row numbers in batches of similar length, each of at most `batch_tokens` with its padding (or one text)."""
    batch: list[int] = []
    for row in sorted(range(len(texts)), key=lambda row: len(texts[row])):
        if batch and (len(batch) + 1) * len(texts[row]) > batch_tokens:
            yield batch
            batch = []
        batch.append(row)
    yield batch
