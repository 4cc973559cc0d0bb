"""`make explain`: where the missing speed-up went, what would help, and how it goes on with more ranks.

    python -m benchmarks.explain                                    # one process against two on the CPU, or one GPU against all
    python -m benchmarks.explain --dataset ../shared/ag_news --rounds 3
    python -m benchmarks.explain --timeline                         # only the picture of a step, some ten seconds

The step measured is the training script's (`pipeline.train_ddp`) at its defaults: the same global batch, dealt out by
tokens. Three launches are kept ready and measured in turns, a few steps a turn, always the same ones:
one process with as many threads as each of several has, several processes, and one process with all cores.

1. The training script's own loop gives the step, by its own clock, and so the speed-up. Time stamps, set by what the script is
   given (loader, model, loss scaler, recorder), take the same steps apart: data, host to device, forward, backward, clipping with
   the optimizer. (A stamp takes a microsecond; on a GPU it waits for the queue. `make bench` has the speed-up without any.)
2. With all communication left out (no_sync) and a barrier after backward: what forward and backward take without
   all-reduce, and who waits for whom. 1 less 2, less the wait, is the all-reduce that backward does not hide.
3. The same on one rank while the others sleep: 2 less 3 (of data and optimizer, 1 less 3) is contention, for cores, memory or power.
4. What may help, each measured as 1 is, and predicted from 1 to 3 and from timed all-reduces.

`benchmarks.explain.parts` has the arithmetic, `benchmarks.scaling` what follows for more ranks, which this runs as well.
Written to benchmarks/results/{explain,timeline,scaling}.json with their pictures, with --label t4x2 to explain-t4x2.json and so on. Exit code 1: the stamped parts do not
add up to the step within 3%, or the speed-up they predict is off by more than 0.05: the loop does something that no stamp covers.
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
from benchmarks.explain.parts import PARTS, explain
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
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=6, help="Steps of a turn, an even number.")
    parser.add_argument("--label", default="", help="Name of another machine, such as t4x2: files of its own.")
    parser.add_argument("--timeline", action="store_true", help="Only draw a step anew, on the CPU.")
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
    return 0 if results["held"] else 1


def draw(about: Mapping[str, Any], steps: Any) -> None:
    path = write_results("timeline", {"about": about, "ranks": timeline.choose(steps)})
    timeline.plot(json.loads(path.read_text(encoding="utf-8")), TIMELINE)
    print(f"A step of {page.label(about)}: {TIMELINE.relative_to(ROOT)}")


def holds(results: Mapping[str, Any]) -> bool:
    """Whether the parts add up to the measured step, and to the measured speed-up."""
    accounts = (results["accounts"]["one"], results["accounts"]["many"])
    off = [abs(sum(account[part] for part in PARTS) / account["step"] - 1) for account in accounts]
    speedup = results["speedup"]
    return max(off) <= page.ADDS_UP_WITHIN and abs(speedup["predicted"] - speedup["measured"]["median"]) <= page.PREDICTS_WITHIN


if __name__ == "__main__":
    sys.exit(run_entry(main))
