"""How much of a GPU a training step uses: batch sizes, torch.compile, padding, and where the time goes.

    python -m benchmarks.gpu_step                                  # on a GPU, some minutes: results/gpu_step.json
    python -m benchmarks.gpu_step --device cpu --rows 4,8 --steps 2 --layers 1 --eager_only --out outputs/gpu_step   # does it run?

DistilBERT from its configuration with random weights (speed does not depend on them), the step of `pipeline/train_ddp.py` on
one device: autocast, fused AdamW, clipping. Token ids are random too; the texts' lengths are those of AG News as
`make bench` counted them (`lengths` in results/bench.json), so neither model nor data are needed. The batches lie on the
device: the loader is not measured. Aim: half of the matrix-multiply peak, or what the time goes to instead.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from tqdm.auto import tqdm

from benchmarks.common import RESULTS, machine, named, provenance, provenance_lines, write_results
from benchmarks.matmul import matmul_peak
from pipeline.batches import Collator
from pipeline.config import TrainConfig
from pipeline.errors import UserError, run_entry
from pipeline.model import classification_loss, decay_groups
from pipeline.sampler import GlobalBatchSampler
from pipeline.speed import training_flops
from pipeline.topology import DTYPES, choose_precision

COMMAND = "python -m benchmarks.gpu_step"
WARMUP, CLASSES = 5, 4
HALF = 0.5
# Kernels by what they are for; the first pattern that fits counts. Names are those of cuBLAS, CUTLASS, torch and Triton.
KINDS = {
    "norms, activations and dropout fused by torch.compile": r"^(triton|cpp)_",  # Inductor's, named after all that they fuse
    "attention": r"flash|fmha|attention|softmax",
    "matrix products": r"gemm|cutlass|cublas|nvjet|wgmma|splitk|aten::(mm|addmm|bmm|baddbmm)|mkldnn_linear",
    "optimizer and clipping": r"adam|multi_tensor|foreach",
    "copies and conversions": r"memcpy|memset|copy",
    "norms, activations, dropout and other element-wise work": r".",
}


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog=COMMAND, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--rows", default="32,64,128,256,512,1024", help="Batch sizes, with commas.")
    parser.add_argument("--steps", type=int, default=30, help="Measured of each, after 5 that are not.")
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--eager_only", action="store_true", help="Leave torch.compile out (it needs a C compiler).")
    parser.add_argument("--out", type=Path, help="Folder for gpu_step.json (default: benchmarks/results).")
    parser.add_argument("--label", default="", help="Name of another machine, such as t4x2: gpu_step-t4x2.json.")
    options = parser.parse_args(argv)
    name = named("gpu_step", options.label)
    if options.device == "cuda" and not torch.cuda.is_available():
        raise UserError("torch sees no GPU here. Run this where there is one, or give --device cpu with small --rows to see that it runs.")
    if not re.fullmatch(r"[1-9]\d*(,[1-9]\d*)*", options.rows) or options.steps < 1 or options.layers < 1:
        raise UserError(
            f"--rows is {options.rows}, --steps {options.steps}, --layers {options.layers}: allowed are numbers above 0, rows with commas."
        )
    provenance()
    bench = Step(options.device, lengths_of_ag_news(), options.steps, options.layers)
    sizes = sorted({int(rows) for rows in options.rows.split(",")})
    path = write_results(name, bench.measure(sizes, compile=not options.eager_only), options.out)
    print("\n".join(section(json.loads(path.read_text(encoding="utf-8")))))
    return 0


def lengths_of_ag_news() -> np.ndarray:
    """Tokens of 4,000 training rows as `make bench` found them, `(rows,)`."""
    path = RESULTS / "bench.json"
    if not path.exists():
        raise UserError(f"{path} is not there, which has the lengths of AG News. Measure it first: make bench.")
    counts = json.loads(path.read_text(encoding="utf-8"))["lengths"]
    return np.repeat(np.arange(1, len(counts) + 1), counts)


def kind_of(kernel: str) -> str:
    return next(kind for kind, pattern in KINDS.items() if re.search(pattern, kernel, flags=re.IGNORECASE))


class Step:
    """The model on one device, and the ways to time its step."""

    def __init__(self, device: str, lengths: np.ndarray, steps: int, layers: int) -> None:
        from transformers import DistilBertConfig, DistilBertForSequenceClassification

        self.device, self.lengths, self.steps = device, lengths, steps
        self.precision = choose_precision(TrainConfig(), device)
        self.autocast = DTYPES[self.precision] if self.precision != "fp32" else None
        torch.manual_seed(0)
        config = DistilBertConfig(n_layers=layers)
        config.num_labels = CLASSES
        self.model: Any = DistilBertForSequenceClassification(config).train()
        self.model.to(device)
        self.optimizer = torch.optim.AdamW(decay_groups(self.model, 0.01), lr=2e-5, fused=True)
        self.scaler = torch.amp.GradScaler(device, enabled=self.precision == "fp16")

    def measure(self, sizes: Sequence[int], compile: bool) -> dict[str, Any]:
        """What becomes results/gpu_step.json, without provenance. A size that does not fit ends the sweep."""
        ways: dict[bool, Callable[..., Any]] = {False: self.model}
        if compile:
            ways[True] = torch.compile(self.model, dynamic=True)
        sweep: list[dict[str, Any]] = []
        for rows, compiled in (
            bar := tqdm([(rows, way) for rows in sizes for way in ways], unit="size", desc="gpu_step", dynamic_ncols=True)
        ):
            bar.set_postfix(rows=rows, compiled=compiled)
            try:
                sweep.append({"rows": rows, "compiled": compiled, **self.timed(ways[compiled], self.batches(rows, "grouped"))})
            except torch.OutOfMemoryError:
                print(f"{rows} rows do not fit into the GPU's memory: the sweep ends there", file=sys.stderr)
                break
        if not sweep:
            raise UserError(f"not even {sizes[0]} rows fit into the GPU's memory. Give smaller --rows.")
        best = max(sweep, key=lambda row: row["share_of_peak"])
        rows, forward = best["rows"], ways[best["compiled"]]
        padding = {}
        for how in ("to 128", "to the longest of a random batch", "grouped"):
            try:
                padding[how] = self.timed(forward, self.batches(rows, how))
            except torch.OutOfMemoryError:  # padded further, the same rows need more
                print(f"{rows} rows padded {how} do not fit into the GPU's memory: left out", file=sys.stderr)
        return {
            "device": self.device,
            "precision": self.precision,
            "model": f"DistilBERT, {self.model.config.n_layers} layers, random weights",
            "mean_length": float(self.lengths.mean()),
            "steps": self.steps,
            "sweep": sweep,
            "best": {"rows": rows, "compiled": best["compiled"]},
            "padding": padding,
            "profile": self.profile(forward, self.batches(rows, "grouped")),
        }

    def batches(self, rows: int, how: str) -> list[dict[str, torch.Tensor]]:
        """Random texts with AG News' lengths on the device, padded: to 128, to the longest of a random or of a length-grouped batch."""
        count, random = rows * (WARMUP + self.steps), np.random.default_rng(0)
        lengths = random.choice(self.lengths, count)
        sampler = GlobalBatchSampler(
            lengths.tolist(), global_batch_size=rows, accumulation=1, num_replicas=1, rank=0, seed=0, length_grouping=how == "grouped"
        )
        collate = Collator(pad_token_id=0, multiple_of=128 if how == "to 128" else 8)
        texts = [{"input_ids": random.integers(1000, 30000, length), "labels": int(random.integers(CLASSES))} for length in lengths]
        return [{name: tensor.to(self.device) for name, tensor in collate([texts[i] for i in batch]).items()} for batch in sampler]

    def step(self, forward: Callable[..., Any], batch: Mapping[str, torch.Tensor]) -> None:
        with torch.autocast(self.device, dtype=self.autocast, enabled=self.autocast is not None):
            logits = forward(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        self.scaler.scale(classification_loss(logits, batch["labels"])).backward()
        self.scaler.unscale_(self.optimizer)
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad()

    def finish(self) -> float:
        """Wait for the device; the clock."""
        if self.device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    def timed(self, forward: Callable[..., Any], batches: Sequence[dict[str, torch.Tensor]]) -> dict[str, Any]:
        """Figures over the batches after the first five; the peak is measured right after."""
        if self.device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        for batch in batches[:WARMUP]:
            self.step(forward, batch)
        began = self.finish()
        for batch in batches[WARMUP:]:
            self.step(forward, batch)
        seconds = self.finish() - began
        memory = torch.cuda.max_memory_allocated() / 2**30 if self.device == "cuda" else None
        lengths = torch.cat([batch["attention_mask"].sum(1) for batch in batches[WARMUP:]]).double()
        padded = torch.tensor([batch["input_ids"].shape for batch in batches[WARMUP:]]).double()  # (steps, 2): rows, seq
        computed = training_flops(self.model, int(padded.prod(1).sum()), int((padded[:, 0] * padded[:, 1] ** 2).sum())) / seconds
        peak = matmul_peak(self.device, DTYPES[self.precision], seconds=1.0)
        return {
            "step_ms": 1000 * seconds / len(padded),
            "samples_per_second": len(lengths) / seconds,
            "tokens_per_second": float(lengths.sum()) / seconds,
            "padded_share": 1 - float(lengths.sum() / padded.prod(1).sum()),
            "flops_per_second": training_flops(self.model, int(lengths.sum()), int(lengths.square().sum())) / seconds,
            "flops_per_second_with_padding": computed,
            "matmul_peak": peak,
            "share_of_peak": computed / peak,
            "memory_gib": memory,
        }

    def profile(self, forward: Callable[..., Any], batches: Sequence[dict[str, torch.Tensor]]) -> dict[str, float]:
        """Shares of the time of some steps by kind of kernel; `idle`: the device waits, for Python to launch the next one."""
        from torch.autograd.profiler_util import EventList
        from torch.profiler import ProfilerActivity, profile

        on_gpu = self.device == "cuda"
        activity = ProfilerActivity.CUDA if on_gpu else ProfilerActivity.CPU
        began = self.finish()
        with profile(activities=[activity]) as seen:
            began = self.finish()
            for batch in batches[WARMUP : WARMUP + 5]:
                self.step(forward, batch)
            total = self.finish() - began
        events: EventList = seen.key_averages()
        parts = dict.fromkeys(KINDS, 0.0)
        for event in events:
            if not event.is_user_annotation:  # a span drawn around kernels that are events themselves
                seconds = (event.self_device_time_total if on_gpu else event.self_cpu_time_total) / 1e6
                parts[kind_of(event.key)] += seconds / total
        return parts | {"idle": max(0.0, 1 - sum(parts.values()))}


def section(results: Mapping[str, Any] | None) -> list[str]:
    """Lines of Markdown: the sweep, padding, and where the time goes; or how to measure them."""
    if results is None:
        return [
            "## A training step on a GPU",
            "",
            f"Not measured: `{COMMAND}` on a machine with a GPU (DistilBERT, batch sizes, torch.compile, padding, profile).",
        ]
    best = next(row for row in results["sweep"] if {name: row[name] for name in ("rows", "compiled")} == results["best"])
    lines = [f"## A training step on {machine(results)}", "", provenance_lines(results), ""]
    lines += [
        f"{results['model']}, {results['precision']}, AG News' lengths ({results['mean_length']:.0f} tokens on average), grouped by length.",
        "",
    ]
    lines += ["| rows | torch.compile | samples/s | step, ms | TFLOP/s on texts | with padding | share of the matrix-multiply peak | memory, GiB |",
              "|---|---|---|---|---|---|---|---|"]  # fmt: skip
    for row in results["sweep"]:
        memory = "" if row["memory_gib"] is None else f"{row['memory_gib']:.1f}"
        lines.append(
            f"| {row['rows']} | {'on' if row['compiled'] else 'off'} | {row['samples_per_second']:.0f} | {row['step_ms']:.1f} | "
            f"{row['flops_per_second'] / 1e12:.3g} | {row['flops_per_second_with_padding'] / 1e12:.3g} | {row['share_of_peak']:.1%} | {memory} |"
        )
    lines += ["", f"At {best['rows']} rows, torch.compile {'on' if best['compiled'] else 'off'}, by padding:", ""]
    lines += ["| padded | samples/s | share of tokens that are padding |", "|---|---|---|"]
    lines += [f"| {how} | {row['samples_per_second']:.0f} | {row['padded_share']:.1%} |" for how, row in results["padding"].items()]
    parts = sorted(results["profile"].items(), key=lambda part: -part[1])
    reached = "reached" if best["share_of_peak"] >= HALF else "not reached"
    lines += ["", f"Half of the peak is {reached} ({best['share_of_peak']:.1%}). A step's time by the profiler: "
                  + ", ".join(f"{kind} {share:.0%}" for kind, share in parts) + "."]  # fmt: skip
    return lines


if __name__ == "__main__":
    sys.exit(run_entry(main))
