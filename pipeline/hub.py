"""Publish a finished run's release to the Hub: one commit, then a tag, then the proof.

    python -m pipeline.hub --run outputs/ag_news --repo your-name/ag-news
    python -m pipeline.hub --run outputs/ag_news --repo your-name/ag-news --tag v2 --private

The token comes from HF_TOKEN or `hf auth login`, the Hub from HF_ENDPOINT. Publishing the same release again changes
nothing: it finds commit and tag in place and proves them once more.
"""

from __future__ import annotations

import argparse
import contextlib
import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi
from huggingface_hub.errors import RepositoryNotFoundError

from pipeline.card import PLACEHOLDER
from pipeline.checkpoint import whole
from pipeline.config import TrainConfig
from pipeline.errors import UserError, run_entry
from pipeline.hub_access import advice, advice_line, check_write_access, limit_waiting, require_private, same_content
from pipeline.proof import RELEASE_SUFFIXES, Proof, prove

__all__ = ["Proof", "Published", "check_before_training", "check_write_access", "prove", "publish"]

CHECK_SECONDS = 20  # for the Hub to answer before a training starts
REQUIRED = ("README.md", "config.json", "golden.json", "model.safetensors", "run.json", "tokenizer.json")
# Left over from an earlier release these would be loaded beside the new files and contradict them. All else that a
# repository holds is its owner's and stays.
SUPERSEDED = ("onnx/model.onnx", "onnx/model.onnx_data", "onnx/model.onnx.data", "vocab.txt", "merges.txt", "special_tokens_map.json",
              "added_tokens.json", "model.safetensors.index.json", "confusion_matrix.png", "training_curve.png")  # fmt: skip
# What clients would load instead of a release's own model, or beside it.
WEIGHTS = re.compile(r"(onnx/)?[^/]+\.(safetensors(\.index\.json)?|bin|h5|msgpack|pt|pth|ckpt|gguf|onnx)")


@dataclass(frozen=True)
class Published:
    """A release on the Hub; `tag` points at `commit`, and `proof` is what pulling it back has shown."""

    repo: str
    commit: str
    tag: str
    url: str
    proof: Proof


def check_before_training(config: TrainConfig, api: HfApi | None = None) -> None:
    """Where the run is to write to the Hub: is there a token, and may it write to `hub_repo`? Asked before hours are spent; writes nothing.

    For a run that has a checkpoint to go on from, whatever is wrong is a warning: it may be mended before it is needed, and
    what is for the Hub is kept until then. Raises UserError otherwise; also for a Hub that cannot be asked whether it has
    a checkpoint.
    """
    if not (config.push_to_hub or config.hub_checkpoints):
        return
    assert config.hub_repo is not None, "TrainConfig asks for hub_repo"
    api = api or HfApi()
    if config.push_to_hub and config.hub_tag is not None:
        _check_tag_name(config.hub_tag)
    limit_waiting(CHECK_SECONDS)
    try:
        check_write_access(config.hub_repo, api)
        if config.push_to_hub:
            _refuse_foreign_model(config.hub_repo, api)
    except Exception as error:
        refused = isinstance(error, UserError)
        line = str(error) if refused else advice_line(error, api, config.hub_repo)
        if line is None:
            raise
        begun = bool(config.output_dir and whole(config.output_dir))
        if not begun and config.push_to_hub:
            run = config.output_dir or "outputs/NAME"
            later = f" Train without --push_to_hub and publish later: make push RUN={run} REPO={config.hub_repo}"
            raise UserError(line if refused else line + later) from error
        if not begun and (refused or config.resume == "auto"):
            unknown = (
                " Whether the Hub has a checkpoint to go on from is not known: run it again later, or with --resume none to start anew."
            )
            raise UserError(line if refused else line + unknown) from error
        print(f"warning: {line} Training goes on; what is for the Hub is kept here until then.", flush=True)
    finally:
        limit_waiting()


