"""What is inside a repository: listing, history, branches and tags, and downloads."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

from dulwich.objects import Commit
from starlette.responses import JSONResponse, Response, StreamingResponse

from pipeline.local_hub.errors import HubError, entry_not_found
from pipeline.local_hub.git import DIRECTORY, Entry, GitRepo
from pipeline.local_hub.store import timestamp
from pipeline.local_hub.web import MIB, Call, route

REPO = "/api/{kind:kind}/{ns}/{name}"


def _commit_json(commit: Commit) -> dict[str, Any]:
    title, _, message = commit.message.decode("utf-8", "replace").strip().partition("\n")
    user = commit.author.decode("utf-8", "replace").split(" <")[0]
    identity = {"id": commit.id.decode(), "title": title, "message": message.strip()}
    return {**identity, "date": timestamp(commit.commit_time), "authors": [{"user": user}]}


def _entries_json(git: GitRepo, commit: str, entries: list[Entry], expand: bool) -> list[dict[str, Any]]:
    last = git.last_commits(commit, [entry.path for entry in entries]) if expand else {}
    found = []
    for entry in entries:
        item: dict[str, Any] = {"type": "directory", "oid": entry.oid, "size": 0, "path": entry.path}
        if entry.mode != DIRECTORY:
            blob, pointer = git.content(entry)
            item |= {"type": "file", "size": pointer.size if pointer else len(blob)}
            if pointer:
                item["lfs"] = {"oid": pointer.oid, "size": pointer.size, "pointerSize": len(blob)}
        if entry.path in last:
            item["lastCommit"] = {key: value for key, value in _commit_json(last[entry.path]).items() if key in ("id", "title", "date")}
        found.append(item)
    return found


@route("GET", f"{REPO}/tree/{{rev}}", f"{REPO}/tree/{{rev}}/{{path:path}}")
def tree(call: Call) -> JSONResponse:
    repo, path, expand = call.repo, call.path("path").strip("/"), call.flag("expand")
    with repo.git() as git:
        commit = git.resolve(call.path("rev"))
        # The next page names the commit: a push between two pages must not shift what they hold.
        here = f"/api/{repo.kind}/{repo.id}/tree/{commit}" + (f"/{quote(path, safe='')}" if path else "")
        page, headers = call.page(git.listing(commit, path, call.flag("recursive")), here, 50 if expand else 1000)
        return JSONResponse(_entries_json(git, commit, page, expand), headers=headers)


@route("POST", f"{REPO}/paths-info/{{rev}}")
def paths_info(call: Call) -> list[dict[str, Any]]:
    fields = call.form()
    with call.repo.git() as git:
        commit = git.resolve(call.path("rev"))
        entries = [entry for path in fields.get("paths", []) if (entry := git.find(commit, path))]
        return _entries_json(git, commit, entries, fields.get("expand", [""])[0].lower() == "true")


@route("GET", f"{REPO}/refs")
def refs(call: Call) -> dict[str, Any]:
    def as_json(base: str) -> list[dict[str, str]]:
        return [{"name": name, "ref": f"refs/{base}/{name}", "targetCommit": commit} for name, commit in git.refs(base).items()]

    with call.repo.git() as git:
        return {"branches": as_json("heads"), "tags": as_json("tags"), "converts": [], "pullRequests": []}


@route("GET", f"{REPO}/commits/{{rev}}")
def commits(call: Call) -> JSONResponse:
    repo = call.repo
    with repo.git() as git:
        commit = git.resolve(call.path("rev"))
        page, headers = call.page(git.history(commit), f"/api/{repo.kind}/{repo.id}/commits/{commit}", 100)
        return JSONResponse([_commit_json(found) for found in page], headers=headers)


@route("POST", f"{REPO}/branch/{{rev}}")
def create_branch(call: Call) -> dict[str, Any]:
    repo, start = call.writable(call.repo), call.json().get("startingPoint") or "main"
    with repo.lock, repo.git() as git:
        git.set_ref("heads", call.path("rev"), git.resolve(str(start)))
    return {}


@route("DELETE", f"{REPO}/branch/{{rev}}")
def delete_branch(call: Call) -> dict[str, Any]:
    repo = call.writable(call.repo)
    if call.path("rev") == "main":
        raise HubError(403, "The branch main cannot be deleted.")
    with repo.lock, repo.git() as git:
        git.delete_ref("heads", call.path("rev"))
    return {}


@route("POST", f"{REPO}/tag/{{rev}}")
def create_tag(call: Call) -> dict[str, Any]:
    repo, body = call.writable(call.repo), call.json()
    with repo.lock, repo.git() as git:
        target, message = git.resolve(call.path("rev")), str(body.get("message") or "")
        git.set_ref("tags", str(body.get("tag") or ""), target, message, str(call.caller.user))
    return {}


@route("DELETE", f"{REPO}/tag/{{rev}}")
def delete_tag(call: Call) -> dict[str, Any]:
    repo = call.writable(call.repo)
    with repo.lock, repo.git() as git:
        git.delete_ref("tags", call.path("rev"))
    return {}


@route("POST", f"{REPO}/super-squash/{{rev}}")
def super_squash(call: Call) -> dict[str, Any]:
    repo, message = call.writable(call.repo), str(call.json().get("message") or "Super-squash")
    with repo.lock, repo.git() as git:
        git.commit(call.path("rev"), [], message, str(call.caller.user), squash=True)
    return {}


# Downloads


@route("GET", *(f"{prefix}/{{ns}}/{{name}}/{verb}/{{rev}}/{{path:path}}" for prefix in ("", "/{kind:kind}") for verb in ("resolve", "raw")))
def resolve(call: Call) -> Response:
    with call.repo.git() as git:
        commit = git.resolve(call.path("rev"))
        entry = git.find(commit, call.path("path"))
        if entry is None or entry.mode == DIRECTORY:
            raise entry_not_found(call.path("path"), commit)
        blob, pointer = git.content(entry)
        large = git.lfs_path(pointer.oid) if pointer else None
    etag, size = (pointer.oid, pointer.size) if pointer else (entry.oid, len(blob))
    headers = {"X-Repo-Commit": commit, "ETag": f'"{etag}"', "Accept-Ranges": "bytes", "X-Content-Type-Options": "nosniff"}
    if pointer:
        headers |= {"X-Linked-Etag": f'"{etag}"', "X-Linked-Size": str(size)}
    asked = byte_range(call.request.headers.get("Range"), size)
    start, end = asked or (0, size)
    headers["Content-Length"] = str(end - start)
    if asked:
        headers["Content-Range"] = f"bytes {start}-{end - 1}/{size}"
    media_type = "application/octet-stream" if large else "text/plain; charset=utf-8"
    if call.request.method == "HEAD" or large is None:
        body = b"" if call.request.method == "HEAD" else blob[start:end]
        return Response(body, 206 if asked else 200, headers, media_type)
    return StreamingResponse(_pieces(large, start, end), 206 if asked else 200, headers, media_type)


def byte_range(header: str | None, size: int) -> tuple[int, int] | None:
    """start and end (exclusive) of a Range header; None when there is none of a kind we serve (then all is sent).

    Raises HubError 416 for a range beyond the file.
    """
    found = re.fullmatch(r"bytes=(\d{0,18})-(\d{0,18})", (header or "").replace(" ", ""))
    if not found or found.group() == "bytes=-":
        return None
    first, last = found.groups()
    start = int(first) if first else max(0, size - int(last))
    end = min(size, int(last) + 1) if first and last else size
    if start >= size or start >= end:
        raise HubError(416, f"The range {header} lies outside the file of {size} bytes.", Content_Range=f"bytes */{size}")
    return start, end


def _pieces(path: Path, start: int, end: int) -> Iterator[bytes]:
    with path.open("rb") as file:
        file.seek(start)
        while start < end and (piece := file.read(min(MIB, end - start))):
            start += len(piece)
            yield piece
