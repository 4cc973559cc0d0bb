"""One process against two, the Trainer against the raw script, both against the usual tutorial loop: speed, memory, arithmetic.

    make bench                                                    # at most 15 minutes on two cores: results/bench.json
    make bench BENCH=quick                                        # a look, under 3 minutes, to outputs/bench
    python -m benchmarks.bench --dataset fancyzhx/ag_news --rounds 5
    python -m benchmarks.bench --label t4x2 --model distilbert/distilbert-base-uncased   # another machine: results/bench-t4x2.json

Every configuration is launched as a user launches it, on the GPUs that are there, else on the CPU; once a round, each round
beginning with another one. Absolute speeds of a shared machine swing by a factor of two, so what is concluded are ratios
within a round. The matrix-multiply peak is measured in the same rounds. Where the machine is so slow that a round more would
not end within 15 minutes, it is left out; --rounds takes as many as it says. `make bench-report` makes the pages of it.
A bound that is not held is said here and on the page; only with --strict is the exit code then 1 (a noisy machine breaks some).
"""

from __future__ import annotations

import argparse
import json
import math
import os
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm.auto import tqdm

from benchmarks.common import ROOT, Launch, interleave, named, provenance, ratio, run_all, write_results
from pipeline.assets import fetch
from pipeline.config import FIELDS, TrainConfig
from pipeline.errors import UserError, run_entry
from pipeline.speed import training_flops

PLAIN, MATMUL = "plain loop", "matrix multiply"
ROWS = 32  # a step
LEARNING_RATE = "2e-4"  # with which so few steps learn something, so that the accuracy means something
# Name -> entry, processes, further options. One thread: what a process is given when two share two cores.
CONFIGURATIONS: dict[str, tuple[str, int, tuple[str, ...]]] = {
    "raw, 1 process": ("raw", 1, ()),
    "Trainer, 1 process": ("trainer", 1, ()),
    "raw, 2 processes": ("raw", 2, ()),
    "Trainer, 2 processes": ("trainer", 2, ()),
    "raw, 1 process of 1 thread": ("raw", 1, ("--cpu_threads", "1")),
}
CPU_ONLY = {"raw, 1 process of 1 thread"}
# Ratios of samples a second, round by round, and their bounds. The defaults' gain is judged on a CPU with AMX only.
RATIOS = {
    "defaults_against_plain": ("raw, 1 process", PLAIN, 3.5),
    "trainer_against_raw_1": ("Trainer, 1 process", "raw, 1 process", None),
    "trainer_against_raw": ("Trainer, 2 processes", "raw, 2 processes", 0.95),
    "two_against_one": ("raw, 2 processes", "raw, 1 process", None),
    "two_against_one_trainer": ("Trainer, 2 processes", "Trainer, 1 process", None),
    "two_against_one_thread": ("raw, 2 processes", "raw, 1 process of 1 thread", None),
}
CHECKPOINT_BOUND, CHECKPOINT_STEPS = 0.03, 50  # share of the seconds, where one is written every so many steps
MINUTES = 14.5  # a round more is begun only if it ends within them; the rest is for reading the texts


@dataclass(frozen=True)
class Scale:
    """How much is measured: optimizer steps of an entry and of the plain loop, rows scored at the end, rounds."""

    steps: int
    plain_steps: int
    test_rows: int
    rounds: int
    names: tuple[str, ...] = tuple(CONFIGURATIONS)
    minutes: float = MINUTES


