"""What the batching peers compute: one release with torch, each batch padded to its longest text."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

MAX_BATCH = 16
WAIT_SECONDS = 0.005


class Classifier:
    """From the environment: PEER_MODEL, a release folder; PEER_DTYPE, float32 or bfloat16; PEER_THREADS."""

    def __init__(self) -> None:
        torch.set_num_threads(int(os.environ["PEER_THREADS"]))
        folder, dtype = os.environ["PEER_MODEL"], getattr(torch, os.environ["PEER_DTYPE"])
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self.model = AutoModelForSequenceClassification.from_pretrained(folder, dtype=dtype).eval()
        self.max_length = min(self.tokenizer.model_max_length, self.model.config.max_position_embeddings)

    def __call__(self, texts: Sequence[str]) -> list[dict[str, Any]]:
        with torch.inference_mode():
            batch = self.tokenizer(
                list(texts), padding=True, truncation=True, max_length=self.max_length, return_token_type_ids=False, return_tensors="pt"
            )
            confidence, label = self.model(**batch).logits.float().softmax(-1).max(-1)
        names = self.model.config.id2label
        return [{"label": names[i], "confidence": p} for i, p in zip(label.tolist(), confidence.tolist(), strict=True)]
