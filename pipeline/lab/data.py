"""Which rows a rank sees: the order that never changes, and the same rows on every rank."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap
from torch.nn.parallel import DistributedDataParallel

from pipeline.lab.frame import BLUE, GREY, INK, ORANGE, RED, Experiment, Ranks
from pipeline.lab.world import World, gradient
from pipeline.sampler import GlobalBatchSampler

ROWS, FEW, BATCH, EPOCHS = 512, 250, 32, 4  # 250 rows are 7 batches and 26 rows that sit an epoch out


def sampler_of(world: World, share: int, rows: int) -> GlobalBatchSampler:
    """The project's own sampler over the first rows, for the share of one rank."""
    return GlobalBatchSampler(
        world.lengths[:rows].tolist(), global_batch_size=BATCH, accumulation=1, num_replicas=world.size, rank=share, seed=0, length_grouping=False
    )  # fmt: skip


class NoSetEpoch(Experiment):
    """The sampler is never told which epoch it is.

    It draws an order from (seed, epoch), so without `set_epoch` every epoch is the first one again: the same rows meet in the
    same batches. Rows that did not fill a batch then are never learnt from; nothing fails, and the loss hardly tells.
    """

    name, marker = "no_set_epoch", "[DDP 4] Sampler and set_epoch"
    says = "different orders in {epochs} epochs: {orders}; rows never learnt from: {never} of {rows}; test loss {test_loss:.3f}"

    def rank(self, world: World, broken: bool) -> dict[str, Any]:
        model = DistributedDataParallel(world.model())
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        sampler = sampler_of(world, world.rank, FEW)
        seen = []
        for epoch in range(EPOCHS):
            sampler.set_epoch(0 if broken else epoch)  # never called, the sampler stays at 0
            seen.append([row for batch in sampler for row in batch])
            for batch in sampler:
                world.learn(model, optimizer, batch)
        return {"seen": seen, "test_loss": world.test_loss(model.module)}

    def figures(self, ranks: Ranks) -> dict[str, Any]:
        orders = {tuple(epoch) for epoch in ranks[0]["seen"]}
        learnt = {row for rank in ranks for epoch in rank["seen"] for row in epoch}
        return {"epochs": EPOCHS, "orders": len(orders), "never": FEW - len(learnt), "rows": FEW, "test_loss": ranks[0]["test_loss"]}

    def draw(self, axes: Axes, ranks: Ranks) -> None:
        first = np.array(ranks[0]["seen"])[:, : BATCH // 2]
        axes.imshow(first, cmap="cividis", aspect="auto", vmin=0, vmax=FEW)
        for (epoch, place), row in np.ndenumerate(first):
            axes.text(place, epoch, str(row), ha="center", va="center", fontsize=6, color="white" if row < FEW / 2 else INK)
        axes.set(xlabel="place in rank 0's first batch; the number is the row", ylabel="epoch")
        axes.set_yticks(range(EPOCHS), [str(i + 1) for i in range(EPOCHS)])


class SameData(Experiment):
    """Both ranks take the same share of every batch.

    The average of two equal gradients is that gradient, so the second rank computes what the first knows already: two
    processes' work for one process's result. Half of the rows are seen by nobody.
    """

    name, file, marker = "same_data", "pipeline/sampler.py", "def deal"
    says = "rows learnt from in an epoch: {learnt} of {rows}; difference of the ranks' gradients: {apart:.0%} of their size; test loss {test_loss:.3f}"

    def rank(self, world: World, broken: bool) -> dict[str, Any]:
        share = 0 if broken else world.rank
        sampler = sampler_of(world, share, ROWS)
        model = world.model()
        world.loss(model, next(iter(sampler))).backward()
        mine = gradient(model)
        average = world.average(mine)
        model.zero_grad()
        ddp = DistributedDataParallel(model)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        for batch in sampler:
            world.learn(ddp, optimizer, batch)
        # Of two ranks, the distance to the average is half of the distance between them.
        apart = 2 * float((mine - average).norm() / mine.norm())
        return {"rows": sorted(row for batch in sampler for row in batch), "apart": apart, "test_loss": world.test_loss(model)}

    def figures(self, ranks: Ranks) -> dict[str, Any]:
        learnt = {row for rank in ranks for row in rank["rows"]}
        return {"rows": ROWS, "learnt": len(learnt), "apart": ranks[0]["apart"], "test_loss": ranks[0]["test_loss"]}

    def draw(self, axes: Axes, ranks: Ranks) -> None:
        seen = np.zeros(ROWS, dtype=int)
        for i, rank in enumerate(ranks):
            seen[rank["rows"]] += i + 1
        axes.imshow(seen.reshape(16, 32), cmap=ListedColormap(["white", BLUE, ORANGE, RED]), vmin=0, vmax=3, aspect="auto")
        axes.set(xlabel="each cell one of the rows, after one epoch", xticks=[], yticks=[])
        names = {"nobody": "white", "rank 0": BLUE, "rank 1": ORANGE, "both": RED}
        for name, colour in names.items():
            axes.plot([], [], "s", color=colour, markeredgecolor=GREY, label=name)
        axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.1), ncols=4, fontsize=8, frameon=False)


EXPERIMENTS = (NoSetEpoch, SameData)