def publish(
    folder: Path, repo: str, *, tag: str | None = None, private: bool = False, message: str | None = None, api: HfApi | None = None
) -> Published:
    """Put a release folder into the model repository `repo` (made if need be), tag it, and prove it.

    One commit on main, which fails rather than overwrites when somebody else commits meanwhile; files of the repository
    that are no part of a release stay. Then the tag. Then the proof; when it fails, a tag made here is taken back, so
    that a tag is always a proven release.

    Args:
        folder: what `build_release` made.
        tag: its name; None: the one this release already has, else v1 or the next free v2, v3...
        private: make a new repository private; refused for one that is public.
        api: client of another Hub or with another token than the environment's.

    Raises:
        UserError: no or insufficient token, somebody else's namespace, a repository with a model that is no release, a
            tag that is taken by another release, quota, network, or a failed proof.
    """
    folder, api = Path(folder), api or HfApi()
    limit_waiting()
    files = _release_files(folder, repo)
    if tag is not None:
        _check_tag_name(tag)
    kept = f"Nothing is lost: the release stays in {folder}; run `make push RUN={folder.parent} REPO={repo}` again then."
    with advice(api, repo, kept):
        check_write_access(repo, api)
        _refuse_foreign_model(repo, api)
        repo = api.create_repo(repo, private=private or None, exist_ok=True).repo_id
        if private:
            require_private(repo, api)
        refs = api.list_repo_refs(repo)
        tags = {ref.name: ref.target_commit for ref in refs.tags}
        branches = {ref.name: ref.target_commit for ref in refs.branches}
        next_tag = _next_tag([*tags, *branches])
        if tag in branches:
            raise UserError(
                f"'{tag}' is a branch of {repo}; a tag of the same name would be ambiguous. Choose another, for example {next_tag}."
            )
        if tag in tags and not _holds(api, repo, tags[tag], files):
            raise UserError(
                f"The tag '{tag}' of {repo} belongs to another release. Taken are {', '.join(sorted(tags))}; choose another, or leave "
                f"--tag out for {next_tag}."
            )
        if tag in tags:
            commit = tags[tag]
        else:
            commit = _commit(api, repo, branches.get("main"), files, message or f"Release of {folder.parent.name}")
            tag = tag or next((name for name, at in tags.items() if at == commit and re.fullmatch(r"v\d+", name)), None) or next_tag
        fresh = tag not in tags
        if fresh:
            api.create_tag(repo, tag=tag, revision=commit)
        try:
            proof = prove(repo, commit, api)
        except BaseException as error:
            if not fresh:
                raise
            with contextlib.suppress(Exception):
                api.delete_tag(repo, tag=tag)
            if isinstance(error, UserError):
                raise UserError(f"{error} (The tag {tag} was taken back.)") from error
            raise
    return Published(repo, commit, tag, f"{api.endpoint}/{repo}/tree/{tag}", proof)


def _refuse_foreign_model(repo: str, api: HfApi) -> None:
    """Raises UserError where main holds a model that no release of ours put there; says so where the name is a dataset's too."""
    try:
        names = api.list_repo_files(repo)
    except RepositoryNotFoundError:
        for kind in ("dataset", "space"):
            if api.repo_exists(repo, repo_type=kind):
                print(
                    f"note: {repo} is a {kind}, which stays as it is; the model gets a repository of its own under that name.", flush=True
                )
        return
    weights = sorted(name for name in names if WEIGHTS.fullmatch(name))
    if weights and "run.json" not in names:
        raise UserError(
            f"{repo} holds a model that is no release of this project ({', '.join(weights[:3])}{' ...' if weights[3:] else ''}); a release would "
            f"mix with it. Choose another --repo, or delete these files first: hf repos delete-files {repo} {' '.join(map(repr, weights[:3]))}"
        )


