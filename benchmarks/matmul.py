"""The most floating-point operations a second that large matrix products reach here: what a training step is measured against.

    python -m benchmarks.matmul --dtype bf16 --dtype fp32        # one line of JSON: FLOP/s by type

The peak on a data sheet is that of a cooler chip which nobody shares; this one is of the same minute, type and threads.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time

import torch

from pipeline.topology import DTYPES, allowed_cores

SIZES = {"cpu": (512, 1024, 2048), "cuda": (2048, 4096, 8192)}


def matmul_peak(device: str, dtype: torch.dtype, seconds: float = 2.0) -> float:
    """FLOP/s of the best of `SIZES`: n x n matrices take 2 n^3 operations; the median of a size's repetitions counts.

    `seconds` is the time for all sizes together; on the CPU it uses torch's number of threads.
    """
    rates = []
    for n in SIZES[device]:
        a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
        times: list[float] = []
        until = time.perf_counter() + seconds / len(SIZES[device])
        while len(times) < 4 or time.perf_counter() < until:
            began = time.perf_counter()
            for _ in range(repeats := 10 if device == "cuda" else 1):
                a @ b
            if device == "cuda":
                torch.cuda.synchronize()
            times.append((time.perf_counter() - began) / repeats)
        rates.append(2 * n**3 / statistics.median(times[1:]))  # the first loads the kernel
    return max(rates)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.matmul", allow_abbrev=False)
    parser.add_argument("--device", choices=SIZES, default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=DTYPES, action="append", help="Once or more; default fp32.")
    parser.add_argument("--threads", type=int, default=allowed_cores(), help="On the CPU; default: all cores.")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    print(json.dumps({name: matmul_peak(options.device, DTYPES[name]) for name in options.dtype or ["fp32"]}))


if __name__ == "__main__":
    main()
