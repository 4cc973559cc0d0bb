"""Which rank saw which row, in every step of two epochs: a real run on two processes, drawn.

    python -m benchmarks.shards            # a minute; results/shards.json and docs/images/shards.png

The run is the hand-written script with `--trace true`, which notes a hash of every row a rank has learnt from. Exit
code 1 where a row was seen twice in an epoch, or by both ranks.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.common import ROOT, Launch, caption, provenance, run_all, save, write_results
from pipeline.assets import fetch
from pipeline.errors import run_entry

PICTURE = ROOT / "docs" / "images" / "shards.png"
PROCESSES, GLOBAL_BATCH, EPOCHS, ROWS = 2, 16, 2, 160
COLOURS = ("#0072b2", "#e69f00")  # of Okabe and Ito's palette, told apart by everyone


def main(argv: list[str]) -> int:
    argparse.ArgumentParser(prog="python -m benchmarks.shards", allow_abbrev=False, description=__doc__.splitlines()[0]).parse_args(argv)
    provenance()
    with tempfile.TemporaryDirectory(prefix="shards-") as folder:
        record, steps = run(Path(folder))
    results = {"processes": PROCESSES, "global_batch": GLOBAL_BATCH, "steps_per_epoch": record["steps"] // EPOCHS, "steps": steps}
    draw(json.loads(write_results("shards", results | {"once": once(results)}).read_text(encoding="utf-8")), PICTURE)
    print(f"every row at most once an epoch: {'yes' if once(results) else 'NO'}; {PICTURE.relative_to(ROOT)}")
    return 0 if once(results) else 1


def run(folder: Path) -> tuple[dict[str, Any], list[list[list[int]]]]:
    """The run's record, and row numbers by step and rank; rows are numbered as they are met first."""
    assets = fetch()
    options = {"model": assets.encoder, "dataset": assets.r8, "max_train_samples": ROWS, "max_length": 32, "epochs": EPOCHS, "trace": "true",
               "global_batch_size": GLOBAL_BATCH, "validation_share": 0.05, "onnx": "false", "dropout": 0}  # fmt: skip
    launch = Launch("raw", PROCESSES, folder / "run", tuple(f"--{name}={value}" for name, value in options.items()))
    _, record, _ = next(iter(run_all([launch], {"TOKENIZERS_PARALLELISM": "false"})))
    ranks = []
    for rank in range(PROCESSES):
        lines = map(json.loads, (launch.folder / "trace" / f"rank-{rank}.jsonl").read_text(encoding="utf-8").splitlines())
        ranks.append([[row for micro in line["rows"] for row, _ in micro] for line in lines if "step" in line])
    number: dict[str, int] = {}
    return record, [[[number.setdefault(row, len(number)) for row in rank[step]] for rank in ranks] for step in range(len(ranks[0]))]


def once(results: dict[str, Any]) -> bool:
    """Whether no row was seen twice in an epoch, by one rank or by two."""
    length = results["steps_per_epoch"]
    epochs = [results["steps"][start : start + length] for start in range(0, len(results["steps"]), length)]
    return all(len(seen) == len(set(seen)) for seen in ([row for step in epoch for rank in step for row in rank] for epoch in epochs))


def draw(results: dict[str, Any], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(9, 4.6), layout="constrained")
    for rank, colour in enumerate(COLOURS):
        points = [(step + 1, row) for step, ranks in enumerate(results["steps"]) for row in ranks[rank]]
        axis.scatter([step for step, _ in points], [row for _, row in points], s=16, color=colour, label=f"rank {rank}", linewidths=0)
    length, total = results["steps_per_epoch"], len(results["steps"])
    for start in range(length, total, length):
        axis.axvline(start + 0.5, color="#666666", linewidth=0.8)
        axis.text(start + 0.6, axis.get_ylim()[1], " set_epoch: another order", va="top", fontsize=9, color="#444444")
    axis.set(xlabel="optimizer step", ylabel="training row, numbered as first met", xticks=range(1, total + 1))
    axis.set_title(
        f"Each global batch of {results['global_batch']} rows is dealt to two ranks; every row once an epoch, to one of them", fontsize=11
    )
    axis.legend(loc="upper left", frameon=False)
    axis.spines[["top", "right"]].set_visible(False)
    caption(figure, results)
    save(figure, path, results, dpi=110)
    plt.close(figure)


if __name__ == "__main__":
    sys.exit(run_entry(main))
