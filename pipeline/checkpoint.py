"""Checkpoints that count only when they are whole.

A checkpoint is a folder `checkpoint-<step>`. Its files are written first; last, its manifest (size and sha256 of every
file, the configuration, the step, the recorder's state) is written beside them and renamed in. A run killed in mid-write
leaves a folder without a manifest, which nothing here takes for a checkpoint. Its files are safetensors and JSON, no
pickle: it may come from a Hub. Both entries use the same rules; what is inside is `pipeline/state.py`.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import socket
import sys
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from pipeline.config import FIELDS, TrainConfig
from pipeline.errors import UserError

MANIFEST = "manifest.json"
ANEW = ".begun-anew"  # which launcher began the run with `--resume none`
BEGUN = ".begun"  # by which launch
SEEN_SECONDS = 20.0  # for a file to be seen from another machine; NFS may keep what it knows of a folder for a while

# What may differ between the run that wrote a checkpoint and the one that goes on from it: where it runs and what it
# tells, not what it learns. (Rows per device and the number of processes may change: the global batch does not.)
FREE_FIELDS = {
    "max_per_device_batch_size", "device", "cpu_threads", "dataloader_workers", "bucket_mb", "static_graph", "hang_seconds", "output_dir",
    "resume", "checkpoint_steps", "save_total_limit", "tracker", "trace", "onnx", "push_to_hub", "hub_repo", "hub_tag", "hub_checkpoints",
    "hub_private",
}  # fmt: skip

# What only names the model and the rows: free to change (another folder, another machine) where these are the same.
NAMES = {
    "model", "model_revision", "dataset", "dataset_revision", "dataset_config", "train_split", "test_split", "test_file", "text_column",
    "label_column",
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


def commit(
    folder: Path, config: TrainConfig, entry: str, world_size: int, identity: Mapping[str, Any], recorder: Mapping[str, Any]
) -> None:
    """Make the folder a checkpoint. Called by one rank once every rank has written its files.

    `identity` says which model and rows it was trained on (`run.identity`), `recorder` is the recorder's state.
    """
    files = sorted(p for p in folder.iterdir() if p.is_file() and p.name != MANIFEST)
    with ThreadPoolExecutor() as pool:  # the disk is written to while cores read; neither holds Python's lock
        synced, digests = pool.map(_sync, files), pool.map(_sha256, files)
        sums = {path.name: {"size": path.stat().st_size, "sha256": digest} for path, digest, _ in zip(files, digests, synced, strict=True)}
    manifest = {
        "format": 2,
        "entry": entry,
        "step": step_of(folder),
        "world_size": world_size,
        "config": config.to_dict(),
        "identity": dict(identity),
        "recorder": dict(recorder),
        "files": sums,
    }
    write_json(folder / MANIFEST, manifest)


def amend(folder: Path, recorder: Mapping[str, Any]) -> None:
    """Put a later state of the recorder into a checkpoint: its validation comes after it was made whole."""
    write_json(folder / MANIFEST, read_manifest(folder) | {"recorder": dict(recorder)})


def read_json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8"))


def read_manifest(folder: Path) -> dict[str, Any]:
    return read_json(folder / MANIFEST)


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
        manifest = read_manifest(folder)
        files = {name: (int(facts["size"]), str(facts["sha256"])) for name, facts in manifest["files"].items()}
        missing = {"entry", "world_size", "config", "identity", "recorder"} - manifest.keys()
    except FileNotFoundError:
        return "it has no manifest: the run was stopped while writing it"
    except (ValueError, KeyError, TypeError, AttributeError):
        return "its manifest cannot be read"
    if missing:
        return f"its manifest lacks {', '.join(sorted(missing))}"
    for name, (size, digest) in files.items():
        path = folder / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != size:
            return f"{name} has {path.stat().st_size} bytes instead of {size}"
        if _sha256(path) != digest:
            return f"{name} has changed since it was written"
    return None


def whole(output_dir: str | Path) -> list[Path]:
    """Folders with a manifest, oldest first (contents not read: for keeping and removing, not for resuming)."""
    return [p for p in candidates(output_dir) if (p / MANIFEST).is_file()]


def set_aside(output_dir: str | Path) -> Path | None:
    """Move what an earlier run left to `<output_dir>.1` (or .2, ...): a new start loses nothing."""
    folder = Path(output_dir)
    if not folder.exists() or all(path.name in (ANEW, BEGUN) for path in folder.iterdir()):
        return None
    number = next(n for n in range(1, 10**6) if not folder.with_name(f"{folder.name}.{n}").exists())
    return folder.rename(folder.with_name(f"{folder.name}.{number}"))


def find_resume(config: TrainConfig, entry: str, identity: Mapping[str, Any]) -> Path | None:
    """The checkpoint that `resume` asks for, or None to start from the beginning.

    With `auto` the newest that is whole and of this run; newer ones that are not are named on stderr and passed over.

    Raises:
        UserError: a named folder that cannot be resumed; a checkpoint of another model, other rows or the other entry;
            checkpoints that are whole, but all of another configuration.
    """
    assert config.output_dir is not None
    if config.resume == "none" and not _begun_anew(config.output_dir):
        moved = set_aside(config.output_dir)
        if moved:
            print(f"The earlier run in {config.output_dir} is kept as {moved}.")
        Path(config.output_dir).mkdir(parents=True, exist_ok=True)
        (Path(config.output_dir) / ANEW).write_text(str(os.getppid()), encoding="utf-8")
        return None
    search = _newest_of_this_run if config.resume in ("auto", "none") else _named
    folder = search(config, entry, identity)
    # Also when none is good: what is damaged must not pass for newer than what is about to be written.
    _leave_behind(config.output_dir, step_of(folder) if folder else 0)
    return folder


def _launch() -> str:
    """The same on all ranks of a launch; another for each restart, and for each launch with a port or an id of its own."""
    return ":".join(
        os.environ.get(name, "") for name in ("MASTER_ADDR", "MASTER_PORT", "TORCHELASTIC_RUN_ID", "TORCHELASTIC_RESTART_COUNT")
    )


def begin_run(output_dir: str) -> None:
    """Rank 0, before the others go on: leave word in the run's folder for `check_shared`."""
    Path(output_dir).mkdir(parents=True, exist_ok=True)
    write_json(Path(output_dir) / BEGUN, {"launch": _launch()})


