"""Two machines, really launched: the same result as one machine, a machine lost and come back, a folder that is not shared."""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from launching import ROOT, environment, launch, short_run, suspend_in_a_step, wait_until, watch_notes
from two_nodes import ADDRESSES, HOSTS, PORT, Nodes, two_nodes

from pipeline import checkpoint
from pipeline.errors import UserError

SETTINGS = """
validation_share: 0.05
max_steps: 40
cpu_threads: 1
checkpoint_steps: 10
logging_steps: 1
hang_seconds: 8
"""
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--nproc_per_node", "1", "--master_addr", ADDRESSES[0],
            "--master_port", str(PORT), "--node_rank"]  # fmt: skip
ACCELERATE = [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch", "--config_file", "configs/accelerate/two_nodes.yaml",
              "--num_processes", "2", "--main_process_ip", ADDRESSES[0], "--main_process_port", str(PORT), "--machine_rank"]  # fmt: skip


@pytest.fixture(scope="module")
def nodes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Nodes]:
    try:
        with two_nodes(tmp_path_factory.mktemp("nodes")) as nodes:
            yield nodes
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"no network namespaces here: {(getattr(error, 'stderr', '') or str(error)).strip()}")


@pytest.fixture(scope="module")
def workshop(tmp_path_factory: pytest.TempPathFactory, tiny_model_dir: Path, r8_dir: Path) -> Path:
    folder = tmp_path_factory.mktemp("two-nodes")
    short_run(folder, tiny_model_dir, r8_dir, SETTINGS)
    return folder


def record_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "run.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def one_machine(workshop: Path) -> dict[str, Any]:
    done = launch(["train-raw-ddp", str(workshop / "run.yaml"), "--output_dir", str(workshop / "one")])
    assert done.returncode == 0, done.stderr
    return record_of(workshop / "one")


def begin(nodes: Nodes, workshop: Path, launcher: list[str], module: str, name: str, setup: str = "true") -> list[subprocess.Popen[str]]:
    """The same command on both nodes, with its number. Each has caches of its own; `setup` is for the second."""
    arguments = ["-m", module, str(workshop / "run.yaml"), "--output_dir", str(workshop / name)]
    return [
        nodes.start(
            node, [*launcher, str(node), *arguments], workshop / f"{name}-{node}.log", setup if node else "true",
            HF_HOME=str(workshop / HOSTS[node]),
        )
        for node in (0, 1)
    ]  # fmt: skip


def finish(workshop: Path, name: str, running: list[subprocess.Popen[str]], seconds: float = 120) -> list[str]:
    """Wait for both; returns what each printed."""
    with contextlib.suppress(subprocess.TimeoutExpired):
        for process in running:
            process.wait(seconds)
    printed = [(workshop / f"{name}-{node}.log").read_text(encoding="utf-8") for node in (0, 1)]
    assert all(process.poll() is not None for process in running), f"not at an end after {seconds} s: {printed}"
    return printed


def same(record: dict[str, Any], other: dict[str, Any]) -> None:
    assert record["topology"]["world_size"] == other["topology"]["world_size"] == 2
    assert record["history"] == other["history"], "every loss and gradient norm, to the last bit"
    assert record["weights_sha256"] == other["weights_sha256"]
    assert record["test"]["confusion_matrix"] == other["test"]["confusion_matrix"]


@pytest.mark.parametrize(
    ("launcher", "module"),
    # The raw script's other run, below, is interrupted and ends the same.
    [pytest.param(TORCHRUN, "pipeline.train_ddp", marks=pytest.mark.slow), (ACCELERATE, "pipeline.train")],
    ids=["torchrun raw", "accelerate Trainer"],
)
def test_two_machines_learn_what_one_does(
    nodes: Nodes, workshop: Path, one_machine: dict[str, Any], launcher: list[str], module: str
) -> None:
    before = nodes.received(0)
    printed = finish(workshop, module, running := begin(nodes, workshop, launcher, module, module))
    assert [process.returncode for process in running] == [0, 0], printed
    record = record_of(workshop / module)
    same(record, one_machine)
    assert "2 process(es), backend gloo" in printed[0] and "topology" not in printed[1], "rank 0 alone speaks"
    gradients = (workshop / module / "checkpoint-40" / "model.safetensors").stat().st_size
    # A ring all-reduce of two brings each the other's half twice: once to be added, once as a sum.
    assert nodes.received(0) - before > 40 * gradients, "gradients came over the cable, at every step"


