"""One parser, two sources: YAML and the command line; mistakes in either name what to do."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from pipeline.config import FIELDS, parse
from pipeline.errors import UserError

ROOT = Path(__file__).resolve().parent.parent


def write(folder: Path, text: str) -> str:
    path = folder / "my.yaml"
    path.write_text(text, encoding="utf-8")
    return str(path)


def test_command_line_wins_over_the_file(tmp_path: Path) -> None:
    config = parse([write(tmp_path, "epochs: 2\nseed: 7\nlength_grouping: false\n"), "--epochs", "5"])
    assert (config.epochs, config.seed, config.length_grouping) == (5.0, 7, False)
    assert config.output_dir == "outputs/my"


def test_defaults_are_the_missions() -> None:
    config = parse([])
    assert (config.dataset, config.model, config.max_length) == ("fancyzhx/ag_news", "distilbert/distilbert-base-uncased", 128)
    assert (config.learning_rate, config.weight_decay, config.epochs) == (2e-5, 0.01, 3.0)


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.yaml")), ids=lambda p: p.name)
def test_every_shipped_configuration_is_valid(path: Path) -> None:
    assert parse([str(path)]).output_dir == f"outputs/{path.stem}"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("learning_rte: 1e-4", ["my.yaml", "'learning_rte'", "'learning_rate'"]),
        ("precision: bf17", ["my.yaml", "bf17", "fp16"]),
        ("epochs: many", ["my.yaml", "many", "--epochs"]),
        ("epochs: -1", ["epochs is -1", "above 0"]),
        ("global_batch_size: [1, 2]", ["global_batch_size", "single value"]),
        ("validation_share: 0.9", ["validation_share is 0.9", "0.5"]),
        ("seed:", ["seed", "no value"]),
        ("just words", ["key: value"]),
        ("a: b: c", ["not valid YAML"]),
        ("push_to_hub: true", ["hub_repo", "owner/name"]),
        ("max_steps: 0", ["max_steps is 0", "-1"]),
        ("learning_rate: .nan", ["learning_rate is nan", "finite"]),
        ("epochs: .inf", ["epochs is inf", "finite"]),
    ],
)
def test_a_mistake_in_the_file_is_named(tmp_path: Path, text: str, words: list[str]) -> None:
    with pytest.raises(UserError) as caught:
        parse([write(tmp_path, text)])
    assert all(word in str(caught.value) for word in words), caught.value


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--learning-rte", "1"], ["--learning-rte", "--learning_rate"]),
        (["--learn", "1"], ["unknown option '--learn'"]),
        (["--epochs"], ["expected one argument"]),
        (["missing.yaml"], ["missing.yaml", "configs/ag_news.yaml"]),
        (["--epochs", "1", "configs/ag_news.yaml"], ["comes first"]),
    ],
)
def test_a_mistake_on_the_command_line_is_named(arguments: list[str], words: list[str]) -> None:
    with pytest.raises(UserError) as caught:
        parse(arguments)
    assert all(word in str(caught.value) for word in words), caught.value


def test_help_explains_every_field() -> None:
    done = subprocess.run([sys.executable, "-m", "pipeline.train", "--help"], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0
    text = " ".join(done.stdout.split())
    for name, field in FIELDS.items():
        assert f"--{name}" in text
        assert " ".join(field.metadata["help"].split())[:30] in text, name


def test_what_the_file_leaves_open_the_command_line_may_give(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("hub_checkpoints: true\n", encoding="utf-8")
    assert parse([str(file), "--hub_repo", "me/mine"]).hub_checkpoints
    with pytest.raises(UserError, match=r"run\.yaml: hub_checkpoints is set but hub_repo is not"):
        parse([str(file)])
    with pytest.raises(UserError, match=r"^unknown option '--epoch'"):
        parse([str(file), "--hub_repo", "me/mine", "--epoch", "1"])
