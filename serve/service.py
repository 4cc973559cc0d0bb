"""The service without HTTP: turns texts into predictions with the model that serves, and tells how it is."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from serve.errors import Refusal
from serve.life import Life
from serve.metrics import Metrics
from serve.model import Model
from serve.settings import Settings
from serve.text import Tokens
from serve.tokenizing import Tokenizing


@dataclass(frozen=True)
class Reply:
    """The model that answered, the texts as it read them, and its logits (texts, classes)."""

    model: Model
    tokens: Sequence[Tokens]
    logits: npt.NDArray[np.float64]


class Service:
    """`on_failure` is called when no model can be served, now or ever; `failure` then says why."""

    def __init__(self, settings: Settings, metrics: Metrics) -> None:
        self.settings, self.metrics = settings, metrics
        self.started = time.monotonic()
        self.on_failure: Callable[[], None] = lambda: None
        self._tokenizing = Tokenizing()
        self._life = Life(settings, metrics, lambda: self.on_failure(), self._stuck)

    def start(self) -> None:
        """Begins to load, in the background: /health answers meanwhile, /ready is red."""
        self._life.start()

    async def stop(self) -> None:
        await self._life.stop()
        self._tokenizing.stop()

    @property
    def model(self) -> Model | None:
        """What answers at this moment."""
        return self._life.serving.model if self._life.serving else None

    @property
    def failure(self) -> Exception | None:
        return self._life.failure

    def trouble(self) -> str | None:
        """Why no prediction can be made at the moment, or None."""
        if self.failure:
            return "the service has failed and is ending"
        if self._life.serving is None:
            return "the model is still being loaded"
        return self._life.serving.batcher.trouble() or self._tokenizing.trouble(self.settings.stall_seconds)

    def _stuck(self) -> str | None:
        return self._tokenizing.trouble(3 * self.settings.stall_seconds)  # as long as an engine is waited for

    def overloaded(self) -> int | None:
        """Whole seconds after which to try again, when no request can be taken now, or None."""
        return self._life.serving.batcher.overloaded() if self._life.serving else None

    async def rollback(self) -> str:
        """Goes back to the commit that served before, and returns it; the one it leaves is not taken again. Raises Refusal."""
        return await self._life.roll_back()

    def engine_choice(self) -> dict[str, Any] | None:
        """For /info: which engine serves, and what the others did. None before there is a model."""
        life = self._life
        if life.serving is None:
            return None
        trials = life.choice.trials if life.choice else ()
        return {
            "state": "measuring" if life.measuring else "settled",
            "engine": life.serving.model.engine.name,
            "trials": [
                {"engine": one.engine, "rejected": one.rejected, "tokens_per_second": {"single": round(one.single), "batched": round(one.batched)}}
                for one in trials
                if one.speed or one.rejected  # a single candidate is not timed
            ],
        }  # fmt: skip

    def updates(self) -> dict[str, Any] | None:
        """For /info: how newer commits are looked for, and what became of them. None before there is a model."""
        life = self._life
        if life.serving is None:
            return None
        watcher = life.watcher
        return {
            "watching": watcher is not None,
            "revision": life.serving.model.release.revision,
            "checked_at": watcher.checked_at if watcher else None,
            "hub": watcher.hub if watcher else None,
            "serving_since": life.serving.since,
            "swaps": life.swaps,
            "refused": life.revisions.refused(),
            "fallback": life.fallback,
        }

    async def predict(self, texts: Sequence[str], fields: Sequence[str], truncate: bool = True) -> Reply:
        """Raises Refusal; `fields` are the texts' names in it. Without `truncate` a text that is too long is refused."""
        serving = self._life.serving
        if serving is None:
            raise Refusal(503, "loading", "The model is still being loaded; try again in 2 s.", retry_after=2)
        model = serving.model
        try:
            with serving.request():
                async with asyncio.timeout(self.settings.deadline_seconds):
                    tokens = await self._tokenizing.encode(model.tokenizer, texts)
                    for field, text in zip(fields, tokens, strict=True):
                        if text.empty:
                            raise Refusal(422, "text_unreadable", "The text holds no character that the model can read.", field=field)
                        if text.truncated and not truncate:
                            limit = f"The text is longer than the {model.tokenizer.max_length} tokens that the model reads"
                            raise Refusal(422, "text_too_long", f"{limit}; shorten it, or leave `truncate` out.", field=field)
                    rows = await serving.batcher.logits([text.ids for text in tokens], fields)
        except Refusal as error:
            error.revision = model.release.commit
            raise
        except TimeoutError as error:
            limit = f"{self.settings.deadline_seconds:g} s"
            less = "send fewer texts at once, or " if len(texts) > 1 else ""
            refusal = Refusal(503, "too_slow", f"There was no answer within {limit}; {less}try again later.", retry_after=5)
            refusal.revision = model.release.commit
            raise refusal from error
        return Reply(model, tokens, np.stack(rows).astype(np.float64))
