"""Traces of runs: faults planted in one run of two are found where they were planted, in the words of a training step."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import DistilBertConfig, DistilBertForSequenceClassification

from benchmarks.parting import first_parting, read
from pipeline.batches import Collator
from pipeline.errors import UserError
from pipeline.model import classification_loss
from pipeline.sampler import GlobalBatchSampler
from pipeline.trace import SKETCH, attach, fingerprint

ROWS = 48


def train(
    folder: Path, *, order: int = 0, head: int = 0, dropout: float = 0.0, class_weights: Any = None, max_grad_norm: float = 0.5,
    learning_rate: float = 1e-3, scale: float = 1.0, accumulation: int = 1, rank: int = 0, world_size: int = 1,
    resume_after: int | None = None, halve_rate_at: int | None = None, noise: float = 0.0, log: bool = True,
) -> Path:  # fmt: skip
    """One process's training with this project's sampler, collator and loss; the keyword arguments are the faults to plant."""

    def new_model() -> Any:
        torch.manual_seed(0)
        settings = DistilBertConfig(vocab_size=100, dim=16, n_layers=2, n_heads=2, hidden_dim=32, max_position_embeddings=32, num_labels=3,
                                    dropout=dropout, attention_dropout=dropout, seq_classif_dropout=dropout)  # fmt: skip
        model = DistilBertForSequenceClassification(settings)
        torch.manual_seed(head + 1)
        torch.nn.init.normal_(model.classifier.weight, std=0.5)
        return model

    random = torch.Generator().manual_seed(0)
    lengths = torch.randint(4, 20, (ROWS,), generator=random).tolist()
    data = [{"input_ids": torch.randint(1, 100, (n,), generator=random).tolist(), "labels": n % 3} for n in lengths]
    sampler = GlobalBatchSampler(lengths, global_batch_size=12, accumulation=accumulation, num_replicas=world_size, rank=rank, seed=order,
                                 length_grouping=True)  # fmt: skip
    collator, micro_batches = Collator(0), iter(sampler)
    model = new_model().train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate)
    attach(model, optimizer, folder / "trace", rank)
    history = []
    for step in range(1, 5):
        running = 0.0
        for _ in range(accumulation):
            batch = collator([data[i] for i in next(micro_batches)])
            labels = batch.pop("labels")
            loss = scale * classification_loss(model(**batch).logits, labels, class_weights) / accumulation
            loss.backward()
            running += loss.item()
        if noise:
            for parameter in model.parameters():
                parameter.grad *= 1 + noise * torch.randn(parameter.shape, generator=random)
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), max_grad_norm)
        if step == halve_rate_at:
            for group in optimizer.param_groups:
                group["lr"] /= 2
        optimizer.step()
        optimizer.zero_grad()
        history.append({"step": step, "loss": running, "grad_norm": norm.item()})
        if step == resume_after:
            weights, state = model.state_dict(), optimizer.state_dict()
            model = new_model().train()
            model.load_state_dict(weights)
            optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate)
            optimizer.load_state_dict(state)
            attach(model, optimizer, folder / "trace", rank, after_step=step)
        with torch.inference_mode():
            model.eval()(torch.ones((1, 4), dtype=torch.long))  # an evaluation is no part of a step
            model.train()
    record = {"topology": {"precision": "fp32"}, "history": history if log else []}
    (folder / "run.json").write_text(json.dumps(record), encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train(tmp_path_factory.mktemp("sound"))


def test_equal_runs_do_not_part(sound: Path, tmp_path: Path) -> None:
    assert first_parting(read(sound), read(train(tmp_path)), tolerance=0) is None
    assert sorted(read(sound).steps) == [1, 2, 3, 4]


@pytest.mark.parametrize(
    "fault, step, stage, words",
    [
        ({"order": 1}, 1, "order of the data", "12 rows share"),
        ({"head": 1}, 1, "initial weights", "1 of 40 tensors differ, most classifier.weight"),
        ({"dropout": 0.1}, 1, "forward", "logits up to"),
        ({"class_weights": torch.tensor([0.5, 1.0, 2.0])}, 1, "gradient", "but losses"),
        ({"max_grad_norm": 0.25}, 1, "clipping", "that the optimizer sees are 0.5 and 0.25"),
        ({"learning_rate": 2e-3}, 1, "optimizer step", "after the step"),
        # Clipped to the same length in the end: only the loss and the norm before clipping tell.
        ({"scale": 2.0}, 1, "gradient", "but losses"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else None,
)
def test_a_fault_is_found_where_it_was_planted(
    sound: Path, tmp_path: Path, fault: dict[str, Any], step: int, stage: str, words: str
) -> None:
    """At the strictest tolerance and at that of rounding."""
    faulty = read(train(tmp_path, **fault))
    for tolerance in (0.0, 1e-4):
        parting = first_parting(read(sound), faulty, tolerance)
        assert parting is not None and (parting.step, parting.stage) == (step, stage), parting
        assert words in parting.detail


def test_a_fault_of_a_later_step_is_found_there(sound: Path, tmp_path: Path) -> None:
    parting = first_parting(read(sound), read(train(tmp_path, halve_rate_at=3)))
    assert parting is not None and str(parting).startswith("step 3, optimizer step: the same gradient, but after the step")


def test_rounding_of_a_gradient_is_not_taken_for_clipping(sound: Path, tmp_path: Path) -> None:
    noisy = read(train(tmp_path / "noisy", noise=1e-6, log=False))
    parting = first_parting(read(sound), noisy)
    assert parting is not None and (parting.step, parting.stage) == (1, "gradient"), parting
    assert first_parting(read(sound), noisy, tolerance=1e-4) is None
    # All by one factor, but only by its last bits: no clipping makes such a factor.
    nudged = read(sound)
    for tensor in nudged.steps[1][0]["gradient"].values():
        tensor.update(sha256="other", sketch=[x * (1 + 4e-16) for x in tensor["sketch"]], norm=tensor["norm"] * (1 + 4e-16))
    parting = first_parting(read(sound), nudged)
    assert parting is not None and (parting.step, parting.stage) == (1, "gradient"), parting


def test_without_logged_norms_the_doubt_is_told(sound: Path, tmp_path: Path) -> None:
    parting = first_parting(read(sound), read(train(tmp_path, max_grad_norm=0.25, log=False)))
    assert parting is not None and parting.stage == "clipping" and "or the loss is scaled" in parting.detail


def test_accumulation_differs_by_rounding_only(sound: Path, tmp_path: Path) -> None:
    accumulated = read(train(tmp_path, accumulation=3))
    assert accumulated.layout == (1, 3)
    assert first_parting(read(sound), accumulated) is None, "the default where the batch is cut in another way"
    assert first_parting(read(sound), accumulated, tolerance=0) is not None


def test_ranks_that_are_not_averaged_are_named(tmp_path: Path) -> None:
    """Two processes that each learn from their own share, as a script without DistributedDataParallel does."""
    for rank in range(2):
        train(tmp_path, rank=rank, world_size=2)
    alone = read(tmp_path)
    assert alone.layout == (2, 1)
    parting = first_parting(alone, alone)
    assert parting is not None and parting.stage == "gradient" and "not averaged over ranks" in parting.detail


def test_the_same_rows_dealt_otherwise_is_told_where_bits_should_agree(tmp_path: Path) -> None:
    for rank in range(2):
        train(tmp_path / "a", rank=rank, world_size=2)
        train(tmp_path / "b", rank=1 - rank, world_size=2)
        (tmp_path / "b" / "trace" / f"rank-{1 - rank}.jsonl").rename(tmp_path / "b" / "trace" / f"was-{rank}")
    for rank in range(2):
        (tmp_path / "b" / "trace" / f"was-{rank}").rename(tmp_path / "b" / "trace" / f"rank-{rank}.jsonl")
    parting = first_parting(read(tmp_path / "a"), read(tmp_path / "b"))
    assert parting is not None and parting.stage == "order of the data" and "dealt to ranks" in parting.detail


def test_a_resumed_run_goes_on_in_its_trace(sound: Path, tmp_path: Path) -> None:
    resumed = read(train(tmp_path, resume_after=2))
    assert sorted(resumed.steps) == [1, 2, 3, 4]
    assert first_parting(read(sound), resumed, tolerance=0) is None


def test_a_folder_without_a_trace_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"holds no trace.*--trace true"):
        read(tmp_path)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("shape", [(), (7,), (64, 33)])
def test_sketches_tell_the_distance_of_two_tensors(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    signs = torch.randint(0, 2, (5000,), generator=generator).to(torch.int8) * 2 - 1
    for size in (0.1, 1.0):
        a = torch.randn(shape, generator=generator).to(dtype)
        b = a + (size * torch.randn(shape, generator=generator)).to(dtype)
        one, other = fingerprint(a, signs), fingerprint(b, signs)
        assert one["sha256"] != other["sha256"] and one == fingerprint(a.clone(), signs)
        true = float((a.double() - b.double()).norm())
        assert len(one["sketch"]) == SKETCH
        assert true / 3 < math.dist(one["sketch"], other["sketch"]) < 3 * true
        assert one["norm"] == pytest.approx(float(a.double().norm()))
