"""Checkpoints that count only when they are whole.

A checkpoint is a folder `checkpoint-<step>`. Its files are written first; last, its manifest (size and sha256 of every
file, the configuration, the step) is written beside them and renamed in. A run killed in mid-write leaves a folder
without a manifest, which nothing here takes for a checkpoint. Both entries use the same rules; what is inside differs.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pipeline.config import TrainConfig
from pipeline.errors import UserError

MANIFEST = "manifest.json"

# What may differ between the run that wrote a checkpoint and the one that goes on from it: where it runs and what it
# tells, not what it learns. (Rows per device and the number of processes may change: the global batch does not.)
FREE_FIELDS = {
    "max_per_device_batch_size", "device", "cpu_threads", "dataloader_workers", "output_dir", "resume", "save_total_limit",
    "tracker", "onnx", "push_to_hub", "hub_repo", "hub_tag", "hub_private",
}  # fmt: skip


def checkpoint_folder(output_dir: str | Path, step: int) -> Path:
    return Path(output_dir) / f"checkpoint-{step}"


def step_of(folder: Path) -> int:
    return int(folder.name.removeprefix("checkpoint-"))


def candidates(output_dir: str | Path) -> list[Path]:
    """All `checkpoint-<step>` folders, oldest first, whole or not."""
    found = [p for p in Path(output_dir).glob("checkpoint-*") if p.is_dir() and p.name.removeprefix("checkpoint-").isdigit()]
    return sorted(found, key=step_of)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def begin(folder: Path) -> None:
    """Make the folder ready for writing: empty, so that nothing of a killed attempt is taken along."""
    if folder.exists():
        shutil.rmtree(folder)
    folder.mkdir(parents=True)


def commit(folder: Path, config: TrainConfig, entry: str, world_size: int) -> None:
    """Make the folder a checkpoint. Called by one rank once every rank has written its files."""
    files = sorted(p for p in folder.rglob("*") if p.is_file() and p.name != MANIFEST)
    for path in files:
        _sync(path)
    manifest = {
        "format": 1,
        "entry": entry,
        "step": step_of(folder),
        "world_size": world_size,
        "config": config.to_dict(),
        "files": {str(p.relative_to(folder)): {"size": p.stat().st_size, "sha256": _sha256(p)} for p in files},
    }
    write_json(folder / MANIFEST, manifest)


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Write whole or not at all: a temporary file beside it, synced, renamed in."""
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("w", encoding="utf-8") as file:
        json.dump(value, file, indent=1, ensure_ascii=False)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
    _sync(path.parent)


def defect(folder: Path) -> str | None:
    """Why the folder does not count as a checkpoint, or None when it is whole."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        files = manifest["files"]
    except FileNotFoundError:
        return "it has no manifest: the run was stopped while writing it"
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError):
        return "its manifest cannot be read"
    for name, facts in files.items():
        path = folder / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != facts["size"]:
            return f"{name} has {path.stat().st_size} bytes instead of {facts['size']}"
        if _sha256(path) != facts["sha256"]:
            return f"{name} has changed since it was written"
    return None


def whole(output_dir: str | Path) -> list[Path]:
    """Folders with a manifest, oldest first (contents not read: for keeping and removing, not for resuming)."""
    return [p for p in candidates(output_dir) if (p / MANIFEST).is_file()]


def newest(output_dir: str | Path) -> Path | None:
    """The newest checkpoint that is whole; each newer one that is not is named on stderr and passed over."""
    for folder in reversed(candidates(output_dir)):
        reason = defect(folder)
        if reason is None:
            return folder
        print(f"warning: {folder} is not used: {reason}.", file=sys.stderr)
    return None


def set_aside(output_dir: str | Path) -> Path | None:
    """Move what an earlier run left to `<output_dir>.1` (or .2, ...): a new start loses nothing."""
    folder = Path(output_dir)
    if not folder.exists() or not any(folder.iterdir()):
        return None
    number = next(n for n in range(1, 10**6) if not folder.with_name(f"{folder.name}.{n}").exists())
    return folder.rename(folder.with_name(f"{folder.name}.{number}"))


def find_resume(config: TrainConfig, entry: str) -> Path | None:
    """The checkpoint that `resume` asks for, or None to start from the beginning.

    Raises UserError for a folder that is not a whole checkpoint, one of the other entry, or one written under a
    configuration that learns something else.
    """
    assert config.output_dir is not None
    if config.resume == "none":
        moved = set_aside(config.output_dir)
        if moved:
            print(f"The earlier run in {config.output_dir} is kept as {moved}.")
        return None
    if config.resume == "auto":
        folder = newest(config.output_dir)
        if folder is None:
            return None
    else:
        folder = Path(config.resume)
        if not folder.is_dir():
            raise UserError(f"resume is '{config.resume}': allowed is auto, none, or the folder of a checkpoint.")
        reason = defect(folder)
        if folder.resolve().parent != Path(config.output_dir).resolve():
            raise UserError(
                f"resume is '{folder}', which lies outside the output folder {config.output_dir}. Add --output_dir {folder.parent}."
            )
        if reason:
            raise UserError(f"{folder} cannot be resumed: {reason}. Choose another, or --resume auto for the newest whole one.")
    manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    if manifest["entry"] != entry:
        raise UserError(
            f"{folder} was written by the {manifest['entry']} entry, this is the {entry} one. Give another --output_dir, "
            "or --resume none to start anew (the earlier run is kept beside it)."
        )
    now, then = config.to_dict(), manifest["config"]
    different = [name for name in now if name not in FREE_FIELDS and then.get(name) != now[name]]
    if different:
        changes = ", ".join(f"{name} {then.get(name)} -> {now[name]}" for name in different)
        raise UserError(
            f"{folder} belongs to a run with another configuration ({changes}). Give another --output_dir, or --resume none "
            "to start anew (the earlier run is kept beside it), or the old values to go on."
        )
    for later in candidates(config.output_dir):
        if step_of(later) > step_of(folder):
            # Half written: room for others. Whole, but of a line that is being left: kept, out of the way.
            if (later / MANIFEST).exists():
                later.rename(later.with_name(f"{later.name}.set-aside-{time.time_ns()}"))
            else:
                shutil.rmtree(later)
    return folder


def rotate(output_dir: str | Path, keep: int, best_step: int | None) -> None:
    """Remove all but the newest `keep` whole checkpoints and the best one; half-written older folders go too."""
    kept = {p.name for p in whole(output_dir)[-keep:]}
    kept.add(f"checkpoint-{best_step}")
    last = max((step_of(p) for p in whole(output_dir)), default=-1)
    for folder in candidates(output_dir):
        if folder.name not in kept and step_of(folder) <= last:
            # The manifest first: a removal cut short must not leave a folder that looks whole.
            (folder / MANIFEST).unlink(missing_ok=True)
            shutil.rmtree(folder)
