"""The whole system from nothing: what it promises at its end, and that no end leaves a process behind."""

from __future__ import annotations

import json
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from launching import ROOT, alive, family, launch, started, wait_until

from pipeline.quickstart import GRACE_SECONDS


def test_ctrl_c_in_the_middle_ends_everything(tmp_path: Path, encoder_dir: Path) -> None:
    with started([str(tmp_path / "quick")], module="pipeline.quickstart") as process:

        def workers() -> list[psutil.Process]:
            return [p for p in alive(family(process)) if "--hub_repo" in (line := _command(p)) and "pipeline.launch" not in line]

        wait_until(process, lambda: len(workers()) >= 2, seconds=200, look=0.2)
        time.sleep(6)  # into the workers' imports and on; each moment must do
        members = family(process)
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=2 * GRACE_SECONDS + 40)  # each child may need its grace
    assert process.returncode == 130
    assert len(members) >= 5, "quickstart, Hub, launcher, two workers"
    psutil.wait_procs(members, timeout=10)
    assert not alive(members)


def _command(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.Error:
        return ""


def test_a_folder_with_other_things_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("years of work")
    done = launch([str(tmp_path)], module="pipeline.quickstart")
    assert done.returncode == 2 and "something else" in done.stderr
    assert (tmp_path / "thesis.txt").read_text() == "years of work"


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_quickstart_keeps_its_promises(tmp_path: Path) -> None:
    done = launch([str(tmp_path / "quick")], module="pipeline.quickstart", timeout=850)
    assert done.returncode == 0, done.stderr[-3000:]
    summary = json.loads((tmp_path / "quick" / "summary.json").read_text(encoding="utf-8"))
    assert summary["test_accuracy"] >= 0.96
    assert summary["world_size"] == 2
    assert summary["served_commit"] == summary["hub_commit"] and len(summary["hub_commit"]) == 40
    assert summary["hub_tag"] == "v1"
    assert summary["prediction"]["label"] == "crude" and 0.5 < summary["prediction"]["confidence"] <= 1
    assert summary["test_macro_f1"] > 0.8 and summary["train_seconds"] > 0 and summary["samples_per_second"] > 0
    assert "DistriNews quickstart" in done.stdout
    # The command it proposes for the first time: as printed, but for where this test writes.
    line = next(line for line in done.stdout.splitlines() if "pipeline.predict" in line)
    command = shlex.split(line)[1:]
    command[command.index("--output") + 1] = str(tmp_path / "scored.csv")
    again = subprocess.run([sys.executable, *command], cwd=ROOT, capture_output=True, text=True, timeout=200, check=False)
    assert again.returncode == 0, again.stderr
    assert "predicted_label" in (tmp_path / "scored.csv").read_text(encoding="utf-8")
    assert all((ROOT / word).exists() for word in shlex.split(done.stdout.split("make serve MODEL=")[1])[:1])
