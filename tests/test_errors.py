"""A user's mistake ends in one line and exit code 2, with a launcher in between or not, and loses nothing."""

from __future__ import annotations

import csv
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from launching import ROOT, error_lines, launch, started, wait_until, workers

from pipeline.errors import explain


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small file of a person's own texts."""
    path = tmp_path_factory.mktemp("texts") / "mine.csv"
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["text", "label"])
        writer.writerows([f"the {word} number {i} arrived late", word] for i in range(60) for word in ("parcel", "invoice"))
    return path


def one_line(done: subprocess.CompletedProcess[str], *words: str, code: int = 2) -> None:
    assert done.returncode == code, done.stderr
    assert "Traceback" not in done.stderr, done.stderr
    lines = error_lines(done)
    assert len(lines) == 1, done.stderr
    assert all(word in lines[0] for word in words), lines[0]


@pytest.mark.parametrize("kind", ["train", "train-ddp", "train-raw-ddp"])
def test_a_launcher_adds_nothing_to_the_one_line(texts: Path, tmp_path: Path, kind: str) -> None:
    """Found while rank 0 reads the data and the other ranks wait for it."""
    one = tmp_path / "one.csv"
    one.write_text("text,label\n" + "only this,same\n" * 40, encoding="utf-8")
    done = launch([kind, "--device", "cpu", "--dataset", str(one), "--model", "nobody/needs-this", "--output_dir", str(tmp_path / "run")],
                  HF_ENDPOINT="http://127.0.0.1:9", HF_HUB_OFFLINE="1")  # fmt: skip
    assert done.returncode == 2 and len(error_lines(done)) == 1 and "Traceback" not in done.stderr, done.stderr
    assert "ChildFailedError" not in done.stderr and "closing signal" not in done.stderr


def test_the_make_target_gives_the_line_and_the_code(tmp_path: Path) -> None:
    wrong = tmp_path / "wrong.yaml"
    wrong.write_text("learning_rat: 1e-4\n", encoding="utf-8")
    command = ["make", "-s", "-o", ".venv/.requirements", "train-ddp", f"CONFIG={wrong}", "ARGS=--device cpu"]
    if not (ROOT / ".venv" / "bin" / "python").exists():
        pytest.skip("the Make targets use .venv")
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    one_line(done, str(wrong), "'learning_rat'", "Did you mean 'learning_rate'?")
    others = [line for line in done.stderr.splitlines() if not line.startswith(("error", "make"))]
    assert not others, others


