"""What computes logits: ONNX Runtime on the CPU, or torch on a GPU or CPU. torch is imported only when it is chosen.

`candidates` lists the engines that could serve a release here, best first; `serve.release` admits the first of them
that proves itself on the golden examples.
"""

from __future__ import annotations

import ctypes
import importlib.util
import math
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from serve.errors import UserError
from serve.settings import Settings

Batch = Sequence[Sequence[int]]  # token ids, unpadded
Logits = npt.NDArray[np.float32]  # (texts, classes)


class Engine(Protocol):
    name: str
    device: str
    precision: str
    threads: int
    # What one batch should hold. On a CPU time goes with tokens, so padding is loss and large batches only fall out of
    # the cache; on a GPU a batch of 1 costs nearly what one of 64 does.
    batch_tokens: int  # padding included
    max_padding: float  # share of a batch, 0-1

    def logits(self, texts: Batch) -> Logits: ...


class Weights(Protocol):
    """The part of a release that an engine needs."""

    folder: Path
    pad_id: int

    def fetch(self, pattern: str) -> bool:
        """Brings the files into `folder`; False where the release has none."""
        ...


def pad(texts: Batch, pad_id: int) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """`(input_ids, attention_mask)`, both (texts, longest), padded on the right."""
    shape = len(texts), max(map(len, texts))
    ids, mask = np.full(shape, pad_id, np.int64), np.zeros(shape, np.int64)
    for row, text in enumerate(texts):
        ids[row, : len(text)] = text
        mask[row, : len(text)] = 1
    return ids, mask


class OnnxEngine:
    """`onnx/model.onnx` on ONNX Runtime's CPU provider, in fp32."""

    name, device, precision = "onnxruntime", "cpu", "fp32"
    batch_tokens, max_padding = 1024, 0.1

    def __init__(self, path: Path, pad_id: int, threads: int) -> None:
        """Raises ValueError for a graph with other inputs or outputs; onnxruntime's own error for a broken file."""
        import onnxruntime  # type: ignore[import-untyped]

        self.threads, self.pad_id = threads, pad_id
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 4  # errors are raised as well; a text that makes it fail must not fill the log
        options.intra_op_num_threads = threads
        options.inter_op_num_threads = 1
        # Spinning threads burn the cores that tokenising and HTTP need, and collapse beside a busy neighbour.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        self._session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        self._inputs = {entry.name for entry in self._session.get_inputs()}
        outputs = [entry.name for entry in self._session.get_outputs()]
        if unknown := self._inputs - {"input_ids", "attention_mask", "token_type_ids"}:
            raise ValueError(f"the graph wants inputs this service does not know: {', '.join(sorted(unknown))}")
        if "logits" not in outputs:
            raise ValueError(f"the graph has no output 'logits', only {', '.join(outputs)}")

    def logits(self, texts: Batch) -> Logits:
        ids, mask = pad(texts, self.pad_id)
        feed = {"input_ids": ids, "attention_mask": mask, "token_type_ids": np.zeros_like(ids)}
        # ONNX Runtime refuses an input that the graph does not have.
        (logits,) = self._session.run(["logits"], {name: feed[name] for name in self._inputs})
        return np.asarray(logits, np.float32)


class TorchEngine:
    """`model.safetensors` on transformers, on a GPU or on the CPU."""

    name = "torch"

    def __init__(self, folder: Path, pad_id: int, device: str, precision: str, threads: int) -> None:
        import torch
        from transformers import AutoModelForSequenceClassification
        from transformers.utils import logging

        logging.disable_progress_bar()  # type: ignore[no-untyped-call]
        on_gpu = device == "cuda"
        if not on_gpu:
            torch.set_num_threads(threads)
        self.device, self.precision, self.pad_id, self.threads = device, precision, pad_id, threads
        self.batch_tokens, self.max_padding = (32768, 0.5) if on_gpu else (1024, 0.1)
        self._model: Any = AutoModelForSequenceClassification.from_pretrained(
            folder,
            dtype=torch.bfloat16 if precision == "bf16" else torch.float32,
            use_safetensors=True,
            trust_remote_code=False,
            local_files_only=True,
        )
        self._model.to(device).eval()

    def logits(self, texts: Batch) -> Logits:
        import torch

        ids, mask = (torch.from_numpy(array).to(self.device) for array in pad(texts, self.pad_id))
        with torch.inference_mode():
            output = self._model(input_ids=ids, attention_mask=mask).logits
        return np.asarray(output.float().cpu())


