"""Runs that are stopped, killed and hung, really launched: nothing is lost, and going on equals never having stopped."""

from __future__ import annotations

import json
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
from launching import alive, error_lines, family, launch, short_run, started, suspend_in_a_step, wait_until, workers

SETTINGS = """
validation_share: 0.05
epochs: 4
cpu_threads: 1
checkpoint_steps: 25
logging_steps: 10
hang_seconds: 8
"""


@pytest.fixture(scope="module")
def workshop(tmp_path_factory: pytest.TempPathFactory, tiny_model_dir: Path, r8_dir: Path) -> Path:
    folder = tmp_path_factory.mktemp("stopping")
    short_run(folder, tiny_model_dir, r8_dir, SETTINGS)
    return folder


def arguments(workshop: Path, kind: str, name: str, *options: str) -> list[str]:
    return [kind, str(workshop / "run.yaml"), "--output_dir", str(workshop / name), *options]


def finish(workshop: Path, kind: str, name: str, *options: str) -> dict[str, Any]:
    done = launch(arguments(workshop, kind, name, *options), timeout=200)
    assert done.returncode == 0, done.stderr
    record = json.loads((workshop / name / "run.json").read_text(encoding="utf-8"))
    return {"record": record, "out": done.stdout, "err": done.stderr}


@pytest.fixture(scope="module")
def whole(workshop: Path) -> dict[str, Any]:
    """The run that nothing happens to."""
    return finish(workshop, "train-raw-ddp", "whole")


def same(run: dict[str, Any], other: dict[str, Any]) -> None:
    """Equal to the last bit: every logged loss and gradient norm, and the weights. The two entries add up their
    validations in another order, which shows in the sixteenth digit."""
    mine, theirs = run["record"], other["record"]
    assert mine["history"] == theirs["history"]
    for ours, its in zip(mine["epochs"], theirs["epochs"], strict=True):
        for name in ("step", "loss", "accuracy", "macro_f1", "nll", "ece"):
            assert ours[name] == pytest.approx(its[name], abs=1e-12)
    assert (mine["weights_sha256"], mine["steps"], mine["best"]["step"]) == (
        theirs["weights_sha256"],
        theirs["steps"],
        theirs["best"]["step"],
    )


def interrupt(
    workshop: Path, kind: str, name: str, act: Callable[[Any, dict[int, psutil.Process]], None], *options: str, after: int = 25, delay: float = 0.3
) -> tuple[int, float, str]:  # fmt: skip
    """Launch, wait for the checkpoint of step `after` and a little, act; returns code, seconds until the end, and stderr."""
    folder = workshop / name
    with started(arguments(workshop, kind, name, *options)) as process:
        wait_until(process, lambda: (folder / f"checkpoint-{after}" / "manifest.json").exists())
        time.sleep(delay)
        members = family(process)
        act(process, workers(process))
        began = time.monotonic()
        _, err = process.communicate(timeout=90)
        seconds = time.monotonic() - began
    psutil.wait_procs(members, timeout=5)
    assert not alive(members), "none may survive"
    return process.returncode, seconds, err


def whole_steps(folder: Path) -> list[int]:
    return sorted(int(p.parent.name.removeprefix("checkpoint-")) for p in folder.glob("checkpoint-*/manifest.json"))


def test_sigterm_saves_on_all_ranks_and_the_same_command_goes_on(workshop: Path, whole: dict[str, Any]) -> None:
    """Once to the launcher, once to one rank; between two logs, and within an epoch."""
    code, seconds, err = interrupt(workshop, "train-ddp", "term", lambda process, ranks: process.send_signal(signal.SIGTERM))
    assert code == 75 and seconds < 20, err
    assert err.count("Stopped by SIGTERM") == 1 and "Traceback" not in err, err
    assert whole_steps(workshop / "term")[-1] > 25, "it saved where it stood"

    code, seconds, err = interrupt(workshop, "train-ddp", "term", lambda process, ranks: ranks[1].send_signal(signal.SIGTERM), after=75)
    assert code == 75 and seconds < 20, err
    again = finish(workshop, "train-ddp", "term")
    assert "resumed     after step" in again["out"]
    assert len(again["record"]["sessions"]) == 3
    same(again, whole)


def test_one_process_is_stopped_alike_and_two_go_on(workshop: Path) -> None:
    code, _, err = interrupt(workshop, "train", "alone", lambda process, ranks: process.send_signal(signal.SIGTERM))
    assert code == 75 and err.count("Stopped by SIGTERM") == 1, err
    again = finish(workshop, "train-ddp", "alone")
    assert "note        2 process(es) go on from 1: dropout masks belong to a rank" in again["out"]


