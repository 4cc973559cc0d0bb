"""The small world that all experiments share: real news stories, a tiny transformer, one rank's view of both.

Reuters R8 in its own order (by date) and a DistilBERT of two narrow layers with random weights: small enough for a step to
take some ten milliseconds on one CPU thread, real enough to learn and to go wrong as the large ones do.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import nn

from pipeline.assets import fetch
from pipeline.model import classification_loss

ROWS, TEST_ROWS = 2048, 601  # 601 do not divide by two ranks
TEST_FIRST = 1200  # from here on the news change with time: two halves of the test rows are different samples
LONGEST, USUAL = 128, 48  # tokens kept of a row, and those that a batch takes unless told otherwise
DATA = "world.npz"


def prepare(folder: Path) -> None:
    """Tokenise the stories once, in the parent, into `folder`; the ranks only read them."""
    import pyarrow.parquet as parquet
    from tokenizers import Tokenizer

    assets = fetch()
    tokenizer = Tokenizer.from_file(str(assets.encoder / "tokenizer.json"))
    tokenizer.enable_truncation(LONGEST)
    tokenizer.no_padding()
    rows: dict[str, list[Any]] = {"text": [], "label": []}
    for split, first, count in (("train", 0, ROWS), ("test", TEST_FIRST, TEST_ROWS)):
        table = parquet.read_table(assets.r8 / "data" / f"{split}.parquet").slice(first, count).to_pydict()
        rows = {name: rows[name] + table[name] for name in rows}
    encoded = [encoding.ids for encoding in tokenizer.encode_batch(rows["text"])]
    ids = np.zeros((len(encoded), LONGEST), dtype=np.int64)  # 0 is the encoder's [PAD]
    for i, row in enumerate(encoded):
        ids[i, : len(row)] = row
    # Numbered anew: only the words that occur need an embedding.
    words, ids = np.unique(ids, return_inverse=True)
    lengths = np.array([len(row) for row in encoded])
    np.savez(folder / DATA, ids=ids.reshape(-1, LONGEST), lengths=lengths, labels=np.array(rows["label"]), words=len(words))


class World:
    """One rank's view: who it is, the rows, and what one does with them.

    `rows` are row numbers everywhere: 0 to ROWS - 1 for training, the TEST_ROWS after them for tests. `folder` is scratch
    space that the ranks share.
    """

    def __init__(self, rank: int, size: int, folder: Path) -> None:
        self.rank, self.size, self.folder = rank, size, folder
        with np.load(folder / DATA) as data:
            self.ids, self.lengths, self.labels = (torch.from_numpy(data[name]) for name in ("ids", "lengths", "labels"))
            self.words = int(data["words"])
        self.test_rows = range(ROWS, ROWS + TEST_ROWS)

    def model(self, dropout: float = 0.0) -> nn.Module:
        """The same weights on every rank and every call."""
        from transformers import DistilBertConfig, DistilBertForSequenceClassification

        torch.manual_seed(0)
        config = DistilBertConfig(
            vocab_size=self.words, dim=64, n_layers=2, n_heads=4, hidden_dim=128, max_position_embeddings=LONGEST,
            dropout=dropout, attention_dropout=dropout, seq_classif_dropout=dropout,
        )  # fmt: skip
        config.num_labels = 8
        return DistilBertForSequenceClassification(config).train()

    def batch(self, rows: Sequence[int] | torch.Tensor, seq: int = USUAL) -> dict[str, torch.Tensor]:
        """`input_ids` and `attention_mask`, `(rows, seq)`: cut or padded to `seq` tokens."""
        numbers = torch.as_tensor(rows)
        return {"input_ids": self.ids[numbers, :seq], "attention_mask": (torch.arange(seq) < self.lengths[numbers, None]).long()}

    def loss(self, model: nn.Module, rows: Sequence[int], seq: int = USUAL) -> torch.Tensor:
        """Mean cross-entropy of these rows, with its graph."""
        return classification_loss(model(**self.batch(rows, seq)).logits, self.labels[torch.as_tensor(rows)])

    def learn(self, model: nn.Module, optimizer: torch.optim.Optimizer, rows: Sequence[int]) -> None:
        """One optimizer step on this rank's rows; with a DDP model the gradient is that of all ranks' rows."""
        self.loss(model, rows).backward()
        optimizer.step()
        optimizer.zero_grad()

    def average(self, vector: torch.Tensor) -> torch.Tensor:
        """The mean over ranks: what DDP does with each bucket of gradients."""
        total = vector.clone()
        dist.all_reduce(total)
        return total / self.size

    def average_gradients(self, model: nn.Module) -> None:
        for parameter in model.parameters():
            if parameter.grad is not None:
                parameter.grad = self.average(parameter.grad)

    @torch.inference_mode()
    def score(self, model: nn.Module, rows: Sequence[int] | None = None) -> tuple[float, float]:
        """Sum of the rows' losses, and how many are labelled right; of all test rows unless told otherwise."""
        was, rows = model.training, self.test_rows if rows is None else rows
        model.eval()
        total = right = 0.0
        for begin in range(0, len(rows), 128):
            part = torch.as_tensor(rows[begin : begin + 128])
            logits = model(**self.batch(part)).logits
            total += classification_loss(logits, self.labels[part]).item() * len(part)
            right += int((logits.argmax(-1) == self.labels[part]).sum())
        model.train(was)
        return total, right

    def test_loss(self, model: nn.Module) -> float:
        """Mean cross-entropy of all test rows."""
        return self.score(model)[0] / TEST_ROWS


def gradient(model: nn.Module) -> torch.Tensor:
    """All gradients as one vector, `(parameters,)`."""
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


def batches(size: int, count: int, rows: int = ROWS) -> list[torch.Tensor]:
    """`count` global batches of `size` rows out of the first `rows`, the same on every rank."""
    order = torch.randperm(rows, generator=torch.Generator().manual_seed(0))
    return list(order[: size * count].split(size))
