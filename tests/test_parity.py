"""The parity matrix at small size: launched runs, compared, explained where they part, and made into a page."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from launching import ROOT

from benchmarks import parity
from benchmarks.common import Launch, interleave, ratio, run_all
from benchmarks.parity_page import page
from pipeline.errors import UserError

REFERENCE = parity.Case("trainer", 1, 1, "fp64", dropout=False)
SPREAD = parity.Case("raw", 2, 2, "fp64", dropout=False)
FAULTY = replace(REFERENCE, entry="raw", extra=("--max_grad_norm", "0.1"))


@pytest.fixture(scope="module")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("parity")


@pytest.fixture(scope="module")
def results(workshop: Path, tiny_model_dir: Path, r8_dir: Path) -> dict[str, Any]:
    """A sound pair, a pair with a planted fault, which is run again with traces, and one run scored again: six launches."""
    options = parity.shared_options(tiny_model_dir, r8_dir, workshop / "data") | {"max_train_samples": 70, "max_length": 32, "max_steps": 6}
    return parity.measure([REFERENCE, SPREAD, FAULTY], [REFERENCE], options, workshop)


@pytest.fixture(scope="module")
def committed() -> dict[str, Any]:
    return json.loads((ROOT / "benchmarks" / "results" / "parity.json").read_text(encoding="utf-8"))


def test_two_processes_with_accumulation_learn_the_same_in_fp64(results: dict[str, Any]) -> None:
    sound = results["pairs"][0]
    assert (sound["a"]["processes"], sound["b"]["processes"], sound["b"]["accumulation"]) == (1, 2, 2)
    assert 0 < sound["apart"]["weights"] <= 1e-12, "not the same bits, or nothing was compared"
    assert sound["apart"]["loss"] <= 1e-6 and sound["apart"]["grad_norm"] <= 1e-6
    assert sound["holds"] and "parting" not in sound
    for run in results["runs"]:
        assert len(run["losses"]) == 6 and run["losses"][0] != run["losses"][-1]


def test_a_broken_bound_is_told_with_the_place(results: dict[str, Any], workshop: Path, capsys: pytest.CaptureFixture[str]) -> None:
    broken = results["pairs"][1]
    assert broken["bound"] == {"weights": 0, "loss": 0, "grad_norm": 0}, "two entries, one layout: the same bits are asked for"
    assert not broken["holds"] and not parity.holds(results)
    assert broken["parting"].startswith("step 1, clipping: one direction, but the norms that the optimizer sees are")
    assert "NO: they part at step 1, clipping" in page(results | stamp())
    # The same from the command line, on the traced runs that were left.
    traced = [str(workshop / "traced" / case.name) for case in (REFERENCE, FAULTY)]
    assert parity.main(["--compare", *traced]) == 1
    assert "part (bit for bit) at step 1, clipping" in capsys.readouterr().out
    assert parity.main(["--compare", traced[0], traced[0]]) == 0
    assert "do not part in the 6 steps" in capsys.readouterr().out


def test_evaluation_is_the_same_at_one_and_two_processes(results: dict[str, Any]) -> None:
    evaluation = results["evaluation"]
    assert evaluation["holds"] and evaluation["each_once"]
    assert [(score["processes"], score["examples"], score["counted"]) for score in evaluation["scored"]] == [(1, 101, 101), (2, 101, 101)]
    assert max(evaluation["apart"].values()) <= 1e-9
    one, two = evaluation["scored"]
    assert one["weights_sha256"] == two["weights_sha256"], "the same weights"
    for fault in ({"counted": 102}, {"weights_sha256": "other"}, {"test": two["test"] | {"nll": two["test"]["nll"] + 1e-8}}):
        assert not parity.judge_scores([one, two | fault])["holds"], fault


def stamp() -> dict[str, Any]:
    """What `write_results` adds, of any run."""
    from pipeline.record import surroundings

    return {"date": "2026-01-01T00:00:00+00:00", "provenance": surroundings()}


def test_the_whole_matrix_is_compared() -> None:
    assert len({case.name for case in parity.ALL}) == len(parity.ALL) == 24
    compared = parity.pairs(parity.ALL)
    assert len(compared) == 4 + 7 + 7
    for a, b in compared:
        assert a.precision == b.precision and a.dropout == b.dropout
        if a.dropout:  # masks belong to a rank
            assert a.layout == b.layout and (a.entry, b.entry) == ("trainer", "raw")
        else:
            assert (a.entry, a.layout) == ("trainer", (1, 1))
    assert {(case.processes, case.accumulation) for case in parity.ALL} == {(1, 1), (1, 2), (2, 1), (2, 2)}


def test_the_committed_page_is_made_from_the_committed_results(committed: dict[str, Any]) -> None:
    assert parity.PAGE.read_text(encoding="utf-8") == page(committed)
    assert parity.holds(committed)
    assert len(committed["runs"]) == 24 and len(committed["pairs"]) == 18
    assert committed["settings"]["steps"] >= 12
    for pair in committed["pairs"]:
        same = (pair["a"]["processes"], pair["a"]["accumulation"]) == (pair["b"]["processes"], pair["b"]["accumulation"])
        weights = 0 if same else {"fp32": 5e-6, "fp64": 1e-12}[pair["b"]["precision"]]
        assert pair["apart"]["weights"] <= weights and max(pair["apart"]["loss"], pair["apart"]["grad_norm"]) <= (0 if same else 1e-6)


def test_what_is_not_a_number_breaks_every_bound() -> None:
    assert parity.largest([0.1, float("nan"), 0.2]) == float("inf")
    assert parity.largest(iter([0.1, 0.3, 0.2])) == 0.3


def test_a_run_that_fails_is_told_by_its_own_line(tmp_path: Path) -> None:
    launch = Launch("raw", 1, tmp_path / "failing", ("--dataset", str(tmp_path / "nothing.csv")))
    with pytest.raises(UserError, match=r"failing failed with code 2: error: .*nothing\.csv"):
        list(run_all([launch], {}, timeout=120))


def test_interleaved_figures_and_their_ratio() -> None:
    order: list[str] = []
    clock = iter(range(100))

    def variant(name: str) -> Any:
        return lambda: (order.append(name), float(next(clock)))[1]

    figures = interleave({name: variant(name) for name in "abc"}, rounds=3)
    assert order == list("abcbcacab"), "each round begins with another variant"
    assert all(len(values) == 3 and all(x < y for x, y in pairwise(values)) for values in figures.values())
    assert [len(v) for v in interleave({"a": lambda: 1.0}, rounds=3, minutes=0).values()] == [1], "the first round is measured at any speed"
    assert ratio([2, 4, 9], [1, 2, 3]) == {"median": 2.0, "lowest": 2.0, "highest": 3.0}