class Candidate(NamedTuple):
    name: str
    load: Callable[[], Engine]


def candidates(settings: Settings, release: Weights) -> list[Candidate]:
    """The engines that could serve `release` under `settings`, best first, at least one. Raises UserError."""
    threads = settings.threads or allowed_cores()
    found: list[Candidate] = []
    wants_gpu = settings.device == "cuda" or (settings.device == "auto" and settings.engine != "onnxruntime" and gpu_present())
    if wants_gpu and (settings.device == "cuda" or has_torch()):
        found += _torch_on_gpu(settings, release)
    if settings.device != "cuda" and not found:
        if settings.engine != "torch" and release.fetch("onnx/model.onnx"):
            path = release.folder / "onnx" / "model.onnx"
            found.append(Candidate("onnxruntime on cpu, fp32", lambda: OnnxEngine(path, release.pad_id, threads)))
        elif settings.engine == "onnxruntime":
            raise UserError(
                "the release has no onnx/model.onnx, which --engine onnxruntime needs: publish it with one, or give --engine torch."
            )
        else:
            _require_torch("the release has no onnx/model.onnx" if settings.engine == "auto" else "--engine is torch")
            _require_safetensors(release)
            found.append(Candidate("torch on cpu, fp32", lambda: TorchEngine(release.folder, release.pad_id, "cpu", "fp32", threads)))
    return found


def _torch_on_gpu(settings: Settings, release: Weights) -> list[Candidate]:
    _require_torch(f"--device is {settings.device}")
    import torch

    if not torch.cuda.is_available():
        if settings.device == "cuda":
            raise UserError("--device is cuda and torch finds no GPU here: give --device cpu or auto, or install a torch built for CUDA.")
        return []
    _require_safetensors(release)
    # Older cards than Ampere compute bf16 by emulation; there fp32 is the faithful choice.
    precisions = ["bf16", "fp32"] if torch.cuda.get_device_capability()[0] >= 8 else ["fp32"]

    def candidate(precision: str) -> Candidate:
        return Candidate(f"torch on cuda, {precision}", lambda: TorchEngine(release.folder, release.pad_id, "cuda", precision, threads=1))

    return [candidate(precision) for precision in precisions]


def has_torch() -> bool:
    return all(importlib.util.find_spec(package) is not None for package in ("torch", "transformers"))


def _require_torch(why: str) -> None:
    if not has_torch():
        raise UserError(
            f"{why}, and torch or transformers is not installed here: pip install torch transformers, "
            "or serve a release with ONNX on the CPU."
        )


def _require_safetensors(release: Weights) -> None:
    if not release.fetch("model*.safetensors*"):
        raise UserError("the release has no model.safetensors, the only weights torch loads here (no pickle): publish it with them.")


def gpu_present() -> bool:
    """Whether CUDA's driver finds a device; asked of the driver, because importing torch to ask takes seconds."""
    try:
        driver, count = ctypes.CDLL("libcuda.so.1"), ctypes.c_int(0)
    except OSError:
        return False
    return driver.cuInit(0) == 0 and driver.cuDeviceGetCount(ctypes.byref(count)) == 0 and count.value > 0


def allowed_cores() -> int:
    """The cores this process may really use: its affinity, and below that the quota of its container."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, math.floor(min(cores, _cgroup_quota())))


def _cgroup_quota(root: Path = Path("/sys/fs/cgroup")) -> float:
    """Cores' worth of time that the container may use (infinite without a limit); cgroup version 2, then 1."""
    for quota_file, period_file in (("cpu.max", None), ("cpu/cpu.cfs_quota_us", "cpu/cpu.cfs_period_us")):
        try:
            words = (root / quota_file).read_text().split()
            words += (root / period_file).read_text().split() if period_file else []
            if words[0] not in ("max", "-1"):
                return max(1.0, int(words[0]) / int(words[1]))
        except (OSError, ValueError, IndexError):
            continue
    return math.inf
