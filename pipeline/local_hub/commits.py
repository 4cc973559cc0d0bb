"""A commit comes in two steps: preupload tells which files go to LFS and which are there already; commit names them all."""

from __future__ import annotations

import base64
import binascii
import codecs
import json
import re
from collections.abc import Iterator
from typing import IO, Any

from dulwich.ignore import IgnoreFilter
from dulwich.lfs import LFSPointer

from pipeline.local_hub.errors import HubError, bad_request, revision_not_found
from pipeline.local_hub.git import DIRECTORY, LFS_SUFFIXES, Change, GitRepo, check_path
from pipeline.local_hub.lfs import SHA256
from pipeline.local_hub.web import MIB, Call, route

REPO = "/api/{kind:kind}/{ns}/{name}"
REGULAR_LIMIT = MIB  # larger files, and binary ones, go to LFS
INLINE_LIMIT = 20 * MIB  # what a commit may carry of one file all the same
COMMIT_LIMIT = 2048 * MIB  # and of all files together; on disk while they arrive


@route("POST", f"{REPO}/preupload/{{rev}}")
def preupload(call: Call) -> dict[str, Any]:
    repo, body = call.writable(call.repo), call.json()
    _refuse_pull_request(call)
    with repo.git() as git:
        commit = _branch_head(git, call.path("rev"))
        ignored = IgnoreFilter(_ignore_lines(git, commit, body))
        answers = []
        for file in call.listed(body, "files"):
            if not isinstance(file.get("size"), int):
                raise bad_request("Every file has a path, a sample and a size.")
            path = check_path(file.get("path"))
            answer: dict[str, Any] = {"path": path, "uploadMode": "lfs" if _is_large(file) else "regular"}
            answer["shouldIgnore"] = bool(ignored.is_ignored(path))
            if (entry := git.find(commit, path)) and entry.mode != DIRECTORY:
                pointer = git.content(entry)[1]
                answer["oid"] = pointer.oid if pointer else entry.oid
            answers.append(answer)
    return {"files": answers}


def _is_large(file: dict[str, Any]) -> bool:
    if file["size"] > REGULAR_LIMIT or file["path"].rsplit(".", 1)[-1].lower() in LFS_SUFFIXES:
        return True
    try:
        sample = base64.b64decode(file.get("sample") or "")
        codecs.getincrementaldecoder("utf-8")().decode(sample)  # incremental: the sample may end within a character
        return b"\0" in sample
    except (ValueError, TypeError):
        return True


def _ignore_lines(git: GitRepo, commit: str, body: dict[str, Any]) -> list[bytes]:
    """The .gitignore of this upload, else the one in the repository."""
    given = body.get("gitIgnore")
    if isinstance(given, str):
        return given.encode().splitlines()
    entry = git.find(commit, ".gitignore")
    return git.read(entry).splitlines() if entry and entry.mode != DIRECTORY else []


def _branch_head(git: GitRepo, branch: str) -> str:
    heads = git.refs("heads")
    name = branch.removeprefix("refs/heads/")
    if name not in heads:
        raise revision_not_found(branch)
    return heads[name]


def _refuse_pull_request(call: Call) -> None:
    if call.flag("create_pr"):
        raise bad_request("The local Hub does not offer pull requests: push to a branch instead.")


@route("POST", f"{REPO}/commit/{{rev}}", limit=COMMIT_LIMIT)
def commit(call: Call) -> dict[str, Any]:
    repo = call.writable(call.repo)
    _refuse_pull_request(call)
    branch, lines = call.path("rev").removeprefix("refs/heads/"), _json_lines(call.body)
    key, header = next(lines, ("", {}))
    if key != "header":
        raise bad_request("The first line of a commit is its header.")
    parent = header.get("parentCommit")
    if parent is not None and not re.fullmatch("[0-9a-f]{5,40}", str(parent)):
        raise bad_request("parentCommit is 5 to 40 hexadecimal digits.")
    message = f"{header.get('summary') or 'Update'}\n\n{header.get('description') or ''}".strip()
    with repo.lock, repo.git() as git:
        changes = (_change(git, *line) for line in lines)
        oid = git.commit(branch, changes, message, str(call.caller.user), parent)
    return {"success": True, "commitOid": oid, "commitUrl": f"{call.base}{repo.web_path}/commit/{oid}"}


def _json_lines(body: IO[bytes]) -> Iterator[tuple[str, dict[str, Any]]]:
    longest = INLINE_LIMIT * 4 // 3 + 64 * 1024  # base64, and the path
    while line := body.readline(longest):
        if len(line) == longest:
            raise HubError(413, f"A file of more than {INLINE_LIMIT} bytes belongs in LFS, not in the commit.")
        if not line.strip():
            continue
        try:
            found = json.loads(line)
            key, value = found["key"], found["value"]
        except (ValueError, TypeError, KeyError, RecursionError) as error:
            raise bad_request("A commit is lines of JSON objects with key and value.") from error
        if not isinstance(value, dict):
            raise bad_request("The value of a commit's line is an object.")
        yield str(key), value


def _change(git: GitRepo, key: str, value: dict[str, Any]) -> Change:
    path = check_path(str(value.get("path")).rstrip("/") if key == "deletedFolder" else value.get("path"))
    if key in ("deletedFile", "deletedFolder"):
        return Change(path, folder=key == "deletedFolder")
    if key == "file":
        try:
            content = str(value["content"])
            return Change(path, base64.b64decode(content) if value.get("encoding") == "base64" else content.encode())
        except (KeyError, binascii.Error, UnicodeEncodeError) as error:
            raise bad_request(f"The content of {path} is not valid base64.") from error
    if key == "lfsFile":
        oid = str(value.get("oid"))
        if not SHA256.fullmatch(oid) or not git.lfs_path(oid).is_file():
            raise bad_request(f"{path} points to the LFS object {oid}, which has not been uploaded to this repository.")
        return Change(path, LFSPointer(oid, git.lfs_path(oid).stat().st_size).to_bytes())
    raise bad_request(f"Unknown operation in a commit: {key!r}")


# The Xet client shows of a refusal the status and the address only. So it is sent to an address that says what to do.
XET_OFF = "/this-local-Hub-does-not-speak-Xet--set-HF_HUB_DISABLE_XET=1-and-run-the-command-again"


@route("GET", f"{REPO}/xet-write-token/{{rev}}", f"{REPO}/xet-read-token/{{rev}}")
def xet_token(call: Call) -> None:
    raise HubError(307, "This local Hub does not speak Xet: set HF_HUB_DISABLE_XET=1.", Location=XET_OFF)


@route("GET", XET_OFF)
def xet_off(call: Call) -> None:
    # 400 is final: the client does not try again.
    raise bad_request("This local Hub does not speak Xet: set HF_HUB_DISABLE_XET=1 and run the command again.")
