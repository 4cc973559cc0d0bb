"""Releases that can be told apart by any single answer: one tiny model under many heads.

A commit's head is a permutation, a scale and a shift of the first one's logits, drawn anew until, for every text, its
probabilities differ from those of all heads before by `SEPARATION` in some class. So an answer says which head gave it.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from benchmarks.tiny_release import MAX_LENGTH

Probabilities = npt.NDArray[np.float64]  # (texts, classes)

SEPARATION = 0.05
BAD = ("other golden logits", "ONNX file cut in half", "another task")
HEAD = ("classifier.weight", "classifier.bias")  # (classes, width), (classes,)
FILES = ("config.json", "tokenizer.json", "tokenizer_config.json")


class Releases:
    """Variants of the release in `base`, in folders under `folder`. Its golden texts are the `texts` that are asked."""

    def __init__(self, base: Path, folder: Path, seed: int = 0) -> None:
        import onnx

        self.base, self.folder = base, folder
        self.golden: dict[str, Any] = json.loads((base / "golden.json").read_text(encoding="utf-8"))
        self.texts: list[str] = [example["text"] for example in self.golden["examples"]]
        self.separation = 1.0  # smallest there is, over all pairs of heads and all texts
        self._logits = np.array([example["logits"] for example in self.golden["examples"]])
        self._graph = onnx.load(base / "onnx" / "model.onnx")
        self._first = {one.name: onnx.numpy_helper.to_array(one).copy() for one in self._graph.graph.initializer if one.name in HEAD}
        self._heads: list[Probabilities] = []
        self._random = np.random.default_rng(seed)
        self._made = 0

    def good(self) -> tuple[Path, Probabilities]:
        """A release with a head of its own, and what it answers, computed from its file by ONNX Runtime, each text alone."""
        folder = self._new()
        logits = self._answers(folder / "onnx" / "model.onnx")
        self._write_golden(folder, logits)
        return folder, softmax(logits)

    def bad(self, kind: str) -> Path:
        """A release with a head of its own that must never answer: one of `BAD`."""
        folder, _ = self.good()
        if kind == "other golden logits":
            self._write_golden(folder, self._logits)
        elif kind == "ONNX file cut in half":
            path = folder / "onnx" / "model.onnx"
            path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
        else:
            config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
            (folder / "config.json").write_text(
                json.dumps(config | {"architectures": ["DistilBertForTokenClassification"]}), encoding="utf-8"
            )
        return folder

    def _new(self) -> Path:
        from onnx import numpy_helper, save_model

        order, scale, shift = self._draw()
        for tensor in self._graph.graph.initializer:
            if tensor.name in HEAD:
                changed = scale * self._first[tensor.name][order] + (shift if tensor.name == HEAD[1] else 0)
                tensor.CopyFrom(numpy_helper.from_array(changed.astype(np.float32), tensor.name))
        self._made += 1
        folder = self.folder / f"release-{self._made:02}"
        (folder / "onnx").mkdir(parents=True)
        for name in FILES:
            shutil.copy(self.base / name, folder / name)
        save_model(self._graph, folder / "onnx" / "model.onnx")
        return folder

    def _draw(self) -> tuple[npt.NDArray[np.int64], float, npt.NDArray[np.float64]]:
        for _ in range(10_000):
            order, scale = self._random.permutation(4), self._random.uniform(0.06, 0.12)
            shift = self._random.normal(0, 1.2, 4)
            found = softmax(scale * self._logits[:, order] + shift)
            apart = min((float(np.abs(found - other).max(axis=1).min()) for other in self._heads), default=1.0)
            if apart >= SEPARATION:
                self._heads.append(found)
                self.separation = min(self.separation, apart)
                return order, scale, shift
        raise RuntimeError(f"no room for another head that differs from {len(self._heads)} others by {SEPARATION}")

    def _answers(self, path: Path) -> Probabilities:
        """Logits (texts, classes)."""
        import onnxruntime
        from tokenizers import Tokenizer

        tokenizer = Tokenizer.from_file(str(self.base / "tokenizer.json"))
        tokenizer.enable_truncation(MAX_LENGTH)
        tokenizer.no_padding()
        session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
        rows = []
        for text in self.texts:
            ids = np.array([tokenizer.encode(text).ids], np.int64)
            rows.append(session.run(["logits"], {"input_ids": ids, "attention_mask": np.ones_like(ids)})[0][0])
        return np.array(rows, np.float64)

    def _write_golden(self, folder: Path, logits: Probabilities) -> None:
        examples: Sequence[dict[str, Any]] = self.golden["examples"]
        changed = [{**example, "logits": row} for example, row in zip(examples, logits.tolist(), strict=True)]
        (folder / "golden.json").write_text(json.dumps({**self.golden, "examples": changed}), encoding="utf-8")


def softmax(logits: Probabilities) -> Probabilities:
    powers = np.exp(logits - logits.max(axis=1, keepdims=True))
    return np.asarray(powers / powers.sum(axis=1, keepdims=True))
