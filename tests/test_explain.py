"""The account of a step, against ranks that are slowed down on purpose: every delay has to turn up in the part it belongs to."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks.common import provenance
from benchmarks.explain import page, timeline
from benchmarks.explain.__main__ import main
from benchmarks.explain.measure import LINK_BYTES, REMEDIES, Launch, launched
from benchmarks.explain.parts import PARTS, account, gains, losses, predictions, speedups, spread, verdict
from benchmarks.scaling import Link
from pipeline.errors import UserError

STEPS, ROUNDS = 2, 3
DELAY = 0.4  # seconds; much longer than a step of the tiny model
NEAR = DELAY / 4  # what other processes of the machine may disturb

# The measuring worker itself, and a model whose forward can be told to take its time on some ranks.
SLOW_WORKER = """
import sys, time
from benchmarks.explain import worker
from pipeline import train_ddp
wrap = train_ddp.wrap

class SlowRank(worker.Rank):
    def slow(self, ranks, seconds, part="forward"):
        if not hasattr(self, "delay"):
            self.state.model.register_forward_pre_hook(lambda *_: time.sleep(self.delay["forward"]))
            last = [module for module in self.state.model.modules() if isinstance(module, worker.torch.nn.Linear)][-1]
            last.register_full_backward_pre_hook(lambda *_: time.sleep(self.delay["backward"]))
        self.delay = {"forward": 0.0, "backward": 0.0, part: seconds if self.topology.rank in ranks else 0.0}

    def late(self, ranks, seconds):
        # Each DDP made from now on sleeps before its last all-reduce.
        def hooked(*given):
            ddp = wrap(*given)
            pause = seconds if self.topology.rank in ranks else 0.0

            def hook(_, bucket):
                if bucket.is_last():
                    time.sleep(pause)
                return worker.dist.all_reduce(bucket.buffer().div_(2), async_op=True).get_future().then(lambda done: done.value()[0])

            ddp.register_comm_hook(None, hook)
            return ddp
        train_ddp.wrap = hooked if ranks else wrap

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


WAYS: dict[str, tuple[str, dict[str, Any]]] = {
    "entry": ("entry", {}), "alone": ("own", {"together": False}), "together": ("own", {"together": True}),
}  # fmt: skip


def turns(launch: Launch, slow: list[int], ways: Sequence[str] = tuple(WAYS), part: str = "forward") -> dict[str, list[Any]]:
    """Rounds of those ways, in which the ranks `slow` are, in that part."""
    launch.ask("slow", ranks=slow, seconds=DELAY, part=part)
    found: dict[str, list[Any]] = {f"many/{way}": [] for way in ways}
    for _ in range(ROUNDS):
        for way in ways:
            method, task = WAYS[way]
            found[f"many/{way}"].append(launch.ask(method, steps=STEPS, **task))
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


@pytest.mark.parametrize(("lost", "slow", "part"), [("contention", ("entry", "together"), "forward"), ("contention", ("entry", "together"), "backward"),
                                                    ("contention", ("entry",), "forward"), ("overlap", ("entry",), "backward")])  # fmt: skip
def test_a_slower_backward_is_told_from_one_slowed_by_all_reduces(launch: Launch, lost: str, slow: tuple[str, ...], part: str) -> None:
    """Ranks that are slower beside each other than alone, or only when they exchange: here because the delay is set only then."""
    found = account(turns(launch, [0, 1], slow, part) | turns(launch, [], [way for way in WAYS if way not in slow]), "many")
    assert found[lost] == pytest.approx(DELAY, abs=NEAR)
    assert all(abs(found[other]) < NEAR for other in ("contention", "overlap", "straggler", "communication") if other != lost), found


def test_the_stamps_sleep_in_every_other_step(launch: Launch) -> None:
    launch.ask("slow", ranks=[0], seconds=DELAY)
    first, second = (launch.ask("entry", steps=2 * STEPS) for _ in range(2))
    for rank in (*first, *second):
        assert len(rank) == 2 * STEPS and all(step["step"] > DELAY for step in rank)
        assert all(list(step) == ["step"] or {"forward", "backward", "optimizer", "ready"} <= step.keys() for step in rank)
    stamped = [["ready" in step for step in turn[0]] for turn in (first, second)]
    assert stamped[0] == [not at for at in stamped[1]] and sum(stamped[0]) == STEPS, "in the next turn in the others"


