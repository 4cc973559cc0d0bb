"""The proof that an engine gives a release's own answers: its golden examples, computed by training in fp32."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from serve.engine import Batch, Engine, Logits
from serve.settings import Settings
from serve.text import softmax

ALONE = 32  # golden examples that are computed one by one and, in batches of any lengths, together
MAX_NEIGHBOUR_CHANGE = 0.01  # most that a probability may depend on the texts it is batched with


@dataclass(frozen=True)
class Proof:
    """How an engine did on golden examples."""

    examples: int
    agreement: float  # share with the same label, 0-1
    max_probability_change: float
    max_neighbour_change: float  # of a probability, in a batch against alone
    seconds: float
    tokens_per_second: float

    def complaint(self, settings: Settings) -> str | None:
        """What is wrong, or None when the engine may serve."""
        if self.max_neighbour_change > MAX_NEIGHBOUR_CHANGE:
            return (
                f"a probability changes by {self.max_neighbour_change:.3f} with the texts it is batched with "
                f"(allowed: at most {MAX_NEIGHBOUR_CHANGE})"
            )
        if self.agreement >= settings.min_agreement and self.max_probability_change <= settings.max_probability_change:
            return None
        return (
            f"{self.agreement:.1%} of {self.examples} golden labels agree (allowed: at least {settings.min_agreement:.1%}), "
            f"a probability is off by {self.max_probability_change:.3f} (allowed: at most {settings.max_probability_change})"
        )


def prove(engine: Engine, golden: Batch, expected: npt.NDArray[np.float64], neighbours: bool = True) -> Proof:
    """Compares the engine's answers to token ids `golden` with the logits `expected`, (examples, classes), of training.

    With `neighbours` also some of them alone and in batches of mixed lengths, where most is padding, with each other.
    """
    started = time.perf_counter()
    actual = np.empty_like(expected)
    batches = list(by_length(golden, engine.batch_tokens))
    for rows, logits in zip(batches, compute(engine, [[golden[row] for row in rows] for rows in batches]), strict=True):
        actual[rows] = logits
    seconds = time.perf_counter() - started
    some = golden[spread(len(golden), ALONE)] if neighbours else []
    alone = [engine.logits([text])[0] for text in some]  # one after the other: a text in company may be computed otherwise
    mixed = [row for logits in compute(engine, [some[start : start + 8] for start in range(0, len(some), 8)]) for row in logits]
    return Proof(
        examples=len(golden),
        agreement=float((actual.argmax(axis=1) == expected.argmax(axis=1)).mean()),
        max_probability_change=_change(actual, expected),
        max_neighbour_change=_change(mixed, alone) if some else 0.0,
        seconds=seconds,
        tokens_per_second=sum(map(len, golden)) / seconds,
    )


def compute(engine: Engine, batches: Sequence[Batch]) -> list[Logits]:
    """The logits of every batch, as many batches at a time as the engine has lanes."""
    with ThreadPoolExecutor(engine.lanes) as pool:
        return list(pool.map(engine.logits, batches))


def spread(examples: int, wanted: int) -> slice:
    """Picks some `wanted` of so many examples, evenly."""
    return slice(None, None, max(1, examples // wanted))


def _change(actual: npt.ArrayLike, expected: npt.ArrayLike) -> float:
    """The largest change of a probability between two sets of logits, (examples, classes)."""
    change = np.abs(softmax(actual) - softmax(expected)).max()
    # Not a number is as wrong as can be, and no comparison with it would say so.
    return float(change) if np.isfinite(change) else 1.0


def by_length(texts: Batch, batch_tokens: int) -> Iterator[list[int]]:
    """Row numbers in batches of similar length, each of at most `batch_tokens` with its padding (or one text)."""
    batch: list[int] = []
    for row in sorted(range(len(texts)), key=lambda row: len(texts[row])):
        if batch and (len(batch) + 1) * len(texts[row]) > batch_tokens:
            yield batch
            batch = []
        batch.append(row)
    yield batch
