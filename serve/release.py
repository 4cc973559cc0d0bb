"""A release: pulled from the Hub at one commit (or read from a folder), then proven before it may answer anybody.

Only JSON, ONNX and safetensors files are ever fetched; no pickle, no code from the repository.

    release = pull("user/repo", "v1")
    model = load(release, settings)      # UserError, in one line, for whatever cannot be served
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import re
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from serve.engine import Batch, Engine, candidates
from serve.errors import UserError
from serve.settings import Settings
from serve.text import TextTokenizer, softmax

SMALL_FILES = ("config.json", "tokenizer.json", "tokenizer_config.json", "golden.json")


@dataclass
class Release:
    """Files of one commit. `fetch` brings the large ones when an engine asks for them."""

    model: str  # what answers call it: owner/name, or the folder's name
    revision: str | None  # what was asked for; None for a folder
    commit: str
    folder: Path
    repo: str | None  # None for a folder
    labels: list[str] = field(default_factory=list)
    pad_id: int = 0
    positions: int = 512  # longest text the model has positions for, in tokens
    golden_texts: list[str] = field(default_factory=list)
    golden_logits: npt.NDArray[np.float64] = field(default_factory=lambda: np.zeros((0, 0)))

    def fetch(self, pattern: str) -> bool:
        if self.repo:
            _download(self.repo, self.commit, [pattern])
        return any(self.folder.glob(pattern))


@dataclass(frozen=True)
class Proof:
    """How an engine did on the golden examples."""

    examples: int
    agreement: float  # share with the same label, 0-1
    max_probability_change: float
    seconds: float
    tokens_per_second: float


@dataclass(frozen=True)
class Model:
    """A release that has proven itself, with all it takes to answer."""

    release: Release
    tokenizer: TextTokenizer
    engine: Engine
    proof: Proof
    rejected: tuple[str, ...]  # engines that were tried before, each with the reason


def pull(model: str, revision: str = "") -> Release:
    """The small files of a release: a folder as it is, else the Hub's `model` at `revision` (main when empty).

    Raises UserError: no such folder, repository or revision, no access, no network, disk full, missing or broken files,
    not a text classifier.
    """
    path = Path(model).expanduser()
    if path.is_dir():
        if revision:
            raise UserError(f"{model} is a folder, and --revision {revision} was given: a folder has no revisions, leave it out.")
        release = Release(path.resolve().name, None, "", path, None)
    elif path.is_absolute() or model.startswith((".", "~")) or model.count("/") > 1:
        raise UserError(f"no folder {model}: give a release folder that exists, or a Hub id like owner/name.")
    else:
        folder = _download(model, revision or None, list(SMALL_FILES))
        release = Release(model, revision or "main", folder.name, folder, model)
    if missing := [name for name in SMALL_FILES if not (release.folder / name).is_file()]:
        where = f"{model} at {release.revision}" if release.repo else model
        raise UserError(
            f"{where} is no release that can be served, it has no {', '.join(missing)}: "
            "give a repository or folder that training published."
        )
    _read_config(release)
    _read_golden(release)
    # A folder has no commit; what its model answers to the golden texts identifies it as well.
    release.commit = release.commit or "folder-" + hashlib.sha256((release.folder / "golden.json").read_bytes()).hexdigest()[:12]
    return release


def _download(repo: str, revision: str | None, patterns: list[str]) -> Path:
    """Folder `.../snapshots/<commit>` in the Hub's cache. Without a network it is what the cache has of `revision`."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.utils.tqdm import disable_progress_bars

    if not sys.stderr.isatty():
        disable_progress_bars()
    try:
        return Path(snapshot_download(repo, revision=revision, allow_patterns=patterns))
    except Exception as error:
        if text := _explain(error, repo, revision or "main"):
            raise UserError(text) from error
        raise


