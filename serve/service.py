"""The service without HTTP: loads a model, proves it, and turns texts into predictions."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Sequence

import numpy as np

from serve import release
from serve.batcher import Batcher
from serve.errors import Refusal
from serve.metrics import Metrics
from serve.schemas import Prediction
from serve.settings import Settings
from serve.text import Tokens, softmax
from serve.worker import Worker

log = logging.getLogger("serve")

# A text of this many characters takes about 20 ms to tokenise. Longer ones queue apart, not in front of the others.
LONG_TEXT = 20_000


class Service:
    """`on_failure` is called when no model can be served; `failure` then says why."""

    def __init__(self, settings: Settings, metrics: Metrics) -> None:
        self.settings, self.metrics = settings, metrics
        self.started = time.monotonic()
        self.model: release.Model | None = None
        self.failure: Exception | None = None
        self.on_failure: Callable[[], None] = lambda: None
        self._batcher: Batcher | None = None
        self._tokenizers = {is_long: Worker("tokenizer") for is_long in (False, True)}
        self._loading: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Begins to load, in the background: /health answers meanwhile, /ready is red."""
        self._loading = asyncio.get_running_loop().create_task(self._load())

    async def stop(self) -> None:
        if self._loading:
            self._loading.cancel()
        if self._batcher:
            await self._batcher.stop()
        for worker in self._tokenizers.values():
            worker.stop()

    async def _load(self) -> None:
        loader = Worker("loader")
        try:
            settings = self.settings
            model = await loader.run(lambda: release.load(release.pull(settings.model, settings.revision), settings))
        except Exception as error:
            self.failure = error
            self.on_failure()
            return
        finally:
            loader.stop()
        (canary,) = model.tokenizer.encode(model.release.golden_texts[:1])
        self._batcher = Batcher(
            model.engine,
            canary.ids,
            self.metrics,
            tokens_per_second=model.proof.tokens_per_second,
            batch_tokens=settings.batch_tokens,
            queue_tokens=settings.queue_tokens,
            longest_wait=settings.deadline_seconds,
            stall_seconds=settings.stall_seconds,
        )
        self._batcher.start()
        self.model = model
        self.metrics.model.labels(model.release.model, model.release.commit, model.engine.name).set(1)
        for line in model.rejected:
            log.warning("not used: %s", line)
        log.info(
            "ready: %s at %s on %s, %s, %s; %d golden examples proven in %.1f s",
            model.release.model, model.release.commit, model.engine.name, model.engine.device, model.engine.precision,
            model.proof.examples, model.proof.seconds,
        )  # fmt: skip

    def trouble(self) -> str | None:
        """Why no prediction can be made at the moment, or None."""
        if self.failure:
            return "no model could be loaded"
        if self._batcher is None:
            return "the model is still being loaded"
        return self._batcher.trouble()

    async def predict(self, texts: Sequence[str], fields: Sequence[str]) -> tuple[release.Model, list[Prediction]]:
        """The model that answered and one prediction per text. Raises Refusal; `fields` are the texts' names in it."""
        model, batcher = self.model, self._batcher
        if model is None or batcher is None:
            raise Refusal(503, "loading", "The model is still being loaded; try again in 2 s.", retry_after=2)
        try:
            async with asyncio.timeout(self.settings.deadline_seconds):
                is_long = sum(map(len, texts)) > LONG_TEXT
                tokens = await self._tokenizers[is_long].run(model.tokenizer.encode, texts)
                for field, text in zip(fields, tokens, strict=True):
                    if text.empty:
                        raise Refusal(422, "text_unreadable", "The text holds no character that the model can read.", field=field)
                rows = await batcher.logits([text.ids for text in tokens], fields)
        except TimeoutError as error:
            limit = self.settings.deadline_seconds
            less = "send fewer texts at once, or " if len(texts) > 1 else ""
            raise Refusal(503, "too_slow", f"There was no answer within {limit:g} s; {less}try again later.", retry_after=5) from error
        labels = model.release.labels
        return model, [_prediction(text, row, labels) for text, row in zip(tokens, softmax(np.stack(rows)), strict=True)]


def _prediction(text: Tokens, probabilities: np.ndarray, labels: list[str]) -> Prediction:
    best = int(probabilities.argmax())
    named = {label: round(float(p), 6) for label, p in zip(labels, probabilities, strict=True)}
    return Prediction(
        label=labels[best], confidence=named[labels[best]], probabilities=named, tokens=len(text.ids), truncated=text.truncated
    )
