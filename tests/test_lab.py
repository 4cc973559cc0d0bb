"""Every experiment of the lab shows its symptom, its cure removes it, and the page tells what was measured."""

from __future__ import annotations

import ast
import inspect
import json
import re
import textwrap
from pathlib import Path
from typing import Any

import psutil
import pytest
from launching import launch
from PIL import Image

from pipeline.errors import UserError
from pipeline.lab.__main__ import main
from pipeline.lab.frame import ROOT, SIDES
from pipeline.lab.report import IMAGES, PAGE, RESULTS, digest, lines, page
from pipeline.lab.runner import EXPERIMENTS, run


@pytest.fixture(scope="module")
def told(assets: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """All experiments, run by the command (no process may be left): what it printed, and the folder it was run in."""
    folder = tmp_path_factory.mktemp("lab")
    done = launch(["--all"], module="pipeline.lab", cwd=folder)
    assert done.returncode == 0, done.stderr
    return done.stdout, folder / "outputs" / "lab"


def check_no_set_epoch(broken: dict[str, Any], cured: dict[str, Any]) -> None:
    assert (broken["orders"], broken["never"]) == (1, 26)
    assert (cured["orders"], cured["never"]) == (cured["epochs"], 0)


def check_same_data(broken: dict[str, Any], cured: dict[str, Any]) -> None:
    assert (broken["learnt"], broken["apart"]) == (broken["rows"] / 2, 0)
    assert cured["learnt"] == cured["rows"] and cured["apart"] > 0.1


def check_no_no_sync(broken: dict[str, Any], cured: dict[str, Any]) -> None:
    assert broken["reduces"] == 4 * cured["reduces"] and broken["mb"] == pytest.approx(4 * cured["mb"])
    assert broken["test_loss"] == pytest.approx(cured["test_loss"], abs=1e-3)  # the same result


def check_loss_times_world(broken: dict[str, Any], cured: dict[str, Any]) -> None:
    assert cured["factor"] == pytest.approx(1, abs=0.02)
    for name in ("factor", "grad_norm"):  # two ranks, two micro-batches
        assert broken[name] == pytest.approx(4 * cured[name], rel=1e-3)


def check_clip_before_average(broken: dict[str, Any], cured: dict[str, Any]) -> None:
    assert broken["apart"] > 0.2 and broken["shortest"] < 0.8 * broken["threshold"]
    assert cured["apart"] < 1e-3 and cured["longest"] == pytest.approx(cured["threshold"], rel=1e-3)


def check_lr_not_scaled(broken: dict[str, Any], cured: dict[str, Any]) -> None:
    assert broken["loss"] > 1.4 * broken["before"]
    assert cured["loss"] < 1.15 * cured["before"]


def check_dropout_seeds(broken: dict[str, Any], cured: dict[str, Any]) -> None:
    assert broken["correlation"] == pytest.approx(1) and broken["left"] > 0.56
    assert abs(cured["correlation"]) < 0.15 and cured["left"] == pytest.approx(0.5, abs=0.04)


def check_one_shard_eval(broken: dict[str, Any], cured: dict[str, Any]) -> None:
    assert broken["scored"] < broken["rows"] and abs(broken["zero"] - broken["one"]) > 0.01
    assert cured["scored"] == cured["rows"] and cured["zero"] == cured["one"] == cured["truth"]


def check_save_on_all_ranks(broken: dict[str, Any], cured: dict[str, Any]) -> None:
    assert broken["torn"] > 4 and broken["mb"] > 0.5
    assert cured["torn"] == 0


def check_unequal_batches(broken: dict[str, Any], cured: dict[str, Any]) -> None:
    assert broken["zero"] == broken["one"] == 6 and "Timed out" in broken["message"] and broken["seconds"] > 3.5
    assert cured["zero"] == cured["one"] == 6 and cured["message"] == "nothing"


def check_straggler(broken: dict[str, Any], cured: dict[str, Any]) -> None:
    assert broken["idle"] > 0.2 and cured["idle"] < 0.03 and broken["waited"] > cured["waited"]


# The safeguards themselves, which stand within some lines of the words that the lab points to.
SAFEGUARDS = {
    "no_set_epoch": "sampler.set_epoch(epoch)",
    "same_data": "self.rank]",
    "no_no_sync": "ddp.no_sync()",
    "loss_times_world": "accepts_loss_kwargs = False",
    "clip_before_average": "unscale_(state.optimizer)",
    "lr_not_scaled": "config.global_batch_size",
    "dropout_seeds": "seed_dropout(config, topology)",
    "one_shard_eval": "dist.all_reduce(total)",
    "save_on_all_ranks": "if rank == 0:",
    "unequal_batches": "// global_batch_size",
    "straggler": "flip(-1)",
}


@pytest.mark.timeout(300)
@pytest.mark.parametrize("name", EXPERIMENTS)
def test_the_symptom_appears_and_the_cure_removes_it(name: str, told: tuple[str, Path]) -> None:
    printed, folder = told
    result = json.loads((folder / name / "result.json").read_text(encoding="utf-8"))
    broken, cured = (result[side] for side in SIDES)
    globals()[f"check_{name}"](broken["figures"], cured["figures"])
    assert broken["seconds"] + cured["seconds"] < 60
    assert lines(EXPERIMENTS[name], result) in printed
    with Image.open(folder / name / "plot.png") as image:
        assert image.width == 1200


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_one_line_differs(name: str) -> None:
    experiment = EXPERIMENTS[name]
    function = ast.parse(textwrap.dedent(inspect.getsource(experiment.rank))).body[0]
    assert sum(isinstance(node, ast.Name) and node.id == "broken" for node in ast.walk(function)) == 1
    assert "broken" in experiment.line and len(experiment.line.splitlines()) <= 2  # `if not broken:` and its one line
    text = (ROOT / experiment.file).read_text(encoding="utf-8")
    assert SAFEGUARDS[name] in text[text.index(experiment.marker) - 100 :][:2500]


def test_the_page_and_its_pictures_are_those_of_the_figures() -> None:
    kept = json.loads(RESULTS.read_text(encoding="utf-8"))
    assert list(kept["experiments"]) == list(EXPERIMENTS)
    assert PAGE.read_text(encoding="utf-8") == page(kept), "out of date: python -m pipeline.lab --page"
    for name, both in kept["experiments"].items():
        globals()[f"check_{name}"](*(both[side]["figures"] for side in SIDES))
        with Image.open(IMAGES / f"lab-{name}.png") as image:
            assert image.width == 1200 and image.info["Description"] == digest(both), f"{name}: python -m pipeline.lab --all --page"


def test_what_there_is_and_a_name_that_is_not(capsys: pytest.CaptureFixture[str]) -> None:
    main([])
    listed = capsys.readouterr().out
    assert all(re.search(rf"^{name} +{re.escape(its.what)}$", listed, re.MULTILINE) for name, its in EXPERIMENTS.items())
    with pytest.raises(UserError, match=r"no experiment 'no_setepoch'\. Did you mean 'no_set_epoch'\?"):
        main(["no_setepoch"])
    with pytest.raises(UserError, match="--page goes with --all or stands alone"):
        main(["straggler", "--page"])


def test_a_rank_that_fails_is_told_and_leaves_nothing(assets: Any, tmp_path: Path) -> None:
    with pytest.raises(Exception, match=r"KeyError.*no_such_experiment"):
        dict(run(["no_such_experiment"], tmp_path))
    assert not [child for child in psutil.Process().children() if "spawn_main" in " ".join(child.cmdline())]
