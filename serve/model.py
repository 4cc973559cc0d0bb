"""A release that may answer: its tokenizer, an engine, and the proof that the engine gives the release's own answers."""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence
from dataclasses import dataclass

from serve.engine import Batch, Engine, known, last_resort, open_engine
from serve.errors import UserError
from serve.proof import Proof, prove, spread
from serve.release import Release, reading
from serve.settings import Settings
from serve.text import TextTokenizer

SAMPLE = 8  # golden examples of a spot check: an engine that was proven here before, loaded once more


@dataclass(frozen=True)
class Model:
    """A release that has proven itself, with all it takes to answer."""

    release: Release
    tokenizer: TextTokenizer
    engine: Engine
    proof: Proof
    rejected: tuple[str, ...]  # engines that were tried before, each with the reason
    canary: Sequence[int]  # token ids of a text the engine is known to answer


def load(release: Release, settings: Settings, engines: Sequence[str] = (), *, proven: Proof | None = None) -> Model:
    """The first of `engines` (none given: `known`) that loads and proves itself. Raises UserError when none does.

    `proven` is the proof that the first of them gave on this machine before: a sample is enough for it now.
    """
    tokenizer, golden = tokenized(release)
    rejected: list[str] = []
    for name in itertools.chain(engines or known(settings, release), last_resort(settings, release)):
        try:
            engine = open_engine(name, release, settings)
            some = spread(len(golden), SAMPLE if proven else len(golden))
            proof = prove(engine, golden[some], release.golden_logits[some], neighbours=proven is None)
        except Exception as error:  # a broken file, a graph that does not fit, a GPU without memory: libraries raise anything
            rejected.append(f"{name}: {first_sentence(error)}")
        else:
            complaint = proof.complaint(settings)
            if complaint is None:
                return Model(release, tokenizer, engine, proven or proof, tuple(rejected), golden[0])
            rejected.append(f"{name}: {complaint}")
        proven = None
    raise unproven(release, rejected)


def unproven(release: Release, rejected: Sequence[str]) -> UserError:
    """`rejected` are the engines that were tried, each with the reason."""
    return UserError(
        f"{release.model} at {release.commit} did not prove itself on its golden examples: {'; '.join(rejected)}. "
        "Publish the release again, or serve another revision."
    )


def tokenized(release: Release) -> tuple[TextTokenizer, Batch]:
    """Its tokenizer, and the golden texts as token ids. Raises UserError."""
    with reading("tokenizer"):
        tokenizer = TextTokenizer(release.folder, release.positions)
        return tokenizer, [text.ids for text in tokenizer.encode(release.golden_texts)]


def first_sentence(error: Exception) -> str:
    """Of what a library says, without the folders of this machine: it stands in /info."""
    said = re.split(r"\.\s|\n", f"{type(error).__name__}: {error}".strip(), maxsplit=1)[0]
    return re.sub(r"(?<![\w/])/(?:[^/\s]+/)+", "", said)[:300]