FULL, QUICK = Scale(24, 8, 200, 3), Scale(8, 5, 40, 1)


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.bench", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--dataset", default=os.environ.get("AG_NEWS_DIR", "fancyzhx/ag_news"), help="AG News: Hub id or folder.")
    parser.add_argument("--model", help="Encoder: Hub id or folder (default: all-MiniLM-L6-v2 from the package registry).")
    parser.add_argument("--rounds", type=int, help=f"Default at most {FULL.rounds}; --quick {QUICK.rounds}.")
    parser.add_argument("--quick", action="store_true", help="Few steps, to outputs/bench.")
    parser.add_argument("--label", default="", help="Name of another machine, such as t4x2: a file of its own.")
    parser.add_argument("--strict", action="store_true", help="Exit code 1 where a bound is not held.")
    options = parser.parse_args(argv)
    scale = QUICK if options.quick else FULL
    rounds = scale.rounds if options.rounds is None else options.rounds
    if rounds < 1:
        raise UserError(f"--rounds is {rounds}: allowed is 1 or more.")
    name = named("bench", options.label)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # through `finally`, so that no run is left behind
    provenance()
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    model = options.model or str(fetch().encoder)
    names = tuple(n for n in scale.names if not gpus or (n not in CPU_ONLY and CONFIGURATIONS[n][1] <= gpus))
    scale = replace(scale, rounds=rounds, names=names, minutes=MINUTES if options.rounds is None else math.inf)
    with tempfile.TemporaryDirectory(prefix="bench-") as folder:
        results = Bench(model, options.dataset, scale, Path(folder), "cuda" if gpus else "cpu").measure()
    print(f"written to {write_results(name, results, ROOT / 'outputs' / 'bench' if options.quick else None)}")
    for name, row in results["ratios"].items():
        print(f"{name:26} {row['median']:.3f} ({row['lowest']:.3f} to {row['highest']:.3f}){'' if row['held'] else '  BOUND BROKEN'}")
    return int(options.strict and not all(row["held"] for row in results["ratios"].values()))


