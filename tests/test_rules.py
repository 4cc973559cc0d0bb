"""Rules of the design that no single test would notice being broken."""

from __future__ import annotations

import ast
from pathlib import Path

from launching import ROOT

# Imports go one way: a module may import those of its own level and below.
LEVELS = [
    {"errors"},
    {"config"},
    {
        "columns",
        "readers",
        "data",
        "sampler",
        "batches",
        "dropout",
        "metrics",
        "model",
        "topology",
        "sharding",
        "calibration",
        "assets",
        "sources",
        "energy",
    },
    {"checkpoint", "record", "export", "card", "card_images", "report", "stopping", "trace", "hub_access"},
    {"speed", "state", "watch", "backup", "release", "proof", "hub", "verify", "predict", "launch", "deploy"},
    {"run", "quickstart"},
    {"train", "train_ddp", "doctor", "lab"},
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
        # meets the others is looked up in the launcher's store. Shards of FSDP are cut and gathered as tensors. The doctor measures, the lab breaks.
        harmless = {"launch.py": ("elastic", ".run"), "topology.py": ("TCPStore",), "sharding.py": (".tensor",)}.get(path.name, ())
        only_harmless = bool(harmless) and all(n == "torch.distributed" or any(h in n for h in harmless) for n in talks)
        allowed = path.name == "train_ddp.py" or path.parent.name in ("doctor", "lab") or only_harmless
        assert not talks or allowed, (path, talks)
