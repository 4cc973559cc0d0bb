"""A run's newest and best checkpoint to its branch on the Hub, in one commit."""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, RepoFile
from huggingface_hub.errors import HfHubHTTPError, RepositoryNotFoundError

from pipeline import checkpoint
from pipeline.backup.branch import branch_of, branches, line_of, manifest_at, newest_step, plain
from pipeline.errors import UserError
from pipeline.hub_access import advice_line, check_write_access, limit_waiting, require_private, same_content

LOG = "backup.log"  # in the run's folder; also what one push locks against another
KEPT = ".gitattributes"  # git's own: says which files are large
ATTEMPTS = 3

Say = Callable[[str], object]
Files = Mapping[str, tuple[Path, str | None]]  # path in the repository -> file, and its sha256 where it is known


def push(run: Path, repo: str, *, private: bool = False, api: HfApi | None = None, say: Say = print) -> int:
    """Make the run's branch hold its newest complete checkpoint and its best one, in one commit; returns the newest's step.

    What is there already is not sent again, and nothing to send is no commit. A head that this run has not grown out of
    (a later step, or a run that learns something else) is kept as branch `<branch>.1`, `.2`, ...

    Raises:
        UserError: nothing to push, another push under way, a damaged checkpoint, no right to write, quota, network.
    """
    api = api or HfApi()
    limit_waiting()
    with _alone(run), plain(api, repo), tempfile.TemporaryDirectory(prefix=".push-", dir=run) as folder:
        files, step = _take(run, Path(folder))
        heads = _branches_of_own(api, repo, private)
        for attempt in range(ATTEMPTS):
            try:
                _commit(api, repo, branch_of(run), heads, files, step, say)
                break
            except HfHubHTTPError as error:
                # The branch has moved: another machine's push, or our own commit, whose answer was lost.
                if error.response.status_code != 412 or attempt == ATTEMPTS - 1:
                    raise
                heads = branches(api, repo)
        _forget_history(api, repo, branch_of(run), say)
    return step


@contextlib.contextmanager
def _alone(run: Path) -> Iterator[None]:
    """One push of a run at a time; clears away what a killed one left."""
    if not run.is_dir():
        raise UserError(f"No run at {run}. Give the folder of one, for example outputs/ag_news.")
    with (run / LOG).open("a") as log:
        try:
            fcntl.flock(log, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UserError(f"Another push of {run} is under way. Wait until it has ended, then run the command again.") from error
        except OSError:
            pass  # a file system without locks: the commit's parent still keeps two pushes apart
        for stale in run.glob(".push-*"):
            shutil.rmtree(stale, ignore_errors=True)
        yield


def _take(run: Path, folder: Path) -> tuple[dict[str, tuple[Path, str | None]], int]:
    """Hold on to the newest complete checkpoint and the best one it needs, so that rotation cannot pull them away.

    Returns path in the repository -> file and its sha256 (None for a manifest, which has none), and the newest's step.
    """
    for newest in reversed(checkpoint.whole(run)):
        files: dict[str, tuple[Path, str | None]] = {}
        try:
            _link(newest, folder, files)
            step, best = checkpoint.step_of(newest), checkpoint.best_of(folder / newest.name)
            if best is not None and best != step:
                _link(checkpoint.checkpoint_folder(run, best), folder, files)
            return files, step
        except FileNotFoundError:  # removed meanwhile: there is a newer one then, or the next older will do
            continue
    raise UserError(f"{run} holds no complete checkpoint to push: train first, or give another --run.")


def _link(source: Path, folder: Path, files: dict[str, tuple[Path, str | None]]) -> None:
    """Link a checkpoint's files under `folder` and add them to `files`."""
    target = folder / source.name
    target.mkdir(exist_ok=True)
    _link_file(source / checkpoint.MANIFEST, target)
    hashes = {name: facts["sha256"] for name, facts in checkpoint.read_manifest(target)["files"].items()}
    for name in hashes:
        _link_file(source / name, target)
    files |= {f"{source.name}/{name}": (target / name, hashes.get(name)) for name in [*hashes, checkpoint.MANIFEST]}


def _link_file(source: Path, target: Path) -> None:
    copy = target / source.name
    copy.unlink(missing_ok=True)
    try:
        os.link(source, copy)
    except FileNotFoundError:
        raise
    except OSError:  # a file system without hard links
        shutil.copyfile(source, copy)


def _branches_of_own(api: HfApi, repo: str, private: bool) -> dict[str, str]:
    """Name -> commit of every branch; the repository is made if need be."""
    try:
        found = branches(api, repo)
    except RepositoryNotFoundError:
        check_write_access(repo, api)
        api.create_repo(repo, private=private or None, exist_ok=True)
        found = branches(api, repo)
    if private:
        require_private(repo, api)
    return found


def _commit(api: HfApi, repo: str, branch: str, heads: Mapping[str, str], files: Files, step: int, say: Say) -> None:
    head = heads.get(branch)
    if head is None:
        api.create_branch(repo, branch=branch, exist_ok=True)  # from main: the Hub knows no empty branch
        head = branches(api, repo)[branch]
    there = {entry.path: entry for entry in api.list_repo_tree(repo, recursive=True, revision=head) if isinstance(entry, RepoFile)}
    adds: list[CommitOperationAdd] = []
    for name, (path, sha256) in files.items():
        if not same_content(there.get(name), path, sha256):
            adds.append(CommitOperationAdd(name, path))
            if sha256 and adds[-1].upload_info.sha256.hex() != sha256:
                raise UserError(f"{name} has changed since it was written: a damaged checkpoint is not put over a good one.")
    deletes = [CommitOperationDelete(name) for name in there if name not in files and name != KEPT]
    if adds or deletes:
        newest = newest_step(there)
        if newest is not None and _to_be_kept(api, repo, head, newest, files, step):
            _keep(api, repo, branch, heads, head, say)
        # create_commit and not upload_folder: with Xet that one may split a large folder into several commits.
        api.create_commit(repo, [*deletes, *adds], commit_message=f"checkpoint-{step}", revision=branch, parent_commit=head)


def _to_be_kept(api: HfApi, repo: str, head: str, there: int, files: Files, step: int) -> bool:
    """Whether what the branch holds is no earlier state of this run: a later step, or a run that learns something else."""
    if there > step:
        return True
    ours = checkpoint.read_json(files[f"checkpoint-{step}/{checkpoint.MANIFEST}"][0])
    try:
        return line_of(manifest_at(api, repo, head, there)) != line_of(ours)
    except (ValueError, KeyError, AttributeError):  # unreadable: not ours to throw away
        return True


def _keep(api: HfApi, repo: str, branch: str, heads: Mapping[str, str], head: str, say: Say) -> None:
    """Branch `<branch>.N` at the head, unless an earlier attempt has made it."""
    aside = {name: at for name, at in heads.items() if re.fullmatch(rf"{re.escape(branch)}\.\d+", name)}
    if head not in aside.values():
        name = next(name for n in range(1, 10**6) if (name := f"{branch}.{n}") not in aside)
        api.create_branch(repo, branch=name, revision=head)
        say(f"{repo}: the checkpoints that were on branch {branch} are another line of training; they are kept on branch {name}.")


def _forget_history(api: HfApi, repo: str, branch: str, say: Say) -> None:
    """Old states go; best effort, for the newest is safe by now."""
    try:
        if len(api.list_repo_commits(repo, revision=branch)) > 1:
            api.super_squash_history(repo, branch=branch, commit_message="Newest and best checkpoint")
    except Exception as error:
        say(f"The history of branch {branch} stays for now: {advice_line(error, api, repo) or type(error).__name__}")
