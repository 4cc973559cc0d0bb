"""What a check says: what was looked at, what was found, what is expected, and what to do about it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

Level = Literal["ok", "warn", "FAIL", "skip"]  # skip: could not be looked at, because of a FAIL elsewhere


@dataclass(frozen=True)
class Finding:
    what: str
    found: str
    expected: str
    level: Level = "ok"
    next: str = ""  # the next step of the person who reads it

    def __post_init__(self) -> None:
        assert self.level in ("ok", "skip") or self.next, f"'{self.what}' is {self.level} and says no next step"

    def __str__(self) -> str:
        start = f"{self.level:<6}{self.what:<16}{self.found}"
        if self.level == "ok":
            return f"{start} (expected: {self.expected})"
        return start + "".join(f"\n{'':<22}  {word} {text}" for word, text in (("expected:", self.expected), ("next:", self.next)) if text)


def judge(what: str, found: str, expected: str, good: bool, next: str, bad: Level = "FAIL") -> Finding:
    """A finding that is ok where `good` holds, else `bad` with its next step."""
    return Finding(what, found, expected) if good else Finding(what, found, expected, bad, next)


def from_error(what: str, text: str, expected: str = "no error") -> Finding:
    """A FAIL out of an error's line; our own errors say first what is wrong, then what to do."""
    found, _, advice = " ".join(text.split()).partition(". ")
    return Finding(what, found.rstrip("."), expected, "FAIL", advice or "Put that right, then run the doctor again.")


def verdict(findings: Sequence[Finding]) -> str:
    failed, warned, skipped = (sum(f.level == level for f in findings) for level in ("FAIL", "warn", "skip"))
    well = f"All is well: {len(findings)} looked at, {warned} warning(s)."
    return f"{failed} FAILED, {warned} warning(s), {skipped} not looked at. Mend the first FAIL, then look again." if failed else well


def gib(amount: float) -> str:
    return f"{amount / 2**30:.3g} GiB"
