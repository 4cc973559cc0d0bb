"""From tokenised rows to padded tensors: dynamic padding, the training loader, and fixed evaluation batches."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from torch.utils.data import DataLoader

from pipeline.sampler import GlobalBatchSampler

EVALUATION_ROWS = 32  # rows per evaluation batch; fixed, so that a row's logits do not depend on the world size


@dataclass(frozen=True)
class Collator:
    """Pads rows to the longest of their batch: `input_ids`, `attention_mask` `(batch, seq)`, `labels` `(batch,)`."""

    pad_token_id: int
    multiple_of: int = 1  # 8 feeds a GPU's tensor cores full tiles

    def __call__(self, rows: Sequence[dict[str, Any]]) -> dict[str, torch.Tensor]:
        longest = max(len(row["input_ids"]) for row in rows)
        seq = -(-longest // self.multiple_of) * self.multiple_of
        input_ids = torch.full((len(rows), seq), self.pad_token_id, dtype=torch.long)
        attention_mask = torch.zeros((len(rows), seq), dtype=torch.long)
        for i, row in enumerate(rows):
            length = len(row["input_ids"])
            input_ids[i, :length] = torch.as_tensor(row["input_ids"])
            attention_mask[i, :length] = 1
        labels = torch.tensor([row["labels"] for row in rows], dtype=torch.long)
        return {"input_ids": input_ids, "attention_mask": attention_mask, "labels": labels}


def training_loader(rows: Dataset, sampler: GlobalBatchSampler, collator: Collator, *, workers: int, pin_memory: bool) -> DataLoader[Any]:
    """Micro-batches of this rank, in the sampler's order."""
    # A DataLoader draws a seed for its workers whenever it is iterated. From a generator of its own, so that the
    # random numbers of dropout do not depend on how often a loader was opened.
    return DataLoader(
        rows,  # type: ignore[arg-type]
        batch_sampler=sampler,
        collate_fn=collator,
        num_workers=workers,
        pin_memory=pin_memory,
        generator=torch.Generator().manual_seed(0),
    )


def evaluation_batches(rows: Dataset, rank: int = 0, world_size: int = 1) -> list[list[int]]:
    """This rank's share of the evaluation batches, as row numbers: each row in exactly one batch of one rank.

    Sorted by length (little padding) and cut the same way at any world size; batch i goes to rank i mod world size.
    The shards may differ by a batch: harmless without gradients, where no rank waits for another in mid-epoch.
    """
    order = np.argsort(rows["length"], kind="stable")[::-1]
    batches = [order[i : i + EVALUATION_ROWS].tolist() for i in range(0, len(order), EVALUATION_ROWS)]
    return batches[rank::world_size]


@torch.inference_mode()
def predict_logits(
    model: torch.nn.Module,
    rows: Dataset,
    collator: Collator,
    device: torch.device,
    *,
    rank: int = 0,
    world_size: int = 1,
    autocast: torch.dtype | None = None,
    tick: Callable[[], None] = lambda: None,
) -> tuple[np.ndarray, np.ndarray]:
    """Logits of this rank's share of the rows; `tick` is called after each batch.

    Returns:
        row numbers `(share,)` and float32 logits `(share, classes)` (float64 of a float64 model), in the same order; both
        empty for a rank without a share. Leaves the model in evaluation mode and no random number drawn.
    """
    model.eval()
    numbers: list[int] = []
    logits: list[torch.Tensor] = []
    for batch in evaluation_batches(rows, rank, world_size):
        inputs = collator([{"input_ids": ids, "labels": 0} for ids in rows[batch]["input_ids"]])
        inputs.pop("labels")
        with torch.autocast(device.type, dtype=autocast, enabled=autocast is not None):
            output = model(**{name: tensor.to(device) for name, tensor in inputs.items()}).logits
        numbers += batch
        tick()
        logits.append(output.cpu() if output.dtype == torch.float64 else output.float().cpu())
    stacked = torch.cat(logits).numpy() if logits else np.zeros((0, 0), dtype=np.float32)
    return np.asarray(numbers, dtype=np.int64), stacked


def in_order(parts: Sequence[tuple[np.ndarray, np.ndarray]]) -> np.ndarray:
    """The ranks' `(row numbers, logits)` joined into `(rows, classes)` in the data set's own order.

    Raises ValueError unless every row came exactly once.
    """
    parts = [part for part in parts if len(part[0])]  # a rank may have had nothing to do
    numbers, logits = np.concatenate([n for n, _ in parts]), np.concatenate([x for _, x in parts])
    order = np.argsort(numbers)
    if not np.array_equal(numbers[order], np.arange(len(numbers))):
        raise ValueError("evaluation lost or repeated rows: the ranks' shares do not add up to the data set")
    return logits[order]
