"""The branch of a run on the Hub: its name, what is on it, and what the Hub's refusals mean."""

from __future__ import annotations

import contextlib
import re
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi
from huggingface_hub.errors import RepositoryNotFoundError

from pipeline.checkpoint import FREE_FIELDS, MANIFEST, NAMES, read_json
from pipeline.errors import UserError
from pipeline.hub_access import advice_line, check_write_access, limit_waiting


@dataclass(frozen=True)
class RemoteCheckpoint:
    """The newest complete checkpoint of a branch, at a commit."""

    repo: str
    branch: str
    commit: str
    step: int


def branch_of(run: str | Path) -> str:
    """`checkpoints-<name of the run's folder>`, with what no branch may be called replaced."""
    name = re.sub(r"[^A-Za-z0-9_-]+", "-", Path(run).resolve().name).strip("-")[:100]
    return f"checkpoints-{name or 'run'}"


def find(run: str | Path, repo: str, api: HfApi | None = None) -> RemoteCheckpoint | None:
    """The newest checkpoint that the Hub has of this run; None when there is no repository, no branch or nothing on it.

    Raises UserError when the Hub cannot be asked, or does not show this token a repository that may be there.
    """
    api, branch = api or HfApi(), branch_of(run)
    limit_waiting()
    with plain(api, repo):
        try:
            commit = branches(api, repo).get(branch)
        except RepositoryNotFoundError:
            check_write_access(repo, api)  # a private repository is not there for a wrong token
            return None
        if commit is None:
            return None
        step = newest_step({entry.path: entry for entry in api.list_repo_tree(repo, recursive=True, revision=commit)})
        return None if step is None else RemoteCheckpoint(repo, branch, commit, step)


def branches(api: HfApi, repo: str) -> dict[str, str]:
    return {ref.name: ref.target_commit for ref in api.list_repo_refs(repo).branches}


def newest_step(paths: Iterable[str]) -> int | None:
    found = (re.fullmatch(rf"checkpoint-(\d+)/{re.escape(MANIFEST)}", path) for path in paths)
    return max((int(match[1]) for match in found if match), default=None)


def manifest_at(api: HfApi, repo: str, commit: str, step: int) -> dict[str, Any]:
    """The manifest of a checkpoint on the Hub."""
    with tempfile.TemporaryDirectory() as folder:
        return read_json(Path(api.hf_hub_download(repo, f"checkpoint-{step}/{MANIFEST}", revision=commit, local_dir=folder)))


def line_of(manifest: Mapping[str, Any]) -> tuple[Any, ...]:
    """What all checkpoints of one run have in common, and those of no other: `--resume none` begins another."""
    learns = {name: value for name, value in manifest["config"].items() if name not in FREE_FIELDS | NAMES}
    return manifest["entry"], manifest["identity"], manifest["recorder"].get("run_id"), learns


@contextlib.contextmanager
def plain(api: HfApi, repo: str) -> Iterator[None]:
    """Whatever the Hub says becomes one line; for a refusal the token is asked about, which names the reason."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        if getattr(getattr(error, "response", None), "status_code", 0) in (401, 403):
            _name_the_reason(repo, api)
        if line := advice_line(error, api, repo):
            raise UserError(line) from error
        raise


def _name_the_reason(repo: str, api: HfApi) -> None:
    """Raises UserError where it is the token. (Not asked at every push: the Hub limits how often this may be.)"""
    try:
        check_write_access(repo, api)
    except UserError:
        raise
    except Exception:
        return  # the Hub does not say; its first refusal will do