def _explain(error: BaseException, repo: str, revision: str) -> str | None:
    """One line for a failed download, or None for a defect of ours."""
    from huggingface_hub import errors as hub

    endpoint = os.environ.get("HF_ENDPOINT") or "https://huggingface.co"
    if isinstance(error, hub.HFValidationError):
        return f"'{repo}' is neither a folder here nor a Hub id: give owner/name, or the path of a release folder."
    if isinstance(error, hub.RevisionNotFoundError):
        return f"{repo} at {endpoint} has no revision '{revision}': give one of its tags, branches or commits, or none for main."
    if isinstance(error, hub.GatedRepoError):
        return f"access to {repo} is gated: ask for it on the repository's page, then set HF_TOKEN."
    if isinstance(error, hub.RepositoryNotFoundError):
        return (
            f"no repository {repo} at {endpoint}, or it is private: check the spelling (owner/name), "
            "or set HF_TOKEN to a token that may read it."
        )
    if isinstance(error, hub.LocalEntryNotFoundError | hub.OfflineModeIsEnabled):
        return (
            f"the Hub at {endpoint} cannot be reached and {repo} at {revision} is not in the local cache: "
            "check the network and HF_ENDPOINT, or give a release folder."
        )
    if isinstance(error, hub.HfHubHTTPError):
        return f"the Hub at {endpoint} answered {error.response.status_code} for {repo}: check HF_TOKEN, or try again later."
    if isinstance(error, ConnectionError) or type(error).__module__.split(".")[0] in ("httpx", "httpx2"):
        return f"the connection to the Hub at {endpoint} broke while {repo} was fetched: start again, what has arrived is kept."
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return f"the disk is full while {repo} was fetched: free some space, or set HF_HOME to a folder with more."
    if isinstance(error, OSError) and error.errno is not None:
        return f"{repo} could not be stored ({error.strerror}: {error.filename}): set HF_HOME to a folder that can be written."
    return None


@contextlib.contextmanager
def _reading(name: str) -> Iterator[None]:
    """Files come from elsewhere: whatever is wrong with one is said in one line."""
    try:
        yield
    except UserError:
        raise
    except (ValueError, KeyError, TypeError, AttributeError, IndexError, OSError, RecursionError) as error:
        detail = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        raise UserError(f"{name} of the release cannot be read ({detail}): publish the release again.") from error


def _read_json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def _read_config(release: Release) -> None:
    with _reading("config.json"):
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
    with _reading("golden.json"):
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


def load(release: Release, settings: Settings) -> Model:
    """The first engine that loads and proves itself. Raises UserError when none does."""
    with _reading("tokenizer"):
        tokenizer = TextTokenizer(release.folder, release.positions)
        golden = [text.ids for text in tokenizer.encode(release.golden_texts)]
    rejected: list[str] = []
    for candidate in candidates(settings, release):
        try:
            engine = candidate.load()
            proof = prove(engine, golden, release.golden_logits)
        except Exception as error:  # a broken file, a graph that does not fit, a GPU without memory: libraries raise anything
            rejected.append(f"{candidate.name}: {_first_sentence(error)}")
            continue
        if proof.agreement >= settings.min_agreement and proof.max_probability_change <= settings.max_probability_change:
            return Model(release, tokenizer, engine, proof, tuple(rejected))
        rejected.append(
            f"{candidate.name}: {proof.agreement:.1%} of {proof.examples} golden labels agree (allowed: at least "
            f"{settings.min_agreement:.1%}), a probability is off by {proof.max_probability_change:.3f} (allowed: at most "
            f"{settings.max_probability_change})"
        )
    raise UserError(
        f"{release.model} at {release.commit} did not prove itself on its golden examples: {'; '.join(rejected)}. "
        "Publish the release again, or serve another revision."
    )


def _first_sentence(error: Exception) -> str:
    return re.split(r"\.\s|\n", f"{type(error).__name__}: {error}".strip(), maxsplit=1)[0][:300]


def prove(engine: Engine, golden: Batch, expected: npt.NDArray[np.float64]) -> Proof:
    """Compares the engine's answers to token ids `golden` with the logits `expected`, (examples, classes), of training."""
    started = time.perf_counter()
    actual = np.empty_like(expected)
    for rows in _by_length(golden, engine.batch_tokens):
        actual[rows] = engine.logits([golden[row] for row in rows])
    seconds = time.perf_counter() - started
    change = np.abs(softmax(actual) - softmax(expected)).max()
    return Proof(
        examples=len(golden),
        agreement=float((actual.argmax(axis=1) == expected.argmax(axis=1)).mean()),
        # Not a number is as wrong as can be, and no comparison with it would say so.
        max_probability_change=float(change) if np.isfinite(change) else 1.0,
        seconds=seconds,
        tokens_per_second=sum(map(len, golden)) / seconds,
    )


def _by_length(texts: Batch, batch_tokens: int) -> Iterator[list[int]]:
    """Row numbers in batches of similar length, each of at most `batch_tokens` with its padding (or one text)."""
    batch: list[int] = []
    for row in sorted(range(len(texts)), key=lambda row: len(texts[row])):
        if batch and (len(batch) + 1) * len(texts[row]) > batch_tokens:
            yield batch
            batch = []
        batch.append(row)
    yield batch
