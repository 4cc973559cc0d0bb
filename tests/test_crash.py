"""Runs killed with SIGKILL and started again end as if they had never been: a few kills here, all of them in the slow test."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks import crash_test

ENVIRONMENT = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "PYTHONUNBUFFERED": "1"}


@pytest.mark.timeout(600)
def test_a_few_kills_leave_no_trace(tmp_path: Path, tiny_model_dir: Path, r8_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(crash_test, "MOMENTS", ("write", "train", "end"))
    options = crash_test.settings(tmp_path, tiny_model_dir, r8_dir, 800)
    results = crash_test.run(["raw", "trainer"], 5, options, tmp_path, ENVIRONMENT, seed=3)
    assert results["passed"], results
    assert results["kills"] == 5 and results["inside_a_write"] >= 1, results


@pytest.mark.slow
@pytest.mark.timeout(2400)
def test_all_kills_leave_no_trace(tmp_path: Path, encoder_dir: Path, r8_dir: Path) -> None:
    options = crash_test.settings(tmp_path, encoder_dir, r8_dir, 800)
    results = crash_test.run(["raw", "trainer"], crash_test.KILLS, options, tmp_path, ENVIRONMENT, seed=0)
    assert results["passed"] and results["kills"] >= 25, results
