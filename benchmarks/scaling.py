"""Predicted efficiency for 2 to 64 ranks, from the measured parts of a step and a link's latency and bandwidth.

    python -m benchmarks.scaling                   # from benchmarks/results/explain.json, which `make explain` measures; seconds
    python -m benchmarks.scaling --faster 200      # as if each rank computed 200 times faster than measured

A step of n ranks takes

    compute(rows per rank) + optimizer + straggler(n) + all-reduce that backward does not hide(n)

- compute is linear in the rows of a rank, a fixed cost and a cost per row, through two points measured with one process
  computing at a time: a rank's share of the batch, and the whole batch;
- an all-reduce over a ring takes 2 (n - 1) / n * bytes / bandwidth + 2 (n - 1) * latency (P. Patarasuk and X. Yuan, "Bandwidth
  optimal all-reduce algorithms for clusters of workstations", J. Parallel Distrib. Comput. 69, 2009);
- DDP's last bucket, full only when backward ends, is hidden by nothing; of the others the measured share is, as far as backward,
  linear in the rows as well, is long enough;
- the straggler's wait grows as the largest of n normal numbers over their mean does, through what was measured.

Latency and bandwidth of the link here come from all-reduces of several sizes, by least squares. The other links are given:
their line rates, and the latency of a ring's step that NCCL plans with. A machine's ranks share nothing but the link there: no
contention, hiding has no price, no hierarchy of links, nobody else's traffic. Results go to benchmarks/results/scaling.json, scaling.png beside the page.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from benchmarks.common import RESULTS, named, provenance, write_results
from pipeline.errors import UserError, run_entry

RANKS = (1, 2, 4, 8, 16, 32, 64)


@dataclass(frozen=True)
class Link:
    latency: float  # seconds, of one step of the ring
    bandwidth: float  # bytes per second out of a rank and, at the same time, into it

    def all_reduce(self, size: float, ranks: int) -> float:
        """Seconds for `size` bytes over a ring; 0 for a single rank (Patarasuk and Yuan 2009)."""
        return 2 * (ranks - 1) / ranks * size / self.bandwidth + 2 * (ranks - 1) * self.latency


# Latencies: NCCL's constants for a step of a ring with its Simple protocol, hwLat in src/graph/tuning.cc (2.10 to 2.22).
NVLINK, PCI, NET = 3.4e-6, 5.7e-6, 14.0e-6
LINKS = {
    "PCIe 3.0 x16 (T4)": Link(PCI, 8e9 * 16 * 128 / 130 / 8),  # 8 GT/s a lane, 128b/130b coding: PCI-SIG; lanes: NVIDIA T4 data sheet
    "NVLink 3 (A100)": Link(NVLINK, 300e9),  # 600 GB/s in both directions together: NVIDIA A100 data sheet
    "25 Gb/s Ethernet": Link(NET, 25e9 / 8),  # IEEE 802.3by
    "100 Gb/s Ethernet": Link(NET, 100e9 / 8),  # IEEE 802.3ba, 802.3bj
    "400 Gb/s Ethernet": Link(NET, 400e9 / 8),  # IEEE 802.3bs
}


def fit_link(sizes: Sequence[int], seconds: Sequence[float], ranks: int) -> Link:
    """Latency and bandwidth by least squares of the relative error, so that the smallest size counts as much as the largest."""
    size, took = np.asarray(sizes, float), np.asarray(seconds, float)
    system = np.stack([np.full_like(size, 2 * (ranks - 1)), 2 * (ranks - 1) / ranks * size], axis=1) / took[:, None]
    (latency, per_byte), *_ = np.linalg.lstsq(system, np.ones_like(took), rcond=None)
    return Link(max(0.0, float(latency)), 1 / float(per_byte))


def exposed(link: Link, buckets: Sequence[int], ranks: int, hidden: float, backward: float = math.inf) -> float:
    """Seconds of all-reduce that backward does not hide: the last bucket, and of the others what is not `hidden`, a share, which
    cannot be more than the seconds of `backward`."""
    *others, last = [link.all_reduce(size, ranks) for size in buckets]
    return last + sum(others) - min(hidden * sum(others), backward)


def hidden_share(link: Link, buckets: Sequence[int], ranks: int, measured: float) -> float:
    """The share, at most 1, that makes `exposed` come out as `measured`; below 0 where talking under backward costs more than after it."""
    *others, last = [link.all_reduce(size, ranks) for size in buckets]
    return min(1.0, 1 - (measured - last) / sum(others)) if others else 0.0


def largest_of(n: int) -> float:
    """Mean of the largest of n standard normal numbers: the integral of x d(F(x)^n), by the trapezoidal rule."""
    x = np.linspace(-9, 9, 4001)
    density = np.exp(-(x**2) / 2) / np.sqrt(2 * np.pi)
    below = np.clip(np.concatenate([[0], np.cumsum((density[1:] + density[:-1]) / 2 * np.diff(x))]), 0, 1)
    return float(np.trapezoid(x * n * below ** (n - 1) * density, x)) if n > 1 else 0.0


@dataclass(frozen=True)
class Model:
    """What was measured, put so that it can be asked for other numbers of ranks. Seconds."""

    fixed: float  # of data, forward and backward, whatever the rows
    per_row: float
    backward: tuple[float, float]  # of these, backward's part, fixed and per row
    once: float  # a step's work that no rank is spared: clipping, optimizer, DDP's copies into its buckets
    jitter: float  # standard deviation between ranks that the measured straggler's wait stands for
    buckets: tuple[int, ...]  # bytes, in the order of their all-reduces
    hidden: float

    def step(self, rows: float, ranks: int, link: Link, faster: float = 1.0) -> float:
        """Seconds of a step with `rows` a rank, where each rank computes `faster` times as fast as the one measured."""
        compute = self.fixed + self.per_row * max(1.0, rows) + self.once + self.jitter * largest_of(ranks)
        backward = self.backward[0] + self.backward[1] * max(1.0, rows)
        return compute / faster + exposed(link, self.buckets, ranks, self.hidden, backward / faster)

    def efficiency(self, rows: float, ranks: int, link: Link, faster: float = 1.0, fixed_global: bool = False) -> float:
        """Rows per second and rank, as a share of a single rank's. `rows`: of the global batch where that is fixed, else of each rank."""
        if not fixed_global:
            return self.step(rows, 1, link, faster) / self.step(rows, ranks, link, faster)
        # Beyond one row a rank, further ranks have nothing to do.
        return self.step(rows, 1, link, faster) / (ranks * self.step(rows / ranks, ranks, link, faster))


