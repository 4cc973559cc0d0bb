"""Which rows each rank sees, and when: one batch sampler for both entries.

A step's *global* batch is a pure function of (seed, epoch, step), whatever the world size, so 1 and 2 GPUs learn from
the same rows in the same order, and a resumed run needs only a step number. Each global batch is then dealt out so
that every rank and every micro-batch gets the same number of rows (the mean of means is right only then) and, with
length grouping, nearly the same number of tokens (no rank waits for the one with the long texts).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch.utils.data import DistributedSampler

WINDOW = 50  # global batches sorted by length together: large enough to pad little, small enough to stay random


class GlobalBatchSampler(DistributedSampler[list[int]]):
    """Yields this rank's micro-batches, as lists of row numbers, for the epoch given to `set_epoch`.

    Rows beyond the last full global batch sit the epoch out; which rows those are changes every epoch.
    """

    def __init__(
        self,
        lengths: Sequence[int],
        *,
        global_batch_size: int,
        accumulation: int,
        num_replicas: int,
        rank: int,
        seed: int,
        length_grouping: bool,
    ) -> None:
        """
        Args:
            lengths: tokens of each training row, `(rows,)`.
            global_batch_size: rows per optimizer step over all ranks and micro-batches.
            accumulation: micro-batches of one rank per optimizer step.
            num_replicas: the world size; `rank` is this process's place in it.
            seed: of the order; the order of epoch e comes from `seed + e`, as in torch's DistributedSampler.
            length_grouping: whether texts of similar length share a batch.

        Raises:
            ValueError: fewer rows than one global batch, or a global batch that does not divide.
        """
        super().__init__(range(len(lengths)), num_replicas=num_replicas, rank=rank, shuffle=True, seed=seed, drop_last=True)  # type: ignore[arg-type]
        if global_batch_size % (num_replicas * accumulation):
            raise ValueError(f"{global_batch_size} rows do not divide by {num_replicas} ranks x {accumulation} micro-batches")
        if len(lengths) < global_batch_size:
            raise ValueError(f"{len(lengths)} rows are fewer than one global batch of {global_batch_size}")
        self.lengths = torch.as_tensor(lengths)
        self.global_batch_size, self.accumulation = global_batch_size, accumulation
        self.batch_size = global_batch_size // (num_replicas * accumulation)  # rows per micro-batch; the name DataLoader knows
        self.length_grouping = length_grouping
        self.steps = len(lengths) // global_batch_size  # optimizer steps per epoch

    def global_batches(self) -> torch.Tensor:
        """Row numbers of this epoch, `(steps, global_batch_size)`: the same on every rank and at every world size."""
        generator = torch.Generator().manual_seed(self.seed + self.epoch)
        order = torch.randperm(len(self.lengths), generator=generator)[: self.steps * self.global_batch_size]
        if not self.length_grouping:
            return order.view(self.steps, self.global_batch_size)
        windows = order.split(WINDOW * self.global_batch_size)
        by_length = torch.cat([window[self.lengths[window].argsort(descending=True, stable=True)] for window in windows])
        batches = by_length.view(self.steps, self.global_batch_size)
        # Sorting made neighbouring batches alike; shuffled again, long and short ones come in random order.
        return batches[torch.randperm(self.steps, generator=generator)]

    def hands(self, batch: torch.Tensor) -> torch.Tensor:
        """All ranks' rows of one global batch: `(global_batch_size,)` to `(accumulation, batch_size, num_replicas)`."""
        if self.length_grouping:
            batch = batch[self.lengths[batch].argsort(descending=True, stable=True)]
        # (micro-batch, round of dealing, rank): a micro-batch's ranks hold neighbours in length, so they pad alike.
        hands = batch.view(self.accumulation, self.batch_size, self.num_replicas).clone()
        # Every other round is dealt backwards; else rank 0 would get the longest text of every round.
        hands[:, 1::2] = hands[:, 1::2].flip(-1)
        return hands

    def deal(self, batch: torch.Tensor) -> torch.Tensor:
        """This rank's rows of one global batch: `(global_batch_size,)` to `(accumulation, batch_size)`."""
        return self.hands(batch)[:, :, self.rank]

    def __iter__(self) -> Iterator[list[int]]:  # type: ignore[override]
        for batch in self.global_batches():
            yield from self.deal(batch).tolist()

    def __len__(self) -> int:
        """Micro-batches of this rank per epoch."""
        return self.steps * self.accumulation
