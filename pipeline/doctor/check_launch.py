"""Is what was launched what was asked for: processes, devices, and the same code on all of them?"""

from __future__ import annotations

import importlib.metadata
import os
import platform
from collections import Counter
from typing import Any

import torch
import torch.distributed as dist
from accelerate import PartialState

from pipeline.doctor.findings import Finding, from_error, judge
from pipeline.doctor.frame import Context
from pipeline.record import PACKAGES, code_version
from pipeline.topology import allowed_cores, plan_batches


def world_size(context: Context) -> list[Finding]:
    """Processes counted, not believed: each rank answers, and Accelerate says how many it sees."""
    answered = len(set(context.ranks.gather(context.topology.rank)))
    seen = context.ranks.gather(PartialState(cpu=context.topology.device == "cpu").num_processes)
    found = f"{answered} rank{'s' * (answered > 1)}, of which Accelerate sees {' or '.join(map(str, sorted(set(seen))))}"
    if answered != context.asked:
        advice = (
            f"{context.launch} does not start what it asks for. Several processes on the CPU: `distributed_type: MULTI_GPU` with "
            "`use_cpu: true`, as in configs/accelerate/cpu2.yaml (MULTI_CPU starts one)."
        )
    else:
        advice = "Each process would train a model of its own. Add --device cpu, or take a launch file of configs/accelerate/ as it is."
    good = answered == context.asked and set(seen) == {answered}
    return [judge("world size", found, f"{context.asked}, num_processes of {context.launch}", good, advice)]


def devices(context: Context) -> list[Finding]:
    """Backend and device of each rank: nobody shares a GPU, and threads do not outnumber cores."""
    place, wanted, cores = context.topology, context.config.device, allowed_cores()
    name, unit, backend = "CPU", "", "gloo"
    if place.device == "cuda":
        facts = torch.cuda.get_device_properties(place.local_rank)
        name, unit, backend = facts.name, str(getattr(facts, "uuid", place.local_rank)), "nccl"
    everyone = context.ranks.gather((context.host, f"{name}, {dist.get_backend()}", unit, place.threads))
    kinds = Counter(kind for _, kind, *_ in everyone)
    found = "; ".join(f"{n} x {kind}" for kind, n in kinds.items())
    advice = f"Ranks must talk over {backend}, and those on unlike devices wait for the slowest: use one kind."
    findings = [judge("device", found, f"device {wanted}, {backend}, equal on all ranks", list(kinds) == [f"{name}, {backend}"], advice)]
    if context.refused:
        asked = f"device {wanted}, precision {context.config.precision} as configured"
        findings.insert(0, from_error("device, precision", context.refused, asked))
    sharing = max(Counter((host, unit) for host, _, unit, _ in everyone if unit).values(), default=1)
    if sharing > 1:
        advice = "Launch one process per GPU: num_processes of the launch file at most the number of GPUs."
        findings.append(Finding("GPUs", f"{sharing} ranks share one", "one rank a GPU", "FAIL", advice))
    if place.device == "cpu":
        idle = torch.cuda.device_count() if wanted == "auto" and torch.cuda.is_available() else 0
        if idle:
            advice = "Take configs/accelerate/gpu1.yaml or gpu2.yaml, or say --device cpu if that is meant."
            findings.append(Finding("GPUs", f"{idle} here, none in use", "in use", "warn", advice))
        threads = sum(of_rank for host, _, _, of_rank in everyone if host == context.host)
        advice = "More threads than cores slow each other down: launch fewer processes, or lower --cpu_threads."
        findings.append(judge("threads", f"{threads} on {context.host}", f"at most its {cores} cores", threads <= cores, advice, "warn"))
    return findings


def differences(everyone: list[dict[str, Any]]) -> dict[str, list[Any]]:
    """The names on which ranks disagree, each with the ranks' values in order."""
    values = {name: [facts.get(name) for facts in everyone] for name in everyone[0]}
    return {name: each for name, each in values.items() if len({str(value) for value in each}) > 1}


def same_everywhere(context: Context) -> list[Finding]:
    """Library versions, code and configuration are equal on all ranks: else machines compute different things."""
    mine: dict[str, Any] = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            mine[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            mine[package] = None
    mine |= {"code": code_version()["commit"]} | context.config.to_dict()
    different = differences(context.ranks.gather(mine))
    if not different:
        versions = ", ".join(f"{name} {mine[name]}" for name in ("python", "torch", "transformers", "accelerate"))
        return [Finding("versions", versions, "the same on all ranks, like code and options")]
    advice = "Install the same requirements.txt and check out the same commit on every machine; launch with the same options."
    return [
        Finding("versions", f"{name}: {', '.join(f'rank {rank} {value}' for rank, value in enumerate(each))}", "the same", "FAIL", advice)
        for name, each in different.items()
    ]


def batches(context: Context) -> list[Finding]:
    """How the global batch is cut for this many processes, and whether the launch file overrides the precision."""
    plan = context.plan = plan_batches(context.config, context.topology.world_size)
    findings = [Finding("batch", str(plan), f"global_batch_size {context.config.global_batch_size}")]
    told = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    if told not in ("no", context.topology.precision):
        advice = f"Put mixed_precision: 'no' into {context.launch}: Accelerate would take it where the raw script takes --precision."
        findings.append(Finding("mixed_precision", f"{told}, in {context.launch}", context.topology.precision, "FAIL", advice))
    return findings
