"""Room: memory, shared memory and disk of each machine that takes part."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import psutil
import torch

from pipeline.doctor.findings import Finding, gib, judge
from pipeline.doctor.frame import Context

# Weights, gradients and AdamW's two moments, each the size of the weights: 16 bytes a parameter in fp32
# (Rajbhandari et al., ZeRO, arXiv:1910.02054, section 3.1). Activations come on top; "longest batch" measures them.
COPIES_IN_MEMORY = 4
COPIES_IN_CHECKPOINT = 3  # weights and the two moments
NCCL_SHARED_MEMORY = 2**30  # what NCCL's guide gives a container: docker run --shm-size=1g
WORKERS_SHARED_MEMORY = 128 * 2**20  # batches of texts are small; Docker's default of 64 MB still fails with many workers


def free_memory() -> tuple[int, int]:
    """Free and total bytes of this machine, or of the container (cgroup v2) where that allows less."""
    memory = psutil.virtual_memory()
    free, total = memory.available, memory.total
    try:
        group = Path("/sys/fs/cgroup")
        limit = (group / "memory.max").read_text().strip()
        if limit != "max":
            total = min(total, int(limit))
            free = min(free, max(0, int(limit) - int((group / "memory.current").read_text())))
    except (OSError, ValueError):
        pass
    return free, total


def existing(path: Path) -> Path:
    """The path, or the nearest folder above it that is there already."""
    path = path.absolute()
    while not path.exists():
        path = path.parent
    return path


def room(context: Context) -> list[Finding]:
    """Memory and shared memory on every machine, disk where rank 0 writes."""
    config, place = context.config, context.topology
    free, total = free_memory()
    shared = tuple(shutil.disk_usage("/dev/shm")) if Path("/dev/shm").is_dir() else None
    device = torch.cuda.mem_get_info() if place.device == "cuda" else None
    everyone = context.ranks.gather((context.host, free, total, shared, device))
    findings = []
    need = COPIES_IN_MEMORY * context.parameter_bytes
    for host in dict.fromkeys(host for host, *_ in everyone):
        of_host = [facts for facts in everyone if facts[0] == host]
        _, free, total, shared, _ = of_host[0]
        wanted = need * len(of_host) if place.device == "cpu" else context.parameter_bytes * len(of_host)
        advice = "Close other programs, launch fewer processes, or choose a smaller --model."
        expected = f"{gib(wanted)} free for weights, gradients, optimizer of {len(of_host)} rank{'s' * (len(of_host) > 1)}"
        findings.append(judge("memory", f"{gib(free)} free of {gib(total)} on {host}", expected, free > wanted, advice))
        findings.append(_shared(context, host, shared))
    for rank, (host, *_, gpu) in enumerate(everyone):
        if gpu:
            advice = "Somebody else computes there (nvidia-smi shows who): end that, or take another with CUDA_VISIBLE_DEVICES."
            expected = f"{gib(need)} free, and most of it"
            fine = gpu[0] > need and gpu[0] > 0.5 * gpu[1]
            findings.append(judge("GPU memory", f"{gib(gpu[0])} free of {gib(gpu[1])} at rank {rank} on {host}", expected, fine, advice,
                                  "warn" if gpu[0] > need else "FAIL"))  # fmt: skip
    checkpoints = config.save_total_limit + 2  # beside those kept: the best one, and the one being written
    need = COPIES_IN_CHECKPOINT * context.parameter_bytes * checkpoints
    folder = existing(Path(config.output_dir or "."))
    left = shutil.disk_usage(folder).free
    advice = "Free some space, lower --save_total_limit, or give an --output_dir on another disk."
    findings.append(
        judge("disk", f"{gib(left)} free for {config.output_dir}", f"{gib(need)} for {checkpoints} checkpoints", left > need, advice)
    )
    if not os.access(folder, os.W_OK):
        findings.append(Finding("disk", f"{folder} may not be written to", "write permission", "FAIL", "Give an --output_dir of your own."))
    return findings


def _shared(context: Context, host: str, usage: tuple[int, ...] | None) -> Finding:
    """Workers of the data loader hand their batches over in /dev/shm, and so does NCCL between GPUs of one machine."""
    place, workers = context.topology, context.config.dataloader_workers
    nccl = place.device == "cuda" and place.local_world_size > 1
    need = NCCL_SHARED_MEMORY if nccl else WORKERS_SHARED_MEMORY * (workers > 0)
    found = f"{gib(usage[2])} free of {gib(usage[0])} on {host}" if usage else f"no /dev/shm on {host}"
    if not need:
        return Finding("shared memory", found, "not needed: no loader workers, no NCCL")
    why = "between GPUs" if nccl else f"for {workers} loader workers"
    advice = "Start the container with --shm-size=1g (or --ipc=host), or use --dataloader_workers 0."
    return judge("shared memory", found, f"{gib(need)} {why}", usage is not None and usage[2] >= need, advice, "warn")
