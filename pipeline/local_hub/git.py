"""One bare git repository through dulwich: revisions, trees, history, and commits made by compare-and-set on the branch.

Large files are git-lfs pointers in the tree and objects under lfs/objects/, named by their sha256, inside the same
repository: an object another repository holds is not this one's. Paths from outside never become file names; they are
looked up in trees only.
"""

from __future__ import annotations

import re
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

from dulwich.index import commit_tree, validate_path, validate_path_element_ntfs
from dulwich.lfs import LFSPointer
from dulwich.object_store import tree_lookup_path
from dulwich.objects import Blob, Commit, ObjectID, Tag, Tree
from dulwich.refs import Ref, check_ref_format
from dulwich.repo import Repo

from pipeline.local_hub.errors import HubError, bad_request, entry_not_found, revision_not_found

FILE, DIRECTORY = 0o100644, 0o040000
POINTER_LIMIT = 200  # bytes; a pointer has about 130
# fmt: off
LFS_SUFFIXES = (
    "7z", "arrow", "bin", "bz2", "ckpt", "gz", "h5", "joblib", "model", "msgpack", "npy", "npz", "onnx", "ot", "parquet", "pb",
    "pickle", "pkl", "pt", "pth", "rar", "safetensors", "tar", "tflite", "tgz", "wasm", "xz", "zip", "zst",
)
# fmt: on
GITATTRIBUTES = "".join(f"*.{suffix} filter=lfs diff=lfs merge=lfs -text\n" for suffix in LFS_SUFFIXES)
HEX = re.compile(r"[0-9a-f]{7,40}")


@dataclass(frozen=True)
class Entry:
    """A file or directory of a commit. `oid` is git's id of the blob or tree."""

    path: str
    mode: int
    oid: str


@dataclass(frozen=True)
class Change:
    """One step of a commit: `blob` bytes to write at `path` (checked by `check_path`), or the deletion of a file or `folder`."""

    path: str
    blob: bytes | None = None
    folder: bool = False


def check_path(path: object) -> str:
    """The path, if it may be stored: relative, without dot segments, NUL or .git in any spelling. Raises HubError 400."""
    if not isinstance(path, str) or not path or len(path.encode("utf-8", "replace")) > 1000:
        raise bad_request("A path is missing, empty or too long.")
    try:
        raw = path.encode()
    except UnicodeEncodeError as error:
        raise bad_request("A path is not valid text.") from error
    if not all(path.split("/")) or min(raw) < 32 or "\\" in path or not validate_path(raw, validate_path_element_ntfs):
        raise bad_request(f"Invalid path in repository: {path!r}")
    return path


