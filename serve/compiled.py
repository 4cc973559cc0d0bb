"""What a library has compiled, kept in files: the next start opens one in a third of the time, and in less memory.

A file is mapped into memory and read from there while the model serves. Its last bytes are the digest of those before, for
the library would crash on a damaged one.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from serve.machine import cpu
from serve.state import write_whole

log = logging.getLogger("serve")

KEPT = 4  # files, each as large as the weights
ABANDONED_SECONDS = 600  # half a file of a process that was killed as it wrote
SAMPLES, SAMPLE_BYTES = 16, 1 << 16
_DIGEST = hashlib.sha256().digest_size

Bytes = npt.NDArray[np.uint8]


def identity(path: Path) -> list[Any]:
    """What tells a file from any other without reading all of it: name, size, time, and the digest of samples.

    Other weights differ everywhere, also where a copy has set name, size and time as they were.
    """
    real = path.resolve()
    about, digest = real.stat(), hashlib.sha256()
    with real.open("rb") as file:
        for part in range(SAMPLES):
            file.seek(about.st_size * part // SAMPLES)
            digest.update(file.read(SAMPLE_BYTES))
    return [str(real), about.st_size, about.st_mtime_ns, digest.hexdigest()]


def compiled(folder: Path, facts: Sequence[Any], make: Callable[[], memoryview]) -> Bytes:
    """What `make` returns, from the file it left when it was called for the same `facts` on this CPU, or by calling it."""
    name, flags = cpu()
    key = hashlib.sha256(json.dumps([name, sorted(flags), *facts]).encode()).hexdigest()[:16]
    file = folder / f"{key}.bin"
    if (found := _read(file)) is None:
        data = make()
        try:
            write_whole(file, data, hashlib.sha256(data).digest())
        except OSError as error:
            log.warning("the model is compiled at every start: %s cannot be written (%s)", folder, error.strerror)
            return np.frombuffer(data, np.uint8)
        _prune(folder)
        if (found := _read(file)) is None:  # somebody else has removed it
            return np.frombuffer(data, np.uint8)
    return found


def _read(file: Path) -> Bytes | None:
    """The content of a whole file, else None."""
    try:
        mapped = np.memmap(file, np.uint8, mode="c")  # the library asks for memory that it could write to
    except (OSError, ValueError):  # ValueError: an empty file
        return None
    with contextlib.suppress(OSError):  # one may read where one may not write
        os.utime(file)  # used last now: those that were not are removed first
    content, digest = mapped[:-_DIGEST], mapped[-_DIGEST:].tobytes()
    return content if hashlib.sha256(content.data).digest() == digest else None


def _prune(folder: Path) -> None:
    """Keeps those used last. One that is removed while it is mapped can still be read."""
    ages: dict[Path, float] = {}
    for path in folder.iterdir():
        with contextlib.suppress(OSError):  # another process was quicker
            ages[path] = time.time() - path.stat().st_mtime
    whole = sorted((path for path in ages if path.suffix == ".bin"), key=ages.__getitem__)
    for path in [*whole[KEPT:], *(path for path, age in ages.items() if path.suffix == ".tmp" and age > ABANDONED_SECONDS)]:
        with contextlib.suppress(OSError):
            path.unlink()
