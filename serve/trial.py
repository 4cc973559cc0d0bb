"""One engine tried on one release in a process of its own: proven on the golden examples, then timed.

    echo '{"folder": "path/to/release", "engine": "openvino-bf16", "settings": {...}}' | python -m serve.trial

In a process of its own, because a file or an engine that crashes must not take the service with it, and because its
memory goes back when it ends. It runs at low priority: whoever is being served comes first.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import json
import math
import os
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from serve import logs
from serve.engine import Batch, open_engine
from serve.model import first_sentence, tokenized
from serve.proof import ALONE, Proof, by_length, compute, prove, spread
from serve.release import Release, pull
from serve.settings import Settings

SECONDS = 180  # the longest a trial may take
NICE = 10


@dataclass(frozen=True)
class Trial:
    """What one engine did here: `rejected` says why it may not serve, or is None."""

    engine: str
    rejected: str | None
    proof: Proof | None = None
    single: float = 0.0  # tokens per second, one text at a time
    batched: float = 0.0  # and in full batches of similar length

    @property
    def speed(self) -> float:
        """Tokens per second; the geometric mean of one text at a time and full batches, as both loads are met."""
        return math.sqrt(self.single * self.batched)


async def run(release: Release, engine: str, settings: Settings) -> Trial:
    """Tries `engine` on the files of `release` that are here. Cancelled, the process is killed."""
    command = (sys.executable, "-m", "serve.trial")
    asked = {"folder": str(release.folder), "engine": engine, "settings": dataclasses.asdict(settings)}
    # A session of its own: Ctrl-C is ours to handle.
    process = await asyncio.create_subprocess_exec(
        *command, stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE, start_new_session=True
    )
    try:
        out, _ = await asyncio.wait_for(process.communicate(json.dumps(asked).encode()), SECONDS)
    except TimeoutError:
        return Trial(engine, f"it took longer than {SECONDS} s")
    finally:
        if process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                process.kill()
            await process.wait()
    try:
        answer = json.loads(out)
        proof = Proof(**answer.pop("proof")) if answer["proof"] else None
        return Trial(**answer | {"proof": proof})
    except (ValueError, TypeError, KeyError):
        code = process.returncode or 0
        how = f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with code {code}"
        return Trial(engine, f"its process {how}")


def try_engine(release: Release, name: str, settings: Settings) -> Trial:
    """The trial itself, in this process."""
    try:
        _, golden = tokenized(release)
        engine = open_engine(name, release, settings)
        proof = prove(engine, golden, release.golden_logits)
    except Exception as error:  # libraries raise anything
        return Trial(name, first_sentence(error))
    if complaint := proof.complaint(settings):
        return Trial(name, complaint, proof)
    full: list[Batch] = [[golden[row] for row in rows] for rows in by_length(golden, engine.batch_tokens)]
    singles = golden[spread(len(golden), ALONE)]
    single = _speed(singles, lambda: [engine.logits([text]) for text in singles])
    return Trial(name, None, proof, single, _speed(golden, lambda: compute(engine, full)))


def _speed(texts: Batch, work: Callable[[], object]) -> float:
    """Tokens per second, the better of two passes: the first also pays for shapes that were not met before."""
    best = math.inf
    for _ in range(2):
        started = time.perf_counter()
        work()
        best = min(best, time.perf_counter() - started)
    return sum(map(len, texts)) / best


def main() -> None:
    asked: dict[str, Any] = json.load(sys.stdin)
    with contextlib.suppress(OSError, AttributeError):  # AttributeError: not on Windows
        os.nice(NICE)
    # What a library prints must not stand in the answer.
    answer, sys.stdout = sys.stdout, sys.stderr
    settings = Settings(**asked["settings"])
    logs.set_up(settings.log_format)
    trial = try_engine(pull(asked["folder"]), asked["engine"], settings)
    json.dump(dataclasses.asdict(trial), answer)


if __name__ == "__main__":
    main()
