"""Tokenising: what a long text's start settles, what waits, and what is refused."""

from __future__ import annotations

import asyncio
import functools
import threading
from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from serving import MAX_LENGTH, make_release

from serve.errors import Refusal
from serve.text import START, TextTokenizer, Tokens
from serve.tokenizing import LONG, MOST, Tokenizing


@pytest.fixture(scope="module")
def release_dir(encoder_dir: Path) -> Path:
    return make_release(encoder_dir)


# Pieces that a cut can fall into: added tokens, marks that join the letter before, characters that vanish, words without an end.
PIECES = [
    "oil prices ",
    "a",
    "[MASK]",
    "[SEP",
    "]",
    ".",
    "界",
    "한",
    "e\u0301",
    "\u0301\u0327",
    "\u200b",
    " ",
    "\n\t",
    "Σ",
    "≠",
    "😀",
    "\u302e",
    "a-b ",
]


# A filler of few tokens, so that the cut falls where the model still reads, and whatever comes there.
@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from(["b", " ", "\u200b"]),
    st.integers(0, 2 * MAX_LENGTH) | st.integers(0, START),
    st.lists(st.tuples(st.sampled_from(PIECES), st.integers(1, 40)), min_size=1, max_size=20),
    st.sampled_from([1, 100]),
)
@example(" ", MAX_LENGTH - 1, [(".", MAX_LENGTH - 3), ("[MASK]", 40)], 1)  # the last token that is read is cut in two
def test_the_start_of_a_text_gives_the_tokens_of_the_whole(
    release_dir: Path, filler: str, before: int, runs: list[tuple[str, int]], times: int
) -> None:
    text = filler * (START - before) + "".join(piece * count for piece, count in runs) * times
    ours, whole = _tokenizers(release_dir)
    assert ours.encode([text, "oil"]) == whole.encode([text, "oil"])


@functools.cache
def _tokenizers(folder: Path) -> tuple[TextTokenizer, TextTokenizer]:
    """As it serves, and one that reads every text to its end."""
    whole = TextTokenizer(folder, 512)
    whole._unsettled = None
    return TextTokenizer(folder, 512), whole


def test_most_of_a_long_text_is_not_read(release_dir: Path) -> None:
    class Counting(TextTokenizer):
        read = 0

        def _encode(self, texts: Sequence[str]) -> tuple[list[Tokens], list[int]]:
            self.read += sum(map(len, texts))
            return super()._encode(texts)

    tokenizer = Counting(release_dir, 512)
    for text in ("." * 1_000_000, "oil prices rise " * 60_000):
        tokenizer.read = 0
        (tokens,) = tokenizer.encode([text])
        assert tokens.truncated and len(tokens.ids) == tokenizer.max_length and tokenizer.read == START


class Held(TextTokenizer):
    """Waits in every call until it is let go; keeps how many characters each call had."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder, 512)
        self.go, self.calls = threading.Event(), list[int]()

    def encode(self, texts: Sequence[str]) -> list[Tokens]:
        self.calls.append(sum(map(len, texts)))
        assert self.go.wait(20)
        return super().encode(texts)


@pytest.mark.parametrize("size", [1_000_000, 4000])
def test_what_waits_is_bounded_and_no_call_is_long(release_dir: Path, size: int) -> None:
    async def check() -> None:
        tokenizer, tokenizing = Held(release_dir), Tokenizing()
        room = MOST // size
        requests = [asyncio.create_task(tokenizing.encode(tokenizer, ["oil " * (size // 4)])) for _ in range(room + 2)]
        while not tokenizer.calls:
            await asyncio.sleep(0.01)
        for one in requests[room:]:
            with pytest.raises(Refusal) as refused:
                await one
            assert refused.value.status == 429 and 1 <= (refused.value.retry_after or 0) <= 10
        assert tokenizing.trouble(60) is None
        await asyncio.sleep(0.05)
        assert "tokenizer has been busy" in (tokenizing.trouble(0.05) or "")
        requests[room - 1].cancel()  # a caller who hangs up makes room
        await asyncio.sleep(0)
        requests.append(asyncio.create_task(tokenizing.encode(tokenizer, ["oil " * (size // 4)])))
        await asyncio.sleep(0)
        tokenizer.go.set()
        async with asyncio.timeout(20):
            await asyncio.gather(*requests[: room - 1], requests[-1])
        assert sum(tokenizer.calls) == room * size and max(tokenizer.calls) <= max(size, LONG)
        assert tokenizing.trouble(0) is None
        tokenizing.stop()

    asyncio.run(check())
