"""The repositories of one Hub root: find, create, move, delete, list, and the few facts about each that git does not hold.

    ROOT/models/OWNER/NAME/{repo.git, meta.json}    (likewise datasets, spaces)
    ROOT/temp/                                      half-made things; emptied at every start

A repository is made complete under temp/ and renamed in, and renamed out before it is deleted: nobody sees half of one.
"""

from __future__ import annotations

import fcntl
import json
import re
import shutil
import threading
import uuid
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from dulwich.errors import NotGitRepository

from pipeline.errors import UserError
from pipeline.local_hub.errors import HubError, bad_request
from pipeline.local_hub.git import GitRepo

KINDS = {"model": "models", "dataset": "datasets", "space": "spaces"}
# One segment of OWNER/NAME by the Hub's rules. It is also a folder's name here: no dots in front, no slashes.
NAME = re.compile(r"(?!.*(--|\.\.))(?!.*\.git$)[A-Za-z0-9_](?:[A-Za-z0-9._-]{0,94}[A-Za-z0-9_])?")


def timestamp(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%dT%H:%M:%S.000Z")


@dataclass(frozen=True)
class Repository:
    """One repository. `kind` is models, datasets or spaces; `id` is OWNER/NAME as it was created."""

    kind: str
    id: str
    path: Path
    lock: threading.RLock  # held by whoever changes the repository

    @property
    def namespace(self) -> str:
        return self.id.split("/")[0]

    @property
    def web_path(self) -> str:
        return f"/{self.id}" if self.kind == "models" else f"/{self.kind}/{self.id}"

    def git(self) -> GitRepo:
        try:
            return GitRepo(self.path / "repo.git")
        except NotGitRepository as error:  # deleted or moved since it was found
            raise FileNotFoundError(self.path) from error

    def meta(self) -> dict[str, Any]:
        """private, created (s), and for a space sdk, hardware, variables, secrets."""
        found: dict[str, Any] = json.loads((self.path / "meta.json").read_text())
        return found

    def save_meta(self, meta: dict[str, Any]) -> None:
        fresh = self.path / "meta.new"
        fresh.write_text(json.dumps(meta))
        fresh.replace(self.path / "meta.json")


class Store:
    """All repositories under `root`. Raises UserError when another Hub serves the same root."""

    def __init__(self, root: Path) -> None:
        self.root = root
        root.mkdir(parents=True, exist_ok=True, mode=0o700)  # private repositories are private on disk too
        self._claim = (root / "serving.lock").open("w")
        try:
            fcntl.flock(self._claim, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UserError(f"Another local Hub already serves {root}: use that one, end it, or give another --root.") from error
        self.temp = root / "temp"
        shutil.rmtree(self.temp, ignore_errors=True)
        self.temp.mkdir()
        for stale in root.glob("*/*/*/repo.git/**/*.lock"):  # of a server that was killed: git would wait for it for ever
            stale.unlink()
        self._locks: defaultdict[Path, threading.RLock] = defaultdict(threading.RLock)
        self._names = threading.Lock()  # held while names come and go

    def _at(self, kind: str, namespace: str, name: str) -> Repository:
        path = self.root / kind / namespace / name
        return Repository(kind, f"{namespace}/{name}", path, self._locks[path])

    def find(self, kind: str, namespace: str, name: str) -> Repository | None:
        """The repository, under whatever upper and lower case the caller writes it; None when there is none."""
        path = self.root / kind
        found: list[str] = []
        for given in (namespace, name):
            if not NAME.fullmatch(given):
                return None
            if not (path / given).is_dir():
                same = [entry for entry in _names(path) if entry.lower() == given.lower()]
                if not same:
                    return None
                given = same[0]
            found.append(given)
            path /= given
        return self._at(kind, *found)

    def all(self, kind: str) -> Iterator[Repository]:
        for namespace in _names(self.root / kind):
            for name in _names(self.root / kind / namespace):
                yield self._at(kind, namespace, name)

    def create(self, kind: str, namespace: str, name: str, author: str, meta: dict[str, Any]) -> Repository:
        """Raises HubError 400 for a bad name, 409 (the repository's id in `.body["id"]`) when it exists."""
        if not NAME.fullmatch(name):
            raise bad_request(f"Invalid repository name '{name}': use letters, digits, '-', '_' and '.', at most 96.")
        made = self.temp / uuid.uuid4().hex
        made.mkdir()
        try:
            GitRepo.create(made / "repo.git", author)
            created = self._at(kind, namespace, name)
            Repository(kind, created.id, made, created.lock).save_meta(meta)
            with self._names:
                self._refuse_taken(kind, namespace, name)
                created.path.parent.mkdir(parents=True, exist_ok=True)
                made.rename(created.path)
        finally:
            shutil.rmtree(made, ignore_errors=True)
        return created

    def move(self, repo: Repository, namespace: str, name: str) -> None:
        if not NAME.fullmatch(name):
            raise bad_request(f"Invalid repository name '{name}': use letters, digits, '-', '_' and '.', at most 96.")
        with self._names, repo.lock:
            self._refuse_taken(repo.kind, namespace, name)
            target = self._at(repo.kind, namespace, name)
            target.path.parent.mkdir(parents=True, exist_ok=True)
            repo.path.rename(target.path)

    def delete(self, repo: Repository) -> None:
        grave = self.temp / uuid.uuid4().hex
        with self._names, repo.lock:
            repo.path.rename(grave)
        shutil.rmtree(grave, ignore_errors=True)

    def _refuse_taken(self, kind: str, namespace: str, name: str) -> None:
        if taken := self.find(kind, namespace, name):
            error = HubError(409, f"You already created this {kind[:-1]} repo")
            error.body["id"] = taken.id
            raise error


def _names(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir() if entry.is_dir()) if folder.is_dir() else []