def check_shared(output_dir: str, seconds: float = SEEN_SECONDS) -> None:
    """Every rank, once rank 0 has begun the run: does this machine see the same folder? Asked before hours are spent.

    Raises UserError where it has not come to see what rank 0 wrote after `seconds`.
    """
    deadline = time.monotonic() + seconds
    while True:
        try:
            if read_json(Path(output_dir) / BEGUN)["launch"] == _launch():
                return
        except (OSError, ValueError):
            pass
        if time.monotonic() > deadline:
            raise UserError(
                f"{socket.gethostname()} does not see what rank 0, on another machine, has written to {Path(output_dir).resolve()}. Give an "
                "--output_dir on storage that all machines share."
            )
        time.sleep(0.5)


def _begun_anew(output_dir: str) -> bool:
    """Whether this very launch has begun anew already: its launcher has started the workers again after a failure."""
    mark = Path(output_dir) / ANEW
    restarted = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0
    return restarted and mark.is_file() and mark.read_text(encoding="utf-8") == str(os.getppid())


KEPT = "Give another --output_dir, or --resume none to start anew (the earlier run is kept beside it)"


def _newest_of_this_run(config: TrainConfig, entry: str, identity: Mapping[str, Any]) -> Path | None:
    others: list[str] = []
    for folder in reversed(candidates(config.output_dir or "")):
        reason = unusable(folder)
        if reason is None:
            manifest = read_manifest(folder)
            _refuse_another_run(folder, manifest, config, entry, identity)
            if changes := _changes(manifest["config"], config, FREE_FIELDS | NAMES):
                reason = f"it has another configuration ({changes})"
                others.append(changes)
        if reason is None:
            return folder
        print(f"warning: {folder} is not used: {reason}.", file=sys.stderr)
    if others:
        raise UserError(f"{config.output_dir} holds a run with another configuration ({others[0]}). {KEPT}, or the old values to go on.")
    return None


