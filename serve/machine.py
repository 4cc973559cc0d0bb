"""What this machine offers an engine: cores really allowed, instructions for bf16, a GPU."""

from __future__ import annotations

import ctypes
import functools
import importlib.util
import math
import os
import platform
from pathlib import Path


def allowed_cores() -> int:
    """The cores this process may really use: its affinity, and below that the quota of its container."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, math.floor(min(cores, _cgroup_quota())))


def _cgroup_quota(root: Path = Path("/sys/fs/cgroup")) -> float:
    """Cores' worth of time that the container may use (infinite without a limit); cgroup version 2, then 1."""
    for quota_file, period_file in (("cpu.max", None), ("cpu/cpu.cfs_quota_us", "cpu/cpu.cfs_period_us")):
        try:
            words = (root / quota_file).read_text().split()
            words += (root / period_file).read_text().split() if period_file else []
            if words[0] not in ("max", "-1"):
                return max(1.0, int(words[0]) / int(words[1]))
        except (OSError, ValueError, IndexError):
            continue
    return math.inf


@functools.cache
def cpu() -> tuple[str, frozenset[str]]:
    """The CPU's name and its feature flags (`amx_bf16`, ...); the flags are empty where the system does not tell."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return platform.processor() or platform.machine(), frozenset()
    found: dict[str, str] = {}
    for line in lines:
        key, _, value = line.partition(":")
        found.setdefault(key.strip(), value.strip())
    return found.get("model name") or platform.machine(), frozenset((found.get("flags") or found.get("Features") or "").split())


def computes_bf16() -> bool:
    """Whether the CPU has instructions for bf16; without them it is emulated, and slower than fp32."""
    return bool(cpu()[1] & {"amx_bf16", "avx512_bf16", "bf16"})


def has(*packages: str) -> bool:
    return all(importlib.util.find_spec(package) is not None for package in packages)


@functools.cache
def gpu_present() -> bool:
    """Whether CUDA's driver finds a device; asked of the driver, because importing torch to ask takes seconds."""
    try:
        driver, count = ctypes.CDLL("libcuda.so.1"), ctypes.c_int(0)
    except OSError:
        return False
    return driver.cuInit(0) == 0 and driver.cuDeviceGetCount(ctypes.byref(count)) == 0 and count.value > 0
