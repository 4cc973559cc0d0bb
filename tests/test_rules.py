"""Rules of the design that no single test would notice being broken."""

from __future__ import annotations

import ast
import re
import shlex
import subprocess
from pathlib import Path

import pytest
from launching import ROOT

from pipeline.config import FIELDS, parse
from pipeline.launch import KINDS, take_restarts

# Imports go one way: a module may import those of its own level and below.
LEVELS = [
    {"errors"},
    {"config"},
    {"columns", "readers", "data", "sampler", "batches", "metrics", "model", "topology", "calibration", "assets", "sources"},
    {"checkpoint", "record", "export", "card", "card_images", "report", "stopping", "trace", "hub_access"},
    {"state", "watch", "backup", "release", "proof", "hub", "predict", "launch"},
    {"run", "quickstart"},
    {"train", "train_ddp", "doctor"},
]


def imports(path: Path) -> set[str]:
    """Full names of all modules imported anywhere in the file."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def test_imports_go_one_way() -> None:
    level = {name: i for i, names in enumerate(LEVELS) for name in names}
    packages = {path.parent.name for path in (ROOT / "pipeline").glob("*/__init__.py")}
    modules = {path.stem for path in (ROOT / "pipeline").glob("*.py")} - {"__init__"} | packages - {"local_hub"}
    assert modules == set(level), "a new module needs its place in LEVELS"
    for name in modules:
        for path in [ROOT / "pipeline" / f"{name}.py"] if name not in packages else (ROOT / "pipeline" / name).glob("*.py"):
            for used in imports(path):
                other = used.split(".")[1] if used.startswith("pipeline.") else ""
                assert level.get(other, 0) <= level[name], f"{path} imports {other}, which is above it"
                assert other not in ("train", "train_ddp"), f"{name} imports an entry"


def test_the_service_and_the_pipeline_meet_only_on_the_hub() -> None:
    for path in (ROOT / "serve").rglob("*.py"):
        assert not [name for name in imports(path) if name.split(".")[0] in ("pipeline", "torch.distributed")], path
    for path in (ROOT / "pipeline").rglob("*.py"):
        assert not [name for name in imports(path) if name.split(".")[0] == "serve"], path


def test_ranks_talk_in_the_raw_script_only() -> None:
    for path in (ROOT / "pipeline").rglob("*.py"):
        talks = {name for name in imports(path) if name.startswith("torch.distributed")}
        # The launcher starts processes with torch's own launcher; it takes part in no collective. Where a restarted rank
        # meets the others is looked up in the launcher's store. The doctor measures.
        harmless = {"launch.py": ("elastic", ".run"), "topology.py": ("TCPStore",)}.get(path.name, ())
        only_harmless = bool(harmless) and all(n == "torch.distributed" or any(h in n for h in harmless) for n in talks)
        allowed = path.name == "train_ddp.py" or path.parent.name == "doctor" or only_harmless
        assert not talks or allowed, (path, talks)


def test_both_entries_carry_the_ten_markers() -> None:
    for name in ("train.py", "train_ddp.py"):
        text = (ROOT / "pipeline" / name).read_text(encoding="utf-8")
        assert {int(n) for n in re.findall(r"\[DDP (\d+)\]", text)} == set(range(1, 11)), name


def shell_lines() -> list[str]:
    """Every command in the README's shell blocks and its table of launches."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```bash\n(.*?)```", text, flags=re.DOTALL)
    lines = [line.split("  #")[0].strip() for block in blocks for line in block.splitlines()]
    return [line for line in lines if line] + re.findall(r"`((?:accelerate launch|torchrun|make) [^`]*)`", text)


@pytest.mark.parametrize("line", sorted(set(shell_lines())))
def test_readme_commands_are_understood(line: str) -> None:
    """Make targets and their variables exist; options of the entries parse; files named are there."""
    words = shlex.split(line.split(" && ")[0], comments=True)
    for word in words:
        if re.fullmatch(r"(configs|pipeline|serve)/[\w/]+\.\w+", word):
            assert (ROOT / word).exists(), word
    if words[0] == "make":
        done = subprocess.run(["make", "-n", *words[1:]], cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
        assert done.returncode == 0, done.stderr
        makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
        variables = [word.split("=", 1) for word in words[1:] if "=" in word]
        assert all(f"$({name})" in makefile for name, _ in variables)
        options = dict(variables)
        if words[1] in KINDS:
            arguments = [options.get("CONFIG", "configs/ag_news.yaml"), *shlex.split(options.get("ARGS", ""))]
            take_restarts(arguments)  # the launchers' option, not the entries'
            parse(arguments)
    for module in ("pipeline.train", "pipeline.train_ddp"):
        if module in words and "--help" not in words:
            parse(words[words.index(module) + 1 :])


def test_readme_names_only_options_that_exist() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    for name in re.findall(r"^- `(\w+):", text, flags=re.MULTILINE):
        assert name in FIELDS, name
