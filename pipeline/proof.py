"""Proof that a published release is the model that was trained: pulled back into an empty cache, the golden texts get
the golden logits, from torch and from ONNX Runtime."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from huggingface_hub import HfApi
from tqdm import tqdm

from pipeline.errors import UserError

RELEASE_SUFFIXES = (".safetensors", ".json", ".txt", ".md", ".onnx", ".png")  # never a pickle or an optimizer's state
TORCH_TOLERANCE = 1e-4  # of a logit: another CPU, another order of summation
ONNX_TOLERANCE = 1e-3
BATCH = 16

Engine = Callable[[np.ndarray, np.ndarray], np.ndarray]  # input_ids, attention_mask (batch, sequence) -> logits (batch, classes)


@dataclass(frozen=True)
class Proof:
    """What was measured: largest absolute differences of a logit, and the share of golden texts with the same label."""

    repo: str
    commit: str
    examples: int
    max_difference: float  # torch
    onnx_difference: float | None  # None: the release has no ONNX file
    label_agreement: float

    def __str__(self) -> str:
        onnx = "no ONNX file" if self.onnx_difference is None else f"ONNX {self.onnx_difference:.1e}"
        return (
            f"pulled back into an empty cache: {self.examples} golden texts, largest difference of a logit torch "
            f"{self.max_difference:.1e}, {onnx}; labels equal {self.label_agreement:.1%}"
        )


def prove(repo: str, revision: str, api: HfApi | None = None) -> Proof:
    """Pull `repo` at `revision` into an empty cache, load it as any client would, and compare it with its golden.json.

    Raises:
        UserError: the release cannot be loaded, or a logit differs by more than 1e-4 (torch) or 1e-3 (ONNX).
        huggingface_hub's errors for a repository or revision that is not there.
    """
    with pulled(repo, revision, api or HfApi()) as (commit, folder):
        try:
            differences = golden_differences(folder, load(folder))
            for difference in differences.values():
                difference.check()
            torch, onnx = differences["torch"], differences.get("ONNX")
            return Proof(repo, commit, torch.examples, torch.largest, onnx.largest if onnx else None, torch.agreement)
        except UserError as error:
            reason = str(error)
        except Exception as error:  # whatever is in there, it is no release
            reason = unloadable(error)
    raise UserError(
        f"{repo} at {commit[:12]} fails its proof: {reason}. What lies there is not the model that was trained: do not serve "
        "it; run the training command again, which makes the release anew from the best checkpoint, and publish that."
    )


@contextlib.contextmanager
def pulled(repo: str, revision: str | None, api: HfApi) -> Iterator[tuple[str, Path]]:
    """The commit of `revision` and a folder with the release at it, fetched into an empty cache that goes with the block.

    Raises huggingface_hub's errors for a repository or revision that is not there.
    """
    commit = api.model_info(repo, revision=revision).sha
    assert commit, "the Hub names the commit of every revision"
    names = [name for name in api.list_repo_files(repo, revision=commit) if _belongs(name)]
    with tempfile.TemporaryDirectory(prefix="proof-") as cache:
        yield commit, Path(api.snapshot_download(repo, revision=commit, cache_dir=cache, allow_patterns=names))


def unloadable(error: Exception) -> str:
    """What a library says of files that are no model, in a line."""
    return f"it cannot be loaded: {str(error).strip() or type(error).__name__}".splitlines()[0][:300]


def _belongs(name: str) -> bool:
    """Of a repository that holds other things too, only what a release is made of: nothing in folders but the ONNX file."""
    return name.endswith(RELEASE_SUFFIXES) and ("/" not in name or name == "onnx/model.onnx")


@dataclass(frozen=True)
class Loaded:
    tokenizer: Any
    label_names: list[str]
    engines: dict[str, Engine]  # "torch", and "ONNX" where the release has onnx/model.onnx


def load(folder: Path) -> Loaded:
    """A release as any client loads it. Raises whatever the libraries raise for files that are no model."""
    # Imported here: seconds, which the checks before an upload need not wait for.
    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    from pipeline.export import onnx_session
    from pipeline.release import ONNX_FILE, no_progress_bar

    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    with no_progress_bar():
        model: Any = AutoModelForSequenceClassification.from_pretrained(
            folder, use_safetensors=True, local_files_only=True, trust_remote_code=False
        ).eval()

    def run(ids: np.ndarray, mask: np.ndarray) -> np.ndarray:
        with torch.inference_mode():
            return model(input_ids=torch.from_numpy(ids), attention_mask=torch.from_numpy(mask)).logits.numpy()

    engines: dict[str, Engine] = {"torch": run}
    if (folder / ONNX_FILE).exists():
        session = onnx_session(folder / ONNX_FILE)
        engines["ONNX"] = lambda ids, mask: session.run(["logits"], {"input_ids": ids, "attention_mask": mask})[0]
    return Loaded(tokenizer, [str(model.config.id2label[i]) for i in range(model.config.num_labels)], engines)


def logits(texts: Sequence[str], loaded: Loaded, engine: str, show_progress: bool = False) -> np.ndarray:
    """`(texts, classes)`; in padded batches of similar length, so that padding is proven too."""
    found: dict[int, np.ndarray] = {}
    order = sorted(range(len(texts)), key=lambda i: -len(texts[i]))  # the longest first: what is left goes faster than the bar says
    with tqdm(total=len(texts), unit=" texts", desc=f"Scoring, {engine}", disable=not show_progress) as bar:
        for start in range(0, len(order), BATCH):
            rows = order[start : start + BATCH]
            tokens = loaded.tokenizer([texts[i] for i in rows], truncation=True, padding=True, return_tensors="np")
            ids, mask = (tokens[name].astype(np.int64) for name in ("input_ids", "attention_mask"))
            found.update(zip(rows, loaded.engines[engine](ids, mask), strict=True))
            bar.update(len(rows))
    return np.stack([found[i] for i in range(len(texts))])


@dataclass(frozen=True)
class Difference:
    """One engine's logits against golden.json: the largest absolute difference, the share of texts with the same label."""

    examples: int
    largest: float
    agreement: float
    complaint: str | None  # where more than a rounding error separates them

    def check(self) -> None:
        if self.complaint:
            raise UserError(self.complaint)


