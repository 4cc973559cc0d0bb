"""Batch arithmetic, device and precision, and which topology a Make target picks."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.config import TrainConfig
from pipeline.errors import UserError
from pipeline.launch import build_command
from pipeline.topology import allowed_cores, choose_precision, plan_batches


@given(rows=st.integers(1, 512), most=st.integers(1, 128), world_size=st.integers(1, 16))
def test_micro_batches_multiply_to_the_global_batch(rows: int, most: int, world_size: int) -> None:
    config = TrainConfig(global_batch_size=rows, max_per_device_batch_size=most)
    if rows % world_size:
        with pytest.raises(UserError, match="global_batch_size"):
            plan_batches(config, world_size)
        return
    plan = plan_batches(config, world_size)
    assert plan.world_size * plan.accumulation * plan.per_device == rows
    assert plan.per_device <= most
    share = rows // world_size
    assert not [a for a in range(1, plan.accumulation) if share % a == 0 and share // a <= most], "a smaller accumulation would do"


def test_an_indivisible_global_batch_names_the_nearest() -> None:
    with pytest.raises(UserError, match=r"--global_batch_size 30 or 33"):
        plan_batches(TrainConfig(global_batch_size=32), 3)


def test_a_static_graph_cannot_accumulate() -> None:
    """DDP 2.13 fails inside (`expect_autograd_hooks_`) when the first backward of a static graph is under no_sync."""
    config = TrainConfig(global_batch_size=32, max_per_device_batch_size=8, static_graph=True)
    with pytest.raises(UserError, match="--max_per_device_batch_size 16"):
        plan_batches(config, 2)
    assert plan_batches(config, 4).accumulation == 1


def test_precision_is_never_silently_another() -> None:
    with pytest.raises(UserError, match=r"fp16.*GPU"):
        choose_precision(TrainConfig(precision="fp16"), "cpu")
    assert choose_precision(TrainConfig(precision="fp32"), "cpu") == "fp32"
    assert choose_precision(TrainConfig(), "cpu") in ("fp32", "bf16")
    assert allowed_cores() >= 1


@pytest.mark.parametrize(
    ("kind", "gpus", "device", "place", "words"),
    [
        ("train", 0, "auto", "CPU", ["cpu1.yaml"]),
        ("train", 2, "auto", "GPU", ["gpu1.yaml"]),
        ("train-ddp", 0, "auto", "CPU", ["cpu2.yaml"]),
        ("train-ddp", 1, "auto", "GPU", ["gpu1.yaml"]),
        ("train-ddp", 2, "auto", "GPU", ["gpu2.yaml"]),
        ("train-ddp", 8, "cuda", "GPU", ["gpu2.yaml", "--num_processes 8"]),
        ("train-ddp", 2, "cpu", "CPU", ["cpu2.yaml"]),
        ("train-raw-ddp", 0, "auto", "CPU", ["torchrun", "--nproc_per_node 2", "pipeline.train_ddp"]),
        ("train-raw-ddp", 4, "auto", "GPU", ["--nproc_per_node 4"]),
        ("train-raw-ddp", 4, "cpu", "CPU", ["--nproc_per_node 2"]),
    ],
)
def test_make_targets_pick_the_topology(kind: str, gpus: int, device: str, place: str, words: list[str]) -> None:
    command, why = build_command(kind, ["configs/ag_news.yaml"], device, gpus)
    assert all(word in " ".join(command) for word in words), command
    assert why.startswith(f"{place} topology")


def test_class_weights_do_not_depend_on_how_rows_are_dealt() -> None:
    """The mean over ranks of the micro-batches' weighted means is the global batch's weighted mean; torch's own is not."""
    import torch

    from pipeline.model import classification_loss

    draw = torch.Generator().manual_seed(0)
    logits, labels = torch.randn(16, 3, generator=draw), torch.tensor([0] * 11 + [1] * 4 + [2])
    weights = torch.tensor([0.5, 1.3, 5.0])
    whole = classification_loss(logits, labels, weights)
    halves = torch.stack([classification_loss(logits[s], labels[s], weights) for s in (slice(0, 8), slice(8, 16))]).mean()
    assert torch.allclose(whole, halves, atol=1e-6)
    torchs = torch.stack([torch.nn.functional.cross_entropy(logits[s], labels[s], weights) for s in (slice(0, 8), slice(8, 16))]).mean()
    assert not torch.allclose(torch.nn.functional.cross_entropy(logits, labels, weights), torchs, atol=1e-2)
    assert torch.allclose(classification_loss(logits, labels, torch.ones(3)), classification_loss(logits, labels))


def test_plain_python_on_several_gpus_is_refused_with_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    """No machine with two GPUs runs these tests, so the count is told."""
    from pipeline.topology import Topology
    from pipeline.train import refuse_data_parallel

    alone = Topology(1, 0, 0, 1, device="cuda", backend="none", precision="fp16", threads=1)
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    with pytest.raises(UserError, match=r"accelerate launch .*gpu2.yaml.*CUDA_VISIBLE_DEVICES=0"):
        refuse_data_parallel(alone)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    refuse_data_parallel(alone)