class GitRepo:
    """Open for one request: `with GitRepo(path) as git: ...`. Writers hold the repository's lock."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._repo = Repo(str(path))
        self._store = self._repo.object_store

    def __enter__(self) -> GitRepo:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._repo.close()

    @staticmethod
    def create(path: Path, author: str) -> None:
        """A new repository with one commit on main, as the Hub makes it."""
        Repo.init_bare(str(path), mkdir=True, default_branch=b"main").close()
        (path / "lfs" / "objects").mkdir(parents=True)
        with GitRepo(path) as git:
            git.commit("main", [Change(".gitattributes", GITATTRIBUTES.encode())], "initial commit", author, first=True)

    # Revisions

    def refs(self, base: str) -> dict[str, str]:
        """Names under refs/`base` ("heads" or "tags") to commit ids; annotated tags are followed."""
        refs = self._repo.refs.as_dict(Ref(f"refs/{base}".encode()))
        return {name.decode(): self._store.peel(oid)[1].id.decode() for name, oid in sorted(refs.items())}

    def resolve(self, revision: str) -> str:
        """A full commit id, branch, tag, refs/... name or id of 7 digits and more, to the commit id."""
        if len(revision) != 40 or not HEX.fullmatch(revision):  # a full id is never mistaken for a branch of that name
            for base in ("heads", "tags"):
                names = self.refs(base)
                name = revision.removeprefix(f"refs/{base}/")
                if name in names:
                    return names[name]
        if HEX.fullmatch(revision):
            found = [oid for oid in self._store.iter_prefix(revision.encode()) if isinstance(self._store[oid], Commit)]
            if len(found) == 1:
                return found[0].decode()
        raise revision_not_found(revision)

    def set_ref(self, base: str, name: str, commit: str, message: str | None = None, author: str = "") -> None:
        """A new branch or tag; with `message` an annotated tag. Raises HubError 409 when there is one, 400 for a bad name."""
        ref = self._ref(base, name)
        target = ObjectID(commit.encode())
        if message:
            tag = Tag()
            tag.name, tag.message, tag.object = name.encode(), message.encode("utf-8", "replace") + b"\n", (Commit, target)
            tag.tagger, tag.tag_time, tag.tag_timezone = _identity(author), int(time.time()), 0
            self._store.add_object(tag)
            target = tag.id
        try:
            created = name not in self.refs(base) and self._repo.refs.add_if_new(ref, target)
        except OSError as error:  # refs are files: release/1 cannot stand beside a branch called release
            raise HubError(409, f"Reference {name} conflicts with an existing one.") from error
        if not created:
            raise HubError(409, f"Reference already exists: {name}")

    def delete_ref(self, base: str, name: str) -> None:
        if name not in self.refs(base):
            raise revision_not_found(name)
        self._repo.refs.remove_if_equals(self._ref(base, name), None)

    def _ref(self, base: str, name: str) -> Ref:
        ref = Ref(f"refs/{base}/{name}".encode("utf-8", "replace"))
        looks_like_a_commit = len(name) == 40 and HEX.fullmatch(name)
        if not name or len(name) > 200 or looks_like_a_commit or not check_ref_format(ref):
            raise bad_request(f"Invalid reference name: {name!r}")
        return ref

    # Trees and history

    def get_commit(self, commit: str) -> Commit:
        found = self._store[ObjectID(commit.encode())]
        assert isinstance(found, Commit), commit
        return found

    def history(self, commit: str) -> Iterator[Commit]:
        """The commit and its first parents, newest first."""
        at: list[ObjectID] = [ObjectID(commit.encode())]
        while at:
            found = self.get_commit(at[0].decode())
            yield found
            at = found.parents

    def files(self, commit: str) -> dict[str, Entry]:
        """Every file of the commit by its path."""
        entries = self._store.iter_tree_contents(self.get_commit(commit).tree)
        found = (Entry(entry.path.decode(), entry.mode or FILE, entry.sha.decode()) for entry in entries if entry.path and entry.sha)
        return {entry.path: entry for entry in found}

    def find(self, commit: str, path: str) -> Entry | None:
        """The file or directory at a path, or None."""
        try:
            mode, oid = tree_lookup_path(self._store.__getitem__, self.get_commit(commit).tree, path.strip("/").encode())
        except (KeyError, ValueError, NotADirectoryError, UnicodeEncodeError):
            return None
        return Entry(path.strip("/"), mode, oid.decode())

    def listing(self, commit: str, path: str = "", recursive: bool = False) -> list[Entry]:
        """Files and directories below a directory. Raises HubError EntryNotFound where there is none."""
        root = self.find(commit, path) if path.strip("/") else Entry("", DIRECTORY, self.get_commit(commit).tree.decode())
        if root is None or root.mode != DIRECTORY:
            raise entry_not_found(path, commit)
        prefix = f"{root.path}/" if root.path else ""
        tree = self._store[ObjectID(root.oid.encode())]
        assert isinstance(tree, Tree)
        found: list[Entry] = []
        for item in tree.items():
            entry = Entry(prefix + item.path.decode(), item.mode, item.sha.decode())
            found.append(entry)
            if recursive and item.mode == DIRECTORY:
                found += self.listing(commit, entry.path, recursive=True)
        return found

    def last_commits(self, commit: str, paths: Iterable[str]) -> dict[str, Commit]:
        """The newest commit that changed each path."""
        wanted = set(paths)
        found: dict[str, Commit] = {}
        newer: Commit | None = None
        after: dict[str, str] = {}
        for current in self.history(commit):
            before = {entry.path: entry.oid for entry in self.listing(current.id.decode(), recursive=True)}
            if newer is not None:
                changed = {path for path in wanted if before.get(path) != after[path]}
                found |= dict.fromkeys(changed, newer)
                wanted -= changed
            if not wanted:
                return found
            newer, after = current, before
        return found | {path: newer for path in wanted if newer}

    def read(self, entry: Entry) -> bytes:
        """A file as git holds it: the pointer for a large one."""
        return bytes(self._store[ObjectID(entry.oid.encode())].as_raw_string())

    # Large files

    def lfs_path(self, sha256: str) -> Path:
        assert re.fullmatch("[0-9a-f]{64}", sha256), sha256
        return self.path / "lfs" / "objects" / sha256[:2] / sha256[2:4] / sha256

    def content(self, entry: Entry) -> tuple[bytes, LFSPointer | None]:
        """The blob and, when it points to an object that this repository holds, the pointer with the object's true size."""
        blob = self.read(entry)
        pointer = LFSPointer.from_bytes(blob) if len(blob) <= POINTER_LIMIT else None
        if pointer and re.fullmatch("[0-9a-f]{64}", pointer.oid) and self.lfs_path(pointer.oid).is_file():
            return blob, LFSPointer(pointer.oid, self.lfs_path(pointer.oid).stat().st_size)
        return blob, None

    # Writing

    def commit(
        self,
        branch: str,
        changes: Iterable[Change],
        message: str,
        author: str,
        expected: str | None = None,
        first: bool = False,
        squash: bool = False,
    ) -> str:
        """Apply the changes in order on top of the branch and move it; returns the new commit's id.

        Until the last line only unreachable objects have been written, so a failure leaves nothing to see. `expected`
        is the (abbreviated) commit that the branch must be at, else HubError 412. Changes that change nothing make no
        commit: a client that repeats a request whose answer it lost gets the same commit again. `squash` forgets the
        history before.
        """
        ref = Ref(f"refs/heads/{branch}".encode())
        head = None if first else self.refs("heads").get(branch)
        if head is None and not first:
            raise revision_not_found(branch)
        if expected is not None and not (head or "").startswith(expected):
            raise HubError(412, f"{branch} is at {head}, not at {expected}: a commit has happened since. Fetch it and try again.")
        old = ObjectID(head.encode()) if head else None
        files = self.files(head) if head else {}
        for change in changes:
            self._apply(files, change)
        directories = {path[:at] for path in files for at, char in enumerate(path) if char == "/"}
        if clash := directories & files.keys():
            raise bad_request(f"{sorted(clash)[0]} would be a file and a directory at once.")
        tree = commit_tree(self._store, [(path.encode(), ObjectID(e.oid.encode()), e.mode) for path, e in files.items()])
        if head and old and tree == self.get_commit(head).tree and not squash:
            return head
        commit = Commit()
        commit.tree, commit.parents = tree, [old] if old and not squash else []
        commit.author = commit.committer = _identity(author)
        commit.author_time = commit.commit_time = int(time.time())
        commit.author_timezone = commit.commit_timezone = 0
        commit.message = message.encode("utf-8", "replace") + b"\n"
        self._store.add_object(commit)
        if not (self._repo.refs.set_if_equals(ref, old, commit.id) if old else self._repo.refs.add_if_new(ref, commit.id)):
            raise HubError(412, f"{branch} moved while this commit was made: try again.")
        if head and squash:
            self._drop_large_files(head)
        return commit.id.decode()

    def _drop_large_files(self, forgotten: str) -> None:
        """Give back the room of objects that only the history up to `forgotten` needed, which no branch or tag leads to now.

        A client that was told meanwhile that such an object is here gets a refusal of its commit, and uploads it again.
        """
        kept = {oid for base in ("heads", "tags") for head in self.refs(base).values() for oid in self._large_files(head)}
        for oid in self._large_files(forgotten) - kept:
            self.lfs_path(oid).unlink(missing_ok=True)

    def _large_files(self, commit: str) -> set[str]:
        """The sha256 of every large file of a commit and those before it."""
        entries = {entry.oid: entry for past in self.history(commit) for entry in self.files(past.id.decode()).values()}
        return {pointer.oid for entry in entries.values() if (pointer := self.content(entry)[1])}

    def _apply(self, files: dict[str, Entry], change: Change) -> None:
        path = change.path
        if change.blob is not None:
            blob = Blob.from_string(change.blob)
            self._store.add_object(blob)
            files[path] = Entry(path, FILE, blob.id.decode())
            return
        doomed = [p for p in files if p.startswith(f"{path}/")] if change.folder else [p for p in (path,) if p in files]
        if not doomed:
            raise HubError(404, f"A file with this name doesn't exist: {path}", "EntryNotFound")
        for name in doomed:
            del files[name]


def _identity(user: str) -> bytes:
    return f"{user} <{user}@localhost>".encode()
