"""Which commits of a model were proven here, and which were refused: kept in memory, and from one start to the next."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from serve.machine import versions
from serve.settings import Settings
from serve.state import State

KEPT = 20  # commits of each kind that are remembered
ALWAYS = ""  # a refusal that no other setting or version makes undone


def now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


@dataclass(frozen=True)
class Refused:
    commit: str
    reason: str
    when: str
    under: str  # the settings and versions it was refused under: under others it is tried again


class Revisions:
    """Of the model and revision that `settings` name."""

    def __init__(self, state: State, settings: Settings) -> None:
        self._state, self._key = state, f"{settings.model}@{settings.revision or 'main'}"
        self._under = _circumstances(settings)
        self._proven, self._refused = self._written()

    def proven(self) -> list[str]:
        """Commits that served here and may again, the last one first."""
        return [commit for commit in reversed(self._proven) if commit not in self._refused]

    def refused(self) -> list[dict[str, Any]]:
        """For people: commit, reason, when."""
        return [{"commit": one.commit, "reason": one.reason, "when": one.when} for one in self._refused.values()]

    def reason(self, commit: str) -> str | None:
        """Why `commit` is not tried again, or None."""
        return self._refused[commit].reason if commit in self._refused else None

    def prove(self, commit: str) -> None:
        self._proven.pop(commit, None)
        self._proven[commit] = now()
        if commit in self._refused and self._refused[commit].under != ALWAYS:
            del self._refused[commit]
        self._write()

    def refuse(self, commit: str, reason: str, always: bool = False) -> None:
        self._refused.pop(commit, None)
        self._refused[commit] = Refused(commit, reason, now(), ALWAYS if always else self._under)
        self._write()

    def _written(self) -> tuple[dict[str, str], dict[str, Refused]]:
        """What the folder has now: commits with when they were proven, the last one last, and those that are refused."""
        found = self._state.read("revisions").get(self._key, {})
        try:
            proven = {str(commit): str(when) for commit, when in found["proven"].items()}
            every = [Refused(**{name: str(value) for name, value in one.items()}) for one in found["refused"]]
        except (TypeError, KeyError, AttributeError):  # nothing yet, or written by another version
            return {}, {}
        return proven, {one.commit: one for one in every if one.under in (self._under, ALWAYS)}

    def _write(self) -> None:
        """Together with what other services on this folder have written since: none of them undoes another's rollback."""
        proven, refused = self._written()
        theirs = {commit: one for commit, one in refused.items() if commit not in self._refused and commit not in self._proven}
        proven = {commit: when for commit, when in proven.items() if commit not in self._proven} | self._proven
        self._proven = dict(sorted(proven.items(), key=lambda one: one[1])[-KEPT:])
        rolled_back = {commit: one for commit, one in refused.items() if one.under == ALWAYS}
        self._refused = dict(list((theirs | self._refused | rolled_back).items())[-KEPT:])
        mine = {"proven": self._proven, "refused": [vars(one) for one in self._refused.values()]}
        self._state.write("revisions", self._state.read("revisions") | {self._key: mine})


def _circumstances(settings: Settings) -> str:
    """What a release's refusal may depend on, besides the release; its digest."""
    asked = [settings.engine, settings.device, settings.min_agreement, settings.max_probability_change, settings.max_model_bytes]
    libraries = ("openvino", "onnxruntime", "torch", "transformers", "tokenizers")
    installed = versions(*libraries)
    return hashlib.sha256(json.dumps([asked, [installed.get(name, "") for name in libraries]]).encode()).hexdigest()[:16]