def test_a_machine_is_lost_and_comes_back(nodes: Nodes, workshop: Path, one_machine: dict[str, Any]) -> None:
    """The cable goes first, so that no connection is closed in order: nothing tells the first machine but the watch."""
    folder = workshop / "lost"
    running = begin(nodes, workshop, TORCHRUN, "pipeline.train_ddp", "lost")
    try:
        suspend_in_a_step(running[0], folder, 10)
    except AssertionError as error:
        raise AssertionError([(workshop / f"lost-{node}.log").read_text(encoding="utf-8") for node in (0, 1)]) from error
    hosts = [note["host"] for _, note in sorted(watch_notes(folder).items())]
    nodes.plug(1, "down")
    try:
        nodes.kill(1)
        assert running[0].poll() is None, "it was still at work when the other was lost"
        began = time.monotonic()
        printed = finish(workshop, "lost", running)
        seconds = time.monotonic() - began
    finally:
        nodes.plug(1, "up")
    assert hosts == list(HOSTS)
    assert running[0].returncode != 0 and seconds < 60, printed[0]
    assert "error: no progress for" in printed[0] and "rank 1 on node-1" in printed[0], printed[0]
    assert not (folder / "run.json").exists(), "it was lost in mid-run"

    printed = finish(workshop, "lost", running := begin(nodes, workshop, TORCHRUN, "pipeline.train_ddp", "lost"))
    assert [process.returncode for process in running] == [0, 0], printed
    assert "resumed     after step" in printed[0]
    same(record_of(folder), one_machine)


# Slurm itself is not here. Its two commands that the script uses are played by these: a step on both nodes, the highest exit code.
SRUN = """#!/bin/bash
export GLOO_SOCKET_IFNAME=eth0
{first} "$@" & a=$!
{second} "$@" & b=$!
wait $a; code=$?; wait $b; other=$?
exit $(( code > other ? code : other ))
"""
SCONTROL = """#!/bin/bash
case $1 in show) printf 'node-0\\nnode-1\\n' ;; requeue) echo $2 >> {requeued} ;; esac
"""


@pytest.mark.slow
def test_the_slurm_script_stops_requeues_and_goes_on(nodes: Nodes, workshop: Path, one_machine: dict[str, Any]) -> None:
    """Time is up: SIGTERM to the launchers alone, as `--signal` without B: has it."""
    folder, requeued = workshop / "slurm", workshop / "requeued"
    tools = {
        "srun": SRUN.format(first=shlex.join(nodes.command(0)), second=shlex.join(nodes.command(1))),
        "scontrol": SCONTROL.format(requeued=requeued),
    }
    for name, text in tools.items():
        (workshop / "bin").mkdir(exist_ok=True)
        (workshop / "bin" / name).write_text(text, encoding="utf-8")
        (workshop / "bin" / name).chmod(0o755)
    job = {"SLURM_SUBMIT_DIR": str(ROOT), "SLURM_JOB_NODELIST": "node-[0-1]", "SLURM_JOB_NUM_NODES": "2", "SLURM_JOB_ID": "75",
           "SLURM_GPUS_ON_NODE": "1", "PATH": f"{workshop / 'bin'}:{os.environ['PATH']}"}  # fmt: skip
    arguments = ["bash", "configs/deploy/slurm.sbatch", str(workshop / "run.yaml"), "--output_dir", str(folder)]

    def submit() -> subprocess.Popen[str]:
        with (workshop / "slurm.log").open("a", encoding="utf-8") as log:
            return subprocess.Popen(arguments, cwd=ROOT, env=environment(**job), text=True, stdout=log, stderr=subprocess.STDOUT)

    first = submit()
    wait_until(first, lambda: (folder / "checkpoint-10" / "manifest.json").exists())
    for node in (0, 1):
        launchers = [pid for pid in nodes.processes(node) if "pipeline.launch" in psutil.Process(pid).cmdline()]
        assert len(launchers) == 1
        os.kill(launchers[0], signal.SIGTERM)
    assert first.wait(60) == 75, (workshop / "slurm.log").read_text(encoding="utf-8")
    assert requeued.read_text(encoding="utf-8").split() == ["75"]
    assert submit().wait(120) == 0, (workshop / "slurm.log").read_text(encoding="utf-8")
    assert requeued.read_text(encoding="utf-8").split() == ["75"], "a job that is done is not queued again"
    assert len(record_of(folder)["sessions"]) == 2
    same(record_of(folder), one_machine)


@pytest.mark.slow
def test_a_folder_that_is_not_shared_is_refused_at_the_start(nodes: Nodes, workshop: Path) -> None:
    private = workshop / "private"
    private.mkdir()
    printed = finish(
        workshop,
        "private/run",
        begin(nodes, workshop, TORCHRUN, "pipeline.train_ddp", "private/run", setup=f"mount -t tmpfs none {private}"),
    )
    assert "does not see" in printed[1] and "node-1" in printed[1] and "--output_dir" in printed[1], printed
    assert not list((private / "run").glob("checkpoint-*"))


def test_a_folder_is_looked_for_before_it_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another launch's word does not count; this launch's, once it has come to be seen, does."""
    monkeypatch.setenv("MASTER_PORT", "1")
    checkpoint.begin_run(str(tmp_path / "run"))
    checkpoint.check_shared(str(tmp_path / "run"), seconds=0)
    monkeypatch.setenv("MASTER_PORT", "2")
    for folder in ("run", "not-there"):
        with pytest.raises(UserError, match="--output_dir on storage that all machines share"):
            checkpoint.check_shared(str(tmp_path / folder), seconds=0)
    late = threading.Timer(0.7, checkpoint.begin_run, [str(tmp_path / "run")])
    late.start()
    checkpoint.check_shared(str(tmp_path / "run"), seconds=10)
    late.join()
    assert checkpoint.set_aside(tmp_path / "run") is None, "a run that only began leaves nothing to keep"
