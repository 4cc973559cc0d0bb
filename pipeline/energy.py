"""Energy of a run by the machine's own counters; what a machine does not count is left out, never estimated.

GPUs: the driver's counter, by NVML's `nvmlDeviceGetTotalEnergyConsumption` (Volta and newer). CPUs: the package counters of
RAPL under /sys/class/powercap, which most systems let only root read. Both count all that the devices drew meanwhile,
whoever used them.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

POWERCAP = Path("/sys/class/powercap")


class EnergyMeter:
    """Counts from its making on. `gpus`: how many of the devices that torch sees are used, from the first."""

    def __init__(self, gpus: int, powercap: Path = POWERCAP) -> None:
        self._counters: dict[str, list[Callable[[], float]]] = {}
        # Not allowed, not there, or no driver: then there is no such figure.
        with suppress(OSError, ValueError, AttributeError, RuntimeError):
            self._counters["cpu"] = [_package(zone) for zone in sorted(powercap.glob("intel-rapl:*")) if _is_package(zone)]
        with suppress(OSError, ValueError, AttributeError, RuntimeError):
            self._counters["gpu"] = [_gpu(torch.cuda.get_device_properties(i).uuid) for i in range(gpus)]

    def read(self) -> dict[str, float]:
        """Joules so far, by "cpu" (all packages) and "gpu" (all used ones). RAPL's counters overflow after some
        minutes: read more often than that."""
        found = {}
        for kind, counters in self._counters.items():
            with suppress(OSError, ValueError):
                found[kind] = sum(counter() for counter in counters)
        return {kind: joules for kind, joules in found.items() if joules > 0}


def total(sessions: Sequence[Mapping[str, Any]]) -> dict[str, float] | None:
    """Joules of a run in several sessions: what every one of them counted; None where that is nothing."""
    counted = [session.get("energy_joules") or {} for session in sessions]
    kinds = set.intersection(*map(set, counted)) if counted else set()
    return {kind: sum(one[kind] for one in counted) for kind in sorted(kinds)} or None


def _is_package(zone: Path) -> bool:
    return (zone / "name").read_text().startswith("package")  # and not a part of one (core, dram), nor the whole board (psys)


def _package(zone: Path) -> Callable[[], float]:
    def microjoules() -> int:
        return int((zone / "energy_uj").read_text())

    span, last, so_far = int((zone / "max_energy_range_uj").read_text()), microjoules(), 0

    def joules() -> float:
        nonlocal last, so_far
        now = microjoules()
        so_far += now - last + (span if now < last else 0)
        last = now
        return so_far / 1e6

    return joules


def _gpu(uuid: Any) -> Callable[[], float]:
    nvml = ctypes.CDLL("libnvidia-ml.so.1")  # comes with the driver
    device = ctypes.c_void_p()

    def checked(code: int) -> None:
        if code != 0:
            raise OSError(f"NVML says {code}")

    def millijoules() -> int:
        value = ctypes.c_ulonglong()
        checked(nvml.nvmlDeviceGetTotalEnergyConsumption(device, ctypes.byref(value)))
        return value.value

    checked(nvml.nvmlInit_v2())
    # By its UUID: torch's numbers follow CUDA_VISIBLE_DEVICES, NVML's do not.
    checked(nvml.nvmlDeviceGetHandleByUUID(f"GPU-{uuid}".encode(), ctypes.byref(device)))
    first = millijoules()
    return lambda: (millijoules() - first) / 1e3
