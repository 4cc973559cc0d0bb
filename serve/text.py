"""From text to token ids, as transformers' AutoTokenizer does it, and from logits to probabilities; without torch."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

# Requests are the parallelism; a pool per batch would take the engine's cores away.
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from tokenizers import Tokenizer

# transformers writes this (1e30) as model_max_length where a tokenizer knows no limit.
NO_LIMIT = 1_000_000


class Tokens(NamedTuple):
    ids: list[int]  # special tokens included, unpadded
    truncated: bool  # the text was longer than the model reads
    empty: bool  # nothing but special tokens: the model would see no text


class TextTokenizer:
    """The release's `tokenizer.json`, cutting at `model_max_length` of its `tokenizer_config.json`."""

    def __init__(self, folder: Path, fallback_length: int) -> None:
        """`fallback_length` (tokens) is used where the tokenizer knows no limit. Raises ValueError for broken files."""
        config = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
        length = config.get("model_max_length") or NO_LIMIT
        self.max_length = int(length) if length < NO_LIMIT else fallback_length
        try:
            self._tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        except Exception as error:  # the library raises a bare Exception
            raise ValueError(error) from error
        # The file can hold settings of its own (MiniLM's pads everything to 128).
        self._tokenizer.no_padding()
        self._tokenizer.enable_truncation(self.max_length, direction=config.get("truncation_side", "right"))
        self._special = self._tokenizer.num_special_tokens_to_add(False)

    def encode(self, texts: Sequence[str]) -> list[Tokens]:
        # The plain `encode` holds the interpreter's lock, for a second on a text of 1 MB: the event loop would stand still.
        encodings = self._tokenizer.encode_batch_fast(list(texts))
        return [Tokens(one.ids, bool(one.overflowing), len(one.ids) <= self._special) for one in encodings]


def softmax(logits: npt.ArrayLike) -> npt.NDArray[np.float64]:
    """(..., classes) logits to probabilities, in float64."""
    shifted = np.asarray(logits, np.float64)
    shifted = np.exp(shifted - shifted.max(axis=-1, keepdims=True))
    return np.asarray(shifted / shifted.sum(axis=-1, keepdims=True))
