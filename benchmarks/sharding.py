"""FSDP beside DDP on two CPU processes: the bytes that each rank keeps, and how far apart what they learn is.

    python -m benchmarks.sharding          # a minute; results/sharding.json, for docs/machines.md

Both are `pipeline.train` under `accelerate launch`, with cpu2.yaml and with gpu2_fsdp.yaml; `benchmarks.fsdp_probe` has each
rank write down what it keeps. (That FSDP learns what DDP learns is held, within the bounds of parity, by tests/test_fsdp.py.)
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

from safetensors.torch import load_file

from benchmarks.common import Launch, provenance, run_all, write_results
from pipeline.assets import fetch
from pipeline.errors import run_entry

STEPS = 12
KINDS = {"ddp": "cpu2", "fsdp": "gpu2_fsdp"}  # -> launch file


class Probe(Launch):
    """A run of `entry` (a key of KINDS) that writes down what its ranks keep."""

    @property
    def command(self) -> list[str]:
        accelerate = [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch"]
        file = f"configs/accelerate/{KINDS[self.entry]}.yaml"
        return [*accelerate, "--config_file", file, "-m", "benchmarks.fsdp_probe", *self.arguments, "--output_dir", str(self.folder)]


def main(argv: list[str]) -> int:
    argparse.ArgumentParser(prog="python -m benchmarks.sharding", allow_abbrev=False, description=__doc__.splitlines()[0]).parse_args(argv)
    provenance()
    assets = fetch()
    options = {"model": assets.encoder, "dataset": assets.r8, "max_train_samples": 400, "validation_share": 0.1, "max_steps": STEPS,
               "precision": "fp32", "logging_steps": 1, "onnx": "false"}  # fmt: skip
    arguments = ("configs/quickstart.yaml", *(f"--{name}={value}" for name, value in options.items()))
    with tempfile.TemporaryDirectory(prefix="sharding-") as folder:
        launches = [Probe(kind, 2, Path(folder) / kind, arguments) for kind in KINDS]
        # Without GPUs in sight, for FSDP takes those it sees.
        records = {one.entry: record for one, record, _ in run_all(launches, {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}, slots=2)}
        results = {"model": Path(assets.encoder).name, "steps": STEPS, **compare(Path(folder), records)}
    write_results("sharding", results)
    print(json.dumps(results, indent=1))
    return 0


def compare(folder: Path, records: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Bytes that rank 0 keeps of parameters and of optimizer state, and the largest differences of any step or weight."""
    weights = {kind: load_file(folder / kind / f"checkpoint-{STEPS}" / "model.safetensors") for kind in KINDS}
    kept = {kind: json.loads((folder / kind / "kept-0.json").read_text(encoding="utf-8")) for kind in KINDS}
    steps = list(zip(records["ddp"]["history"], records["fsdp"]["history"], strict=True))
    apart = {name: max(abs(a[name] - b[name]) for a, b in steps) for name in ("loss", "grad_norm")}
    apart["weights"] = max(float((tensor - weights["fsdp"][name]).abs().max()) for name, tensor in weights["ddp"].items())
    counts = {kind: {"count": sum(tensor.numel() for tensor in tensors.values())} for kind, tensors in weights.items()}
    return {**{kind: kept[kind] | counts[kind] for kind in KINDS}, "apart": apart, "first_grad_norm": steps[0][0]["grad_norm"]}


if __name__ == "__main__":
    sys.exit(run_entry(main))