def test_the_speed_up_from_the_parts_is_judged_by_steps_without_stamps() -> None:
    """Two processes that halve a step of 1 s but for 0.1 s of an all-reduce; a stamp that costs one process 0.2 s is found out."""

    def found(stamps: float) -> dict[str, Any]:
        rng = np.random.default_rng(1)
        turns: dict[str, Any] = {"one/entry": [], "many/entry": []}
        for turn in range(8):
            speed = rng.choice([1.0, 1.6])  # the machine's in this turn
            one = {"ready": 0.0, "forward": (0.5 + stamps) * speed, "backward": 0.5 * speed, "step": (1.0 + stamps) * speed}
            many = {"ready": 0.0, "forward": 0.25, "backward": 0.25, "reduce": 0.1, "step": 0.6}
            for name, parts, plain, ranks in (("one", one, speed, 1), ("many", many, 0.6, 2)):
                turns[f"{name}/entry"].append([[parts if step % 2 == turn % 2 else {"step": plain} for step in range(4)]] * ranks)
        return spread(turns, speedups)

    honest, costly = found(0.0), found(0.2)
    assert honest["off"]["median"] == pytest.approx(0) and verdict(honest["off"], 8) == "right"
    assert costly["over one"] == honest["over one"] and verdict(costly["off"], 8) == "wrong"
    assert honest["over one"]["highest"] - honest["over one"]["lowest"] > 0.3, "though it is itself uncertain"


@pytest.mark.parametrize("rounds", [1, 2, 3])
def test_few_rounds_give_figures_and_no_verdict(rounds: int) -> None:
    def step(seconds: float, stamped: bool) -> dict[str, float]:
        return {"ready": 0.0, "forward": seconds / 2, "backward": seconds / 2, "step": seconds} if stamped else {"step": seconds}

    turns = {f"{name}/entry": [[[step(seconds, at % 2 == turn % 2) for at in range(4)]] * ranks for turn in range(rounds)]
             for name, seconds, ranks in (("one", 1.0, 1), ("many", 0.5, 2))}  # fmt: skip
    found = spread(turns, speedups)
    assert found["over one"] == {"median": 2, "lowest": 2, "highest": 2} and found["off"]["median"] == pytest.approx(0)
    assert verdict(found["off"], rounds) == "open"


def test_the_last_gradient_is_noted_before_it_is_reduced(launch: Launch) -> None:
    """One rank is late by a delay after its last gradient (in DDP's hook): what follows is no backward of its own any more."""
    launch.ask("slow", ranks=[], seconds=0.0)
    launch.ask("late", ranks=[1], seconds=DELAY)
    found = account({"many/entry": [launch.ask("entry", steps=STEPS) for _ in range(ROUNDS)]}, "many")
    launch.ask("late", ranks=[], seconds=0.0)
    assert found["communication"] == pytest.approx(DELAY, abs=NEAR) and found["backward"] < NEAR, found


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
        "overlap": 0.0,
        "straggler": 0.02,
        "communication": 0.06,
        "rest": 0.04,
    }
    many["step"] = sum(many.values())
    lost = losses(one, many, 2)
    assert lost["copies"] * many["step"] == pytest.approx(0.01) and lost["communication"] * many["step"] == pytest.approx(0.04)
    assert sum(lost.values()) == pytest.approx(1 - one["step"] / 2 / many["step"])
    assert lost["optimizer"] * many["step"] == pytest.approx(0.05) and lost["small_batch"] * many["step"] == pytest.approx(0.02)
    rows = {name: {"median": share, "lowest": share - 0.02, "highest": share + 0.02} for name, share in lost.items()}
    results = {"accounts": {"many": {"about": {"processes": 2}}}, "losses": rows, "speedup": {"measured": {"median": 1 / many["step"]}}}
    assert page.sentence(results) == (
        "1.45x of 2: 7% the ranks slowing each other down, 7% the optimizer, which each rank runs in full, 6% all-reduce not hidden "
        "under backward, 3% a smaller batch a rank, which computes less per second, 3% waiting for the slower rank, 1% too uncertain to name."
    )


def test_what_is_hidden_has_its_price() -> None:
    """Two buckets of 10 ms and a last one of 50: backward hides all of the two, and is 20 ms longer for it. One bucket hides nothing."""
    link, buckets = Link(latency=0.0, bandwidth=1e9), [10_000_000, 10_000_000, 50_000_000]
    turns: dict[str, Any] = {"many/entry": [[[{"backward": 0.3, "optimizer": 0.1, "step": 0.5}]] * 2]}
    turns |= {f"many/link {dtype}": [[[link.all_reduce(size, 2) for size in LINK_BYTES]] * 2] for dtype in ("float32", "float16")}
    turns["many/passes"] = [[{"casts": 0.0, "sum": 0.04}] * 2]
    sizes = {"5": [5_000_000] * 4 + [50_000_000], "25": buckets, "100": [sum(buckets)]}

    def saved(overlap: float) -> dict[str, float]:
        found = predictions(turns, sizes, {"communication": 0.01}, {"communication": 0.06, "overlap": overlap, "step": 0.5}, 2)
        return {name: 0.5 - 0.5 / (1 + gain) for name, gain in found.items()}

    free, paid = saved(0.0), saved(0.02)
    assert free["larger buckets"] == pytest.approx(-0.02) and paid["larger buckets"] == pytest.approx(0)
    assert free["smaller buckets"] == pytest.approx(0) and paid["smaller buckets"] == pytest.approx(0)
    assert free["fp16 hook"] == pytest.approx(0.025) and paid["fp16 hook"] == pytest.approx(0.035)
    assert free["accumulation"] == pytest.approx((0.06 + 0.1 - 0.04) / 2) and paid["accumulation"] == pytest.approx((0.08 + 0.1 - 0.04) / 2)