def test_two_processes_then_one_then_two(workshop: Path) -> None:
    """In mid-epoch, dropout off: as if the number had never changed. In fp64, where rounding cannot hide a mistake."""
    from safetensors.torch import load_file

    options = ("--dropout", "0", "--logging_steps", "7", "--precision", "fp64")
    code, _, err = interrupt(workshop, "train-raw-ddp", "elastic", lambda process, ranks: process.send_signal(signal.SIGTERM), *options)
    assert code == 75, err
    folder = workshop / "elastic"
    at = whole_steps(folder)[-1]
    # One process is the entry itself, without a launcher.
    with started(arguments(workshop, "", "elastic", *options)[1:], module="pipeline.train_ddp") as process:
        wait_until(process, lambda: whole_steps(folder)[-1] != at)
        process.send_signal(signal.SIGTERM)
        _, err = process.communicate(timeout=60)
    assert process.returncode == 75, err
    changed = finish(workshop, "train-raw-ddp", "elastic", *options)["record"]
    assert [s["topology"]["world_size"] for s in changed["sessions"]] == [2, 1, 2]
    straight = finish(workshop, "train-raw-ddp", "straight", *options)["record"]
    for mine, theirs in zip(changed["history"], straight["history"], strict=True):
        assert mine["step"] == theirs["step"] and mine["loss"] == pytest.approx(theirs["loss"], abs=1e-12)
    a, b = (load_file(workshop / name / f"checkpoint-{changed['steps']}" / "model.safetensors") for name in ("elastic", "straight"))
    assert max(float((a[name] - b[name]).abs().max()) for name in a) < 1e-12


def test_a_killed_rank_is_named(workshop: Path) -> None:
    code, seconds, err = interrupt(workshop, "train-raw-ddp", "killed", lambda process, ranks: ranks[1].kill())
    assert code == 137 and seconds < 60, err
    assert next(line for line in err.splitlines() if line.startswith("error")).startswith("error: rank 1 was ended by SIGKILL"), err


def test_a_killed_rank_is_named_under_the_plain_launcher(workshop: Path) -> None:
    """`torchrun` and `accelerate launch` say little and a lot; the surviving rank says which one is gone."""
    folder = workshop / "plain"
    command = ["--nproc_per_node", "2", "-m", "pipeline.train_ddp", *arguments(workshop, "", "plain")[1:]]
    with started(command, module="torch.distributed.run") as process:
        wait_until(process, lambda: (folder / "checkpoint-25" / "manifest.json").exists())
        time.sleep(1.5)  # a pulse of the watch
        workers(process)[0].kill()
        _, err = process.communicate(timeout=60)
    assert "error (rank 1): Rank 0 on" in err and "has ended in mid-run" in err, err


def test_a_hung_rank_is_named_and_the_others_end(workshop: Path) -> None:
    ended: list[float] = []

    def freeze(process: Any, ranks: dict[int, psutil.Process]) -> None:
        suspend_in_a_step(process, workshop / "hung", 25)
        began = time.monotonic()
        psutil.wait_procs([ranks[0]], timeout=60)
        ended.append(time.monotonic() - began)

    code, _, err = interrupt(workshop, "train-ddp", "hung", freeze, delay=0)
    assert ended[0] < 60 and code == 70, err
    lines = [line for line in err.splitlines() if line.startswith("error")]
    assert len(lines) == 1 and "rank 1 on" in lines[0] and "--hang_seconds" in lines[0], err


def test_max_restarts_goes_on_by_itself(workshop: Path, whole: dict[str, Any]) -> None:
    folder = workshop / "restarted"
    with started(arguments(workshop, "train-ddp", "restarted", "--max_restarts", "2", "--resume", "none")) as process:
        for step, rank in ((25, 1), (100, 0)):
            wait_until(process, lambda step=step: (folder / f"checkpoint-{step}" / "manifest.json").exists())
            workers(process)[rank].kill()
        _, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    again = {"record": json.loads((folder / "run.json").read_text(encoding="utf-8"))}
    assert len(again["record"]["sessions"]) == 3
    same(again, whole)


def test_restarts_must_be_a_number(workshop: Path) -> None:
    done = launch(arguments(workshop, "train-ddp", "never", "--max_restarts", "often"))
    assert done.returncode == 2
    assert error_lines(done) == [
        "error: --max_restarts is 'often': allowed is a whole number, how often to start again after a failed rank."
    ]
