"""Is what was launched what was asked for: processes, devices, the same code on all of them, and room for it?"""

from __future__ import annotations

import os
import shutil
import socket
from collections import Counter
from pathlib import Path

import psutil
import torch
import torch.distributed as dist
from accelerate import PartialState

from pipeline import sharding
from pipeline.doctor.frame import Context, Finding, Level, from_error, gib, judge
from pipeline.record import surroundings
from pipeline.topology import plan_batches

# Weights, gradients and AdamW's two moments, each the size of the weights: 16 bytes a parameter in fp32
# (Rajbhandari et al., ZeRO, arXiv:1910.02054, section 3.1). Activations come on top; "longest batch" measures them.
COPIES_IN_MEMORY = 4
COPIES_IN_CHECKPOINT = 3  # weights and the two moments
NCCL_SHARED_MEMORY = 2**30  # what NCCL's guide gives a container: docker run --shm-size=1g
WORKERS_SHARED_MEMORY = 128 * 2**20  # batches of texts are small; Docker's default of 64 MB still fails with many workers


def world_size(context: Context) -> list[Finding]:
    """Processes counted, not believed: each rank answers, and Accelerate says how many it sees."""
    seen = context.gather(PartialState(cpu=context.topology.device == "cpu").num_processes)
    found = f"{len(seen)} rank{'s' * (len(seen) > 1)}, of which Accelerate sees {' or '.join(map(str, sorted(set(seen))))}"
    advice = "Several on the CPU: MULTI_GPU with use_cpu, as in cpu2.yaml (MULTI_CPU starts one), and --device cpu where there are GPUs."
    good = set(seen) == {len(seen)} == {context.asked}
    findings = [judge("world size", found, f"{context.asked}, num_processes of {context.launch}", good, advice)]
    if context.sharded:
        sharding.check(context.config, len(seen), context.topology.device)
        advice = f"Nothing, but read the lines below as those of DDP: weights, gradients and optimizer take 1/{len(seen)} of what they say."
        findings.append(Finding("FSDP", "examined as DDP, each rank with the whole model", "no sharding", "warn", advice))
    return findings


def devices(context: Context) -> list[Finding]:
    """Backend, device and precision of each rank, as configured and as the hardware has them."""
    config, place = context.config, context.topology
    name, backend = (torch.cuda.get_device_name(place.local_rank), "nccl") if place.device == "cuda" else ("CPU", "gloo")
    kinds = Counter(context.gather(f"{name}, {dist.get_backend()}, {place.precision}"))
    found = "; ".join(f"{n} x {kind}" for kind, n in kinds.items())
    advice = f"Ranks must talk over {backend}, and those on unlike devices wait for the slowest: use one kind."
    good = list(kinds) == [f"{name}, {backend}, {place.precision}"]
    findings = [judge("device", found, f"device {config.device}, {backend}, equal on all ranks", good, advice)]
    if context.refused:
        findings.append(from_error("configured", context.refused, f"device {config.device}, precision {config.precision}"))
    told = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    if told not in ("no", place.precision):
        advice = f"Put mixed_precision: 'no' into {context.launch}: Accelerate would take it where the raw script takes --precision."
        findings.append(Finding("mixed_precision", f"{told}, in {context.launch}", place.precision, "FAIL", advice))
    return findings


def same_everywhere(context: Context) -> list[Finding]:
    """Library versions, code and configuration are equal on all ranks: else machines compute different things."""
    facts = surroundings()
    mine = {**facts["versions"], "code": facts["code"]["commit"], **context.config.to_dict()}
    everyone = context.gather(mine)
    different = [name for name in mine if len({str(of_rank[name]) for of_rank in everyone}) > 1]
    found = ", ".join(f"{name} {mine[name]}" for name in ("python", "torch", "transformers", "accelerate"))
    if different:
        found = "; ".join(f"{name}: {', '.join(f'rank {i} {of_rank[name]}' for i, of_rank in enumerate(everyone))}" for name in different)
    advice = "Install the same requirements.txt and check out the same commit on every machine; launch with the same options."
    return [judge("versions", found, "the same on all ranks, like code and options", not different, advice)]


def batches(context: Context) -> list[Finding]:
    """How the global batch is cut for this many processes. Raises UserError where it cannot be."""
    context.plan = plan_batches(context.config, context.topology.world_size)
    return [Finding("batch", str(context.plan), f"global_batch_size {context.config.global_batch_size}")]


def free_memory() -> tuple[int, int]:
    """Free and total bytes of this machine, or of the container (cgroup v2) where that allows less."""
    memory, group = psutil.virtual_memory(), Path("/sys/fs/cgroup")
    try:
        limit = int((group / "memory.max").read_text())
        return min(memory.available, limit - int((group / "memory.current").read_text())), min(memory.total, limit)
    except (OSError, ValueError):  # no such container, or "max"
        return memory.available, memory.total


def room(context: Context) -> list[Finding]:
    """Memory and shared memory of each machine, each GPU's own, and the disk that rank 0 writes to."""
    config, place, size, findings = context.config, context.topology, context.parameter_bytes, []
    on_gpu, need = place.device == "cuda", COPIES_IN_MEMORY * size

    def enough(what: str, free: int, total: int, need: int, purpose: str, advice: str, bad: Level = "FAIL") -> None:
        found = f"{gib(free)} free of {gib(total)} on {socket.gethostname()}"
        findings.append(judge(what, found, f"{gib(need)} for {purpose}", free >= need, advice, bad))

    if on_gpu:
        advice = "nvidia-smi shows who else computes there: end that, or take another with CUDA_VISIBLE_DEVICES."
        enough("GPU memory", *torch.cuda.mem_get_info(), need, "weights, gradients, optimizer", advice)
    if place.local_rank == 0:
        models, purpose = place.local_world_size, "loading" if on_gpu else "weights, gradients, optimizer"
        advice = "Close other programs, launch fewer processes, or choose a smaller --model."
        enough("memory", *free_memory(), models * (size if on_gpu else need), f"{purpose}, {models} times", advice)
        # Workers of the data loader hand their batches over in shared memory, and so does NCCL between GPUs of one machine.
        shared = NCCL_SHARED_MEMORY if on_gpu and models > 1 else WORKERS_SHARED_MEMORY * (config.dataloader_workers > 0)
        usage = shutil.disk_usage("/dev/shm" if Path("/dev/shm").is_dir() else "/")  # macOS has none that can be measured
        advice = "Start the container with --shm-size=1g (or --ipc=host), or use --dataloader_workers 0."
        enough("shared memory", usage.free, usage.total, shared, "loader workers and NCCL", advice, "warn")
    if place.rank == 0:
        checkpoints = config.save_total_limit + 2  # beside those kept: the best one, and the one being written
        wanted = Path(config.output_dir or ".").absolute()
        folder = next(path for path in (wanted, *wanted.parents) if path.exists())
        usage, purpose = shutil.disk_usage(folder), f"{checkpoints} checkpoints in {config.output_dir}"
        advice = "Free some space, lower --save_total_limit, or give an --output_dir of your own on another disk."
        free = usage.free if os.access(folder, os.W_OK) else 0
        enough("disk", free, usage.total, COPIES_IN_CHECKPOINT * size * checkpoints, purpose, advice)
    return findings
