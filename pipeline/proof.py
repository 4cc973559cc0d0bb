"""Proof that a published release is the model that was trained: pulled back into an empty cache, the golden texts get
the golden logits, from torch and from ONNX Runtime."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from huggingface_hub import HfApi

from pipeline.errors import UserError

RELEASE_SUFFIXES = (".safetensors", ".json", ".txt", ".md", ".onnx", ".png")  # never a pickle or an optimizer's state
TORCH_TOLERANCE = 1e-4  # of a logit: another CPU, another order of summation
ONNX_TOLERANCE = 1e-3
BATCH = 16


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
    api = api or HfApi()
    commit = api.model_info(repo, revision=revision).sha
    assert commit, "the Hub names the commit of every revision"
    names = [name for name in api.list_repo_files(repo, revision=commit) if _belongs(name)]
    with tempfile.TemporaryDirectory(prefix="proof-") as cache:
        folder = Path(api.snapshot_download(repo, revision=commit, cache_dir=cache, allow_patterns=names))
        try:
            return _compare(repo, commit, folder)
        except UserError as error:
            reason = str(error)
        except Exception as error:  # whatever is in there, it is no release
            reason = f"it cannot be loaded: {str(error).strip() or type(error).__name__}".splitlines()[0][:300]
    raise UserError(
        f"{repo} at {commit[:12]} fails its proof: {reason}. What lies there is not the model that was trained: do not serve "
        "it; run the training command again, which makes the release anew from the best checkpoint, and publish that."
    )


def _belongs(name: str) -> bool:
    """Of a repository that holds other things too, only what a release is made of: nothing in folders but the ONNX file."""
    return name.endswith(RELEASE_SUFFIXES) and ("/" not in name or name == "onnx/model.onnx")


def _compare(repo: str, commit: str, folder: Path) -> Proof:
    # Imported here: seconds, which the checks before an upload need not wait for.
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    from pipeline.export import onnx_session
    from pipeline.release import ONNX_FILE, no_progress_bar, read_golden

    examples = read_golden(folder)["examples"]
    if not examples:
        raise UserError("golden.json holds no examples")
    golden = np.array([example["logits"] for example in examples], dtype=np.float32)
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    with no_progress_bar():
        model: Any = AutoModelForSequenceClassification.from_pretrained(
            folder, use_safetensors=True, local_files_only=True, trust_remote_code=False
        )
    texts = [example["text"] for example in examples]
    logits = _logits(texts, tokenizer, _torch_runner(model.eval()))
    difference = _checked(golden, logits, TORCH_TOLERANCE, "torch", texts)
    agreement = float((logits.argmax(axis=1) == golden.argmax(axis=1)).mean())
    onnx_difference = None
    if (folder / ONNX_FILE).exists():
        session = onnx_session(folder / ONNX_FILE)
        onnx_logits = _logits(texts, tokenizer, lambda ids, mask: session.run(["logits"], {"input_ids": ids, "attention_mask": mask})[0])
        onnx_difference = _checked(golden, onnx_logits, ONNX_TOLERANCE, "ONNX Runtime", texts)
    return Proof(repo, commit, len(examples), difference, onnx_difference, agreement)


def _torch_runner(model: Any) -> Callable[[np.ndarray, np.ndarray], np.ndarray]:
    import torch

    def run(ids: np.ndarray, mask: np.ndarray) -> np.ndarray:
        with torch.inference_mode():
            return model(input_ids=torch.from_numpy(ids), attention_mask=torch.from_numpy(mask)).logits.numpy()

    return run


def _logits(texts: Sequence[str], tokenizer: Any, run: Callable[[np.ndarray, np.ndarray], np.ndarray]) -> np.ndarray:
    """`(texts, classes)`; in padded batches of similar length, so that padding is proven too."""
    found: dict[int, np.ndarray] = {}
    for rows in _batches(texts):
        tokens = tokenizer([texts[i] for i in rows], truncation=True, padding=True, return_tensors="np")
        found.update(zip(rows, run(tokens["input_ids"].astype(np.int64), tokens["attention_mask"].astype(np.int64)), strict=True))
    return np.stack([found[i] for i in range(len(texts))])


def _batches(texts: Sequence[str]) -> Iterator[list[int]]:
    order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
    for start in range(0, len(order), BATCH):
        yield order[start : start + BATCH]


def _checked(golden: np.ndarray, logits: np.ndarray, tolerance: float, engine: str, texts: Sequence[str]) -> float:
    if logits.shape != golden.shape:
        raise UserError(f"{engine} gives logits of shape {logits.shape}, golden.json has {golden.shape}")
    differences = np.abs(logits - golden).max(axis=1)
    if not (differences <= tolerance).all():  # a NaN fails as well
        worst = int(np.argmax(np.where(np.isnan(differences), np.inf, differences)))
        wrong = int((~(differences <= tolerance)).sum())
        raise UserError(
            f"{engine}'s logits differ from the golden ones by up to {differences[worst]:.2g} (allowed {tolerance:g}) on {wrong} of "
            f'{len(texts)} texts, most on "{texts[worst][:40]}"'
        )
    return float(differences.max())
