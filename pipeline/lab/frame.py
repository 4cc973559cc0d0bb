"""What an experiment is: one safeguard, one line that switches it off, numbers and a picture of what follows."""

from __future__ import annotations

import ast
import inspect
import textwrap
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes

from pipeline.lab.world import World

ROOT = Path(__file__).resolve().parents[2]
SIDES = ("broken", "cured")

# Okabe and Ito's colours, which the colour-blind tell apart too.
INK, GREY, PALE, BLUE, ORANGE, RED, GREEN = "#1f2933", "#9aa5b1", "#e4e7eb", "#0072b2", "#e69f00", "#d55e00", "#009e73"
RANKS = (BLUE, ORANGE)

Ranks = Sequence[Mapping[str, Any]]  # what `rank` returned on rank 0, 1, ...


class Experiment(ABC):
    """Its docstring is what the lab tells: first what is switched off (a sentence), then why that matters (two)."""

    name: str
    file = "pipeline/train_ddp.py"  # the safeguard is in it ...
    marker: str  # ... after these words
    says: str  # the symptom, filled with the figures of the broken run; filled with those of the cured one, the cure
    timeout = 60.0  # seconds that a collective waits for the other rank

    @abstractmethod
    def rank(self, world: World, broken: bool) -> dict[str, Any]:
        """One rank's part, inside a process group of its own; returns what JSON can hold. `broken` decides one line."""

    @abstractmethod
    def figures(self, ranks: Ranks) -> dict[str, Any]:
        """The numbers of one side, from what its ranks returned: those that `says` names."""

    @abstractmethod
    def draw(self, axes: Axes, ranks: Ranks) -> None:
        """One side's picture."""

    @property
    def what(self) -> str:
        return " ".join((inspect.getdoc(self) or "").split("\n\n")[0].split())

    @property
    def why(self) -> str:
        return " ".join((inspect.getdoc(self) or "").split("\n\n")[1].split())

    @property
    def line(self) -> str:
        """The one statement in which broken and cured differ, as it stands in the source."""
        source = textwrap.dedent(inspect.getsource(self.rank))
        function = ast.parse(source).body[0]
        (used,) = [node for node in ast.walk(function) if isinstance(node, ast.Name) and node.id == "broken"]
        holding = [s for s in ast.walk(function) if isinstance(s, ast.stmt) and s is not function and used in ast.walk(s)]
        innermost = max(holding, key=lambda statement: statement.lineno)
        # What a loop or a block holds is the same on both sides; what an `if` holds is not.
        last = innermost.lineno if isinstance(innermost, ast.For | ast.With) else innermost.end_lineno
        lines = source.splitlines()[innermost.lineno - 1 : last]
        return textwrap.dedent("\n".join(lines))

    @property
    def safeguard(self) -> str:
        """Where the safeguard stands: `pipeline/train_ddp.py:194 [DDP 6] no_sync`."""
        lines = (ROOT / self.file).read_text(encoding="utf-8").splitlines()
        number = next(i for i, line in enumerate(lines, 1) if self.marker in line)
        return f"{self.file}:{number} {self.marker}"

    def sentence(self, side: Mapping[str, Any]) -> str:
        return self.says.format(**side["figures"])