def _release_files(folder: Path, repo: str) -> dict[str, Path | bytes]:
    """Path in the repository -> file or content. Raises UserError when the folder is no whole release."""
    missing = [name for name in REQUIRED if not (folder / name).is_file()]
    if missing:
        raise UserError(f"{folder} is no release: {', '.join(missing)} missing. Run the training command again; it makes the release anew.")
    files: dict[str, Path | bytes] = {
        str(path.relative_to(folder)): path for path in sorted(folder.rglob("*")) if path.is_file() and path.suffix in RELEASE_SUFFIXES
    }
    card = (folder / "README.md").read_text(encoding="utf-8")
    files["README.md"] = card.replace(PLACEHOLDER, repo).encode()
    return files


def _commit(api: HfApi, repo: str, head: str | None, files: Mapping[str, Path | bytes], message: str) -> str:
    """The commit on main that holds exactly these files of a release; makes it unless `head` does already."""
    if head and _holds(api, repo, head, files):
        return head
    stale = _stale(api, repo, head, files) if head else []
    operations = [CommitOperationDelete(path) for path in stale]
    # create_commit and not upload_folder: with Xet that one may split a large folder into several commits.
    return api.create_commit(
        repo,
        operations=[*operations, *(CommitOperationAdd(name, content) for name, content in files.items())],
        commit_message=message,
        parent_commit=head,
    ).oid


def _holds(api: HfApi, repo: str, commit: str, files: Mapping[str, Path | bytes]) -> bool:
    """Whether the repository at `commit` has exactly this release."""
    there: dict[str, Any] = {entry.path: entry for entry in api.get_paths_info(repo, list(files), revision=commit)}
    if not all(same_content(there.get(name), content) for name, content in files.items()):
        return False
    return not _stale(api, repo, commit, files)


def _stale(api: HfApi, repo: str, commit: str, files: Mapping[str, Any]) -> list[str]:
    return [entry.path for entry in api.get_paths_info(repo, [name for name in SUPERSEDED if name not in files], revision=commit)]


def _next_tag(taken: Iterable[str]) -> str:
    numbers = [int(name[1:]) for name in taken if re.fullmatch(r"v\d+", name)]
    return f"v{max(numbers, default=0) + 1}"


def _check_tag_name(tag: str) -> None:
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", tag) or ".." in tag or tag.endswith((".", ".lock")):
        raise UserError(f"'{tag}' cannot be a tag: allowed are letters, digits, '.', '_' and '-', starting with a letter or digit. Try v1.")


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}. Usage: python -m pipeline.hub --run outputs/NAME --repo owner/name [--tag v2] [--private]")


def main(argv: Sequence[str]) -> None:
    description = "Publish the release of a finished run: one commit, a tag, and the proof by pulling it back."
    parser = _Parser(prog="python -m pipeline.hub", description=description, allow_abbrev=False)
    parser.add_argument("--run", required=True, type=Path, help="Folder of the finished run, for example outputs/ag_news.")
    parser.add_argument("--repo", required=True, help="owner/name of the model repository; made if it does not exist.")
    parser.add_argument("--tag", help="Name of the release; none: v1, or the next free v2, v3, ...")
    parser.add_argument("--private", action="store_true", help="Create the repository as private.")
    parser.add_argument("--message", help="Commit message.")
    arguments = parser.parse_args(argv)
    published = publish(_release_of(arguments.run), arguments.repo, tag=arguments.tag, private=arguments.private, message=arguments.message)
    print(
        f"repository  {published.repo}\ncommit      {published.commit}\ntag         {published.tag}\n"
        f"proof       {published.proof}\nat          {published.url}",
        flush=True,
    )


def _release_of(run: Path) -> Path:
    if not run.is_dir():
        others = sorted(str(path.parent) for path in run.parent.glob("*/release") if path.is_dir()) if run.parent.is_dir() else []
        raise UserError(f"No run at {run}. {'There are ' + ', '.join(others) + '.' if others else 'Train one first: make train.'}")
    if not (run / "release").is_dir():
        raise UserError(
            f"{run} holds no release: its training is not finished. Run its command again, it goes on from the newest checkpoint "
            f"and ends with {run / 'release'}."
        )
    return run / "release"


if __name__ == "__main__":
    sys.exit(run_entry(main))
