"""The order of the data: the same global batches at any world size, equal shares, balanced tokens."""

from __future__ import annotations

import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.sampler import GlobalBatchSampler


def ranks(
    lengths: list[int], world_size: int, accumulation: int, rows: int, epoch: int = 0, grouping: bool = True
) -> list[list[list[int]]]:
    """Each rank's micro-batches of one epoch."""
    made = []
    for rank in range(world_size):
        sampler = GlobalBatchSampler(
            lengths, global_batch_size=rows, accumulation=accumulation, num_replicas=world_size, rank=rank, seed=3, length_grouping=grouping
        )
        sampler.set_epoch(epoch)
        made.append(list(sampler))
    return made


def global_batches(made: list[list[list[int]]], accumulation: int) -> list[list[int]]:
    steps = len(made[0]) // accumulation
    return [
        sorted(row for rank in made for micro in rank[s * accumulation : (s + 1) * accumulation] for row in micro) for s in range(steps)
    ]


@settings(max_examples=60, deadline=None)
@given(
    lengths=st.lists(st.integers(2, 128), min_size=24, max_size=300),
    world_size=st.sampled_from([1, 2, 3, 4, 6]),
    accumulation=st.sampled_from([1, 2]),
    epoch=st.integers(0, 3),
    grouping=st.booleans(),
)
def test_global_batches_do_not_depend_on_the_world(
    lengths: list[int], world_size: int, accumulation: int, epoch: int, grouping: bool
) -> None:
    rows = 24
    alone = global_batches(ranks(lengths, 1, 1, rows, epoch, grouping), 1)
    made = ranks(lengths, world_size, accumulation, rows, epoch, grouping)
    assert global_batches(made, accumulation) == alone
    assert {len(micro) for rank in made for micro in rank} == {rows // world_size // accumulation}
    flat = [row for batch in alone for row in batch]
    assert len(set(flat)) == len(flat) == len(lengths) // rows * rows


def test_epochs_differ_and_repeat_exactly() -> None:
    lengths = [10] * 200
    first, second = ranks(lengths, 2, 1, 16, epoch=0), ranks(lengths, 2, 1, 16, epoch=1)
    assert first != second
    assert first == ranks(lengths, 2, 1, 16, epoch=0)


@pytest.mark.parametrize(("world_size", "accumulation"), [(2, 1), (2, 2), (4, 1), (8, 2)])
def test_grouping_pads_little_and_balances_ranks(world_size: int, accumulation: int) -> None:
    draw = random.Random(0)
    lengths = [min(128, max(5, round(draw.gauss(53, 25)))) for _ in range(5000)]
    made = ranks(lengths, world_size, accumulation, 64)
    padded = [[len(micro) * max(lengths[i] for i in micro) for micro in rank] for rank in made]
    real = sum(lengths[i] for rank in made for micro in rank for i in micro)
    assert sum(map(sum, padded)) < 1.05 * real
    per_step = torch.tensor(padded).view(world_size, -1, accumulation).sum(-1).float()
    # How much longer the slowest rank of a step works than the average one: all wait for it.
    assert (per_step.max(0).values / per_step.mean(0)).mean() < 1.03
    ungrouped = [
        [len(micro) * max(lengths[i] for i in micro) for micro in rank]
        for rank in ranks(lengths, world_size, accumulation, 64, grouping=False)
    ]
    assert sum(map(sum, ungrouped)) > 1.3 * real


def test_what_cannot_be_dealt_is_refused() -> None:
    with pytest.raises(ValueError, match="do not divide"):
        ranks([5] * 100, 3, 1, 16)
    with pytest.raises(ValueError, match="fewer than one global batch"):
        ranks([5] * 10, 1, 1, 16)
