"""The loop most tutorials begin with, as the base line: one process, every text padded to 128 tokens, fp32, plain AdamW.

    python -m benchmarks.plain_loop --model .cache/assets/all-MiniLM-L6-v2 --dataset .cache/assets/reuters-r8 --steps 30

Written on its own, with nothing of pipeline/, so that it is what it says. Prints one line of JSON: samples per second over
the steps after the first three, which load code and fill caches.
"""

from __future__ import annotations

import argparse
import json
import time

import torch
from datasets import load_dataset
from torch.utils.data import DataLoader
from transformers import AutoModelForSequenceClassification, AutoTokenizer


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.plain_loop", allow_abbrev=False)
    parser.add_argument("--model", required=True, help="Hub id or folder.")
    parser.add_argument("--dataset", required=True, help="Hub id or folder with the columns text and label.")
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--batch_size", type=int, default=32)
    parser.add_argument("--max_length", type=int, default=128)
    parser.add_argument("--threads", type=int, default=0, help="0: torch's own choice.")
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
    classes = rows.features["label"].num_classes
    model = AutoModelForSequenceClassification.from_pretrained(arguments.model, num_labels=classes, dtype=torch.float32)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-5, weight_decay=0.01)
    model.train()
    began = 0.0
    for step, batch in enumerate(DataLoader(rows, batch_size=arguments.batch_size, shuffle=True)):
        if step == 3:
            began = time.perf_counter()
        loss = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], labels=batch["label"]).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    seconds = time.perf_counter() - began
    print(json.dumps({"samples_per_second": (arguments.steps - 3) * arguments.batch_size / seconds, "threads": torch.get_num_threads()}))


if __name__ == "__main__":
    main()
