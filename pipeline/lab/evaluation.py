"""After training: a score that is one shard's, and a file that two ranks write."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from matplotlib.axes import Axes
from torch.nn.parallel import DistributedDataParallel

from pipeline.lab.data import sampler_of
from pipeline.lab.frame import GREY, INK, RANKS, RED, Experiment, Ranks
from pipeline.lab.world import TEST_ROWS, World


class OneShardEval(Experiment):
    """Each rank reports the score of its own shard.

    A shard is another sample of the rows, here the older or the newer half of the news, so ranks report different figures and
    none is that of the test set. Worse, ranks that decide by it (early stopping, the best checkpoint) decide differently, and hang.
    """

    name, marker = "one_shard_eval", "[DDP 8] Metrics over exact shards"
    says = "rows behind the score: {scored} of {rows}; accuracy on rank 0 {zero:.2%}, on rank 1 {one:.2%}, of all rows {truth:.2%}"

    def rank(self, world: World, broken: bool) -> dict[str, Any]:
        model = DistributedDataParallel(world.model())
        optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
        for batch in sampler_of(world, world.rank, 1536):
            world.learn(model, optimizer, batch)
        shard = np.array_split(world.test_rows, world.size)[world.rank].tolist()
        counts = torch.tensor([world.score(model.module, shard)[1], len(shard)])
        if not broken:
            dist.all_reduce(counts)
        return {"right": int(counts[0]), "scored": int(counts[1]), "truth": world.score(model.module)[1] / TEST_ROWS}

    def figures(self, ranks: Ranks) -> dict[str, Any]:
        zero, one = (rank["right"] / rank["scored"] for rank in ranks)
        return {"scored": ranks[0]["scored"], "rows": TEST_ROWS, "zero": zero, "one": one, "truth": ranks[0]["truth"]}

    def draw(self, axes: Axes, ranks: Ranks) -> None:
        for i, rank in enumerate(ranks):
            accuracy = 100 * rank["right"] / rank["scored"]
            axes.bar(i, accuracy, color=RANKS[i], width=0.6)
            axes.text(i, accuracy / 2, f"{accuracy:.1f}", ha="center", fontsize=11, color="white", weight="bold")
        axes.axhline(100 * ranks[0]["truth"], color=GREY, linestyle="--", linewidth=1.2, label="all test rows, one process")
        axes.set(xticks=[0, 1], xticklabels=["reported by rank 0", "reported by rank 1"], ylabel="accuracy (%)", ylim=(0, 109))
        axes.legend(frameon=False, fontsize=8, loc="upper center")


class SaveOnAllRanks(Experiment):
    """Both ranks write the same checkpoint file.

    `torch.save` empties the file it opens, so the rank that comes second tears what the first has just finished, in the moment
    in which that one reads it back, uploads it or is killed. That both write the same numbers does not help.
    """

    name, marker = "save_on_all_ranks", "[DDP 9] Save on rank 0, and wait"
    says = "checkpoints torn when rank 0 reads back what it wrote: {torn} of {saves}, by up to {mb:.1f} MB"
    saves = 40

    def rank(self, world: World, broken: bool) -> dict[str, Any]:
        model = world.model()
        # Weights and AdamW's two moments, as in a checkpoint.
        tensors = {f"{part}.{name}": p.detach().clone() for part in ("weights", "first", "second") for name, p in model.named_parameters()}
        path, took, lost = world.folder / "checkpoint.pt", 0.0, []
        if world.rank == 0:
            torch.save(tensors, path)
        dist.barrier()
        wanted = np.frombuffer(path.read_bytes(), dtype=np.uint8)
        for share in np.random.default_rng(0).uniform(0, 1.5, self.saves):
            dist.barrier()
            time.sleep(share * took * world.rank)  # ranks never come at exactly the same moment: here by up to 1.5 saves later
            began = time.perf_counter()
            if broken or world.rank == 0:
                torch.save(tensors, path)
            took = time.perf_counter() - began
            if world.rank == 0:
                found = np.frombuffer(path.read_bytes(), dtype=np.uint8)
                lost.append(len(wanted) - int((found == wanted[: len(found)]).sum()))
        dist.barrier()
        return {"lost": lost}

    def figures(self, ranks: Ranks) -> dict[str, Any]:
        lost = ranks[0]["lost"]
        return {"torn": sum(size > 0 for size in lost), "saves": self.saves, "mb": max(lost) / 1e6}

    def draw(self, axes: Axes, ranks: Ranks) -> None:
        lost = ranks[0]["lost"]
        axes.bar(range(1, len(lost) + 1), [size / 1e6 for size in lost], color=RED, width=0.8)
        torn = f"torn: {sum(size > 0 for size in lost)} of {len(lost)}"
        axes.text(0.98, 0.98, torn, ha="right", va="top", transform=axes.transAxes, fontsize=9, color=INK)
        axes.set(xlabel="checkpoint", ylabel="MB missing or zero when read back")
        axes.margins(y=0.15)  # for the words


EXPERIMENTS = (OneShardEval, SaveOnAllRanks)
