"""A hand-made run record with real arithmetic in it, for the tests of release, card and Hub."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from pipeline.config import TrainConfig
from pipeline.metrics import compute_metrics

LABELS = ["World", "Sports", "Business", "Sci/Tech"]


def run_record(label_names: list[str] = LABELS, *, model: str = "distilbert/distilbert-base-uncased", **config: Any) -> dict[str, Any]:
    random = np.random.default_rng(1)
    labels = random.integers(0, len(label_names), 3800)
    logits = 2.2 * np.eye(len(label_names))[labels] + random.normal(size=(3800, len(label_names)))
    test = compute_metrics(logits, labels, label_names)
    settings = TrainConfig(model=model, output_dir="outputs/ag_news", **config)
    steps = range(10, 471, 10)
    return {
        "format": 1,
        "entry": "trainer",
        "command": "python -m pipeline.train configs/ag_news.yaml --learning_rate 1e-4 --epochs 2",
        "finished": "2026-03-01T12:00:00+00:00",
        "config": settings.to_dict(),
        "versions": {"python": "3.11.7", "torch": "2.13.0", "transformers": "5.23.0", "onnx": "1.23.2", "evaluate": None},
        "code": {"commit": "0123456789abcdef0123456789abcdef01234567", "dirty": False},
        "hardware": {"cpu": "A CPU with 2 cores", "cpu_flags": ["avx2"], "cores": 2, "memory_gib": 15.6, "gpus": []},
        "topology": {"world_size": 2, "backend": "gloo", "device": "cpu", "precision": "bf16", "threads": 1},
        "batch": {"global": 32, "per_device": 16, "accumulation": 1, "world_size": 2},
        "data": {
            "dataset": settings.dataset,
            "revision": "a" * 40,
            "rows": {"train": 7500, "validation": 400, "test": 3800},
            "label_names": label_names,
            "warnings": ["12 rows of train are duplicates."],
        },
        "steps": 470,
        "train_seconds": 131.4,
        "samples_per_second": 114.5,
        "history": [
            {"step": s, "epoch": s / 235, "loss": 0.3 + 1.1 * math.exp(-s / 60) + 0.03 * random.normal(), "learning_rate": 1e-4, "grad_norm": 1.0}
            for s in steps
        ],
        "epochs": [
            {"step": 235 * e, "epoch": e, "loss": 0.4, "seconds": 60.0, "samples_per_second": 114.0,
             "accuracy": 0.86 + 0.02 * e, "macro_f1": 0.85 + 0.02 * e, "nll": 0.42 - 0.05 * e, "ece": 0.02}
            for e in (1, 2)
        ],
        "best": {"step": 470, "metric": "macro_f1", "value": 0.89},
        "temperature": 1.234,
        "validation": test,
        "test": test,
        "weights_sha256": "0" * 64,
    }  # fmt: skip
