"""Looks at the Hub from time to time: which commit the served revision is now.

One HEAD request a look, with jitter, so that many services do not come at once. While the Hub is down or refuses,
looks get rarer, up to one in a quarter of an hour, and never earlier than the Hub asks for.
"""

from __future__ import annotations

import asyncio
import logging
import random

from serve.errors import UserError
from serve.hub import Unavailable, head
from serve.revisions import now
from serve.worker import in_thread

log = logging.getLogger("serve")

RAREST = 900.0  # seconds between looks at a Hub that is down
JITTER = 0.2


class Watcher:
    def __init__(self, repo: str, revision: str, seconds: float) -> None:
        """Looks about every `seconds`."""
        self.repo, self.revision, self.seconds = repo, revision, seconds
        self.hub: str | None = None  # "reachable", or what went wrong at the last look; None before the first
        self.checked_at: str | None = None
        self._failures = 0
        self._delay = seconds

    async def look(self) -> str:
        """Waits until it is time to, then asks for the commit. Raises UserError where the Hub does not say."""
        await asyncio.sleep(self._delay * random.uniform(1 - JITTER, 1 + JITTER))
        self.checked_at = now()
        return await in_thread("watcher", head, self.repo, self.revision)

    def settled(self) -> None:
        """All was well with the last look and what followed from it."""
        if self._failures:
            log.info("the Hub is reachable again")
        self._failures, self._delay, self.hub = 0, self.seconds, "reachable"

    def failed(self, error: Exception) -> None:
        """The last look, or what followed from it, has to be repeated."""
        self._failures += 1
        asked = error.retry_after if isinstance(error, Unavailable) else 0.0
        # The jitter must not undercut what the Hub asked for.
        rarer = self.seconds * 2 ** min(self._failures, 20)  # a power without bounds overflows when the Hub stays away for days
        self._delay = max(self.seconds, min(RAREST, rarer), min(asked, 4 * RAREST) / (1 - JITTER))
        # It stands in /info: what a defect says may quote anything.
        said = str(error) if isinstance(error, UserError) else f"a defect of the service ({type(error).__name__}); its log says more"
        if said != self.hub:
            log.warning("no newer revision can be looked for: %s", said)
        self.hub = said
