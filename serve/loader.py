"""From a commit to a model that may serve: fetched or taken from the cache, proven, refused where it does not prove itself.

At the start that is the Hub's newest commit, or else the last one that was proven here.
"""

from __future__ import annotations

import dataclasses
import logging

from serve import choice, trial
from serve.engine import known
from serve.errors import UserError
from serve.hub import Unavailable, cached, list_files, remove_damaged
from serve.metrics import Metrics
from serve.model import Model, load, unproven
from serve.release import Release, fetched, is_folder, kept, pull
from serve.revisions import Revisions
from serve.settings import Settings
from serve.state import State
from serve.worker import in_thread

log = logging.getLogger("serve")


class Loader:
    """`fallback` says why it is an older commit that serves, or is None."""

    def __init__(self, settings: Settings, metrics: Metrics, state: State) -> None:
        self.settings, self.metrics, self.state = settings, metrics, state
        self.revisions = Revisions(state, settings)
        self.fallback: str | None = None

    async def first(self) -> Model:
        """The folder, or the Hub's commit; the last one proven where that one cannot be had or does not prove itself. Raises UserError."""
        settings = self.settings
        if await in_thread("loader", is_folder, settings.model):
            return await self.prove(await in_thread("loader", pull, settings.model, settings.revision))
        try:
            listing = await in_thread("hub", list_files, settings.model, settings.revision or "main")
        except UserError as error:  # a Hub that is gone, and one that answers strangely: what was proven can serve
            return await self._fall_back(error)
        commit, proven = listing.commit, self.revisions.proven()
        if (reason := self.revisions.reason(commit)) and proven:
            return await self._fall_back(UserError(f"{commit} is refused: {reason}"))
        kind = "release"
        try:
            for attempt in (1, 2):
                try:
                    release = await in_thread("hub", fetched, listing, settings.revision, settings.max_model_bytes)
                    kind = "proof"
                    # A file that crashes its reader must not do so at every start, where there is something else to serve.
                    return await self.prove(release, in_child=bool(proven) and commit not in proven)
                except UserError as error:
                    if attempt == 2 or not await self.damaged(commit, error):
                        raise
            raise AssertionError("either returned or raised")
        except UserError as error:
            model = await self._fall_back(error, without=commit)
            if not isinstance(error, Unavailable):
                self.refuse(commit, kind, error)
            return model

    async def _fall_back(self, error: UserError, without: str = "") -> Model:
        """The last commit proven here, from the cache. With nothing proven: what the cache has, if the Hub is the trouble."""
        settings = self.settings
        commits = [commit for commit in self.revisions.proven() if commit != without]
        for commit in [*commits, *([""] if isinstance(error, Unavailable) else [])]:
            try:
                release = await in_thread("loader", kept, settings.model, settings.revision, commit)
                if self.revisions.reason(release.commit):  # the cache's newest may be what an operator rolled back
                    continue
                model = await self.prove(release)
            except UserError as other:
                if commit:
                    log.warning("%s, proven before, cannot be served either: %s", commit, other)
                continue
            self.fallback = str(error)
            log.warning("%s serves, the last that is known to be good, because: %s", model.release.commit, error)
            return model
        if isinstance(error, Unavailable):
            where = f"{settings.model} at {settings.revision or 'main'}"
            raise UserError(f"{str(error).rstrip('.')}; and {where} is not whole in the local cache.") from error
        raise error

    async def prove(self, release: Release, prefer: str = "", in_child: bool = False) -> Model:
        """Loads `release` on the engine that was chosen for it, else on `prefer`, else on the first that proves itself.

        `in_child` tries it in a child process before. Raises UserError.
        """
        settings = self.settings
        names = await in_thread("loader", known, settings, release)
        found = await in_thread("loader", choice.recall, release, settings, self.state)
        names.sort(key=lambda name: name != (found.engine if found else prefer))
        proven = found.proof(names[0]) if found else None
        rejected: list[str] = []
        if in_child and proven is None:
            for name in names:
                one = await trial.run(release, name, settings)
                if one.rejected is None:
                    names, proven = [name], one.proof
                    break
                rejected.append(f"{name}: {one.rejected}")
            else:
                raise unproven(release, rejected)
        model = await in_thread("loader", lambda: load(release, settings, names, proven=proven))
        return dataclasses.replace(model, rejected=(*rejected, *model.rejected))

    def refuse(self, commit: str, kind: str, error: Exception) -> None:
        self.revisions.refuse(commit, str(error))
        self.metrics.refusals.labels(kind).inc()
        log.error("refused, and not tried again: %s: %s", commit, error)

    async def damaged(self, commit: str, error: UserError) -> bool:
        """Whether `error` came from damaged copies in the cache, which are now gone: the release is not to blame.

        Raises Unavailable where they cannot be removed.
        """
        if isinstance(error, Unavailable) or (folder := cached(self.settings.model, commit)) is None:
            return False
        names = await in_thread("hub", remove_damaged, folder)
        if names:
            log.warning("%s of %s were damaged in the cache: they are fetched again", ", ".join(names), commit)
        return bool(names)
