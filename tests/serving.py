"""What the tests of the service share: a small real release, and the service as a child process."""

from __future__ import annotations

import functools
import json
import os
import random
import select
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import httpx2 as httpx  # the HTTP client that huggingface_hub brings

ROOT = Path(__file__).resolve().parent.parent
LABELS = ["World", "Sports", "Business", "Sci/Tech"]
MAX_LENGTH = 32
_WORDS = """
    oil prices rise fall market stocks bank profit earnings quarter minister election talks border troops city storm
    striker scores twice cup final coach season team wins loses chip maker phone software web search engine space probe
    launch mars robot study finds says report early monday friday in of the to for on after before new york london tokyo
"""
WORDS = _WORDS.split()


def make_text(words: int, seed: int) -> str:
    return " ".join(random.Random(seed).choices(WORDS, k=words)).capitalize()


@functools.cache
def make_release(encoder_dir: Path) -> Path:
    """A release of a small random DistilBERT, made as training makes one; golden logits by torch in fp32. Do not change it."""
    import torch
    from transformers import AutoTokenizer, DistilBertConfig, DistilBertForSequenceClassification

    from pipeline.export import export_onnx
    from pipeline.release import release_tokenizer

    torch.manual_seed(0)
    config = DistilBertConfig(
        vocab_size=30522, dim=32, n_layers=2, n_heads=2, hidden_dim=64, max_position_embeddings=MAX_LENGTH, initializer_range=0.2,
        id2label=dict(enumerate(LABELS)), label2id={name: i for i, name in enumerate(LABELS)},
    )  # fmt: skip
    model = DistilBertForSequenceClassification(config).eval()
    tokenizer = release_tokenizer(AutoTokenizer.from_pretrained(encoder_dir), MAX_LENGTH)
    folder = Path(tempfile.mkdtemp(dir=os.environ["HF_HOME"])) / "tiny-release"  # goes when the tests end
    texts = [make_text(words, seed) for seed, words in enumerate((2, 3, 4, 5, 8, 12, 20, 30, 60, 100) * 4)]

    def answers() -> torch.Tensor:  # (texts, classes), each text alone: no padding
        with torch.inference_mode():
            return torch.cat([model(**tokenizer(text, truncation=True, return_tensors="pt")).logits for text in texts])

    means = answers().mean(dim=0)
    with torch.no_grad():  # an untrained head says the same to every text; without its bias it tells them apart
        model.classifier.bias -= means
        model.classifier.weight *= 4
        model.classifier.bias *= 4
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    logits = answers().tolist()
    examples = [{"text": text, "label": i % 4, "logits": row} for i, (text, row) in enumerate(zip(texts, logits, strict=True))]
    golden = {"format": 1, "max_length": MAX_LENGTH, "label_names": LABELS, "examples": examples}
    (folder / "golden.json").write_text(json.dumps(golden), encoding="utf-8")
    export_onnx(model, folder / "onnx" / "model.onnx", MAX_LENGTH)
    return folder


def variant(release: Path, folder: Path, **files: dict[str, Any] | str | None) -> Path:
    """A copy of `release` in `folder`; `files` by name without extension: values to change in the JSON, new text, or None: gone."""
    shutil.copytree(release, folder, symlinks=True)
    for stem, change in files.items():
        name = "onnx/model.onnx" if stem == "onnx" else "model.safetensors" if stem == "model" else f"{stem}.json"
        path = folder / name
        if change is None:
            path.unlink()
        elif isinstance(change, str):
            path.write_text(change, encoding="utf-8")
        else:
            path.write_text(json.dumps(json.loads(path.read_text(encoding="utf-8")) | change), encoding="utf-8")
    return folder


class Serve:
    """The service on a free port, in a child process that is gone when the context ends. `.client` speaks to it."""

    def __init__(self, *arguments: str | Path, env: dict[str, str] | None = None, program: Sequence[str] = ("-m", "serve")) -> None:
        self.command = [sys.executable, *program, *map(str, arguments), "--port", "0"]
        self.env = {**os.environ, "OMP_NUM_THREADS": "1", **(env or {})}

    def __enter__(self) -> Serve:
        self.errors = tempfile.TemporaryFile("w+", encoding="utf-8")
        self.process = subprocess.Popen(self.command, cwd=ROOT, env=self.env, stdout=subprocess.PIPE, stderr=self.errors, text=True)
        try:
            assert self.process.stdout
            assert select.select([self.process.stdout], [], [], 30)[0], "the service said nothing in 30 s"
            line = self.process.stdout.readline()
            assert line.startswith("listening on "), f"{line!r}; {self.log()}"
            self.url = line.removeprefix("listening on ").strip()
            self.client = httpx.Client(base_url=self.url, timeout=30, trust_env=False)
            self.wait_ready()
        except BaseException:
            self.__exit__(None, None, None)
            raise
        return self

    def wait_ready(self) -> None:
        end = time.monotonic() + 60
        while self.client.get("/ready").status_code != 200:
            assert self.process.poll() is None, self.log()
            assert time.monotonic() < end, "not ready in 60 s"
            time.sleep(0.05)

    def log(self) -> str:
        self.errors.seek(0)
        return self.errors.read()

    def metric(self, name: str) -> float:
        """A metric's value by its full name with labels; 0 where it was never counted."""
        for line in self.client.get("/metrics").text.splitlines():
            if line.startswith(f"{name} "):
                return float(line.split()[-1])
        return 0.0

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if hasattr(self, "client"):
            self.client.close()
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait(10)
        if self.process.stdout:
            self.process.stdout.close()
        self.errors.close()
