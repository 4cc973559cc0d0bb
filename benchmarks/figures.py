"""Measured figures in running text: README.md and docs/*.md take each from its JSON, so that none is typed by hand.

    python -m benchmarks.figures           # writes the pages anew; a test holds that nothing changes

In a page `<!-- figure: crash_test kills d -->26<!-- / -->` is `kills` of benchmarks/results/crash_test.json in Python's format
`d`. A path goes down by dots, through lists by number; what was not measured stands as "not measured".
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

from benchmarks.common import RESULTS, ROOT
from pipeline.errors import UserError, run_entry

FIGURE = re.compile(r"(<!-- figure: (\S+) (\S+) (\S+) -->)(.*?)(<!-- / -->)", re.DOTALL)


def fill(text: str, results: Path = RESULTS) -> str:
    """`text` with every figure as it stands in `results`. Raises UserError for a path that leads nowhere."""

    def figure(match: re.Match[str]) -> str:
        opening, name, path, form, _, closing = match.groups()
        file = results / f"{name}.json"
        value: Any = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else None
        for key in path.split(".") if file.is_file() else ():
            try:
                value = value[int(key)] if isinstance(value, list) else value[key]
            except (KeyError, IndexError, ValueError, TypeError):
                raise UserError(f"{file.name} has no {path}: allowed are keys by dots and list items by number; mend the page.") from None
        return f"{opening}{'not measured' if value is None else format(value, form)}{closing}"

    return FIGURE.sub(figure, text)


def pages() -> list[Path]:
    return [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def main(_: list[str]) -> None:
    for page in pages():
        text = page.read_text(encoding="utf-8")
        page.write_text(fill(text), encoding="utf-8")


if __name__ == "__main__":
    sys.exit(run_entry(main))
