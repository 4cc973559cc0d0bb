"""The scaling model against formulas known in closed form, and against steps made up from it."""

from __future__ import annotations

import itertools
import math
from pathlib import Path
from typing import Any

import pytest

from benchmarks import scaling_page
from benchmarks.common import provenance
from benchmarks.scaling import LINKS, RANKS, Link, exposed, fit_link, hidden_share, largest_of, predict

BUCKETS = [3_000_000, 28_000_000, 60_000_000]
GLOO = Link(latency=2e-4, bandwidth=1.2e9)


def explained(hidden: float, contention: float = 0.0, overlap: float = 0.0) -> dict[str, Any]:
    """What benchmarks.explain would find where 5 ms a row and 20 ms a batch are all there is to computing."""
    where = {"cores": 2, "cpu": "CPU", "gpus": []}
    provenance = {"command": "c", "hardware": where, "versions": dict.fromkeys(("torch", "transformers", "accelerate", "python"), "1"),
                  "code": {"commit": None, "dirty": None}}  # fmt: skip

    def account(ranks: int, rows: int) -> dict[str, Any]:
        about = {"processes": ranks, "threads": 1, "device": "cpu", "backend": "gloo", "batch": {"global": 32, "per_device": rows}}
        compute = 0.02 + 0.005 * rows
        parts = {"data": 0.001, "to_device": 0.0, "forward": compute - 0.101, "backward": 0.1, "optimizer": 0.03, "straggler": 0.0,
                 "contention": contention * (ranks - 1), "overlap": overlap * (ranks - 1), "communication": 0.01 + (exposed(GLOO, BUCKETS, ranks, hidden) if ranks > 1 else 0)}  # fmt: skip
        return {"about": about, **parts, "rest": 0.0, "step": sum(parts.values())}

    one, many = account(1, 32), account(2, 16)
    sizes = [2**k for k in range(12, 27, 2)]
    link = {"bytes": sizes, "float32": [GLOO.all_reduce(size, 2) for size in sizes]}
    return {"accounts": {"one": one, "many": many}, "buckets": {"25": BUCKETS}, "link": link, "date": "2026-01-01", "provenance": provenance,
            "speedup": {"measured": {"median": one["step"] / many["step"]}}}  # fmt: skip


def test_the_ring_and_its_fit() -> None:
    link = Link(latency=5e-6, bandwidth=1e10)
    assert link.all_reduce(1e9, 1) == 0 and link.all_reduce(1e9, 4) == pytest.approx(2 * 3 / 4 * 0.1 + 6 * 5e-6)
    for ranks in (2, 8):
        sizes = [4096, 10**6, 10**8]
        fitted = fit_link(sizes, [link.all_reduce(size, ranks) for size in sizes], ranks)
        assert fitted.latency == pytest.approx(link.latency) and fitted.bandwidth == pytest.approx(link.bandwidth)


def test_the_largest_of_normal_numbers() -> None:
    """In closed form for two and three: H. A. David and H. N. Nagaraja, Order Statistics."""
    assert largest_of(1) == 0
    assert largest_of(2) == pytest.approx(1 / math.sqrt(math.pi), rel=1e-4) and largest_of(3) == pytest.approx(
        1.5 / math.sqrt(math.pi), rel=1e-4
    )


@pytest.mark.parametrize("hidden", [0.6, -0.5])
def test_the_model_gives_back_what_it_was_made_from(hidden: float) -> None:
    assert hidden_share(GLOO, BUCKETS, 2, exposed(GLOO, BUCKETS, 2, hidden)) == pytest.approx(hidden)
    found = predict(explained(hidden), faster=100)
    fixed_global, fixed_rows = found["curves"][0], found["curves"][1]
    for curve in (fixed_global, fixed_rows):
        assert curve["efficiency"]["gloo here"][1] == pytest.approx(found["measured"][curve["fixed"]])
    rows = found["model"]
    assert (rows["fixed"], rows["per_row"], rows["hidden"]) == (pytest.approx(0.02), pytest.approx(0.005), pytest.approx(hidden))


def test_no_more_is_hidden_than_backward_lasts() -> None:
    """Two buckets of 10 ms each and a last one of 30, of which a backward of 15 ms hides no more than that."""
    link, buckets = Link(latency=0.0, bandwidth=1e9), [10_000_000, 10_000_000, 30_000_000]
    assert [exposed(link, buckets, 2, hidden=1.0, backward=seconds) for seconds in (0.1, 0.015, 0.0)] == pytest.approx([0.03, 0.035, 0.05])
    assert exposed(link, buckets, 2, hidden=0.5, backward=0.015) == pytest.approx(0.04)


def test_more_ranks_and_slower_links_never_help() -> None:
    for curve in predict(explained(0.5), faster=100)["curves"]:
        for values in curve["efficiency"].values():
            assert values[0] == 1 and values == sorted(values, reverse=True) and len(values) == len(RANKS)
        ethernet = [curve["efficiency"][name] for name in LINKS if "Ethernet" in name]
        assert all(slow <= fast for slower, faster in itertools.pairwise(ethernet) for slow, fast in zip(slower, faster, strict=True))


def test_the_check_holds_out_what_it_says() -> None:
    """All that is not known beforehand is missing from the first prediction, the price of hiding from the second, nothing from the last."""
    strict, informed, priced = predict(explained(hidden=1.0, contention=0.04, overlap=0.02), faster=100)["held_out"]
    assert strict["error"] > informed["error"] + 0.1 and informed["error"] > 0.05 and priced["error"] == pytest.approx(0)


def test_the_page_says_that_it_predicts(tmp_path: Path) -> None:
    results = predict(explained(0.5), faster=100)
    text = scaling_page.section(results)
    assert text.startswith("## More ranks: predictions") and "**Predictions**" in text and "which nobody measured" in text
    assert "of the other buckets 50% of the time is hidden under backward" in text
    worse = scaling_page.section(predict(explained(-0.5), faster=100))
    assert "none is hidden: talking under backward takes 1.5 times as long" in worse
    scaling_page.plot(results | provenance(), tmp_path / "scaling.png")
    assert (tmp_path / "scaling.png").stat().st_size > 20_000
