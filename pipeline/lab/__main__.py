"""Break distributed training on purpose: one safeguard off, the symptom with numbers and a picture, then the cure.

    python -m pipeline.lab                      # lists the experiments
    python -m pipeline.lab no_set_epoch         # runs one (or several) on two CPU processes, each in less than a minute
    python -m pipeline.lab --all                # runs all
    python -m pipeline.lab --all --page         # runs all and writes figures, pictures and text of docs/lab.md
    python -m pipeline.lab --page               # only the text anew, from benchmarks/results/lab.json

(or: make lab NAME=no_set_epoch, make lab). Each leaves outputs/lab/NAME/result.json and plot.png.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import tempfile
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from tqdm import tqdm

from pipeline.checkpoint import write_json
from pipeline.errors import UserError, nearest, run_entry
from pipeline.lab.frame import SIDES
from pipeline.lab.report import IMAGES, PAGE, RESULTS, lines, page, picture
from pipeline.lab.runner import EXPERIMENTS, run
from pipeline.record import surroundings

OUTPUT = Path("outputs/lab")


def experiment(names: list[str]) -> dict[str, dict[str, Any]]:
    """Run them, and print and keep each result as it comes; returns the results by name."""
    results = {}
    with tempfile.TemporaryDirectory(prefix="lab-") as scratch:
        bar = tqdm(run(names, Path(scratch)), total=len(names), unit="experiment", desc="two processes", dynamic_ncols=True)
        for name, result in bar:
            folder = OUTPUT / name
            folder.mkdir(parents=True, exist_ok=True)
            write_json(folder / "result.json", result)
            picture(EXPERIMENTS[name], result, folder / "plot.png")
            bar.write(f"{lines(EXPERIMENTS[name], result)}\n  kept       {folder}/result.json, plot.png\n", file=sys.stdout)
            results[name] = result
    return results


def main(argv: list[str]) -> None:
    about, _, commands = (__doc__ or "").partition("\n\n")
    parser = argparse.ArgumentParser(
        prog="python -m pipeline.lab", allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter, description=about, epilog=commands
    )  # fmt: skip
    parser.add_argument("names", nargs="*", metavar="NAME", help="Experiments to run; none: list them.")
    parser.add_argument("--all", action="store_true", help="Run all experiments.")
    parser.add_argument("--page", action="store_true", help="Write docs/lab.md; with --all its figures and pictures too.")
    options = parser.parse_args(argv)
    for name in options.names:
        if name not in EXPERIMENTS:
            there = ", ".join(EXPERIMENTS)
            raise UserError(
                f"There is no experiment '{name}'.{nearest(name, EXPERIMENTS)} There are: {there}. `python -m pipeline.lab` explains them."
            )
    if options.names and (options.all or options.page):
        raise UserError("Experiments are named, or --all is given; --page goes with --all or stands alone. Leave one of them out.")
    if options.names or options.all:
        facts = {"date": datetime.now(UTC).isoformat(timespec="seconds"), "provenance": surroundings()}
        results = experiment(list(EXPERIMENTS) if options.all else list(dict.fromkeys(options.names)))
        if options.page:
            kept = {
                name: {side: {key: result[side][key] for key in ("figures", "seconds")} for side in SIDES}
                for name, result in results.items()
            }
            IMAGES.mkdir(exist_ok=True)
            write_json(RESULTS, {"format": 1, **facts, "experiments": kept})
            for name in results:
                shutil.copy(OUTPUT / name / "plot.png", IMAGES / f"lab-{name}.png")
    if options.page:
        PAGE.write_text(page(json.loads(RESULTS.read_text(encoding="utf-8"))), encoding="utf-8")
        print(f"written: {os.path.relpath(PAGE)}")
    elif not options.names and not options.all:
        for name, its in EXPERIMENTS.items():
            print(f"{name:<20} {its.what}")
        print("\nRun one: python -m pipeline.lab NAME; all: python -m pipeline.lab --all")


if __name__ == "__main__":
    sys.exit(run_entry(main))
