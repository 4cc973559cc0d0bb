"""A checkpoint counts when it is whole; nothing else is ever resumed, and nothing whole is lost."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from pipeline import checkpoint
from pipeline.config import TrainConfig
from pipeline.errors import UserError

IDENTITY = {"model": "m", "dataset": "d"}


def make(config: TrainConfig, step: int, entry: str = "raw", best: int | None = None) -> Path:
    folder = checkpoint.checkpoint_folder(config.output_dir or "", step)
    checkpoint.begin(folder)
    (folder / "model.safetensors").write_bytes(b"weights" * step)
    checkpoint.commit(folder, config, entry, 2, IDENTITY, {"step": step, "best": {"step": best} if best else None})
    return folder


def find(config: TrainConfig, entry: str = "raw", **identity: str) -> Path | None:
    return checkpoint.find_resume(config, entry, IDENTITY | identity)


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
    assert find(config) == good
    told = capsys.readouterr().err
    for folder, reason in ((damaged, "has changed"), (truncated, "1 bytes instead of"), (gone, "is missing"), (halfway, "no manifest")):
        assert any(f"{folder} is not used" in line and reason in line for line in told.splitlines()), (folder, told)


def test_another_run_is_refused_with_what_differs(config: TrainConfig) -> None:
    make(config, 5)
    with pytest.raises(UserError, match=r"learning_rate 2e-05 -> 0\.1"):
        find(replace(config, learning_rate=0.1))
    with pytest.raises(UserError, match="raw entry"):
        find(config, "trainer")
    assert find(replace(config, max_per_device_batch_size=8, tracker="tensorboard", bucket_mb=1, static_graph=True))


def test_a_field_that_came_later_had_its_default(config: TrainConfig) -> None:
    manifest = make(config, 5) / checkpoint.MANIFEST
    old = json.loads(manifest.read_text(encoding="utf-8"))
    del old["config"]["comm_hook"]
    manifest.write_text(json.dumps(old), encoding="utf-8")
    assert find(config)
    with pytest.raises(UserError, match="comm_hook none -> fp16"):
        find(replace(config, comm_hook="fp16"))


def test_another_model_or_dataset_is_refused_by_content(config: TrainConfig) -> None:
    make(config, 5)
    with pytest.raises(UserError, match=r"another dataset \(dataset fancyzhx/ag_news -> mine\)"):
        find(replace(config, dataset="mine"), dataset="x")
    with pytest.raises(UserError, match=r"another model and dataset \(model .* -> m, dataset"):
        find(replace(config, model="m", dataset="mine"), dataset="x", model="y")
    with pytest.raises(UserError, match=r"another dataset \(the names are the same, the contents of dataset have changed\)"):
        find(config, dataset="x")
    assert find(replace(config, dataset="the/same-rows-in-another-folder")), "a name alone is no difference"


def test_one_of_another_configuration_is_passed_over_for_one_that_fits(config: TrainConfig, capsys: pytest.CaptureFixture[str]) -> None:
    good = make(config, 5)
    other = make(replace(config, learning_rate=0.1), 9)
    assert find(config) == good
    assert f"{other} is not used: it has another configuration (learning_rate 0.1 -> 2e-05)" in capsys.readouterr().err


def test_a_checkpoint_needs_its_best_one(config: TrainConfig, capsys: pytest.CaptureFixture[str]) -> None:
    first = make(config, 3, best=3)
    best = make(config, 5, best=5)
    make(config, 9, best=5)
    (best / "model.safetensors").write_bytes(b"WEIGHTS" * 5)
    assert find(config) == first
    assert "checkpoint-9 is not used: the best one, checkpoint-5, is damaged (model.safetensors has changed" in capsys.readouterr().err


def test_a_restarted_launch_begins_anew_once(config: TrainConfig, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    make(config, 5)
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")  # the first attempt died before it came so far
    assert find(replace(config, resume="none")) is None
    assert checkpoint.defect(tmp_path / "run.1" / "checkpoint-5") is None
    mine = make(config, 3)
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "2")
    assert find(replace(config, resume="none")) == mine, "of this launch"
    monkeypatch.delenv("TORCHELASTIC_RESTART_COUNT")
    assert find(replace(config, resume="none")) is None, "another launch"


def test_when_all_are_damaged_the_new_ones_are_kept(config: TrainConfig) -> None:
    for step in (50, 75, 100):
        (make(config, step) / "model.safetensors").write_bytes(b"")
    assert find(config) is None
    fresh = make(config, 25)
    checkpoint.rotate(config.output_dir or "", keep=2)
    assert find(config) == fresh


def test_a_validation_is_added_to_a_whole_checkpoint(config: TrainConfig) -> None:
    folder = make(config, 5)
    checkpoint.amend(folder, {"step": 5, "best": {"step": 5}})
    assert checkpoint.defect(folder) is None
    assert checkpoint.read_manifest(folder)["recorder"]["best"] == {"step": 5}


def test_a_new_start_keeps_the_old_run(config: TrainConfig, tmp_path: Path) -> None:
    make(config, 5)
    assert find(replace(config, resume="none")) is None
    assert checkpoint.defect(tmp_path / "run.1" / "checkpoint-5") is None
    assert find(config) is None


def test_a_named_checkpoint_must_be_whole(config: TrainConfig, tmp_path: Path) -> None:
    folder = make(config, 5)
    assert find(replace(config, resume=str(folder))) == folder
    (folder / checkpoint.MANIFEST).write_text("{")
    with pytest.raises(UserError, match="manifest cannot be read"):
        find(replace(config, resume=str(folder)))
    with pytest.raises(UserError, match="allowed is auto, none"):
        find(replace(config, resume=str(tmp_path / "nowhere")))


def test_a_named_older_checkpoint_leaves_the_later_ones_behind(config: TrainConfig, tmp_path: Path) -> None:
    older, later = make(config, 5), make(config, 9)
    assert find(replace(config, resume=str(older))) == older
    assert not later.exists() and list((tmp_path / "run").glob("checkpoint-9.set-aside-*")), "kept, but out of the way"
    assert find(config) == older
    half = checkpoint.checkpoint_folder(config.output_dir or "", 11)
    checkpoint.begin(half)
    assert find(config) == older and not half.exists(), "half written: its room is given back"
    with pytest.raises(UserError, match=r"outside the output folder.*--output_dir"):
        find(replace(config, resume=str(older), output_dir=str(tmp_path / "other")))


def steps(config: TrainConfig) -> list[int]:
    return [checkpoint.step_of(p) for p in checkpoint.candidates(config.output_dir or "")]


def test_rotation_keeps_the_newest_and_the_best(config: TrainConfig) -> None:
    for step in (1, 2, 3, 4):
        make(config, step, best=1)
    halfway = checkpoint.checkpoint_folder(config.output_dir or "", 2)
    (halfway / checkpoint.MANIFEST).unlink()
    checkpoint.rotate(config.output_dir or "", keep=1)
    assert steps(config) == [1, 4]


def test_rotation_never_takes_what_another_may_need(config: TrainConfig) -> None:
    """The newest is the best: the one before, which counts on an earlier best, stays good to go on from."""
    for step, best in ((1, 1), (2, 1), (3, 3)):
        make(config, step, best=best)
        checkpoint.rotate(config.output_dir or "", keep=2)
    assert steps(config) == [1, 2, 3]
    (checkpoint.checkpoint_folder(config.output_dir or "", 3) / "model.safetensors").write_bytes(b"")
    assert find(config) == checkpoint.checkpoint_folder(config.output_dir or "", 2)


def test_the_only_whole_one_is_never_removed(config: TrainConfig) -> None:
    make(config, 1)
    halfway = checkpoint.checkpoint_folder(config.output_dir or "", 2)
    checkpoint.begin(halfway)
    checkpoint.rotate(config.output_dir or "", keep=1)
    assert find(config) == checkpoint.checkpoint_folder(config.output_dir or "", 1)


def test_the_manifest_holds_what_it_says(config: TrainConfig) -> None:
    manifest = json.loads((make(config, 3) / checkpoint.MANIFEST).read_text())
    assert manifest["step"] == 3 and manifest["config"]["learning_rate"] == 2e-5
    assert manifest["files"]["model.safetensors"]["size"] == 21
