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
from tokenizers.models import WordPiece
from tokenizers.normalizers import BertNormalizer
from tokenizers.pre_tokenizers import BertPreTokenizer

# transformers writes this (1e30) as model_max_length where a tokenizer knows no limit.
NO_LIMIT = 1_000_000
# Characters of a longer text that are read first: the model reads a few hundred tokens, and a megabyte takes seconds.
START = 20_000


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
        side = config.get("truncation_side", "right")
        self._tokenizer.enable_truncation(self.max_length, direction=side)
        self._special = self._tokenizer.num_special_tokens_to_add(False)
        self._unsettled = _unsettled(self._tokenizer) if side == "right" else None

    def encode(self, texts: Sequence[str]) -> list[Tokens]:
        if self._unsettled is None:
            return self._encode(texts)[0]
        tokens, dropped = self._encode([text[:START] for text in texts])
        whole = [i for i, text in enumerate(texts) if len(text) > START and dropped[i] <= self._unsettled]
        for i in whole:  # one by one: long texts take much memory
            (tokens[i],), _ = self._encode([texts[i]])
        return tokens

    def _encode(self, texts: Sequence[str]) -> tuple[list[Tokens], list[int]]:
        """The tokens, and how many of each text's were cut off."""
        # The plain `encode` holds the interpreter's lock, for a second on a text of 1 MB: the event loop would stand still.
        encodings = self._tokenizer.encode_batch_fast(list(texts))
        rests = [one.overflowing for one in encodings]
        tokens = [Tokens(one.ids, bool(rest), len(one.ids) <= self._special) for one, rest in zip(encodings, rests, strict=True)]
        return tokens, [sum(len(part) - self._special for part in rest) for rest in rests]


def _unsettled(tokenizer: Tokenizer) -> int | None:
    """How many tokens at the end of a text's start may change with what follows; None where that cannot be told.

    BERT's own steps see no further than a word, and a word gives at most `max_input_chars_per_word` tokens. The last word
    may go on, and so may an added token such as [MASK], which else is a word or two a character.
    """
    model, added = tokenizer.model, tokenizer.get_added_tokens_decoder().values()
    is_bert = isinstance(tokenizer.normalizer, BertNormalizer) and isinstance(tokenizer.pre_tokenizer, BertPreTokenizer)
    if not (is_bert and isinstance(model, WordPiece)) or any(token.normalized for token in added):
        return None
    longest = max((len(token.content) for token in added), default=0)
    return int((2 * longest + 1) * model.max_input_chars_per_word)


def softmax(logits: npt.ArrayLike) -> npt.NDArray[np.float64]:
    """(..., classes) logits to probabilities, in float64."""
    shifted = np.asarray(logits, np.float64)
    shifted = np.exp(shifted - shifted.max(axis=-1, keepdims=True))
    return np.asarray(shifted / shifted.sum(axis=-1, keepdims=True))