@pytest.mark.parametrize("talking", [-0.04, 0.05, 0.3])
def test_what_changes_nothing_is_predicted_to_change_nothing(talking: float) -> None:
    """Whatever the all-reduce was found to cost: less than nothing, as differences of measurements can come out, or a lot."""
    link, buckets = Link(latency=2e-4, bandwidth=1.2e9), [3_000_000, 28_000_000, 60_000_000]
    step = {"forward": 0.2, "backward": 0.3, "optimizer": 0.1, "step": 0.6}
    turns: dict[str, Any] = {f"many/{name}": [[[step] * 4] * 2] * 3 for name in ("entry", *REMEDIES)}
    turns["many/accumulation"] = [[[step] * 2] * 2] * 3  # half as many steps of twice the rows, each as long: twice as fast
    turns |= {f"many/link {dtype}": [[[link.all_reduce(size, 2) for size in LINK_BYTES]] * 2] * 3 for dtype in ("float32", "float16")}
    turns["many/passes"] = [[{"casts": 0.0, "sum": 0.0}] * 2] * 3
    sizes = dict.fromkeys(("5", "25", "100"), buckets)
    predicted = predictions(turns, sizes, {"communication": 0.01}, {"communication": 0.01 + talking, "overlap": 0.03, "step": 0.6}, 2)
    for name in ("larger buckets", "smaller buckets", "static graph"):
        assert predicted[name] == pytest.approx(0) and gains(turns)[name] == pytest.approx(0)
    assert predicted["fp16 hook"] > 0, "half of the bytes over a link that is as fast"
    turns["many/passes"] = [[{"casts": casts, "sum": 0.0} for casts in (0.1, 0.3)]] * 3
    saved = 0.6 - 0.6 / (1 + predicted["fp16 hook"])
    slower = predictions(turns, sizes, {"communication": 0.01}, {"communication": 0.01 + talking, "overlap": 0.03, "step": 0.6}, 2)[
        "fp16 hook"
    ]
    assert 0.6 / (1 + slower) == pytest.approx(0.6 - saved + 0.3), "the slower rank's casts come on top"
    assert gains(turns)["accumulation"] == pytest.approx(1)


def test_what_the_rounds_do_not_tell_is_left_open() -> None:
    """Steps of 1 s but for noise between rounds, and 10% faster ones: told from each other where the noise allows it."""

    def found(noise: float) -> dict[str, float]:
        rng = np.random.default_rng(1)
        turns = {f"many/{name}": [[[{"step": rng.normal(mean, noise)}] * 4] * 2 for _ in range(7)]
                 for name, mean in (("entry", 1.1), *((name, 1.0) for name in REMEDIES))}  # fmt: skip
        turns["many/accumulation"] = [[rank[:2] for rank in ranks] for ranks in turns["many/accumulation"]]
        return spread(turns, gains)["larger buckets"]

    clear, noisy = found(0.002), found(0.4)
    assert clear["lowest"] <= clear["median"] <= clear["highest"] and clear["median"] == pytest.approx(0.1, abs=0.005)

    def off(predicted: float, measured: dict[str, float]) -> dict[str, float]:
        return {
            "median": predicted - measured["median"],
            "lowest": predicted - measured["highest"],
            "highest": predicted - measured["lowest"],
        }

    assert [verdict(off(predicted, clear), 8) for predicted in (0.08, 0.0, 0.2)] == ["right", "wrong", "wrong"]
    assert verdict(off(0.1, noisy), 8) == verdict(off(0.0, noisy), 8) == "open"
    assert verdict(off(0.08, clear), 3) == "open", "three rounds are too few to tell how much rounds differ"
    near = {"median": 0.01, "lowest": -0.07, "highest": 0.09}
    assert verdict(near, 8) == "likely" and verdict(near, 3) == "open"
    assert verdict(near | {"median": 0.07}, 8) == verdict(near | {"lowest": -0.2}, 8) == "open", "its middle is off, or it is too wide"


def test_a_rank_alone_is_compared_in_the_same_steps() -> None:
    """One round: stamps in the short steps alone, while the rank by itself has all of them."""
    short, long = ({"ready": 0.0, "backward": seconds, "step": seconds} for seconds in (0.5, 2.0))
    entry = [[[short, {"step": 2.0}] * 2] * 2]
    found = account({"many/entry": entry} | {f"many/{way}": [[[short, long] * 2] * 2] for way in ("alone", "together")}, "many")
    assert found["contention"] == found["overlap"] == 0 and found["backward"] == found["step"] == 0.5 and found["plain"] == 2


@pytest.mark.parametrize(("option", "value"), [("--steps", "3"), ("--processes", "1"), ("--rounds", "0")])
def test_a_wrong_number_is_refused_before_anything_is_measured(option: str, value: str) -> None:
    with pytest.raises(UserError, match=f"{option} is {value}: allowed is"):
        main([option, value])