def compute_line(small: tuple[float, float], large: tuple[float, float]) -> tuple[float, float]:
    """The fixed cost and the cost per row through two points `(rows, seconds)`."""
    per_row = (large[1] - small[1]) / (large[0] - small[0])
    return small[1] - per_row * small[0], per_row


def model_of(explained: Mapping[str, Any], link: Link) -> Model:
    """The model through all that `benchmarks.explain` measured."""
    one, many = explained["accounts"]["one"], explained["accounts"]["many"]
    ranks, buckets = many["about"]["processes"], explained["buckets"]["25"]
    rows = [a["about"]["batch"]["global"] / a["about"]["processes"] for a in (many, one)]
    fixed, per_row = compute_line((rows[0], work(many)), (rows[1], work(one)))
    backward = compute_line((rows[0], many["backward"]), (rows[1], one["backward"]))
    all_reduce = many["communication"] - one["communication"]
    return Model(
        fixed, per_row, backward, one["optimizer"] + one["communication"], many["straggler"] / largest_of(ranks), tuple(buckets),
        hidden=hidden_share(link, buckets, ranks, all_reduce),
    )  # fmt: skip


def work(account: Mapping[str, float]) -> float:
    """Seconds of a rank's own data, forward and backward, undisturbed."""
    return sum(account[part] for part in ("data", "to_device", "forward", "backward"))