def golden_differences(folder: Path, loaded: Loaded) -> dict[str, Difference]:
    """By engine. Raises UserError where golden.json holds nothing to compare with."""
    from pipeline.release import read_golden

    examples = read_golden(folder)["examples"]
    if not examples:
        raise UserError("golden.json holds no examples")
    golden = np.array([example["logits"] for example in examples], dtype=np.float32)
    texts = [example["text"] for example in examples]
    return {engine: _difference(golden, logits(texts, loaded, engine), engine, texts) for engine in loaded.engines}


def _difference(golden: np.ndarray, found: np.ndarray, engine: str, texts: Sequence[str]) -> Difference:
    if found.shape != golden.shape:
        return Difference(len(texts), float("inf"), 0, f"{engine} gives logits of shape {found.shape}, golden.json has {golden.shape}")
    tolerance = TORCH_TOLERANCE if engine == "torch" else ONNX_TOLERANCE
    differences = np.abs(found - golden).max(axis=1)
    complaint = None
    if not (differences <= tolerance).all():  # a NaN fails as well
        worst = int(np.argmax(np.where(np.isnan(differences), np.inf, differences)))
        wrong = int((~(differences <= tolerance)).sum())
        complaint = (
            f"{engine}'s logits differ from the golden ones by up to {differences[worst]:.2g} (allowed {tolerance:g}) on {wrong} of "
            f'{len(texts)} texts, most on "{texts[worst][:40]}"'
        )
    agreement = float((found.argmax(axis=1) == golden.argmax(axis=1)).mean())
    return Difference(len(texts), float(differences.max()), agreement, complaint)
