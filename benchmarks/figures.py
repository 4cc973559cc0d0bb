"""What README.md and docs/*.md take from elsewhere: measured figures, lines of the textbook script, the table of options.

    python -m benchmarks.figures           # writes the pages anew; a test holds that nothing changes

In a page `<!-- figure: crash_test kills d -->26<!-- / -->` is `kills` of benchmarks/results/crash_test.json in Python's format
`d`. A path goes down by dots, through lists by number; what was not measured stands as "not measured". `[DDP 4](pipeline/train_ddp.py)`
is given the line of that marker.
"""

from __future__ import annotations

import inspect
import json
import re
import sys
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

from benchmarks.common import RESULTS, ROOT
from pipeline.config import FIELDS, TrainConfig
from pipeline.errors import UserError, run_entry

TYPES = get_type_hints(TrainConfig)
FIGURE = re.compile(r"(<!-- figure: (\S+) (\S+) (\S+) -->)(.*?)(<!-- / -->)", re.DOTALL)

MARKER = re.compile(r"\[DDP (\d+)\]\(((?:\.\./)?pipeline/train_ddp\.py)(?:#L\d+)?\)")
GUIDE, SCRIPT, OPTIONS = ROOT / "docs" / "ddp.md", ROOT / "pipeline" / "train_ddp.py", ROOT / "docs" / "options.md"


def marker_lines() -> dict[str, int]:
    """The line of train_ddp.py where the guide's section `[DDP n] Title` is written out, by n. Raises UserError where none is."""
    lines = SCRIPT.read_text(encoding="utf-8").splitlines()
    found = {}
    for number, title in re.findall(r"^### \[DDP (\d+)\] (.+)$", GUIDE.read_text(encoding="utf-8"), flags=re.MULTILINE):
        at = [i for i, line in enumerate(lines, 1) if f"[DDP {number}] {title}" in line]
        if not at:
            raise UserError(f"{SCRIPT.name} has no '[DDP {number}] {title}', a section of {GUIDE.name}: give both the same title.")
        found[number] = at[0]
    return found


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

    lines = marker_lines()
    return MARKER.sub(lambda match: f"[DDP {match[1]}]({match[2]}#L{lines[match[1]]})", FIGURE.sub(figure, text))


def options_page() -> str:
    """Every option of a run, from the dataclass and its comments."""
    source = inspect.getsource(TrainConfig)
    page = [
        "# Options of a run",
        "",
        "Keys of a configuration file and options of every entry; the command line wins. Made by `python -m benchmarks.figures`.",
    ]
    for line in source.splitlines():
        if heading := re.fullmatch(r"    # (.+)", line):
            page += ["", f"## {heading[1]}", "", "| option | default | what it is |", "|---|---|---|"]
        elif (name := re.match(r"    (\w+): ", line)) and name[1] in FIELDS:
            one = FIELDS[name[1]]
            default = "none" if one.default is None else str(one.default).lower() if isinstance(one.default, bool) else one.default
            allowed = f" ({', '.join(get_args(TYPES[name[1]]))})" if get_origin(TYPES[name[1]]) is Literal else ""
            page.append(f"| `{name[1]}` | {default} | {one.metadata['help']}{allowed} |")
    return "\n".join(page) + "\n"


def pages() -> list[Path]:
    return [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def main(_: list[str]) -> None:
    OPTIONS.write_text(options_page(), encoding="utf-8")
    for page in pages():
        text = page.read_text(encoding="utf-8")
        page.write_text(fill(text), encoding="utf-8")


if __name__ == "__main__":
    sys.exit(run_entry(main))