@dataclass
class Bench:
    """Measures on one device; `runs` fills with one record a round for each configuration."""

    model: str
    dataset: str
    scale: Scale
    work: Path
    device: str
    runs: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    rows: dict[str, int] = field(default_factory=dict)  # of each split, before some are drawn

    def measure(self) -> dict[str, Any]:
        """What becomes results/bench*.json, without provenance."""
        began = time.monotonic()
        test, lengths = self.write_test_rows(), self.count_lengths()
        variants: dict[str, Callable[[], float]] = {MATMUL: self.matmul, PLAIN: lambda: self.plain(test)}
        variants |= {name: self.entry(name, test) for name in self.scale.names}
        with tqdm(total=self.scale.rounds * len(variants), desc="measuring", unit="run", dynamic_ncols=True) as bar:
            figures = interleave(variants, self.scale.rounds, self.scale.minutes, bar=bar)
        rounds = len(figures[MATMUL])
        if rounds < self.scale.rounds:
            print(
                f"{rounds} of {self.scale.rounds} rounds: one more would not have ended within {self.scale.minutes:g} minutes (--rounds takes them all)"
            )
        amx = "amx_bf16" in provenance()["provenance"]["hardware"]["cpu_flags"]
        ratios: dict[str, dict[str, Any]] = {}
        for name, (above, below, bound) in RATIOS.items():
            if above in figures and below in figures:
                found = ratio(figures[above], figures[below])
                bound = None if name == "defaults_against_plain" and not (amx and self.device == "cpu") else bound
                ratios[name] = {**found, "bound": bound, "held": bound is None or found["median"] >= bound}
        for name in (PLAIN, *self.scale.names):
            for run, peak in zip(self.runs[name], self.runs[MATMUL], strict=True):  # of the same round
                place = run["topology"]
                devices = place["world_size"] if self.device == "cuda" else 1
                run["share_of_peak"] = run["flops_per_second_with_padding"] / (devices * peak[place["precision"]])
        shares = [run["checkpoint_share"] for name, runs in self.runs.items() if "2 processes" in name for run in runs]
        if shares:
            middle = statistics.median(shares)
            ratios["checkpoint_share"] = {"median": middle, "lowest": min(shares), "highest": max(shares), "bound": CHECKPOINT_BOUND,
                                          "held": middle <= CHECKPOINT_BOUND}  # fmt: skip
        return {
            "model": Path(self.model).name,
            "dataset": Path(self.dataset).name,
            "dataset_rows": self.rows,
            "device": self.device,
            "interconnect": interconnect(self.device),
            "settings": {"rows_a_step": ROWS, "steps": self.scale.steps, "plain_steps": self.scale.plain_steps, "rounds": rounds,
                         "test_rows": self.scale.test_rows, "max_length": TrainConfig.max_length},
            "lengths": lengths,
            "minutes_in_all": round((time.monotonic() - began) / 60, 1),
            "runs": self.runs,
            "same_weights": {str(n): self.same_weights(n) for n in (1, 2) if f"raw, {n} process{'es' * (n > 1)}" in self.runs},
            "ratios": ratios,
        }  # fmt: skip

    def split(self, name: str, rows: int) -> Any:
        """Some rows of a split, the same for all who ask."""
        from datasets import load_dataset

        try:
            found = load_dataset(self.dataset, split=name)
        except (OSError, ValueError) as error:
            raise UserError(
                f"--dataset {self.dataset} cannot be read: {str(error).splitlines()[0]} Give AG News, as Hub id or folder."
            ) from error
        if not {"text", "label"} <= set(found.column_names):
            raise UserError(
                f"--dataset {self.dataset} has the columns {', '.join(found.column_names)}: needed are text and label. Give AG News."
            )
        self.rows[name] = len(found)
        return found.shuffle(seed=42).select(range(min(rows, len(found))))

    def write_test_rows(self) -> Path:
        """What all entries score: it is no part of their speed, but the figure belongs to a run."""
        rows, path = self.split("test", self.scale.test_rows), self.work / "test.jsonl"
        names = rows.features["label"].names
        path.write_text("".join(json.dumps({"text": row["text"], "label": names[row["label"]]}) + "\n" for row in rows), encoding="utf-8")
        return path

    def count_lengths(self) -> list[int]:
        """How many of 4,000 training rows have 1, 2, ... tokens (cut at 128): what a benchmark without the texts draws from."""
        from transformers import AutoTokenizer

        longest = TrainConfig.max_length
        texts = self.split("train", 4000)["text"][:]
        encoded = AutoTokenizer.from_pretrained(self.model)(texts, truncation=True, max_length=longest)["input_ids"]
        return np.bincount([len(ids) for ids in encoded], minlength=longest + 1)[1:].tolist()

    def environment(self, processes: int) -> dict[str, str]:
        seen = os.environ.get("CUDA_VISIBLE_DEVICES", "")
        gpus = seen.split(",") if seen else [str(gpu) for gpu in range(processes)]
        visible = {"CUDA_VISIBLE_DEVICES": ",".join(gpus[:processes])} if self.device == "cuda" else {}
        return {"TOKENIZERS_PARALLELISM": "false", **visible}

    def entry(self, name: str, test: Path) -> Callable[[], float]:
        kind, processes, options = CONFIGURATIONS[name]

        def once() -> float:
            runs = self.runs.setdefault(name, [])
            folder = self.work / f"{name.replace(', ', '-').replace(' ', '-')}-{len(runs)}"
            common = ("configs/ag_news.yaml", "--model", self.model, "--dataset", self.dataset, "--test_file", str(test),
                      "--validation_share", "0.005", "--max_train_samples", str(self.scale.steps * ROWS), "--max_steps", str(self.scale.steps),
                      "--learning_rate", LEARNING_RATE, "--onnx", "false")  # fmt: skip
            launch = Launch(kind, processes, folder, (*common, *options), self.device)
            _, record, seconds = next(iter(run_all([launch], self.environment(processes), slots=1)))
            runs.append(self.figures(record) | {"seconds_in_all": round(seconds, 1)})
            return record["speed"]["samples_per_second"]

        return once

    def figures(self, record: dict[str, Any]) -> dict[str, Any]:
        """What is kept of an entry's run.json."""
        config = {name: value for name, value in record["config"].items() if value != FIELDS[name].default}
        for name in ("output_dir", "test_file"):
            config.pop(name)
        config |= {"model": Path(self.model).name, "dataset": Path(self.dataset).name}
        speed, checkpoint = record["speed"], record["pauses"]["checkpoint"]  # a run writes one, with its manifest
        return {
            **speed, "topology": record["topology"], "batch": record["batch"], "config": config,
            "accuracy": record["test"]["accuracy"], "scored": record["test"]["examples"], "weights_sha256": record["weights_sha256"],
            # By each run's own clock, so no other run's noise is in it.
            "checkpoint_share": checkpoint / (checkpoint + CHECKPOINT_STEPS * speed["seconds"] / speed["steps"]),
        }  # fmt: skip

    def plain(self, test: Path) -> float:
        """The tutorial's loop. It is slow, so it takes fewer steps."""
        done = self.program("benchmarks.plain_loop", "--model", self.model, "--dataset", self.dataset, "--steps", str(self.scale.plain_steps),
                            "--device", self.device, "--learning_rate", LEARNING_RATE, "--test_file", str(test))  # fmt: skip
        from transformers import AutoConfig, AutoModelForSequenceClassification

        with torch.device("meta"):  # shapes without weights: enough to count
            model = AutoModelForSequenceClassification.from_config(AutoConfig.from_pretrained(self.model))
        total = sum(done["step_seconds"])
        self.runs.setdefault(PLAIN, []).append({
            "steps": len(done["step_seconds"]), "seconds": total, "samples_per_second": done["rows"] / total,
            "tokens_per_second": done["tokens"] / total, "padded_share": 1 - done["tokens"] / done["padded_tokens"],
            "step_seconds": {f"p{share}": float(np.percentile(done["step_seconds"], share)) for share in (10, 50, 90, 99)},
            "peak_memory_gib": [round(done["peak_memory_gib"], 3)],
            "flops_per_second": training_flops(model, done["tokens"], done["squares"]) / total,
            "flops_per_second_with_padding": training_flops(model, done["padded_tokens"], done["padded_squares"]) / total,
            "topology": {"world_size": 1, "device": self.device, "precision": "fp32", "threads": done["threads"]}, "config": done["config"],
            "accuracy": done["accuracy"], "scored": done["scored"],
        })  # fmt: skip
        return self.runs[PLAIN][-1]["samples_per_second"]

    def matmul(self) -> float:
        """FLOP/s by type, of all cores or of one GPU. (CPUs multiply fp16 slowly, and no run computes in it there.)"""
        types = ("fp32", "bf16", "fp16") if self.device == "cuda" else ("fp32", "bf16")
        found = self.program("benchmarks.matmul", "--device", self.device, *(word for name in types for word in ("--dtype", name)))
        self.runs.setdefault(MATMUL, []).append(found)
        return max(found.values())

    def program(self, module: str, *arguments: str) -> dict[str, Any]:
        """Run one of our programs alone and read the line of JSON that it ends with."""
        done = subprocess.run(
            [sys.executable, "-m", module, *arguments], cwd=ROOT, env=os.environ | self.environment(1), capture_output=True, text=True,
            timeout=900, check=False,
        )  # fmt: skip
        if done.returncode:
            raise UserError(f"{module} failed: {(done.stderr.strip().splitlines() or ['no output'])[-1]}")
        return json.loads(done.stdout.splitlines()[-1])

    def same_weights(self, processes: int) -> bool:
        """Whether Trainer and raw script ended with the same bits, in every round (on the CPU in fp32 they must)."""
        words = f"{processes} process{'es' * (processes > 1)}"
        return len({run["weights_sha256"] for entry in ("raw", "Trainer") for run in self.runs.get(f"{entry}, {words}", [])}) == 1


def interconnect(device: str) -> str:
    """What ranks talk over, as found: for GPUs the cell between the first two in `nvidia-smi topo -m` (NV: NVLink; PIX, PHB, NODE, SYS: PCIe)."""
    if device == "cpu":
        return "gloo over the loopback interface"
    if torch.cuda.device_count() < 2:
        return "none: one GPU"
    try:
        table = subprocess.run(["nvidia-smi", "topo", "-m"], capture_output=True, text=True, timeout=60, check=False).stdout
    except OSError:
        table = ""
    found = re.search(r"^GPU0\s+X\s+(\w+)", table, flags=re.MULTILINE)
    return f"NCCL over {found.group(1)}" if found else "NCCL, link unknown (no nvidia-smi)"


if __name__ == "__main__":
    sys.exit(run_entry(main))
