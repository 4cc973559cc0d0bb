"""Where a run runs: device, precision, threads, and how the global batch is cut for this many processes.

Decided once at start, from the configuration and the launcher's environment, before Accelerate or torch.distributed
wakes up; printed by both entries so that nobody has to guess.
"""

from __future__ import annotations

import os
import socket
from dataclasses import dataclass
from pathlib import Path

import torch

from pipeline import sharding
from pipeline.config import TrainConfig
from pipeline.errors import UserError

DTYPES = {"fp64": torch.float64, "fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Topology:
    """One process's place among all. `precision` is what the hardware will really compute in."""

    world_size: int
    rank: int
    local_rank: int
    local_world_size: int
    device: str  # "cpu" or "cuda"
    backend: str  # "gloo", "nccl", or "none" for a process that talks to nobody
    precision: str  # "fp64", "fp32", "bf16" or "fp16"
    threads: int  # CPU threads of this process
    sharded: bool = False  # FSDP: each rank keeps a part of the model

    @property
    def attention(self) -> str | None:
        """The attention code of transformers to use; None: its own choice, torch's fused kernel.

        On the CPU in bf16 with dropout the plain one took 12 to 14% less for forward and backward (MiniLM, 8 and 16 rows
        of 64 and 128 tokens, two ranks, interleaved, on a CPU with AMX). That was with torch's dropout; with pipeline.dropout they
        take about the same.
        """
        return "eager" if (self.device, self.precision) == ("cpu", "bf16") else None

    @property
    def autocast(self) -> torch.dtype | None:
        """The type that autocast computes in; None: no autocast, the weights' own type is computed in."""
        return DTYPES[self.precision] if self.precision in ("bf16", "fp16") else None

    @property
    def torch_device(self) -> torch.device:
        return torch.device("cuda", self.local_rank) if self.device == "cuda" else torch.device("cpu")


@dataclass(frozen=True)
class BatchPlan:
    """`global_rows = world_size * accumulation * per_device`, always exactly."""

    global_rows: int
    world_size: int
    accumulation: int
    per_device: int

    def to_dict(self) -> dict[str, int]:
        return {"global": self.global_rows, "per_device": self.per_device, "accumulation": self.accumulation, "world_size": self.world_size}

    def __str__(self) -> str:
        return (
            f"{self.global_rows} rows a step = {self.world_size} process{'es' * (self.world_size > 1)} x {self.accumulation} "
            f"accumulation x {self.per_device} rows on a device"
        )


def allowed_cores() -> int:
    """CPU cores this process may use: its affinity mask, cut by a container's quota (cgroup v2) where there is one."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        if quota != "max":
            cores = min(cores, max(1, int(quota) // int(period)))
    except (OSError, ValueError):
        pass
    return cores


def cpu_computes_bf16() -> bool:
    """Whether the CPU has bf16 instructions: on others bf16 is emulated and slower than fp32."""
    try:
        flags = Path("/proc/cpuinfo").read_text()
    except OSError:
        return False
    return "amx_bf16" in flags or "avx512_bf16" in flags or " bf16" in flags


def choose_precision(config: TrainConfig, device: str) -> str:
    """What `precision: auto` means here, and an error for what the hardware would silently turn into something else."""
    if device == "cuda":
        # is_bf16_supported() counts emulation: a T4 (capability 7.5) says yes and is slower than fp32 with it.
        native_bf16 = torch.cuda.get_device_capability()[0] >= 8
        if config.precision == "auto":
            return "bf16" if native_bf16 else "fp16"
        if config.precision == "bf16" and not native_bf16:
            raise UserError(
                f"precision is bf16, but {torch.cuda.get_device_name()} has no bf16 arithmetic and would emulate it, slowly. "
                "Use --precision fp16, or auto."
            )
        return config.precision
    if config.precision == "fp16":
        raise UserError("precision is fp16, which needs a GPU (on the CPU it would silently be fp32). Use bf16, fp32 or auto.")
    if config.precision == "auto":
        return "bf16" if cpu_computes_bf16() else "fp32"
    return config.precision


def find_topology(config: TrainConfig) -> Topology:
    """Read the launcher's environment, choose device and precision, set this process's threads and device.

    Raises UserError where the configuration asks for what is not there.
    """
    world_size, rank = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("RANK", "0"))
    local_rank, local_world_size = int(os.environ.get("LOCAL_RANK", "0")), int(os.environ.get("LOCAL_WORLD_SIZE", str(world_size)))
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    # The CPU launch files say so in the environment of the launcher only; `--device` is the one switch that always works.
    device = (
        config.device if config.device != "auto" else ("cuda" if gpus and os.environ.get("ACCELERATE_USE_CPU", "") != "true" else "cpu")
    )
    if device == "cuda":
        if not gpus:
            raise UserError("device is cuda, but torch sees no GPU here. Use --device cpu, or auto.")
        if local_world_size > gpus:
            raise UserError(
                f"{local_world_size} processes were launched on a machine with {gpus} GPU{'s' * (gpus > 1)}. "
                f"Launch {gpus}, or use --device cpu."
            )
        torch.cuda.set_device(local_rank)
    else:
        # Accelerate would take a GPU it finds; its launcher does not hand `use_cpu` of the launch file on to us.
        os.environ["ACCELERATE_USE_CPU"] = "true"
    # The launcher sets one thread per process when there are several; with spare cores that wastes them.
    threads = config.cpu_threads or max(1, allowed_cores() // local_world_size)
    torch.set_num_threads(threads)
    os.environ["OMP_NUM_THREADS"] = str(threads)
    _leave_old_rendezvous(rank)
    backend = ("nccl" if device == "cuda" else "gloo") if "RANK" in os.environ else "none"
    if sharded := sharding.asked_for():
        sharding.check(config, world_size, device)
    return Topology(world_size, rank, local_rank, local_world_size, device, backend, choose_precision(config, device), threads, sharded)


def _leave_old_rendezvous(rank: int) -> None:
    """After a restart (`--max_restarts`): meet in a new store, at a port that rank 0 picks and tells through the old one.

    accelerate launch keeps one store for all attempts, in which the addresses of the dead processes still stand; the new
    ones would try to connect to those ("Gloo connectFullMesh failed ... Connection refused").
    """
    attempt = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))
    if not attempt:
        return
    from torch.distributed import TCPStore

    old = TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False)
    if rank == 0:
        with socket.create_server(("", 0)) as free:
            old.set(f"distrinews/attempt-{attempt}", str(free.getsockname()[1]))
    os.environ["MASTER_PORT"] = old.get(f"distrinews/attempt-{attempt}").decode()
    os.environ["TORCHELASTIC_USE_AGENT_STORE"] = "False"  # rank 0 hosts the store


def plan_batches(config: TrainConfig, world_size: int) -> BatchPlan:
    """Cut the global batch into equal micro-batches no larger than the device may hold.

    Equal, because the mean over ranks of the micro-batches' mean losses is the mean over all rows only then.
    Raises UserError where the global batch cannot be divided by the number of processes, or DDP cannot accumulate as asked.
    """
    rows, most = config.global_batch_size, config.max_per_device_batch_size
    if rows % world_size:
        lower, upper = rows - rows % world_size, rows + world_size - rows % world_size
        nearest = f"{lower} or {upper}" if lower else f"{upper}"
        raise UserError(
            f"global_batch_size is {rows}, which {world_size} processes cannot share equally. Use --global_batch_size {nearest}."
        )
    share = rows // world_size
    accumulation = next(a for a in range(1, share + 1) if share % a == 0 and share // a <= most)
    if config.static_graph and accumulation > 1:
        raise UserError(
            f"static_graph is set, but a step has {accumulation} micro-batches, and DDP cannot learn the graph from a backward that does "
            f"not communicate. Leave it out, or use --max_per_device_batch_size {share}."
        )
    return BatchPlan(rows, world_size, accumulation, share // accumulation)
