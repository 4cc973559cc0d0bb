"""`make explain`: where the missing speed-up went, what would help, and how it goes on with more ranks.

    python -m benchmarks.explain                                    # one process against two on the CPU, or one GPU against all
    python -m benchmarks.explain --dataset ../shared/ag_news --rounds 3
    python -m benchmarks.explain --timeline                         # only the picture of a step, some ten seconds

The step measured is the training script's (`pipeline.train_ddp`) at its defaults: the same global batch, dealt out by
tokens. Three launches are kept ready and measured in turns, a few steps a turn, always the same ones, which each has taken
before: one process with as many threads as each of several has, several processes, and one process with all cores.

1. The training script's own loop gives the speed-up, by its own clock.
2. In every other step, time stamps are set by what the script is given (loader, model, its parameters, loss scaler, recorder): data,
   host to device, forward, backward to the rank's last gradient, waiting for the slowest rank's last gradient, what of the
   all-reduces is left after it, clipping with the optimizer. (A stamp takes a microsecond; on a GPU it waits for the queue.)
3. The same steps with nothing exchanged, on one rank while the others sleep and on all together: what backward takes longer
   again in 2 than together is the price of the all-reduces that run under it; what else a rank's own parts take longer in 2 than
   alone is contention, for cores, memory or power.
4. What may help, each measured as 2 is, and predicted from 2, 3 and timed all-reduces.

`benchmarks.explain.parts` has the arithmetic, `benchmarks.scaling` what follows for more ranks, which this runs as well.
Written to benchmarks/results/{explain,timeline,scaling}.json with their pictures, with --label t4x2 to explain-t4x2.json and so on. Where the parts do not add
up to the step within 3%, or the speed-up they predict is off by more than 0.05 whatever the spread of the rounds, page and
JSON say so; with --strict that is exit code 1.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks import scaling
from benchmarks.common import RESULTS, ROOT, named, provenance, write_results
from benchmarks.explain import page, timeline
from benchmarks.explain.measure import launched, measure, shapes
from benchmarks.explain.parts import explain
from pipeline.assets import fetch
from pipeline.errors import UserError, run_entry

ROWS = 1632  # training rows: 51 global batches of 32, the sampler's window for grouping by length, so the first steps are like any
TIMELINE = ROOT / "docs" / "images" / "timeline.png"


def main(argv: list[str]) -> int:
    import torch

    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    parser = argparse.ArgumentParser(prog="python -m benchmarks.explain", allow_abbrev=False)
    parser.add_argument("--dataset", default=os.environ.get("AG_NEWS_DIR", "fancyzhx/ag_news"), help="AG News: Hub id or folder.")
    parser.add_argument("--model", default=None, help="Encoder: Hub id or folder (all-MiniLM-L6-v2 from the package registry).")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if gpus > 1 else "cpu")
    parser.add_argument("--processes", type=int, default=gpus if gpus > 1 else 2, help="Of the larger launch (default: 2, or all GPUs).")
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--steps", type=int, default=10, help="Steps of a turn, an even number.")
    parser.add_argument("--label", default="", help="Name of another machine, such as t4x2: files of its own.")
    parser.add_argument("--timeline", action="store_true", help="Only draw a step anew, on the CPU.")
    parser.add_argument("--strict", action="store_true", help="Exit code 1 where parts and step do not agree.")
    given = parser.parse_args(argv)
    name = named("explain", given.label)
    if given.processes < 2:
        raise UserError(f"--processes is {given.processes}: allowed is 2 or more.")
    if given.rounds < 1:
        raise UserError(f"--rounds is {given.rounds}: allowed is 1 or more.")
    if given.steps < 2 or given.steps % 2:
        raise UserError(f"--steps is {given.steps}: allowed is an even number from 2 (two steps can share one all-reduce).")
    provenance()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # an exception, so that the launches are ended
    model = given.model or str(fetch().encoder)
    with tempfile.TemporaryDirectory(prefix="explain-") as folder:
        test = Path(folder) / "test.csv"  # what is never scored; two rows of each topic, so that nothing is held out for it
        topics = ("World", "Sports", "Business", "Sci/Tech")
        test.write_text("text,label\n" + "".join(f'"{topic}, row {i}",{topic}\n' for topic in topics for i in range(2)), encoding="utf-8")
        options = ["configs/ag_news.yaml", "--model", model, "--dataset", given.dataset, "--test_file", str(test), "--validation_share", "0.02",
                   "--max_train_samples", str(ROWS)]  # fmt: skip
        if given.timeline:
            several = {"many": shapes(given.processes, "cpu")["many"]}
            with launched(several, [*options, "--device", "cpu"], Path(folder)) as launches:
                about = launches["many"].ask("about")[0]
                draw(about | {"model": Path(model).name}, launches["many"].ask("timeline", steps=given.steps))
            return 0
        raw = measure([*options, "--device", given.device], given.processes, given.device, given.rounds, given.steps, Path(folder))
    found = explain(raw)
    about = {"model": Path(model).name, "dataset": Path(given.dataset).name, "held": holds(found), "sentence": page.sentence(found)}
    path = write_results(name, about | found)
    results = json.loads(path.read_text(encoding="utf-8"))
    page.plot(results, RESULTS.parent / f"{name}.png")
    print(page.section(results, given.label))
    if raw["timeline"] and not given.label:
        draw(raw["about"]["many"] | {"model": Path(model).name}, raw["timeline"])
    scaling.main(["--label", given.label])
    return 1 if given.strict and not results["held"] else 0


def draw(about: Mapping[str, Any], steps: Any) -> None:
    path = write_results("timeline", {"about": about, "ranks": timeline.choose(steps)})
    timeline.plot(json.loads(path.read_text(encoding="utf-8")), TIMELINE)
    print(f"A step of {page.label(about)}: {TIMELINE.relative_to(ROOT)}")


def holds(results: Mapping[str, Any]) -> bool:
    """Whether the parts add up to the measured step, and nothing speaks against the speed-up that they predict."""
    return page.added_up(results) and results["speedup"]["verdict"] != "wrong"


if __name__ == "__main__":
    sys.exit(run_entry(main))
