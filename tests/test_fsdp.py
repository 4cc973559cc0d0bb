"""FSDP2 on two CPU processes: what DDP learns, in half the memory, with checkpoints that either goes on from."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
from launching import error_lines, launch, short_run

from benchmarks.parity import BOUNDS
from pipeline import sharding
from pipeline.config import TrainConfig
from pipeline.errors import UserError

# 9 evaluation batches for two ranks: one has to help the other. Accumulation 2, class weights, clipping, dropout.
SETTINGS = """
validation_share: 0.05
max_steps: 24
epochs: 1
evals_per_epoch: 4
class_weights: balanced
max_per_device_batch_size: 4
cpu_threads: 1
logging_steps: 1
"""


@pytest.fixture(scope="module")
def workshop(tmp_path_factory: pytest.TempPathFactory, tiny_model_dir: Path, r8_dir: Path) -> Path:
    folder = tmp_path_factory.mktemp("fsdp")
    short_run(folder, tiny_model_dir, r8_dir, SETTINGS)
    return folder


def train(workshop: Path, name: str, launch_file: str, *options: str) -> dict[str, Any]:
    folder = workshop / name
    command = [
        "launch",
        "--config_file",
        f"configs/accelerate/{launch_file}.yaml",
        "-m",
        "benchmarks.fsdp_probe",
        str(workshop / "run.yaml"),
    ]
    done = launch([*command, "--output_dir", str(folder), *options], module="accelerate.commands.accelerate_cli")
    assert done.returncode == 0, done.stderr
    kept = [json.loads((folder / f"kept-{rank}.json").read_text(encoding="utf-8")) for rank in (0, 1)]
    return {"folder": folder, "kept": kept, "out": done.stdout, "record": json.loads((folder / "run.json").read_text(encoding="utf-8"))}


@pytest.fixture(scope="module")
def ddp(workshop: Path) -> dict[str, Any]:
    return train(workshop, "ddp", "cpu2")


@pytest.fixture(scope="module")
def fsdp(workshop: Path) -> dict[str, Any]:
    return train(workshop, "fsdp", "gpu2_fsdp")


def compare(run: dict[str, Any], other: dict[str, Any]) -> None:
    """Within the bounds of the parity table: a rank squares and adds its shards' gradients only, so the norm is added up in another order."""
    from safetensors.torch import load_file

    assert len(run["record"]["history"]) == 24
    for mine, its in zip(run["record"]["history"], other["record"]["history"], strict=True):
        assert mine["loss"] == pytest.approx(its["loss"], abs=BOUNDS["fp32"].loss)
        assert mine["grad_norm"] == pytest.approx(its["grad_norm"], abs=BOUNDS["fp32"].grad_norm)
    for name in ("model", "optimizer"):
        mine, its = (load_file(r["folder"] / "checkpoint-24" / f"{name}.safetensors") for r in (run, other))
        assert mine.keys() == its.keys()
        assert max(float((mine[key] - its[key]).abs().max()) for key in mine) < BOUNDS["fp32"].weights
    assert run["record"]["test"]["confusion_matrix"] == other["record"]["test"]["confusion_matrix"]
    assert [e["accuracy"] for e in run["record"]["epochs"]] == [e["accuracy"] for e in other["record"]["epochs"]]


def test_fsdp_learns_what_ddp_does_in_half_the_memory(ddp: dict[str, Any], fsdp: dict[str, Any]) -> None:
    assert fsdp["record"]["topology"]["sharded"] and not ddp["record"]["topology"]["sharded"]
    compare(fsdp, ddp)
    for rank in (0, 1):
        assert fsdp["kept"][rank]["type"].startswith("FSDP"), "Accelerate runs DDP on the CPU unless told otherwise"
        for what in ("parameters", "optimizer"):
            assert fsdp["kept"][rank][what] == pytest.approx(ddp["kept"][rank][what] / 2, rel=0.001)


