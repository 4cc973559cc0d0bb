"""What this machine offers an engine: cores really allowed, instructions for bf16, a GPU."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import importlib.metadata
import importlib.util
import math
import os
import platform
from pathlib import Path


def allowed_cores() -> int:
    """The cores this process may really use: its affinity, and below that the quota of its container."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, math.floor(min(cores, _cgroup_quota())))


def _cgroup_quota(root: Path = Path("/sys/fs/cgroup"), own: Path = Path("/proc/self/cgroup")) -> float:
    """Cores' worth of time that this process's groups may use (infinite without a limit); cgroup version 2, then 1."""
    try:
        lines = [line.split(":", 2) for line in own.read_text().splitlines()]
    except OSError:
        lines = []
    least = math.inf
    for controller, files in (("", ("cpu.max",)), ("cpu", ("cpu.cfs_quota_us", "cpu.cfs_period_us"))):
        # A limit holds for everything below it. In a container the group's path may not be there: its root is the mount.
        path = next((path for _, names, path in lines if controller in names.split(",")), "/")
        group = Path(path.lstrip("/"))
        for folder in {root / controller / part for part in (group, *group.parents)}:
            with contextlib.suppress(OSError, ValueError, IndexError):
                quota, period = " ".join((folder / file).read_text() for file in files).split()
                if quota not in ("max", "-1"):
                    least = min(least, max(1.0, int(quota) / int(period)))
    return least


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
def versions(*packages: str) -> dict[str, str]:
    """Of those that are installed. Asking costs milliseconds for each, and does not change while the process lives."""
    found = {}
    for package in packages:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[package] = importlib.metadata.version(package)
    return found


@functools.cache
def gpu_present() -> bool:
    """Whether CUDA's driver finds a device; asked of the driver, because importing torch to ask takes seconds."""
    try:
        driver, count = ctypes.CDLL("libcuda.so.1"), ctypes.c_int(0)
    except OSError:
        return False
    return driver.cuInit(0) == 0 and driver.cuDeviceGetCount(ctypes.byref(count)) == 0 and count.value > 0


def share_memory() -> None:
    """One pool of memory for all threads, to be asked for before there are any.

    glibc gives every thread a pool of its own, and what is freed in one is not used by another: some 60 MiB here.
    """
    with contextlib.suppress(OSError, AttributeError, TypeError):  # not glibc
        ctypes.CDLL(None).mallopt(-8, 1)  # M_ARENA_MAX


def trim_memory() -> None:
    """Gives back what was freed: the C library keeps it for itself unless it is asked, a model's worth after a swap."""
    with contextlib.suppress(OSError, AttributeError, TypeError):  # not glibc
        ctypes.CDLL(None).malloc_trim(0)
