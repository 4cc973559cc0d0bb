"""The loop most tutorials begin with, as the base line: one process, every text padded to 128 tokens, fp32, plain AdamW.

    python -m benchmarks.plain_loop --model .cache/assets/all-MiniLM-L6-v2 --dataset .cache/assets/reuters-r8 --steps 30

Written on its own, with nothing of pipeline/, so that it is what it says. Prints one line of JSON, of the steps after the
first three, which load code and fill caches: rows, their tokens, those computed with padding, the squares of both row by row,
the seconds of each step, and the peak of memory; with --test_file also the accuracy on its rows, scored after all steps.
"""

from __future__ import annotations

import argparse
import json
import re
import time
from pathlib import Path
from typing import Any

import torch
from datasets import load_dataset
from torch.utils.data import DataLoader
from transformers import AutoModelForSequenceClassification, AutoTokenizer

FIRST_STEPS = 3


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.plain_loop", allow_abbrev=False)
    parser.add_argument("--model", required=True, help="Hub id or folder.")
    parser.add_argument("--dataset", required=True, help="Hub id or folder with the columns text and label.")
    parser.add_argument("--steps", type=int, default=30, help="More than 3.")
    parser.add_argument("--batch_size", type=int, default=32)
    parser.add_argument("--max_length", type=int, default=128)
    parser.add_argument("--threads", type=int, default=0, help="0: torch's own choice.")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--learning_rate", type=float, default=2e-5)
    parser.add_argument("--test_file", help="Rows to score at the end: JSON lines with text and the label's name.")
    arguments = parser.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    torch.manual_seed(42)
    rows = load_dataset(arguments.dataset, split="train").shuffle(seed=42).select(range(arguments.steps * arguments.batch_size))
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    rows = rows.map(
        lambda row: tokenizer(row["text"], padding="max_length", truncation=True, max_length=arguments.max_length), batched=True
    )
    rows.set_format("torch", columns=["input_ids", "attention_mask", "label"])
    names = rows.features["label"].names
    model = AutoModelForSequenceClassification.from_pretrained(arguments.model, num_labels=len(names), dtype=torch.float32)
    model.to(arguments.device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=arguments.learning_rate, weight_decay=0.01)
    model.train()
    seconds: list[float] = []
    tokens = squares = 0
    began = time.perf_counter()
    for step, batch in enumerate(DataLoader(rows, batch_size=arguments.batch_size, shuffle=True)):
        if step >= FIRST_STEPS:
            lengths = batch["attention_mask"].sum(1)
            tokens, squares = tokens + int(lengths.sum()), squares + int(lengths.square().sum())
        batch = {name: tensor.to(arguments.device) for name, tensor in batch.items()}
        loss = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], labels=batch["label"]).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        loss.item()  # as loops that print it do; on a GPU it waits for the step
        now = time.perf_counter()
        seconds.append(now - began)
        began = now
    seconds = seconds[FIRST_STEPS:]
    on_gpu = arguments.device != "cpu"
    held = re.search(r"VmHWM:\s*(\d+) kB", Path("/proc/self/status").read_text())
    memory = torch.cuda.max_memory_allocated() / 2**30 if on_gpu else int(held.group(1)) / 2**20 if held else None
    done = len(seconds) * arguments.batch_size
    print(json.dumps({"rows": done, "tokens": tokens, "squares": squares, "padded_tokens": done * arguments.max_length, "padded_squares": done * arguments.max_length**2,
                      "step_seconds": seconds, "peak_memory_gib": memory, "threads": torch.get_num_threads(),
                      "config": {"batch_size": arguments.batch_size, "max_length": arguments.max_length, "learning_rate": arguments.learning_rate, "weight_decay": 0.01},
                      **(score(model, tokenizer, names, arguments) if arguments.test_file else {})}))  # fmt: skip


@torch.no_grad()
def score(model: Any, tokenizer: Any, names: list[str], arguments: argparse.Namespace) -> dict[str, Any]:
    """Accuracy on the test rows, padded as in training."""
    model.eval()
    with Path(arguments.test_file).open(encoding="utf-8") as file:
        rows = [json.loads(line) for line in file]
    right = 0
    for i in range(0, len(rows), arguments.batch_size):
        some = rows[i : i + arguments.batch_size]
        texts = [row["text"] for row in some]
        batch = tokenizer(texts, padding="max_length", truncation=True, max_length=arguments.max_length, return_tensors="pt")
        batch = batch.to(arguments.device)
        guesses = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits.argmax(1).tolist()
        right += sum(names[guess] == row["label"] for guess, row in zip(guesses, some, strict=True))
    return {"accuracy": right / len(rows), "scored": len(rows)}


if __name__ == "__main__":
    main()
