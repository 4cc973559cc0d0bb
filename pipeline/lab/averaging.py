"""What averaging over ranks does to the length of a step and to the noise in it."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from pipeline.lab.frame import BLUE, GREY, INK, ORANGE, Experiment, Ranks
from pipeline.lab.world import World, batches, gradient


class Bag(nn.Module):
    """The mean of the words' embeddings, and a linear layer (as fastText has it): plain SGD learns it, for which the rule holds."""

    def __init__(self, words: int, dim: int = 64, classes: int = 8) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.mean, self.out = nn.EmbeddingBag(words, dim, mode="mean", padding_idx=0), nn.Linear(dim, classes)

    def forward(self, input_ids: torch.Tensor, **_: Any) -> Any:
        return SimpleNamespace(logits=self.out(self.mean(input_ids)))


class LrNotScaled(Experiment):
    """The global batch grows eightfold, and the learning rate stays.

    Gradients are averaged, not summed: a step of 64 rows is as long as one of 8, and an epoch has an eighth of the steps.
    Linear scaling (Goyal et al., arXiv:1706.02677) makes each step longer by as much; keeping the global batch, as here, spares it.
    """

    name, file, marker = "lr_not_scaled", "pipeline/topology.py", "def plan_batches"
    says = "after the same {epochs} epochs: training loss {loss:.3f}, where batches of {base} rows reached {before:.3f}"
    rows, base, grown, epochs, rate = 1024, 8, 64, 3, 0.05

    def rank(self, world: World, broken: bool) -> dict[str, Any]:
        before = self.train(world, self.base, self.rate)
        rate = self.rate if broken else self.rate * self.grown / self.base
        return {"before": before, "after": self.train(world, self.grown, rate)}

    def train(self, world: World, size: int, rate: float) -> list[float]:
        """The loss of all training rows before the first and after each epoch, with batches of `size` rows."""
        model = DistributedDataParallel(Bag(world.words))
        optimizer = torch.optim.SGD(model.parameters(), lr=rate, momentum=0.9)
        losses = [world.score(model.module, range(self.rows))[0] / self.rows]
        for _ in range(self.epochs):
            for rows in batches(size, self.rows // size, self.rows):
                world.learn(model, optimizer, rows[world.rank :: world.size].tolist())
            losses.append(world.score(model.module, range(self.rows))[0] / self.rows)
        return losses

    def figures(self, ranks: Ranks) -> dict[str, Any]:
        return {"epochs": self.epochs, "base": self.base, "loss": ranks[0]["after"][-1], "before": ranks[0]["before"][-1]}

    def draw(self, axes: Axes, ranks: Ranks) -> None:
        style: dict[str, Any] = {"markersize": 4, "linewidth": 1.6}
        axes.plot(ranks[0]["before"], "o--", color=GREY, label=f"{self.base} rows a step, learning rate {self.rate}", **style)
        axes.plot(ranks[0]["after"], "o-", color=BLUE, label=f"{self.grown} rows a step", **style)
        axes.set(xlabel="epoch", ylabel="training loss (nats)")
        axes.set_xticks(range(self.epochs + 1))
        axes.legend(frameon=False, fontsize=8)


class DropoutSeeds(Experiment):
    """Both ranks draw their dropout masks from the same seed.

    Masks are noise, and averaging over ranks halves the variance of noise only where ranks draw it independently. With one
    seed (and rows padded to one length) row i of every rank loses the same places, and a part of the noise stays.
    """

    name, marker = "dropout_seeds", "[DDP 4] Masks of its own for each rank"
    says = "correlation of the ranks' masks: {correlation:.2f}; averaging leaves {left:.0%} of the gradient variance that dropout gives one rank"
    draws, rows_each, probability = 50, 16, 0.3

    def rank(self, world: World, broken: bool) -> dict[str, Any]:
        model: Any = world.model(dropout=self.probability)
        mask = torch.zeros(0)

        def look(module: Any, inputs: Any, output: torch.Tensor) -> None:
            nonlocal mask
            mask = output[:, 1] != 0  # of the first word of each row, (rows, dim)

        model.distilbert.embeddings.dropout.register_forward_hook(look)
        rows = batches(self.rows_each * world.size, 1)[0][world.rank :: world.size].tolist()
        mine, averaged = Variance(), Variance()
        for draw in range(self.draws):
            seed = draw if broken else draw + self.draws * world.rank
            torch.manual_seed(seed)
            model.zero_grad()
            world.loss(model, rows).backward()
            mine.add(gradient(model))
            averaged.add(world.average(gradient(model)))
        return {"mask": mask.int().tolist(), "mine": mine.value(), "averaged": averaged.value()}

    def figures(self, ranks: Ranks) -> dict[str, Any]:
        zero, one = (np.ravel(rank["mask"]) for rank in ranks)
        correlation = np.corrcoef(zero, one)[0, 1]
        return {"correlation": float(correlation), "left": ranks[0]["averaged"] / float(np.mean([rank["mine"] for rank in ranks]))}

    def draw(self, axes: Axes, ranks: Ranks) -> None:
        zero, one = (np.array(rank["mask"]) for rank in ranks)
        kinds = {"kept on both": "white", "dropped on both": INK, "dropped on one": ORANGE}
        axes.imshow(np.where(zero == one, 1 - zero, 2), cmap=ListedColormap(list(kinds.values())), vmin=0, vmax=2, aspect="auto")
        axes.set(xlabel="place in the embedding", ylabel="row of the batch")
        for name, colour in kinds.items():
            axes.plot([], [], "s", color=colour, markeredgecolor=GREY, label=name)
        axes.legend(
            loc="upper center", bbox_to_anchor=(0.5, -0.17), ncols=3, fontsize=7.5, frameon=False, columnspacing=0.8, handletextpad=0
        )


class Variance:
    """Total variance (trace of the covariance) of vectors, added up as they come."""

    def __init__(self) -> None:
        self.n, self.total, self.squares = 0, torch.zeros(()), 0.0

    def add(self, vector: torch.Tensor) -> None:
        vector = vector.double()
        self.n, self.total, self.squares = self.n + 1, self.total + vector, self.squares + float(vector.square().sum())

    def value(self) -> float:
        return (self.squares - float(self.total.square().sum()) / self.n) / (self.n - 1)


EXPERIMENTS = (LrNotScaled, DropoutSeeds)
