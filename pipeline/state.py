"""What a training run is made of at a step: the contents of a checkpoint.

Weights, optimizer, schedule and loss scaler are the same on all ranks, so one rank writes them. Each rank has a random
state of its own (its dropout masks) and its own part of the loss that is not yet logged. Tensors are kept as safetensors
and the rest as JSON (floats survive it exactly): nothing is unpickled, so a checkpoint may be fetched from a Hub.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from pipeline.checkpoint import read_json, read_manifest, write_json
from pipeline.sharding import like, whole

WEIGHTS, OPTIMIZER, SCHEDULE = "model.safetensors", "optimizer.safetensors", "schedule.json"


@dataclass
class TrainingState:
    """The live objects of one rank. `loss`: the sum of this rank's losses since the last log, a scalar tensor."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    scheduler: Any
    scaler: Any  # GradScaler, or None without one
    loss: torch.Tensor

    def save_shared(self, folder: Path, writes: bool = True) -> None:
        """What all ranks have in common; called on the one that writes, and under FSDP on all, to give their shards."""
        optimizer = self.optimizer.state_dict()
        moments = {f"{i}.{name}": tensor for i, slots in optimizer["state"].items() for name, tensor in slots.items()}
        for name, tensors in ((WEIGHTS, self.model.state_dict()), (OPTIMIZER, moments)):
            full = whole(tensors, keep=writes)
            if writes:
                # safetensors stores plain memory, so views are laid out first. No copy: nothing trains meanwhile.
                save_file({key: tensor.contiguous() for key, tensor in full.items()}, folder / name)
        if writes:
            scaler = self.scaler.state_dict() if self.scaler is not None else {}
            write_json(folder / SCHEDULE, {"groups": optimizer["param_groups"], "scheduler": self.scheduler.state_dict(), "scaler": scaler})

    def save_rank(self, folder: Path, rank: int) -> None:
        """What only this rank has; called on every rank."""
        random_state = {"cpu": torch.get_rng_state()}
        if self.loss.device.type == "cuda":
            random_state["cuda"] = torch.cuda.get_rng_state()
        save_file(random_state | {"loss": self.loss.detach().cpu().reshape(1)}, folder / f"rank-{rank}.safetensors")

    def load_shared(self, folder: Path) -> None:
        load_weights(self.model, folder)
        self.load_optimizer(folder)

    def load_optimizer(self, folder: Path) -> None:
        """Optimizer, schedule and scaler."""
        schedule = read_json(folder / SCHEDULE)
        parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        moments: dict[int, dict[str, torch.Tensor]] = {}
        for key, tensor in load_file(folder / OPTIMIZER).items():
            i, name = key.split(".")
            moments.setdefault(int(i), {})[name] = like(tensor, parameters[int(i)])
        self.optimizer.load_state_dict({"state": moments, "param_groups": schedule["groups"]})
        self.scheduler.load_state_dict(schedule["scheduler"])
        if self.scaler is not None and schedule["scaler"]:
            self.scaler.load_state_dict(schedule["scaler"])

    def load_rank(self, folder: Path, rank: int, world_size: int, seed: int) -> None:
        """This rank's random state and its part of the unlogged loss.

        With another number of processes than before no rank's old state fits: the masks of dropout are drawn anew from
        seed, step and rank, and every rank takes the mean of the old losses (the log is the mean over ranks).
        """
        manifest = read_manifest(folder)
        of_ranks = [load_file(folder / f"rank-{r}.safetensors") for r in range(manifest["world_size"])]
        if manifest["world_size"] == world_size:
            mine = of_ranks[rank]
            torch.set_rng_state(mine["cpu"])
            if "cuda" in mine and self.loss.device.type == "cuda":
                torch.cuda.set_rng_state(mine["cuda"])
            self.loss.copy_(mine["loss"][0])
        else:
            torch.manual_seed(seed + 1 + rank + 1_000_003 * manifest["step"])
            self.loss.copy_(torch.stack([old["loss"][0] for old in of_ranks]).mean())


def load_weights(model: nn.Module, folder: Path) -> None:
    """Put the weights of a checkpoint into the model, in place."""
    live = model.state_dict()
    model.load_state_dict({name: like(tensor, live.get(name)) for name, tensor in load_file(folder / WEIGHTS).items()})