def _named(config: TrainConfig, entry: str, identity: Mapping[str, Any]) -> Path:
    folder = Path(config.resume)
    if not folder.is_dir():
        raise UserError(f"resume is '{config.resume}': allowed is auto, none, or the folder of a checkpoint.")
    if folder.resolve().parent != Path(config.output_dir or "").resolve():
        raise UserError(
            f"resume is '{folder}', which lies outside the output folder {config.output_dir}. Add --output_dir {folder.parent}."
        )
    if reason := unusable(folder):
        raise UserError(f"{folder} cannot be resumed: {reason}. Choose another, or --resume auto for the newest whole one.")
    manifest = read_manifest(folder)
    _refuse_another_run(folder, manifest, config, entry, identity)
    if changes := _changes(manifest["config"], config, FREE_FIELDS | NAMES):
        raise UserError(f"{folder} belongs to a run with another configuration ({changes}). {KEPT}, or the old values to go on.")
    return folder


def best_of(folder: Path) -> int | None:
    """The step of the best checkpoint so far, as this one's manifest knows it; None before the first validation."""
    try:
        return int(read_manifest(folder)["recorder"]["best"]["step"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def unusable(folder: Path) -> str | None:
    """Why a run cannot go on from the folder: it is not whole, or the best checkpoint, which its end needs, is not."""
    if reason := defect(folder):
        return reason
    best = best_of(folder)
    if best is not None and best != step_of(folder):
        needed = checkpoint_folder(folder.parent, best)
        if reason := defect(needed) if needed.is_dir() else "it is missing":
            return f"the best one, {needed.name}, is damaged ({reason})"
    return None


def _changes(then: Mapping[str, Any], config: TrainConfig, free: set[str]) -> str:
    now = config.to_dict()
    then = {name: field.default for name, field in FIELDS.items()} | dict(then)  # a field that came later: as it was without it
    return ", ".join(f"{name} {then.get(name)} -> {now[name]}" for name in now if name not in free and then.get(name) != now[name])


def _refuse_another_run(folder: Path, manifest: Mapping[str, Any], config: TrainConfig, entry: str, identity: Mapping[str, Any]) -> None:
    """Raises UserError where the checkpoint learnt from another model or other rows, or by the other entry."""
    if manifest["entry"] != entry:
        raise UserError(f"{folder} was written by the {manifest['entry']} entry, this is the {entry} one. {KEPT}.")
    different = [name for name in identity if manifest["identity"].get(name) != identity[name]]
    if different:
        changes = _changes(manifest["config"], config, FREE_FIELDS)
        what = " and ".join(different)
        raise UserError(
            f"{folder} was trained with another {what} ({changes or f'the names are the same, the contents of {what} have changed'}). "
            f"{KEPT}, or put back what was there to go on."
        )


def _leave_behind(output_dir: str, step: int) -> None:
    """Later folders than the one resumed: half written ones make room, whole ones, of a line that is left, are kept aside."""
    for later in candidates(output_dir):
        if step_of(later) > step:
            if (later / MANIFEST).exists():
                later.rename(later.with_name(f"{later.name}.set-aside-{time.time_ns()}"))
            else:
                shutil.rmtree(later)


def rotate(output_dir: str | Path, keep: int) -> None:
    """Remove all but the newest `keep` (at least 1) whole checkpoints and the best ones they count on.

    Half-written folders that are older than the newest go too.
    """
    newest = whole(output_dir)[-keep:]
    kept = {step_of(folder) for folder in newest}
    # Not the newest one's best alone: should that turn out damaged, the one before must still be good to go on from.
    kept |= {best for folder in newest if (best := best_of(folder)) is not None}
    for folder in candidates(output_dir):
        if newest and step_of(folder) not in kept and step_of(folder) <= step_of(newest[-1]):
            # The manifest first: a removal cut short must not leave a folder that looks whole.
            (folder / MANIFEST).unlink(missing_ok=True)
            shutil.rmtree(folder)
