"""What a check says: one line each of what was looked at, what was found, what is expected, and what to do about it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

Level = Literal["ok", "warn", "FAIL", "skip"]  # skip: could not be looked at, because of a FAIL elsewhere

WAITING, DONE = "waiting for the other ranks", "done"  # in a rank's notes


@dataclass(frozen=True)
class Finding:
    what: str
    found: str
    expected: str
    level: Level = "ok"
    next: str = ""  # the next step of the person who reads it

    def __post_init__(self) -> None:
        assert self.level in ("ok", "skip") or self.next, f"'{self.what}' is {self.level} and says no next step"

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def judge(what: str, found: str, expected: str, good: bool, next: str, bad: Level = "FAIL") -> Finding:
    """A finding that is ok where `good` holds, else `bad` with its next step."""
    return Finding(what, found, expected) if good else Finding(what, found, expected, bad, next)


def from_error(what: str, text: str, expected: str = "no error") -> Finding:
    """A FAIL out of an error's line; our own errors say first what is wrong, then what to do."""
    found, _, advice = " ".join(text.split()).partition(". ")
    return Finding(what, found.rstrip("."), expected, "FAIL", advice or "Put that right, then run the doctor again.")


def count(findings: Sequence[Finding], level: Level) -> int:
    return sum(finding.level == level for finding in findings)


def table(findings: Sequence[Finding]) -> str:
    """The findings, aligned, and a last line that sums them up."""
    first = max((len(f.what) for f in findings), default=0)
    second = max((len(f.found) for f in findings if f.level == "ok" and len(f.found) < 80), default=0)
    lines = []
    for f in findings:
        if f.level == "ok":
            lines.append(f"ok    {f.what:<{first}}  {f.found:<{second}}  expected: {f.expected}")
            continue
        lines.append(f"{f.level:<4}  {f.what:<{first}}  {f.found}")
        if f.level != "skip":
            lines += [f"      {'':<{first}}    expected: {f.expected}", f"      {'':<{first}}    next:     {f.next}"]
    failed, warned, skipped = (count(findings, level) for level in ("FAIL", "warn", "skip"))
    warnings = f"{warned} warning{'s' * (warned != 1)}"
    if failed:
        lines.append(f"{failed} of {len(findings)} FAILED, {warnings}, {skipped} not looked at. Mend the first FAIL, then look again.")
    else:
        lines.append(f"All is well: {len(findings)} looked at, {warnings}.")
    return "\n".join(lines)


def gib(amount: float) -> str:
    """Bytes for people, in the unit that fits."""
    for unit, size in (("GiB", 2**30), ("MiB", 2**20)):
        if amount >= size:
            return f"{amount / size:.1f} {unit}"
    return f"{amount / 1024:.1f} KiB"
