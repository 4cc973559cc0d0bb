"""Ranks that wait for each other: for ever, or in every step."""

from __future__ import annotations

import time
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from matplotlib.axes import Axes
from torch.nn.parallel import DistributedDataParallel

from pipeline.lab.frame import GREY, INK, RANKS, RED, Experiment, Ranks
from pipeline.lab.world import World
from pipeline.sampler import GlobalBatchSampler


class UnequalBatches(Experiment):
    """One rank has a batch more than the other.

    Every step communicates, and all must take part: in the step that only rank 0 takes, it waits for a partner that will never
    come (here before its forward, where DDP copies rank 0's buffers to all; without buffers it would be in backward). By default
    for half an hour, with nothing printed; here for 4 seconds.
    """

    name, file, marker = "unequal_batches", "pipeline/sampler.py", "self.steps = len(lengths) // global_batch_size"
    says = "steps done: {zero} on rank 0, {one} on rank 1; rank 0 says: {message}"
    timeout = 4.0

    def rank(self, world: World, broken: bool) -> dict[str, Any]:
        model = DistributedDataParallel(world.model())
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        rows = list(range(97))
        rows = rows if broken else rows[: len(rows) // 16 * 16]
        mine = rows[world.rank :: world.size]
        # For the end of the epoch, where ranks meet to validate. More patient: a timeout closes its group's connections, and rank
        # 0 is to see its own.
        end = dist.new_group(timeout=timedelta(seconds=10 * self.timeout))
        began, ends, message = time.perf_counter(), [], ""
        try:
            for i in range(0, len(mine), 8):
                world.learn(model, optimizer, mine[i : i + 8])
                ends.append(time.perf_counter() - began)
            dist.barrier(end)
        except RuntimeError as error:
            message = "[" + str(error).splitlines()[0].rsplit("/", 1)[-1]  # without the folders of torch's build
        return {"ends": ends, "left": time.perf_counter() - began, "message": message}

    def figures(self, ranks: Ranks) -> dict[str, Any]:
        message = ranks[0]["message"] or "nothing"
        return {"zero": len(ranks[0]["ends"]), "one": len(ranks[1]["ends"]), "message": message, "seconds": ranks[0]["left"]}

    def draw(self, axes: Axes, ranks: Ranks) -> None:
        for i, rank in enumerate(ranks):
            ends = rank["ends"]
            axes.barh(i, ends[-1], color=RANKS[i], height=0.5)
            axes.barh(i, rank["left"] - ends[-1], left=ends[-1], color="white", edgecolor=RED, hatch="///", height=0.5)
            axes.text(0, i - 0.3, f"{len(ends)} steps", fontsize=8, color=INK, va="bottom")
        axes.set(xlabel="seconds; hatched: waiting", yticks=[0, 1], yticklabels=["rank 0", "rank 1"], ylim=(1.5, -0.6))


class Straggler(Experiment):
    """Rank 0 gets the short texts and rank 1 the long ones, as with a sorted file cut in two.

    All ranks step together, so each step takes as long as its slowest rank needs, and the others pay for waiting. Dealing out
    every batch so that ranks pad alike (the project's sampler) shares the work evenly.
    """

    name, file, marker = "straggler", "pipeline/sampler.py", "def hands"
    says = "tokens of the most unequal step: {short} on rank 0, {long} on rank 1; lost to waiting, counted in tokens: {idle:.0%}; measured: rank 0 waits for {waited:.0%} of {seconds:.1f} s"
    rows, batch = 512, 32

    def rank(self, world: World, broken: bool) -> dict[str, Any]:
        lengths = world.lengths[: self.rows]
        sampler = GlobalBatchSampler(
            lengths.tolist(), global_batch_size=self.batch, accumulation=1, num_replicas=world.size, rank=world.rank, seed=0, length_grouping=True
        )  # fmt: skip
        half = lengths.argsort().chunk(world.size)[world.rank]  # a sorted file, cut in as many pieces as there are ranks
        shares = half.split(self.batch // world.size) if broken else sampler
        model = world.model()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        tokens, computing, waiting = [], [], []
        for share in shares:
            began = time.perf_counter()
            rows = torch.as_tensor(share).tolist()
            longest = int(lengths[rows].max())
            world.loss(model, rows, longest).backward()
            computed = time.perf_counter()
            dist.barrier()  # what the all-reduce would wait for, alone
            waiting.append(time.perf_counter() - computed)
            computing.append(computed - began)
            tokens.append(len(rows) * longest)
            world.average_gradients(model)
            optimizer.step()
            optimizer.zero_grad()
        return {"tokens": tokens, "computing": computing, "waiting": waiting}

    def figures(self, ranks: Ranks) -> dict[str, Any]:
        steps = list(zip(*(rank["tokens"] for rank in ranks), strict=True))
        widest = max(steps, key=lambda step: max(step) - min(step))
        needed, paid = sum(sum(step) for step in steps), sum(len(step) * max(step) for step in steps)
        waited, computed = sum(ranks[0]["waiting"]), sum(ranks[0]["computing"])
        return {
            "short": widest[0],
            "long": widest[1],
            "idle": 1 - needed / paid,
            "waited": waited / (waited + computed),
            "seconds": waited + computed,
        }

    def draw(self, axes: Axes, ranks: Ranks) -> None:
        for i, rank in enumerate(ranks):
            at = 0.0
            for computing, waiting in zip(rank["computing"], rank["waiting"], strict=True):
                axes.barh(i, computing, left=at, color=RANKS[i], height=0.5)
                axes.barh(i, waiting, left=at + computing, color=GREY, height=0.5)
                at += computing + waiting
        axes.set(
            xlabel="seconds of computing, in colour, and of waiting, in grey",
            yticks=[0, 1],
            yticklabels=["rank 0", "rank 1"],
            ylim=(1.5, -0.5),
        )


EXPERIMENTS = (UnequalBatches, Straggler)