def train(tmp_path: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return launch([*arguments, "--device", "cpu", "--output_dir", str(tmp_path / "run")], module="pipeline.train",
                  **({"HF_HOME": str(tmp_path / "home")} | environment))  # fmt: skip


def test_no_network_and_no_hub(tmp_path: Path, texts: Path) -> None:
    done = train(tmp_path, "--dataset", str(texts), HF_ENDPOINT="http://127.0.0.1:9")
    one_line(done, "http://127.0.0.1:9", "cannot be reached", "make hub")


def test_no_such_model_dataset_or_revision(tmp_path: Path, texts: Path, tiny_model_dir: Path, local_hub: Any) -> None:
    from huggingface_hub import HfApi

    api = HfApi(endpoint=local_hub.url, token=local_hub.token)
    api.create_repo(f"{local_hub.user}/tiny-errors")
    api.upload_folder(repo_id=f"{local_hub.user}/tiny-errors", folder_path=tiny_model_dir)
    one_line(train(tmp_path, "--dataset", str(texts), "--model", "nobody/nothing", **local_hub.env), "nobody/nothing", "No such repository")
    done = train(tmp_path, "--dataset", str(texts), "--model", f"{local_hub.user}/tiny-errors", "--model_revision", "v9", **local_hub.env)
    one_line(done, "tiny-errors", "v9", "evision")
    one_line(train(tmp_path, "--dataset", "nobody/nothing", "--model", str(tiny_model_dir), **local_hub.env), "nobody/nothing")


def test_a_token_that_may_not_write_is_found_before_training(tmp_path: Path, texts: Path, tiny_model_dir: Path, local_hub: Any) -> None:
    push = ["--dataset", str(texts), "--model", str(tiny_model_dir), "--push_to_hub", "--hub_repo"]
    reader = local_hub.add_user("reader", "read")
    done = train(tmp_path, *push, "reader/mine", **(local_hub.env | {"HF_TOKEN": reader}))
    one_line(done, "write")
    assert "training" not in done.stderr and not (tmp_path / "run").exists(), "nothing was trained in vain"
    one_line(train(tmp_path, *push, "somebody-else/theirs", **local_hub.env), "somebody-else")
    without = {name: value for name, value in local_hub.env.items() if name != "HF_TOKEN"}
    one_line(train(tmp_path, *push, f"{local_hub.user}/mine", **without), "hf auth login", "HF_TOKEN")


def test_a_model_that_is_no_folder_and_a_text_too_long_for_it(tmp_path: Path, texts: Path, tiny_model_dir: Path) -> None:
    one_line(train(tmp_path, "--dataset", str(texts), "--model", "./not/here"), "./not/here", "no folder")
    one_line(train(tmp_path, "--dataset", str(texts), "--model", str(tiny_model_dir), "--max_length", "1000"), "max_length is 1000", "512")
    done = train(tmp_path, "--dataset", str(texts), "--model", str(tiny_model_dir), "--global_batch_size", "500")
    one_line(done, "fewer than one global batch of 500", "--global_batch_size")


def test_a_full_disk_while_saving_loses_nothing(tmp_path: Path, texts: Path, tiny_model_dir: Path) -> None:
    """The disk is full when the record is written, after training; afterwards the same command goes on from there."""
    if not Path("/dev/full").exists():
        pytest.skip("no /dev/full here")
    settings = ["--dataset", str(texts), "--model", str(tiny_model_dir), "--epochs", "3", "--validation_share", "0.2"]
    # 120 rows: 108 left of a test share, 87 of a validation share, 2 steps of 32 an epoch.
    (tmp_path / "run").mkdir()
    blocked = tmp_path / "run" / "run.json.tmp"
    blocked.symlink_to("/dev/full")
    one_line(train(tmp_path, *settings), "disk is full", "run the same command again")
    saved = sorted(p.name for p in (tmp_path / "run").glob("checkpoint-*"))
    assert saved and all((tmp_path / "run" / name / "manifest.json").is_file() for name in saved)
    blocked.unlink(missing_ok=True)
    done = train(tmp_path, *settings)
    assert done.returncode == 0, done.stderr
    assert "resumed     this run is finished" in done.stdout
    assert json.loads((tmp_path / "run" / "run.json").read_text())["test"]["examples"] == 12


@pytest.fixture
def small_disk(tmp_path: Path) -> Any:
    """A disk of six megabytes, where this user may mount one."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if (
        os.geteuid()
        or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=6m", "tmpfs", str(folder)], capture_output=True, check=False).returncode
    ):
        pytest.skip("mounting a small disk needs root")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


def test_every_writer_of_weights_is_understood_when_the_disk_is_full(small_disk: Path) -> None:
    import torch
    from safetensors.torch import save_file

    weights = {"a": torch.zeros(3_000_000)}
    for write in (lambda: save_file(weights, small_disk / "a.safetensors"), lambda: torch.save(weights, small_disk / "a.pt")):
        with pytest.raises(Exception) as caught:
            write()
        assert "disk is full" in (explain(caught.value) or ""), caught.value
        for path in small_disk.iterdir():
            path.unlink()


def test_debug_shows_the_traceback_too() -> None:
    done = launch(["no-such-file.yaml", "--debug"], module="pipeline.config")
    assert done.returncode == 2 and "Traceback" in done.stderr and len(error_lines(done)) == 1


def test_a_defect_of_ours_is_not_dressed_up() -> None:
    assert explain(KeyError("x")) is None
    assert explain(RuntimeError("shape mismatch")) is None


def test_a_hub_that_is_not_there_is_understood_from_the_client_itself() -> None:
    from huggingface_hub import HfApi

    with pytest.raises(Exception) as caught:
        HfApi(endpoint="http://127.0.0.1:9").model_info("nobody/nothing")
    assert "cannot be reached" in (explain(caught.value) or ""), caught.value


@pytest.mark.parametrize("kind", ["train-ddp", "train-raw-ddp"])
def test_a_disk_that_fills_up_in_a_checkpoint_of_two_processes(small_disk: Path, texts: Path, tiny_model_dir: Path, kind: str) -> None:
    """The weights still fit, the optimizer's state does not; the other rank waits at a barrier meanwhile."""
    arguments = [kind, "--dataset", str(texts), "--model", str(tiny_model_dir), "--device", "cpu", "--output_dir", str(small_disk / "run")]
    done = launch([*arguments, "--max_steps", "2"])
    one_line(done, "disk is full", "run the same command again")
    assert not list(small_disk.glob("run/*/manifest.json")), "what is half written is no checkpoint"


def test_what_only_the_second_rank_meets_is_told_by_it(texts: Path, tiny_model_dir: Path, tmp_path: Path) -> None:
    """Rank 1 cannot write its random state; rank 0 only sees its peer go and lets it speak."""
    script = tmp_path / "one_full_disk.py"
    script.write_text(
        "import pathlib, sys\n"
        "from pipeline import train_ddp\n"
        "from pipeline.errors import run_entry\n"
        "from pipeline.state import TrainingState\n"
        "save = TrainingState.save_rank\n"
        "def save_rank(self, folder, rank):\n"
        "    if rank == 1:\n"
        "        pathlib.Path('/dev/full').write_bytes(bytes(10**6))\n"
        "    save(self, folder, rank)\n"
        "TrainingState.save_rank = save_rank\n"
        "sys.exit(run_entry(train_ddp.entry))\n",
        encoding="utf-8",
    )
    arguments = [
        "--nproc_per_node",
        "2",
        str(script),
        "--dataset",
        str(texts),
        "--model",
        str(tiny_model_dir),
        "--max_steps",
        "2",
        "--device",
        "cpu",
    ]
    done = launch([*arguments, "--output_dir", str(tmp_path / "run")], module="torch.distributed.run")
    lines = error_lines(done)
    assert len(lines) == 1 and lines[0].startswith("error (rank 1): The disk is full"), done.stderr


def test_a_worker_killed_by_the_system_is_named(texts: Path, tiny_model_dir: Path, tmp_path: Path) -> None:
    arguments = ["train-ddp", "--dataset", str(texts), "--model", str(tiny_model_dir), "--device", "cpu", "--epochs", "200"]
    with started([*arguments, "--output_dir", str(tmp_path / "run")]) as process:
        wait_until(process, lambda: any(tmp_path.glob("run/checkpoint-*/manifest.json")), look=0.05)
        workers(process)[1].kill()
        _, err = process.communicate(timeout=60)
    assert process.returncode == 137
    assert "error: rank 1 was ended by SIGKILL" in err and "The same command goes on" in err


def test_a_model_without_safetensors_is_refused(texts: Path, tiny_model_dir: Path, tmp_path: Path) -> None:
    pickled = tmp_path / "pickled"
    shutil.copytree(tiny_model_dir, pickled)
    (pickled / "model.safetensors").rename(pickled / "pytorch_model.bin")
    one_line(train(tmp_path, "--dataset", str(texts), "--model", str(pickled)), "safetensors", "pickle")


def test_a_model_in_the_cache_serves_when_the_hub_is_away(tiny_model_dir: Path, tmp_path: Path, local_hub: Any) -> None:
    """Pulled once with files that are not wanted beside it; then offline by choice, then with the Hub unreachable."""
    from huggingface_hub import HfApi

    api, name = HfApi(endpoint=local_hub.url, token=local_hub.token), f"{local_hub.user}/tiny-cached"
    api.create_repo(name)
    api.upload_folder(repo_id=name, folder_path=tiny_model_dir)
    commit = api.upload_file(repo_id=name, path_in_repo="onnx/other.bin", path_or_fileobj=b"not wanted").oid
    code = f"from pipeline.sources import find_model; print(find_model({name!r}))"
    for extra, words in (
        ({}, "warning=None"),
        ({"HF_HUB_OFFLINE": "1"}, "warning=None"),
        ({"HF_ENDPOINT": "http://127.0.0.1:9"}, "cannot be reached"),
    ):
        environment = {**os.environ, **local_hub.env, "HF_HOME": str(tmp_path / "home"), "PYTHONPATH": str(ROOT), **extra}
        done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=120, check=False)
        assert done.returncode == 0, done.stderr
        assert commit in done.stdout and words in done.stdout, done.stdout


@pytest.mark.parametrize(
    ("codes", "verdict"),
    [
        ({0: 75, 1: 75}, 75),  # asked to stop, together
        ({0: 75, 1: -15}, 75),
        ({0: -15}, 75),  # before it could hear the signal
        ({0: 75, 1: 1}, 1),  # rank 1 has a defect; the launcher then ended rank 0, which only says that it was told to
        ({0: 69, 1: 75}, 75),
        ({0: 75, 1: 2}, 2),
        ({0: 130, 1: -15}, 130),
        ({0: 70, 1: -9}, 70),
        ({0: 75, 1: -9}, 137),
        ({0: 69, 1: -9}, 137),
    ],
)
def test_the_launchers_verdict(codes: dict[int, int], verdict: int) -> None:
    from pipeline.launch import _verdict

    assert _verdict(codes) == verdict


def test_restarts_need_several_processes() -> None:
    done = launch(["train", "configs/ag_news.yaml", "--max_restarts", "2"])
    assert done.returncode == 2 and "Use train-ddp" in done.stderr
