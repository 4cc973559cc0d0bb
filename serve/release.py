"""A release: pulled from the Hub at one commit, kept in its cache, or read from a folder.

release = pull("user/repo", "v1")      # UserError, in one line, for whatever cannot be served
"""

from __future__ import annotations

import contextlib
import fnmatch
import hashlib
import json
import os
from collections.abc import Container, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from serve.errors import UserError
from serve.hub import SMALL_FILES, WEIGHTS, Listing, cached, download, list_files

DEFAULT_MODEL_BYTES = 4 << 30


@dataclass
class Release:
    """Files of one commit. `fetch` brings the large ones when an engine asks for them."""

    model: str  # what answers call it: owner/name, or the folder's name
    revision: str | None  # what was asked for; None for a folder
    commit: str
    folder: Path
    listing: Listing | None  # None for a folder, and for what is taken from the cache as it is
    max_model_bytes: int = DEFAULT_MODEL_BYTES
    labels: list[str] = field(default_factory=list)
    pad_id: int = 0
    positions: int = 512  # longest text the model has positions for, in tokens
    golden_texts: list[str] = field(default_factory=list)
    golden_logits: npt.NDArray[np.float64] = field(default_factory=lambda: np.zeros((0, 0)))

    def fetch(self, pattern: str) -> bool:
        """Brings the weights that match `pattern`; False where there are none. Raises UserError as `download` does."""
        if self.listing:
            names = [name for name in self.listing.files if WEIGHTS.fullmatch(name) and fnmatch.fnmatch(name, pattern)]
            if names:
                download(self.listing, names, self.max_model_bytes)
        return any(self.folder.glob(pattern))

    def contents(self) -> dict[str, Path]:
        """The files that serve, by name, each with the place of its content: two commits share what they have in common."""
        names = [path.relative_to(self.folder).as_posix() for path in self.folder.rglob("*") if path.is_file()]
        return {name: (self.folder / name).resolve() for name in names if name in SMALL_FILES or WEIGHTS.fullmatch(name)}


def is_folder(model: str) -> bool:
    """Whether `model` is a release folder rather than a Hub id. Raises UserError for the path of a folder that is not there."""
    path = _local(model)
    if not path.is_dir() and (path.is_absolute() or model.startswith((".", "~")) or model.count("/") > 1):
        raise UserError(f"no folder {model}: give a release folder that exists, or a Hub id like owner/name.")
    return path.is_dir()


def _local(model: str) -> Path:
    return Path(os.path.expanduser(model))  # noqa: PTH111 (pathlib's raises for a user that does not exist)


def pull(model: str, revision: str = "", max_model_bytes: int = DEFAULT_MODEL_BYTES) -> Release:
    """The small files of a release: a folder as it is, else the Hub's `model` at `revision` (main when empty).

    Raises UserError: no such folder, repository or revision, no access, no network, disk full, missing, too large or
    broken files, not a text classifier.
    """
    if not is_folder(model):
        return fetched(list_files(model, revision or "main"), revision, max_model_bytes)
    if revision:
        raise UserError(f"{model} is a folder, and --revision {revision} was given: a folder has no revisions, leave it out.")
    path = _local(model)
    return _read(Release(path.resolve().name, None, "", path, None), model)


def fetched(listing: Listing, revision: str, max_model_bytes: int = DEFAULT_MODEL_BYTES) -> Release:
    """One commit of the Hub, its small files downloaded. Raises UserError like `pull`."""
    where = f"{listing.repo} at {revision or 'main'}"
    _check_whole(where, listing.files)
    folder = download(listing, SMALL_FILES, max_model_bytes)
    return _read(Release(listing.repo, revision or "main", listing.commit, folder, listing, max_model_bytes), where)


def kept(model: str, revision: str, commit: str = "") -> Release:
    """What the Hub's cache has of `commit`, or of `revision` as it was last seen; nobody is asked. Raises UserError."""
    folder = cached(model, commit or revision or "main")
    if folder is None:
        raise UserError(f"{model} at {commit or revision or 'main'} is not in the local cache")
    return _read(Release(model, revision or "main", folder.name, folder, None), f"{model} at {folder.name} in the local cache")


def _check_whole(where: str, files: Container[str]) -> None:
    if missing := [name for name in SMALL_FILES if name not in files]:
        raise UserError(
            f"{where} is no release that can be served, it has no {', '.join(missing)}: "
            "give a repository or folder that training published."
        )


def _read(release: Release, where: str) -> Release:
    _check_whole(where, [name for name in SMALL_FILES if (release.folder / name).is_file()])
    _read_config(release)
    _read_golden(release)
    # A folder has no commit; what its model answers to the golden texts identifies it as well.
    release.commit = release.commit or "folder-" + hashlib.sha256((release.folder / "golden.json").read_bytes()).hexdigest()[:12]
    return release


@contextlib.contextmanager
def reading(name: str) -> Iterator[None]:
    """Files come from elsewhere: whatever is wrong with one is said in one line."""
    try:
        yield
    except UserError:
        raise
    except (ValueError, KeyError, TypeError, AttributeError, IndexError, OSError, RecursionError) as error:
        said = error.strerror if isinstance(error, OSError) else error  # an OSError also names the folder; this stands in /info
        detail = " ".join(f"{type(error).__name__}: {said}".split())[:200]
        raise UserError(f"{name} of the release cannot be read ({detail}): publish the release again.") from error


def _read_json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def _read_config(release: Release) -> None:
    with reading("config.json"):
        config = _read_json(release.folder / "config.json")
        architecture = (config.get("architectures") or ["model without an architecture"])[0]
        if not architecture.endswith("ForSequenceClassification"):
            raise UserError(f"{release.model} is a {architecture}: only text classifiers (...ForSequenceClassification) can be served.")
        problem = config.get("problem_type") or "single_label_classification"
        if problem != "single_label_classification":
            raise UserError(f"{release.model} is for {problem.replace('_', ' ')}: only models with one label per text can be served.")
        release.labels = [str(label) for _, label in sorted(config["id2label"].items(), key=lambda item: int(item[0]))]
        if len(release.labels) < 2 or len(set(release.labels)) < len(release.labels):
            raise UserError(
                f"config.json of {release.model} names the labels {release.labels}: a classifier needs two or more different ones."
            )
        release.pad_id = int(config.get("pad_token_id") or 0)
        release.positions = int(config.get("max_position_embeddings") or release.positions)


def _read_golden(release: Release) -> None:
    with reading("golden.json"):
        golden = _read_json(release.folder / "golden.json")
        if golden["format"] != 1:
            raise UserError(f"golden.json of {release.model} is of format {golden['format']}: this service reads format 1; update it.")
        if golden["label_names"] != release.labels:
            raise UserError(f"golden.json of {release.model} names other labels than its config.json: publish the release again.")
        release.golden_texts = [str(example["text"]) for example in golden["examples"]]
        release.golden_logits = np.array([example["logits"] for example in golden["examples"]], np.float64)
        expected = len(release.golden_texts), len(release.labels)
        if not release.golden_texts or release.golden_logits.shape != expected or not np.isfinite(release.golden_logits).all():
            raise ValueError(f"logits of shape {release.golden_logits.shape}, expected {expected}, finite")
