"""Which engine serves: measured once for a CPU, a release and the libraries' versions, and remembered.

The service begins with an engine that is known to be good and answers at once; meanwhile every candidate is tried in
a child process (`serve.trial`), and the fastest that proves itself takes over. The next start begins with it.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from serve import trial
from serve.engine import known
from serve.machine import allowed_cores, cpu, versions
from serve.proof import Proof
from serve.release import Release
from serve.settings import Settings
from serve.state import State
from serve.trial import Trial

log = logging.getLogger("serve")

KEPT = 50  # choices that are remembered
GAIN = 1.1  # another engine takes over only if it is faster by this factor: timings beside live traffic are not exact
_LIBRARIES = ("openvino", "onnxruntime", "torch", "transformers", "tokenizers", "numpy")


@dataclass(frozen=True)
class Choice:
    engine: str
    trials: tuple[Trial, ...] = field(default=())

    def proof(self, engine: str) -> Proof | None:
        """The proof that `engine` gave, where it may serve."""
        return next((one.proof for one in self.trials if one.engine == engine and one.rejected is None), None)

    def rejected(self) -> list[str]:
        return [f"{one.engine}: {one.rejected}" for one in self.trials if one.rejected]


def recall(release: Release, settings: Settings, state: State) -> Choice | None:
    """What was measured before for this release on this machine, or None."""
    found = state.read("engines").get(_key(release, settings), {})
    try:
        trials = [Trial(**one | {"proof": Proof(**one["proof"]) if one["proof"] else None}) for one in found["trials"]]
        return Choice(found["engine"], tuple(trials))
    except (KeyError, TypeError, ValueError):
        return None


async def measure(release: Release, settings: Settings, state: State, serving: str, candidates: Sequence[str] = ()) -> Choice:
    """Tries `candidates` (none given: all that are known), one after the other, and remembers the fastest.

    `serving` stays if nothing is faster by a tenth. The engines' files must be there. Raises UserError like `known`.
    """
    trials = [await trial.run(release, name, settings) for name in candidates or known(settings, release)]
    good = {one.engine: one.speed for one in trials if one.rejected is None}
    best = max(good, key=lambda name: good[name] * (GAIN if name == serving else 1), default=serving)
    choice = Choice(best, tuple(trials))
    for line in choice.rejected():
        log.warning("not used: %s", line)
    log.info("engines by tokens per second: %s", ", ".join(f"{name} {speed:.0f}" for name, speed in good.items()) or "none proved itself")
    _remember(_key(release, settings), dataclasses.asdict(choice), state)
    return choice


def settle(release: Release, settings: Settings, state: State, only: Trial) -> Choice:
    """With one engine there is no choice, but its proof is remembered, which spares the next start most of it."""
    choice = Choice(only.engine, (only,))
    _remember(_key(release, settings), dataclasses.asdict(choice), state)
    return choice


def carry_over(old: Release, new: Release, settings: Settings, state: State) -> None:
    """What was measured for `old` holds for `new`, a commit with the same files."""
    if found := state.read("engines").get(_key(old, settings)):
        _remember(_key(new, settings), found, state)


def _remember(key: str, found: dict[str, Any], state: State) -> None:
    every = state.read("engines")
    every.pop(key, None)
    every[key] = found
    state.write("engines", dict(list(every.items())[-KEPT:]))


def _key(release: Release, settings: Settings) -> str:
    """All that a choice depends on; its digest."""
    name, flags = cpu()
    facts = {
        "cpu": [name, sorted(flags), settings.threads or allowed_cores()],
        "release": [release.model, release.commit],
        "versions": versions(*_LIBRARIES),
        "bounds": [settings.min_agreement, settings.max_probability_change],
        "asked": [settings.engine, settings.device],
    }
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:16]
