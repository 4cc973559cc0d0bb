"""FSDP: each rank keeps a shard of weights, gradients and optimizer where DDP keeps all of them on every rank.

    accelerate launch --config_file configs/accelerate/gpu2_fsdp.yaml -m pipeline.train configs/ag_news.yaml

Accelerate cuts the model layer by layer (FSDP2, torch's `fully_shard`): a parameter becomes a DTensor, of which this rank
holds some rows. Here is what remains to be known of that: which settings are right, and how whole tensors become shards
and shards whole tensors. A checkpoint holds whole tensors, in the files that DDP writes: either goes on from the other's, at
any number of processes. When FSDP pays: docs/machines.md.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Mapping
from typing import TYPE_CHECKING, TypeGuard

import torch
from torch import nn

from pipeline.config import FIELDS, TrainConfig
from pipeline.errors import UserError

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor

LAUNCH_FILE = "configs/accelerate/gpu2_fsdp.yaml"

# What the launcher's environment says -> the one value that is right here, and why no other.
SETTINGS = {
    "FSDP_VERSION": ("2", "FSDP1 flattens the parameters, and checkpoints hold them by name"),
    "FSDP_OFFLOAD_PARAMS": ("false", "parameters on the CPU are not supported"),
    "FSDP_ACTIVATION_CHECKPOINTING": ("false", "Accelerate recomputes the forward with other dropout masks, so gradients would be wrong"),
    "FSDP_CPU_RAM_EFFICIENT_LOADING": ("false", "every rank reads the weights itself"),
}


def asked_for() -> bool:
    """Whether the launch file says FSDP."""
    return os.environ.get("ACCELERATE_USE_FSDP", "").lower() == "true"


def check(config: TrainConfig, world_size: int, device: str) -> None:
    """Raises UserError where the launch or the run asks for what FSDP here would get wrong, or silently ignore."""
    for name, (allowed, why) in SETTINGS.items():
        given = os.environ.get(name, allowed).lower()
        if given != allowed:
            raise UserError(f"{name.lower()} is {given}: allowed is {allowed} ({why}). Take {LAUNCH_FILE}.")
    if world_size == 1:
        raise UserError("FSDP shares the model among processes, and there is one. Add --num_processes 2, or take another launch file.")
    if device == "cpu" and torch.cuda.is_available():
        raise UserError(
            "FSDP takes the GPUs it sees, though device is cpu. Put CUDA_VISIBLE_DEVICES= before the command, or use --device cuda."
        )
    for name in ("trace", "comm_hook", "bucket_mb", "static_graph"):
        if getattr(config, name) != FIELDS[name].default:
            raise UserError(f"{name} is {getattr(config, name)}: it belongs to DDP and has no meaning under FSDP. Leave it out.")


def layer_class(model: nn.Module) -> str:
    """The name of the class that the model repeats, such as TransformerBlock: the unit that is gathered at a time."""
    found = Counter({type(layers[0]).__name__: sum(p.numel() for p in layers.parameters())
                     for layers in model.modules() if isinstance(layers, nn.ModuleList) and len(layers)})  # fmt: skip
    return found.most_common(1)[0][0] if found else type(model).__name__


def whole(tensors: Mapping[str, torch.Tensor], keep: bool) -> dict[str, torch.Tensor]:
    """The whole tensors, in the CPU's memory where they were shards; empty unless `keep`.

    A collective where there are shards: every rank calls it. One tensor at a time, so that no GPU holds them all.
    """
    kept = {}
    for name, tensor in tensors.items():
        full = tensor.full_tensor() if _is_shard(tensor) else tensor
        if keep:
            kept[name] = full.cpu() if _is_shard(tensor) else full
    return kept


def like(tensor: torch.Tensor, parameter: torch.Tensor | None) -> torch.Tensor:
    """This rank's shard of a whole tensor, where `parameter`, of the same shape, is sharded; else the tensor itself."""
    if parameter is None or not _is_shard(parameter) or tensor.shape != parameter.shape:
        return tensor
    from torch.distributed.tensor import distribute_tensor

    # src_data_rank=None: every rank has read the whole tensor and cuts its own shard, nothing is sent.
    return distribute_tensor(tensor.to(parameter.device), parameter.device_mesh, parameter.placements, src_data_rank=None)


def _is_shard(tensor: torch.Tensor) -> TypeGuard[DTensor]:
    """Told by its method, for importing the class would take every command a second."""
    return hasattr(tensor, "full_tensor")
