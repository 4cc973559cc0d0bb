"""A checkpoint counts when it is whole; nothing else is ever resumed, and nothing whole is lost."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from pipeline import checkpoint
from pipeline.config import TrainConfig
from pipeline.errors import UserError


def make(config: TrainConfig, step: int, entry: str = "raw") -> Path:
    folder = checkpoint.checkpoint_folder(config.output_dir or "", step)
    checkpoint.begin(folder)
    (folder / "model.safetensors").write_bytes(b"weights" * step)
    checkpoint.commit(folder, config, entry, world_size=2)
    return folder


@pytest.fixture
def config(tmp_path: Path) -> TrainConfig:
    return TrainConfig(output_dir=str(tmp_path / "run"))


def test_the_newest_whole_one_is_taken(config: TrainConfig, capsys: pytest.CaptureFixture[str]) -> None:
    make(config, 9)
    good = make(config, 10)
    damaged = make(config, 11)
    (damaged / "model.safetensors").write_bytes(b"WEIGHTS" * 11)
    truncated = make(config, 12)
    (truncated / "model.safetensors").write_bytes(b"w")
    gone = make(config, 13)
    (gone / "model.safetensors").unlink()
    halfway = checkpoint.checkpoint_folder(config.output_dir or "", 100)
    checkpoint.begin(halfway)
    (halfway / "model.safetensors").write_bytes(b"w")
    assert checkpoint.find_resume(config, "raw") == good
    told = capsys.readouterr().err
    for folder, reason in ((damaged, "has changed"), (truncated, "1 bytes instead of"), (gone, "is missing"), (halfway, "no manifest")):
        assert any(f"{folder} is not used" in line and reason in line for line in told.splitlines()), (folder, told)


def test_another_run_is_refused_with_what_differs(config: TrainConfig) -> None:
    make(config, 5)
    with pytest.raises(UserError, match=r"learning_rate 2e-05 -> 0\.1"):
        checkpoint.find_resume(replace(config, learning_rate=0.1), "raw")
    with pytest.raises(UserError, match="raw entry"):
        checkpoint.find_resume(config, "trainer")
    assert checkpoint.find_resume(replace(config, max_per_device_batch_size=8, tracker="tensorboard"), "raw")


def test_a_new_start_keeps_the_old_run(config: TrainConfig, tmp_path: Path) -> None:
    make(config, 5)
    assert checkpoint.find_resume(replace(config, resume="none"), "raw") is None
    assert checkpoint.defect(tmp_path / "run.1" / "checkpoint-5") is None
    assert checkpoint.find_resume(config, "raw") is None


def test_a_named_checkpoint_must_be_whole(config: TrainConfig, tmp_path: Path) -> None:
    folder = make(config, 5)
    assert checkpoint.find_resume(replace(config, resume=str(folder)), "raw") == folder
    (folder / checkpoint.MANIFEST).write_text("{")
    with pytest.raises(UserError, match="manifest cannot be read"):
        checkpoint.find_resume(replace(config, resume=str(folder)), "raw")
    with pytest.raises(UserError, match="allowed is auto, none"):
        checkpoint.find_resume(replace(config, resume=str(tmp_path / "nowhere")), "raw")


def test_a_named_older_checkpoint_leaves_the_later_ones_behind(config: TrainConfig, tmp_path: Path) -> None:
    older, later = make(config, 5), make(config, 9)
    assert checkpoint.find_resume(replace(config, resume=str(older)), "raw") == older
    assert not later.exists() and list((tmp_path / "run").glob("checkpoint-9.set-aside-*")), "kept, but out of the way"
    assert checkpoint.newest(config.output_dir or "") == older
    half = checkpoint.checkpoint_folder(config.output_dir or "", 11)
    checkpoint.begin(half)
    assert checkpoint.find_resume(config, "raw") == older and not half.exists(), "half written: its room is given back"
    with pytest.raises(UserError, match=r"outside the output folder.*--output_dir"):
        checkpoint.find_resume(replace(config, resume=str(older), output_dir=str(tmp_path / "other")), "raw")


def test_rotation_keeps_the_newest_and_the_best(config: TrainConfig) -> None:
    for step in (1, 2, 3, 4):
        make(config, step)
    halfway = checkpoint.checkpoint_folder(config.output_dir or "", 2)
    (halfway / checkpoint.MANIFEST).unlink()
    checkpoint.rotate(config.output_dir or "", keep=1, best_step=1)
    assert [p.name for p in checkpoint.candidates(config.output_dir or "")] == ["checkpoint-1", "checkpoint-4"]


def test_the_manifest_holds_what_it_says(config: TrainConfig) -> None:
    manifest = json.loads((make(config, 3) / checkpoint.MANIFEST).read_text())
    assert manifest["step"] == 3 and manifest["config"]["learning_rate"] == 2e-5
    assert manifest["files"]["model.safetensors"]["size"] == 21
