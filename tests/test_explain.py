"""The account of a step, against ranks that are slowed down on purpose: every delay has to turn up in the part it belongs to."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from benchmarks.common import provenance
from benchmarks.explain import page, timeline
from benchmarks.explain.__main__ import main
from benchmarks.explain.measure import LINK_BYTES, REMEDIES, Launch, launched
from benchmarks.explain.parts import PARTS, account, losses, remedies
from benchmarks.scaling import Link
from pipeline.errors import UserError

STEPS, ROUNDS = 2, 3
DELAY = 0.4  # seconds; much longer than a step of the tiny model
NEAR = DELAY / 4  # what other processes of the machine may disturb

# The measuring worker itself, and a model whose forward can be told to take its time on some ranks.
SLOW_WORKER = """
import sys, time
from benchmarks.explain import worker

class SlowRank(worker.Rank):
    def slow(self, ranks, seconds):
        if not hasattr(self, "delay"):
            self.state.model.register_forward_pre_hook(lambda *_: time.sleep(self.delay))
        self.delay = seconds if self.topology.rank in ranks else 0.0

worker.Rank = SlowRank
sys.exit(worker.run_entry(worker.main))
"""


@pytest.fixture(scope="module")
def launch(tiny_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Launch]:
    folder = tmp_path_factory.mktemp("explain")
    (folder / "slow_worker.py").write_text(SLOW_WORKER, encoding="utf-8")
    for name, rows in (("train", 300), ("test", 4)):
        lines = [f"{'word ' * (3 + i % 9)}{i},{'ab'[i % 2]}" for i in range(rows)]
        (folder / f"{name}.csv").write_text("\n".join(["text,label", *lines]), encoding="utf-8")
    options = ["--model", str(tiny_model_dir), "--dataset", str(folder / "train.csv"), "--test_file", str(folder / "test.csv"),
               "--precision", "fp32", "--device", "cpu"]  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(folder), prepend=":")
        with launched({"many": (2, 1)}, options, folder, module="slow_worker") as launches:
            yield launches["many"]


def turns(launch: Launch, slow: list[int]) -> dict[str, list[Any]]:
    launch.ask("slow", ranks=slow, seconds=DELAY)
    found: dict[str, list[Any]] = {f"many/{way}": [] for way in ("entry", "quiet", "alone")}
    for _ in range(ROUNDS):
        found["many/entry"].append(launch.ask("entry", steps=STEPS))
        for way in ("quiet", "alone"):
            found[f"many/{way}"].append(launch.ask("silent", steps=STEPS, how=way))
    return found


def test_a_delay_is_found_in_its_part(launch: Launch) -> None:
    undisturbed = account(turns(launch, []), "many")

    def more(slow: list[int]) -> dict[str, float]:
        """By how many seconds each part has grown."""
        found = account(turns(launch, slow), "many")
        assert sum(found[part] for part in PARTS) + found["rest"] == pytest.approx(found["step"]) and abs(found["rest"]) < NEAR, found
        return {part: found[part] - undisturbed[part] for part in found}

    both = more([0, 1])
    assert both["forward"] == pytest.approx(DELAY, abs=NEAR) and both["step"] == pytest.approx(DELAY, abs=NEAR)
    assert all(abs(both[part]) < NEAR for part in PARTS if part != "forward"), both
    one = more([1])  # as long a step: rank 0 waits what rank 1 takes longer, half of either in the mean over ranks
    assert one["step"] == pytest.approx(DELAY, abs=NEAR)
    assert one["straggler"] == pytest.approx(DELAY / 2, abs=NEAR) and one["forward"] == pytest.approx(DELAY / 2, abs=NEAR)
    assert all(abs(one[part]) < NEAR for part in PARTS if part not in ("forward", "straggler")), one


def test_the_timeline_shows_every_gradient_under_backward(launch: Launch, tmp_path: Path) -> None:
    launch.ask("slow", ranks=[], seconds=0.0)
    about = launch.ask("about")[0]
    ranks = timeline.choose(launch.ask("timeline", steps=3))
    for spans in ranks:
        (backward,) = [span for span in spans if span[0] == "backward"]
        reduces = [span for span in spans if span[0] == "all-reduce"]
        assert sum(span[3] for span in reduces) == about["gradient_bytes"]
        assert all(backward[1] < begin < end <= backward[2] for _, begin, end, _ in reduces)
    timeline.plot({"ranks": ranks, **provenance()}, tmp_path / "timeline.png")
    assert (tmp_path / "timeline.png").stat().st_size > 10_000


def test_losses_and_efficiency_make_a_whole() -> None:
    parts = dict.fromkeys((*PARTS, "rest"), 0.0)
    one = parts | {"forward": 0.3, "backward": 0.5, "optimizer": 0.1, "communication": 0.02, "rest": 0.08, "step": 1.0}
    many = parts | {
        "forward": 0.16,
        "backward": 0.26,
        "optimizer": 0.1,
        "contention": 0.05,
        "straggler": 0.02,
        "communication": 0.06,
        "rest": 0.04,
    }
    many["step"] = sum(many.values())
    lost = losses(one, many, 2)
    assert sum(lost.values()) == pytest.approx(1 - one["step"] / 2 / many["step"])
    assert lost["optimizer"] * many["step"] == pytest.approx(0.05) and lost["small_batch"] * many["step"] == pytest.approx(0.02)
    results = {"accounts": {"many": {"about": {"processes": 2}}}, "losses": lost, "speedup": {"measured": {"median": 1 / many["step"]}}}
    assert page.sentence(results).startswith("1.45x of 2: 7% the ranks slowing each other down, 7% the optimizer")


@pytest.mark.parametrize("talking", [-0.04, 0.05, 0.3])
def test_what_changes_nothing_is_predicted_to_change_nothing(talking: float) -> None:
    """Whatever the all-reduce was found to cost: less than nothing, as differences of measurements can come out, or a lot."""
    link, buckets = Link(latency=2e-4, bandwidth=1.2e9), [3_000_000, 28_000_000, 60_000_000]
    step = {"forward": 0.2, "backward": 0.3, "optimizer": 0.1, "step": 0.6}
    turns: dict[str, Any] = {f"many/{name}": [[[step] * 4] * 2] * 3 for name in ("entry", *REMEDIES)}
    turns |= {f"many/link {dtype}": [[[link.all_reduce(size, 2) for size in LINK_BYTES]] * 2] * 3 for dtype in ("float32", "float16")}
    raw = {"turns": turns, "buckets": dict.fromkeys(("5", "25", "100"), buckets)}
    rows = {row["remedy"]: row for row in remedies(raw, {"communication": 0.01}, {"communication": 0.01 + talking}, 2)}
    for name in ("larger buckets", "smaller buckets", "static graph"):
        assert rows[name]["predicted"] == pytest.approx(0) and rows[name]["measured"]["median"] == pytest.approx(0) and rows[name]["right"]
    assert rows["fp16 hook"]["predicted"] > 0, "half of the bytes over a link that is as fast"


@pytest.mark.parametrize(("option", "value"), [("--steps", "3"), ("--processes", "1"), ("--rounds", "0")])
def test_a_wrong_number_is_refused_before_anything_is_measured(option: str, value: str) -> None:
    with pytest.raises(UserError, match=f"{option} is {value}: allowed is"):
        main([option, value])