def test_the_release_of_a_sharded_run_is_whole(fsdp: dict[str, Any]) -> None:
    from safetensors.torch import load_file

    best = load_file(fsdp["folder"] / f"checkpoint-{fsdp['record']['best']['step']}" / "model.safetensors")
    released = load_file(fsdp["folder"] / "release" / "model.safetensors")
    assert best.keys() == released.keys()
    different = {name for name in best if not best[name].equal(released[name])}
    assert different == {"classifier.weight", "classifier.bias"}, "the temperature is folded into the last layer"


def test_fsdp_goes_on_from_a_checkpoint_of_ddp(workshop: Path, ddp: dict[str, Any]) -> None:
    """The files are the same ones, of whole tensors."""
    shutil.copytree(ddp["folder"], workshop / "mixed")
    for name in ("checkpoint-24", "release"):
        shutil.rmtree(workshop / "mixed" / name)
    mixed = train(workshop, "mixed", "gpu2_fsdp")
    assert "resumed     after step 14 of 24" in mixed["out"]
    assert [session["topology"]["sharded"] for session in mixed["record"]["sessions"]] == [False, True]
    compare(mixed, ddp)


@pytest.mark.slow
def test_fsdp_resumed_equals_never_stopped(workshop: Path, fsdp: dict[str, Any]) -> None:
    shutil.copytree(fsdp["folder"], workshop / "again")
    shutil.rmtree(workshop / "again" / "checkpoint-24")
    again = train(workshop, "again", "gpu2_fsdp")
    assert "resumed     after step 14 of 24" in again["out"]
    assert again["record"]["history"] == fsdp["record"]["history"]
    assert again["record"]["weights_sha256"] == fsdp["record"]["weights_sha256"]


@pytest.mark.parametrize(
    ("setting", "value"),
    [("FSDP_VERSION", "1"), ("FSDP_OFFLOAD_PARAMS", "true"), ("FSDP_ACTIVATION_CHECKPOINTING", "true"),
     ("FSDP_CPU_RAM_EFFICIENT_LOADING", "true")],
)  # fmt: skip
def test_what_would_train_another_model_is_refused(monkeypatch: pytest.MonkeyPatch, setting: str, value: str) -> None:
    monkeypatch.setenv(setting, value)
    with pytest.raises(UserError, match=rf"{setting.lower()} is {value}: allowed is .*gpu2_fsdp.yaml"):
        sharding.check(TrainConfig(), world_size=2, device="cpu")


def test_what_fsdp_would_ignore_is_refused() -> None:
    sharding.check(TrainConfig(), world_size=2, device="cpu")
    with pytest.raises(UserError, match="--num_processes 2"):
        sharding.check(TrainConfig(), world_size=1, device="cpu")
    for config in (TrainConfig(trace=True), TrainConfig(comm_hook="fp16"), TrainConfig(bucket_mb=5), TrainConfig(static_graph=True)):
        with pytest.raises(UserError, match="belongs to DDP"):
            sharding.check(config, world_size=2, device="cpu")


def test_the_raw_script_says_that_it_has_no_fsdp(workshop: Path) -> None:
    assert "ACCELERATE_USE_FSDP" not in os.environ
    arguments = [str(workshop / "run.yaml"), "--output_dir", str(workshop / "raw")]
    done = launch(arguments, module="pipeline.train_ddp", ACCELERATE_USE_FSDP="true", FSDP_VERSION="2")
    assert done.returncode == 2
    assert len(error_lines(done)) == 1 and "pipeline.train" in error_lines(done)[0], done.stderr


def test_the_repeated_layer_is_found_in_any_model() -> None:
    from transformers import BertConfig, BertForSequenceClassification, DistilBertConfig, DistilBertForSequenceClassification

    sizes = {"vocab_size": 50, "num_hidden_layers": 2, "n_layers": 2}
    assert (
        sharding.layer_class(DistilBertForSequenceClassification(DistilBertConfig(**sizes, dim=16, n_heads=2, hidden_dim=16)))
        == "TransformerBlock"
    )
    bert = BertConfig(**sizes, hidden_size=16, num_attention_heads=2, intermediate_size=16)
    assert sharding.layer_class(BertForSequenceClassification(bert)) == "BertLayer"
