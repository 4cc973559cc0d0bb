"""The real service with an engine that can be broken while it runs, by files in a folder.

    python -m benchmarks.soak.server FLAGS --model user/repo ...

poison      holds a token id; a batch with it raises, as where one text is more than an engine can take
break-one   the engine that meets it raises from then on, as after a GPU's error; one that is loaded anew works
break       every engine raises, also one loaded anew
hang        every engine waits while the file is there
hang-one    the engine that meets it never comes back; one that is loaded anew works
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from serve.__main__ import main
from serve.engine import Batch, Logits, OnnxEngine, OpenVinoEngine


def breakable(whole: Callable[[Any, Batch], Logits], flags: Path) -> Callable[[Any, Batch], Logits]:
    """`whole`, an engine's `logits`, that fails as the files in `flags` say."""

    def take(name: str) -> bool:
        try:
            (flags / name).unlink()
        except FileNotFoundError:
            return False
        return True

    def logits(self: Any, texts: Batch) -> Logits:
        self.is_broken = getattr(self, "is_broken", False) or take("break-one")
        self.is_hung = getattr(self, "is_hung", False) or take("hang-one")
        while self.is_hung or (flags / "hang").exists():
            time.sleep(0.01)
        if self.is_broken or (flags / "break").exists():
            raise MemoryError
        try:
            poison = int((flags / "poison").read_text())
        except (FileNotFoundError, ValueError):
            poison = -1
        if any(poison in text for text in texts):
            raise RuntimeError("a token that is more than this engine can take")
        return whole(self, texts)

    return logits


if __name__ == "__main__":
    for kind in (OnnxEngine, OpenVinoEngine):
        kind.logits = breakable(kind.logits, Path(sys.argv[1]))  # type: ignore[method-assign,assignment]
    sys.exit(main(sys.argv[2:]))
