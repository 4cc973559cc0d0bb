"""A run's checkpoints back from the Hub, onto a machine that has none, or older ones."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

from huggingface_hub import HfApi

from pipeline import checkpoint
from pipeline.backup.branch import RemoteCheckpoint, find, line_of, manifest_at, plain
from pipeline.config import TrainConfig
from pipeline.errors import UserError
from pipeline.hub_access import limit_waiting

CONTENT = ["checkpoint-*/*.safetensors", "checkpoint-*/*.json"]  # no pickle comes from the network

Say = Callable[[str], object]


class DamagedError(UserError):
    """What is on the Hub cannot be used."""


def pull(remote: RemoteCheckpoint, run: str | Path, api: HfApi | None = None, say: Say = print) -> Path:
    """Bring the branch's checkpoints into the run's folder, each checked against its manifest; returns the newest usable one.

    Complete checkpoints that are here already stay as they are. One that is damaged on the Hub is named and left there.
    Raises UserError when none can be used, or the Hub fails.
    """
    api, run = api or HfApi(), Path(run)
    limit_waiting()
    run.mkdir(parents=True, exist_ok=True)
    for stale in run.glob(".pull-*"):
        shutil.rmtree(stale, ignore_errors=True)
    with plain(api, remote.repo), tempfile.TemporaryDirectory(prefix=".pull-", dir=run) as temporary:
        api.snapshot_download(remote.repo, revision=remote.commit, local_dir=temporary, allow_patterns=CONTENT)
        arrived = []
        for folder in checkpoint.candidates(temporary):  # the best one before the newest, which counts on it
            if reason := _suspect(folder):
                say(f"warning: {folder.name} of {remote.repo}, branch {remote.branch}, is not used: {reason}.")
                continue
            target = run / folder.name
            if checkpoint.defect(target) is not None:
                shutil.rmtree(target, ignore_errors=True)
                folder.rename(target)
            arrived.append(target)
    usable = [folder for folder in arrived if checkpoint.unusable(folder) is None]
    if not usable:
        raise DamagedError(f"The checkpoints of {remote.repo}, branch {remote.branch}, are damaged; none can be used.")
    return usable[-1]


def _suspect(folder: Path) -> str | None:
    """Why a folder from the network is not taken: it is not whole, is called by another step, or holds what it does not name."""
    if reason := checkpoint.defect(folder):
        return reason
    manifest = checkpoint.read_manifest(folder)
    if manifest.get("step") != checkpoint.step_of(folder):
        return f"its manifest is that of step {manifest.get('step')}"
    unnamed = {path.name for path in folder.iterdir()} - {*manifest["files"], checkpoint.MANIFEST}
    return f"its manifest does not name {sorted(unnamed)[0]}" if unnamed else None


def _continues(here: Path, remote: RemoteCheckpoint) -> bool:
    return line_of(manifest_at(HfApi(), remote.repo, remote.commit, remote.step)) == line_of(checkpoint.read_manifest(here))


def restore(config: TrainConfig, say: Say = print) -> None:
    """Before a run with `hub_checkpoints` looks for what to resume: bring here what the Hub has and this machine lacks.

    For `resume: auto` only. Where the Hub cannot be asked, a run with a checkpoint of its own goes on from that, with a
    warning. One without raises UserError: starting anew would later push its first steps over the Hub's.
    """
    if not config.hub_checkpoints or config.resume != "auto":
        return
    assert config.output_dir is not None and config.hub_repo is not None
    here = next((folder for folder in reversed(checkpoint.candidates(config.output_dir)) if checkpoint.unusable(folder) is None), None)
    try:
        remote = find(config.output_dir, config.hub_repo)
        # A later checkpoint of the run that lies here, and not of one that `--resume none` has left.
        if remote and (here is None or (checkpoint.step_of(here) < remote.step and _continues(here, remote))):
            folder = pull(remote, config.output_dir, say=say)
            say(f"pulled      {folder.name} from {remote.repo}, branch {remote.branch}")
    except Exception as error:
        said = str(error) if isinstance(error, UserError) else f"The Hub gave no usable answer ({type(error).__name__}: {error})."
        if here is not None:
            say(f"warning: {said} The run goes on from {here}.")
        elif isinstance(error, DamagedError):
            raise UserError(f"{said} Start anew with --resume none: they are kept on another branch then.") from error
        else:
            raise UserError(
                f"{said} Whether the Hub has a checkpoint to go on from is not known: run the same command again later, or with "
                "--resume none to start anew."
            ) from error