def held_out(explained: Mapping[str, Any], link: Link) -> list[dict[str, Any]]:
    """The speed-up at the measured number of ranks, predicted without measuring any step of several ranks, and what came out.

    From one process, with the whole batch and with a rank's share of it, and from the timed all-reduces: what DDP was
    built for is taken for granted, every bucket but the last hidden at no price, and that ranks do not disturb each other. Not
    held out any more is what the next two know in addition: the measured contention, then the price of hiding.
    """
    one, many = explained["accounts"]["one"], explained["accounts"]["many"]
    ranks, base = many["about"]["processes"], work(one) + one["optimizer"] + one["communication"]
    share = work(many) + many["optimizer"] + one["communication"] + exposed(link, explained["buckets"]["25"], ranks, hidden=1.0)
    measured = explained["speedup"]["measured"]["median"]
    known = (
        ("one process and timed all-reduces", 0.0),
        ("the same, and the measured contention", many["contention"]),
        ("the same, and what hidden all-reduces take from backward", many["contention"] + many["overlap"]),
    )
    return [
        {"known": name, "predicted": base / (share + extra), "measured": measured, "error": base / (share + extra) / measured - 1}
        for name, extra in known
    ]


def predict(explained: Mapping[str, Any], faster: float) -> dict[str, Any]:
    """All curves: efficiencies by link for `RANKS`, at a fixed global batch and at fixed rows per rank, at two speeds of a rank."""
    about = explained["accounts"]["many"]["about"]
    ranks, batch = about["processes"], about["batch"]["global"]
    here = fit_link(explained["link"]["bytes"], explained["link"]["float32"], ranks)
    model = model_of(explained, here)
    name = f"{about['backend']} here"
    links = {name: here, **LINKS}
    curves = [
        {"fixed": fixed, "faster": speed, "rows": rows, "efficiency": {
            name: [model.efficiency(rows, n, link, speed, fixed == "global batch") for n in RANKS] for name, link in links.items()}}
        for speed in (1.0, faster) for fixed, rows in (("global batch", batch), ("rows per rank", batch / ranks))
    ]  # fmt: skip
    one, many = explained["accounts"]["one"], explained["accounts"]["many"]
    share_alone = work(many) + many["optimizer"] + one["communication"] + one["rest"]  # what a single rank takes for a rank's rows
    return {
        "ranks": list(RANKS), "links": {name: asdict(link) for name, link in links.items()}, "model": asdict(model), "curves": curves,
        "measured": {"ranks": ranks, "link": name, "global batch": explained["speedup"]["measured"]["median"] / ranks,
                     "rows per rank": share_alone / many["step"]},
        "held_out": held_out(explained, here),
        "fit": {"bytes": explained["link"]["bytes"][-1],
                "error": here.all_reduce(explained["link"]["bytes"][-1], ranks) / explained["link"]["float32"][-1] - 1},
        "from": {"date": explained["date"], "provenance": explained["provenance"], "about": about},
    }  # fmt: skip


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.scaling", allow_abbrev=False)
    parser.add_argument("--faster", type=float, default=100.0, help="Second speed of a rank to predict for, times the measured one.")
    parser.add_argument("--label", default="", help="Predict from explain-<label>.json, another machine's.")
    arguments = parser.parse_args(argv)
    source, name = named("explain", arguments.label), named("scaling", arguments.label)
    if not arguments.faster > 0:
        raise UserError(f"--faster is {arguments.faster}: allowed is anything above 0.")
    path = RESULTS / f"{source}.json"
    if not path.exists():
        raise UserError(f"there is no benchmarks/results/{path.name} to predict from. Measure it with `make explain`.")
    from benchmarks.scaling_page import plot, section, sentence

    provenance()
    found = predict(json.loads(path.read_text(encoding="utf-8")), arguments.faster)
    written = write_results(name, {"sentence": sentence(found), **found})
    results = json.loads(written.read_text(encoding="utf-8"))
    plot(results, RESULTS.parent / f"{name}.png")
    print(section(results, arguments.label))
    return 0


if __name__ == "__main__":
    sys.exit(run_entry(main))
