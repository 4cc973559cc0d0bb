"""What the service remembers from one start to the next: small JSON files in a folder of its own.

Engines' timings, proofs, the last revision that was proven, those that were refused; beside them, in `compiled`, the
models as OpenVINO compiled them (`serve.compiled`). Nothing here is needed: without a folder that can be written, the
service works, and measures and compiles again at the next start.
"""

from __future__ import annotations

import json
import logging
import os
import tempfile
from pathlib import Path
from typing import Any

from serve.settings import Settings

log = logging.getLogger("serve")


class State:
    def __init__(self, settings: Settings) -> None:
        # Beside the Hub's cache: what is remembered about a commit is of use only where its files are.
        cache = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
        home = os.environ.get("HF_HOME") or f"{cache}/huggingface"
        # pathlib's raises where there is no home, as for a user id that only the container's starter knows.
        self.folder = Path(os.path.expanduser(settings.state_dir or f"{home}/distrinews"))  # noqa: PTH111

    def read(self, name: str) -> dict[str, Any]:
        """What was written under `name`; empty where nothing was, or nothing that can be read."""
        try:
            found = json.loads((self.folder / f"{name}.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return {}
        return found if isinstance(found, dict) else {}

    def write(self, name: str, value: dict[str, Any]) -> None:
        try:
            write_whole(self.folder / f"{name}.json", json.dumps(value, indent=1).encode())
        except OSError as error:
            log.warning("nothing is remembered for the next start: %s cannot be written (%s)", self.folder, error.strerror)


def write_whole(file: Path, *parts: bytes | memoryview) -> None:
    """Whole or not at all: a service that is killed here, or two that write at once, leave no half file."""
    file.parent.mkdir(parents=True, exist_ok=True)
    handle, fresh = tempfile.mkstemp(dir=file.parent, suffix=".tmp")
    try:
        with os.fdopen(handle, "wb") as sink:
            sink.writelines(parts)
        Path(fresh).replace(file)
    except OSError:
        Path(fresh).unlink()  # a full disk must not fill up with these
        raise
