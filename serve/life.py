"""The life of a model in the service: start, choice of the engine, newer commits, the way back, recovery.

One task does these one after the other: measure the engines, look for a newer commit, prove it, let it take over. A
second one guards the engine that serves. Whatever happens, a model that answers stays until the next one has proven
itself; the exchange is one assignment.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import re
import time
from collections.abc import AsyncIterator, Callable, Coroutine
from typing import Any

from serve import choice
from serve.batcher import Batcher
from serve.choice import Choice
from serve.engine import known
from serve.errors import Refusal, UserError
from serve.hub import Unavailable, list_files
from serve.loader import Loader
from serve.metrics import Metrics
from serve.model import Model, load
from serve.release import fetched, kept
from serve.serving import Serving, retire
from serve.settings import Settings
from serve.state import State
from serve.trial import Trial
from serve.watcher import Watcher
from serve.worker import in_thread

log = logging.getLogger("serve")

DOWNLOAD_SECONDS = 3600  # for a newer commit: a Hub that sends a byte now and then must not hold up the watch for ever
RELOAD_SECONDS = 120  # for loading an engine again that died
AGAIN_SECONDS = 60  # an engine that dies again within this time will not be helped by a third


class Fatal(Exception):
    """The service cannot go on in this process; a new one may."""


class Life:
    """`serving` is what answers now, None at first; `failure` why there is none and never will be."""

    def __init__(
        self, settings: Settings, metrics: Metrics, on_failure: Callable[[], None], stuck: Callable[[], str | None] = lambda: None
    ) -> None:
        """`stuck` says why the process cannot be helped, whatever the engine does, or None."""
        self.settings, self.metrics, self._on_failure, self._stuck = settings, metrics, on_failure, stuck
        self.serving: Serving | None = None
        self.failure: Exception | None = None
        self.choice: Choice | None = None  # of the engine, for what serves
        self.measuring = False
        self.swaps = 0
        self._state = State(settings)
        self._loader = Loader(settings, metrics, self._state)
        self.revisions = self._loader.revisions
        self.watcher: Watcher | None = None
        self._died = asyncio.Event()
        self._main: asyncio.Task[None] | None = None
        self._others: set[asyncio.Task[Any]] = set()
        self._going_back = self._stopped = False
        self._holds = 0  # how many keep the main task from running

    @property
    def fallback(self) -> str | None:
        """Why it is an older commit that serves."""
        return self._loader.fallback

    def start(self) -> None:
        self._main = asyncio.get_running_loop().create_task(self._begin())

    async def stop(self) -> None:
        """Ends at once, trials in child processes included; downloads are left to their threads, which end with the process."""
        self._stopped = True
        tasks = [*self._others, *([self._main] if self._main else [])]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        if self.serving:
            await self.serving.batcher.stop()

    def _spawn(self, work: Coroutine[Any, Any, Any]) -> asyncio.Task[Any]:
        task = asyncio.get_running_loop().create_task(work)
        self._others.add(task)  # the loop itself keeps only a weak reference
        task.add_done_callback(self._others.discard)
        return task

    @contextlib.asynccontextmanager
    async def _paused(self) -> AsyncIterator[None]:
        """Drops what the main task is doing; it is done again when the last who asked for this has finished."""
        self._holds += 1
        try:
            main, self._main = self._main, None
            if main:
                main.cancel()
                await asyncio.wait([main])
            yield
        finally:
            self._holds -= 1
            if not self._holds and not self._stopped:
                self._main = asyncio.get_running_loop().create_task(self._live())

    def _fail(self, error: Exception) -> None:
        self.failure = error
        self._on_failure()

    # ---- the start

    async def _begin(self) -> None:
        settings = self.settings
        try:
            model = await self._loader.first()
        except Exception as error:
            self._fail(error)
            return
        is_fixed = re.fullmatch("[0-9a-f]{40}", settings.revision) is not None  # a commit never changes
        if model.release.revision is not None and settings.watch_seconds and not is_fixed:
            self.watcher = Watcher(settings.model, settings.revision or "main", settings.watch_seconds)
        self._take(model)
        del model  # this frame lasts as long as the service; the first model need not
        self._spawn(self._guard())
        await self._live()

    # ---- the exchange

    def _take(self, model: Model) -> None:
        """From here on `model` answers. Requests that began with the one before it end with it."""
        old, release = self.serving, model.release
        self.serving = Serving.begin(model, self.settings, self.metrics, self._died.set)
        self._changed(old)
        if old and old.model.release.commit != release.commit:
            self.choice = None
        if old:
            self._spawn(retire(old))
        for line in model.rejected:
            log.warning("not used: %s", line)
        log.info(
            "%s: %s at %s on %s, %s, %s; %d golden examples proven in %.1f s", "now serving" if old else "ready",
            release.model, release.commit, model.engine.name, model.engine.device, model.engine.precision,
            model.proof.examples, model.proof.seconds,
        )  # fmt: skip

    def _changed(self, old: Serving | None) -> None:
        assert self.serving
        release, engine = self.serving.model.release, self.serving.model.engine
        if old and old.model.release.commit != release.commit:
            self.swaps += 1
            self.metrics.swaps.inc()
        self.metrics.model.clear()
        self.metrics.model.labels(release.model, release.commit, engine.name).set(1)
        if release.revision is not None:
            self.revisions.prove(release.commit)

    # ---- while it serves

    async def _live(self) -> None:
        while True:
            try:
                await self._choose()
            except Exception as error:  # what serves is good, if perhaps not the fastest
                log.warning("the engines could not be measured (%s: %s): %s stays", type(error).__name__, error, self._engine())
                self.choice = Choice(self._engine(), self.choice.trials if self.choice else ())
            if self.watcher is None:
                return
            try:
                await self._update(await self.watcher.look())
            except UserError as error:
                self.watcher.failed(error)
            except Exception as error:  # a defect of ours; it must not end the watch
                log.exception("looking for a newer revision failed")
                self.watcher.failed(error)
            else:
                self.watcher.settled()

    def _engine(self) -> str:
        assert self.serving
        return self.serving.model.engine.name

    async def _choose(self) -> None:
        """Measures the engines where that was not done for what serves, and lets the fastest take over."""
        assert self.serving
        release = self.serving.model.release
        if self.choice:
            return
        self.measuring = True
        try:
            names = await in_thread("loader", known, self.settings, release)
            found = await in_thread("loader", choice.recall, release, self.settings, self._state)
            if found is None and len(names) > 1:
                found = await choice.measure(release, self.settings, self._state, self._engine(), names)
            elif found is None:
                only = Trial(self._engine(), None, self.serving.model.proof)
                found = await in_thread("loader", choice.settle, release, self.settings, self._state, only)
            self.choice = found
            winner, proof = self.choice.engine, self.choice.proof(self.choice.engine)
            if winner != self._engine():
                self._take(await in_thread("loader", lambda: load(release, self.settings, [winner], proven=proof)))
        finally:
            self.measuring = False

    async def _update(self, commit: str) -> None:
        """Lets `commit` take over if it is new and proves itself. Raises Unavailable for what is to be tried again."""
        assert self.serving
        settings, old = self.settings, self.serving
        if commit == old.model.release.commit:
            self._loader.fallback = None
            return
        if self.revisions.reason(commit):
            return
        log.info("%s of %s is %s now: it is fetched and proven", settings.revision or "main", settings.model, commit)
        kind = ""
        try:
            async with asyncio.timeout(DOWNLOAD_SECONDS):
                listing = await in_thread("hub", list_files, settings.model, commit)
                kind = "release"
                release = await in_thread("hub", fetched, listing, settings.revision, settings.max_model_bytes)
                await in_thread("hub", known, settings, release)  # fetches the weights
            if release.contents() == old.model.release.contents():
                self.serving = old.renamed(release)
                self._changed(old)
                log.info("%s takes over without loading: none of the files that serve has changed", commit)
                await in_thread("loader", choice.carry_over, old.model.release, release, settings, self._state)
            else:
                kind = "proof"
                self._take(await self._loader.prove(release, prefer=old.model.engine.name, in_child=True))
        except Unavailable:
            raise
        except TimeoutError as error:
            raise Unavailable(
                f"{commit} could not be fetched within {DOWNLOAD_SECONDS / 60:g} minutes; what has arrived is kept."
            ) from error
        except UserError as error:
            if not kind:  # the Hub's answer, and not the commit, is what is wrong
                raise
            if await self._loader.damaged(commit, error):
                raise Unavailable(f"files of {commit} were damaged in the cache, and are fetched again.") from error
            self._loader.refuse(commit, kind, error)
            self._loader.fallback = str(error)
        else:
            self._loader.fallback = None

    async def roll_back(self) -> str:
        """Back to the commit that served before; returns it. The one it leaves is not taken again. Raises Refusal."""
        if self._going_back:
            raise Refusal(409, "rollback_running", "A rollback is under way; wait for it to end.")
        if self.serving is None:
            raise Refusal(503, "loading", "The model is still being loaded; try again in 2 s.", retry_after=2)
        self._going_back = True
        # In a task of its own: a caller who hangs up must not leave it half done.
        return str(await asyncio.shield(self._spawn(self._roll_back())))

    async def _roll_back(self) -> str:
        try:
            async with self._paused():
                assert self.serving
                leaving = self.serving.model.release  # only now: until it was paused, the watch could take a newer one
                left = leaving.commit
                back = next((commit for commit in self.revisions.proven() if commit != left), None)
                if back is None or leaving.revision is None:
                    message = "No other commit of this revision has served here: there is nothing to go back to."
                    raise Refusal(409, "nothing_to_roll_back", message)
                try:
                    release = await in_thread("loader", kept, self.settings.model, self.settings.revision, back)
                    model = await self._loader.prove(release)
                except UserError as error:
                    log.error("not rolled back: %s", error)
                    message = f"{back} cannot be served any more; {left} serves on. The service's log says why."
                    raise Refusal(409, "rollback_failed", message) from error
                self.revisions.refuse(left, "rolled back by the operator", always=True)
                self.metrics.refusals.labels("rollback").inc()
                self._loader.fallback = f"{left} was rolled back by the operator"
                self._take(model)
                return back
        finally:
            self._going_back = False

    # ---- an engine that dies or hangs

    async def _guard(self) -> None:
        """Replaces an engine that died, or, once, one that is stuck. Where that does not help, the process has to end."""
        stall = self.settings.stall_seconds
        recovered, was_stuck, since = float("-inf"), False, None
        while self.failure is None:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(min(1.0, stall / 2)):
                    await self._died.wait()
            if reason := self._stuck():
                self._fail(Fatal(reason))
                return
            is_dead, now = self._died.is_set(), time.monotonic()
            self._died.clear()
            assert self.serving
            broken = self.serving.batcher
            trouble = broken.trouble()
            since = (since or now) if trouble else None
            if trouble is None or since is None or not (is_dead or now - since > 2 * stall):  # trouble begins after 1 x stall
                continue
            await broken.stop()  # who waits for it is refused now, and not when the deadline has passed
            if now - recovered < AGAIN_SECONDS or (was_stuck and not is_dead):
                self._fail(Fatal(f"{trouble}, again after it was loaded anew"))
                return
            # A stuck thread cannot be ended, and keeps its memory: there is no room for many.
            recovered, was_stuck, since = now, was_stuck or not is_dead, None
            try:
                async with asyncio.timeout(RELOAD_SECONDS):
                    await self._reload(broken)
            except Exception as error:
                self._fail(Fatal(f"{trouble}, and it could not be loaded anew ({type(error).__name__}: {error})"))

    async def _reload(self, broken: Batcher) -> None:
        async with self._paused():
            assert self.serving
            release = self.serving.model.release
            log.warning("%s is loaded anew", release.commit)
            model = await self._loader.prove(release)
            if self.serving.batcher is broken:  # else a rollback was there first
                self._take(model)
