"""The pages under benchmarks/ are those that their programs make of the measured JSON, and every bound in them is held."""

from __future__ import annotations

import json
from typing import Any

import pytest
from launching import ROOT

from benchmarks import crash_test, training_speed


def results(name: str) -> dict[str, Any]:
    return json.loads((ROOT / "benchmarks" / "results" / f"{name}.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize("module", [crash_test, training_speed])
def test_the_page_is_that_of_the_results(module: Any) -> None:
    assert module.PAGE.read_text(encoding="utf-8") == module.page(results(module.PAGE.stem))


def test_what_was_measured_holds() -> None:
    crash = results("crash_test")
    assert crash["passed"] and crash["kills"] >= 25 and crash["inside_a_write"] >= 3
    speed = results("training_speed")
    for row in speed["questions"]:
        bound = training_speed.BOUNDS[row["question"]]
        within = row["median"] <= bound if row["question"] == "checkpoint_share" else row["median"] >= bound
        assert row["held"] == within and within, row
