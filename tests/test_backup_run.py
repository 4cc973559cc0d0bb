"""Real runs with `--hub_checkpoints`: a machine is lost and another goes on, and a Hub that goes away costs nothing."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import HfApi
from launching import ROOT, launch, lose, short_run, started, wait_until

from pipeline.checkpoint import step_of, whole
from pipeline.local_hub.faults import Fault
from pipeline.local_hub.process import HubProcess

SETTINGS = """
validation_share: 0.05
epochs: 12
cpu_threads: 1
checkpoint_steps: 50
hub_checkpoints: true
"""


@pytest.fixture(scope="module")
def workshop(tmp_path_factory: pytest.TempPathFactory, tiny_model_dir: Path, r8_dir: Path) -> Path:
    folder = tmp_path_factory.mktemp("backup")
    short_run(folder, tiny_model_dir, r8_dir, SETTINGS)
    return folder


FAULTS = [Fault("status", status=429, retry_after=1), Fault("status", status=500), Fault("status", status=503), Fault("refuse"),
          Fault("cut", method="PUT"), Fault("stall")]  # fmt: skip


def arguments(workshop: Path, repository: str, *options: str) -> list[str]:
    folder = ["--output_dir", str(workshop / "run")]
    return ["train-raw-ddp", str(workshop / "run.yaml"), "--hub_repo", repository, *folder, *options]


def record(workshop: Path) -> dict[str, Any]:
    return json.loads((workshop / "run" / "run.json").read_text(encoding="utf-8"))


def backed_up(api: HfApi, repository: str) -> bool:
    """A whole checkpoint is on the branch."""
    if not api.repo_exists(repository) or "checkpoints-run" not in {b.name for b in api.list_repo_refs(repository).branches}:
        return False
    return any(path.endswith("manifest.json") for path in api.list_repo_files(repository, revision="checkpoints-run"))


@pytest.mark.timeout(400)
def test_a_machine_is_lost_and_an_empty_one_goes_on(workshop: Path, local_hub: Any, tmp_path: Path) -> None:
    repository = f"{local_hub.user}/lost"
    api = HfApi(endpoint=local_hub.url, token=local_hub.token)
    with started(arguments(workshop, repository), **local_hub.env) as process:
        wait_until(process, lambda: backed_up(api, repository), seconds=200, look=0.2)
        lose(process)
    assert not (workshop / "run" / "run.json").exists(), "it was lost in mid-run"
    shutil.rmtree(workshop / "run")

    # Another machine: nothing of the run there, nothing in its caches.
    empty = {"HF_HOME": str(tmp_path / "home")}
    done = launch(arguments(workshop, repository), timeout=200, **local_hub.env, **empty)
    assert done.returncode == 0, done.stderr
    assert "pulled      checkpoint-" in done.stdout and "resumed     after step" in done.stdout
    assert f"checkpoints {repository}, branch checkpoints-run: checkpoint-672" in done.stdout, "its last state is on the Hub too"
    assert api.list_repo_files(repository) == [".gitattributes"], "main keeps releases only"
    resumed = record(workshop)

    shutil.rmtree(workshop / "run")
    straight = launch(arguments(workshop, repository, "--hub_checkpoints", "false"), timeout=200, **local_hub.env)
    assert straight.returncode == 0, straight.stderr
    for name in ("history", "weights_sha256", "best", "test"):
        assert resumed[name] == record(workshop)[name], name


@pytest.mark.timeout(400)
def test_a_hub_that_misbehaves_costs_nothing(workshop: Path, tmp_path: Path) -> None:
    shutil.rmtree(workshop / "run", ignore_errors=True)
    with HubProcess(tmp_path / "hub", faults=True) as hub:
        repository, environment = f"{hub.user}/gone", dict(hub.env)
        with started(arguments(workshop, repository), **environment) as process:
            wait_until(process, lambda: bool(whole(workshop / "run")), seconds=200, look=0.05)
            troubles = [*(partial(hub.fault, fault) for fault in FAULTS), hub.revoke]
            for trouble in troubles:  # one after another, each met by the push of another checkpoint
                trouble()
                newest = step_of(whole(workshop / "run")[-1])
                wait_until(process, lambda before=newest: step_of(whole(workshop / "run")[-1]) > before, look=0.05)
            hub.heal()
            hub.vanish()
            out, err = process.communicate(timeout=250)
            hub.restore()
        assert process.returncode == 0, err
        assert record(workshop)["steps"] == 672
        unpushed = next(line for line in out.splitlines() if "is not on the Hub" in line)
        assert "warning: checkpoint-672 is not on the Hub" in unpushed

        hub.start()
        command = shlex.split(unpushed.split("`")[1])
        assert command[:3] == ["python", "-m", "pipeline.backup"]
        api = HfApi(endpoint=hub.url, token=hub.token)
        heads = []
        for _ in range(2):
            done = subprocess.run(
                [sys.executable, *command[1:]], cwd=ROOT, env=os.environ | hub.env, capture_output=True, text=True, timeout=120, check=False
            )
            assert done.returncode == 0, done.stderr
            heads.append(api.model_info(repository, revision="checkpoints-run").sha)
        assert heads[0] == heads[1], "a push repeated changes nothing"
        assert "checkpoint-672/manifest.json" in api.list_repo_files(repository, revision="checkpoints-run")
