"""What the lab shows: lines on the terminal, a picture of both sides, and the page docs/lab.md."""

from __future__ import annotations

import hashlib
import json
import textwrap
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from pipeline.lab.frame import GREEN, GREY, INK, PALE, RED, ROOT, SIDES, Experiment
from pipeline.lab.runner import EXPERIMENTS

PAGE, RESULTS, IMAGES = ROOT / "docs" / "lab.md", ROOT / "benchmarks" / "results" / "lab.json", ROOT / "docs" / "images"
WIDTH = 120  # of the terminal's text


def lines(experiment: Experiment, result: Mapping[str, Any]) -> str:
    """An experiment's result for the terminal."""
    rows = {
        "broken": experiment.what,
        "line": experiment.line,
        "symptom": experiment.sentence(result["broken"]),
        "cure": experiment.sentence(result["cured"]),
        "why": experiment.why,
        "safeguard": experiment.safeguard,
    }
    text = [experiment.name]
    for name, value in rows.items():
        first, *further = value.splitlines() if name == "line" else textwrap.wrap(value, WIDTH - 13)
        text += [f"  {name:<11}{first}", *(" " * 13 + line for line in further)]
    return "\n".join(text)


def digest(result: Mapping[str, Any]) -> str:
    """Names the figures of a result; a picture carries that of the result it shows."""
    return hashlib.sha256(json.dumps([result[side]["figures"] for side in SIDES], sort_keys=True).encode()).hexdigest()


def picture(experiment: Experiment, result: Mapping[str, Any], path: Path) -> None:
    """Broken and cured side by side, as a PNG of 1200 x 525 pixels, readable at 800."""
    figure = Figure(figsize=(8, 3.5), layout="constrained")
    panels = figure.subplots(1, 2, sharex=True, sharey=True)
    for axes, side, colour in zip(panels, SIDES, (RED, GREEN), strict=True):
        experiment.draw(axes, result[side]["ranks"])
        axes.set_title(side, color=colour, fontsize=11, weight="bold", loc="left")
        if not axes.images:
            axes.grid(axis="y", color=PALE, linewidth=0.8)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
        axes.spines[["left", "bottom"]].set_color(GREY)
        axes.tick_params(colors=INK, labelsize=8, length=0 if axes.images else 3)
        for label in (axes.xaxis.label, axes.yaxis.label):
            label.set(color=INK, fontsize=9)
        axes.label_outer()
    figure.suptitle(experiment.what, fontsize=10.5, color=INK, x=0.01, ha="left")
    figure.savefig(path, dpi=150, facecolor="white", metadata={"Software": None, "Description": digest(result)})


def page(results: Mapping[str, Any]) -> str:
    """docs/lab.md, from what the experiments say of themselves and the figures in benchmarks/results/lab.json."""
    found, versions, where = results["experiments"], results["provenance"]["versions"], results["provenance"]["hardware"]
    table = "\n".join(
        f"| [{name}](#{name}) | {EXPERIMENTS[name].sentence(both['broken'])} | {EXPERIMENTS[name].sentence(both['cured'])} | `make lab NAME={name}` |"
        for name, both in found.items()
    )
    sections = "\n".join(section(EXPERIMENTS[name], both) for name, both in found.items())
    return f"""# Break it on purpose

Each experiment trains a tiny model on real news stories (Reuters R8) with two CPU processes over gloo, twice: with one safeguard
of distributed training switched off, and with it. Exactly one line differs. None needs a GPU, nor a minute.

```bash
make setup && source .venv/bin/activate
python -m pipeline.lab                  # what there is
python -m pipeline.lab no_set_epoch     # one of them
make lab                                # all of them
```

Each prints what was broken, the symptom, the cure and where the safeguard stands in the hand-written script, and leaves its numbers and
its picture in `outputs/lab/NAME/`. This page is made from the figures in `benchmarks/results/lab.json` by the command that measured them.

Measured on {results["date"][:10]} by `{results["provenance"]["command"]}` on {where["cores"]} cores of {where["cpu"]}, one thread a process; \
torch {versions["torch"]}, transformers {versions["transformers"]}, accelerate {versions["accelerate"]}, Python {versions["python"]}. \
Seconds depend on the machine and what else it does; counts do not.

| experiment | symptom: broken | cured | command |
|---|---|---|---|
{table}

{sections}"""


def section(experiment: Experiment, both: Mapping[str, Any]) -> str:
    name = experiment.name
    return f"""## {name}

{experiment.what} {experiment.why}

```py
{experiment.line}
```

![Left broken, right cured: {experiment.what}](images/lab-{name}.png)

- **Broken:** {experiment.sentence(both["broken"])}.
- **Cured:** {experiment.sentence(both["cured"])}.
- The safeguard: `{experiment.marker}` in [{experiment.file}](../{experiment.file}).
"""
