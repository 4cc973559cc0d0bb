"""A release of a small random DistilBERT, made as training makes one: real in kind, a few megabytes, quick to serve."""

from __future__ import annotations

import json
import random
from pathlib import Path

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


def tiny_release(encoder_dir: Path, folder: Path, sharpness: float = 4) -> Path:
    """Writes it to `folder`, with the tokenizer of `encoder_dir` and 40 golden examples by torch in fp32; returns `folder`.

    At `sharpness` 4 the random head is as sure of itself as a trained one, and a rounding error weighs as much more.
    """
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
    texts = [make_text(words, seed) for seed, words in enumerate((2, 3, 4, 5, 8, 12, 20, 30, 60, 100) * 4)]

    def answers() -> torch.Tensor:  # (texts, classes), each text alone: no padding
        with torch.inference_mode():
            return torch.cat([model(**tokenizer(text, truncation=True, return_tensors="pt")).logits for text in texts])

    means = answers().mean(dim=0)
    with torch.no_grad():  # an untrained head says the same to every text; without its bias it tells them apart
        model.classifier.bias -= means
        model.classifier.weight *= sharpness
        model.classifier.bias *= sharpness
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    logits = answers().tolist()
    examples = [{"text": text, "label": i % 4, "logits": row} for i, (text, row) in enumerate(zip(texts, logits, strict=True))]
    golden = {"format": 1, "max_length": MAX_LENGTH, "label_names": LABELS, "examples": examples}
    (folder / "golden.json").write_text(json.dumps(golden), encoding="utf-8")
    export_onnx(model, folder / "onnx" / "model.onnx", MAX_LENGTH)
    return folder
