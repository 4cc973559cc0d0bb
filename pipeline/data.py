"""Labelled texts: loaded, checked, split, tokenised once.

    python -m pipeline.data configs/ag_news.yaml          # what a run would train on, and what is odd about it
    python -m pipeline.data configs/own_data.yaml --label_column topic

Train decides what the labels are. A stratified, seeded validation share comes out of train; test rows are only loaded
and checked. Every split is a pure function of the rows and the seed: the same on any number of processes.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import numpy as np
from datasets import ClassLabel, Dataset, Features, List, Value

from pipeline.columns import Rows, check_seen, checked_rows, make_label_names, short
from pipeline.config import TrainConfig, parse
from pipeline.errors import UserError, nearest, run_entry
from pipeline.readers import Splits, file_hash, read_file, read_splits

TOKENS_VERSION = "1"  # raise it when `tokenize` computes something else, so that no old cache is read


@dataclass(frozen=True)
class TextData:
    """Three tables with the columns `text` (str) and `label` (int, the position in `label_names`)."""

    train: Dataset
    validation: Dataset
    test: Dataset
    label_names: list[str]
    warnings: list[str]  # what a person should look at, one line each
    provenance: dict[str, Any]  # dataset, revision, rows {split: n}, label_names, class_counts {name: rows in train}
    repeats: dict[str, int]  # duplicates: rows of train, contradictions: texts with several labels, leaked: test rows in train


def load_texts(config: TrainConfig, show_progress: bool = False) -> TextData:
    """Load, check and split the data that the configuration names.

    Order of the cuts: test (where the data has none: `test_share` of train), then validation, then
    `max_train_samples`. So runs with fewer training rows are judged on the same validation rows.

    Raises UserError for data that is not there, cannot be read, or cannot be learnt from.
    """
    source = read_splits(config.dataset, name=config.dataset_config, revision=config.dataset_revision, show_progress=show_progress)
    warnings, revision = list(source.warnings), source.revision
    where = f"{config.dataset}, {config.train_split}"
    rows = checked_rows(_pick(source, config.train_split, "train_split", config), config, where, warnings)
    label_names = make_label_names(rows, config, where, warnings)
    index = {name: i for i, name in enumerate(label_names)}
    train = _labelled(rows, index)

    given = None
    if config.test_file:
        given, where = read_file(config.test_file, show_progress=show_progress), config.test_file
        revision = f"{revision} + {file_hash([Path(config.test_file).expanduser()])}"
    elif config.test_split in source.tables or config.test_split != "test":
        given, where = _pick(source, config.test_split, "test_split", config), f"{config.dataset}, {config.test_split}"
    if given is not None:
        test_rows = checked_rows(given, config, where, warnings)
        check_seen(test_rows.labels, rows.labels, label_names, where)
        test = _labelled(test_rows, index)
    else:
        # The name `test` is only the default, so data without such a split is not a mistake.
        train, test = _held_out(train, config.test_share, "test_share", config.seed)
        present = f" (present: {', '.join(source.tables)})" if len(source.tables) > 1 else ""
        warnings.append(
            f"{config.dataset} has no test split{present}: {len(test):,} rows of {config.train_split} are held out as test "
            f"(test_share {config.test_share}, stratified, seed {config.seed})."
        )
    repeats, lines = _repeated(train, test, label_names)
    warnings += lines

    train, validation = _held_out(train, config.validation_share, "validation_share", config.seed)
    classes = len(set(rows.labels))
    if config.max_train_samples is not None and config.max_train_samples < len(train):
        if config.max_train_samples < classes:
            raise UserError(
                f"max_train_samples is {config.max_train_samples}, but there are {classes} classes; give at least one row of each."
            )
        train = train.select(stratified(train["label"], config.max_train_samples, config.seed))
    counts = np.bincount(train["label"][:], minlength=len(label_names))
    provenance = {
        "dataset": config.dataset,
        "revision": revision,
        "rows": {"train": len(train), "validation": len(validation), "test": len(test)},
        "label_names": label_names,
        "class_counts": {name: int(n) for name, n in zip(label_names, counts, strict=True)},
    }
    return TextData(train, validation, test, label_names, warnings, provenance, repeats)


def tokenize(dataset: Dataset, tokenizer: Any, max_length: int, show_progress: bool = False) -> Dataset:
    """`text`, `label` to `input_ids` (unpadded, at most `max_length`, special tokens included), `length`, `labels`.

    Computed once and kept in the datasets cache, under a name made of the rows, the tokenizer and `max_length`: let rank
    0 go first and the other ranks, and later runs, read its file. The name is made here because the library would hash
    the tokenizer object, whose truncation setting changes as it is used. No attention mask: without padding it is all
    ones, and the collator makes it.
    """
    fingerprint = _fingerprint(dataset, tokenizer, max_length)
    folder = Path(datasets.config.HF_DATASETS_CACHE) / "tokenised"
    folder.mkdir(parents=True, exist_ok=True)

    def encode(batch: dict[str, list[Any]]) -> dict[str, list[Any]]:
        ids = tokenizer(batch["text"], truncation=True, max_length=max_length, return_attention_mask=False, return_token_type_ids=False)[
            "input_ids"
        ]
        return {"input_ids": ids, "length": [len(row) for row in ids], "labels": batch["label"]}

    backend = getattr(tokenizer, "backend_tokenizer", None)
    truncation = getattr(backend, "truncation", None)
    bars_disabled = datasets.are_progress_bars_disabled()
    (datasets.enable_progress_bars if show_progress else datasets.disable_progress_bars)()
    try:
        return dataset.map(
            encode,
            batched=True,
            remove_columns=dataset.column_names,
            features=Features({"input_ids": List(Value("int32")), "length": Value("int32"), "labels": Value("int64")}),
            cache_file_name=str(folder / f"{fingerprint}.arrow"),
            load_from_cache_file=True,
            new_fingerprint=fingerprint,
            desc="Tokenising",
        )
    finally:
        (datasets.disable_progress_bars if bars_disabled else datasets.enable_progress_bars)()
        if backend is not None:
            # As it was: else a saved tokenizer would differ between a run that tokenised and one that read the cache.
            backend.enable_truncation(**truncation) if truncation else backend.no_truncation()


def class_weights(labels: Sequence[int], n_classes: int) -> np.ndarray:
    """Balanced weights `(n_classes,)` float32: rows / (classes in train * rows of this class).

    Their mean over the training rows is 1, so the learning rate keeps its meaning. The loss is the mean over rows of
    `weight[label] * cross_entropy`: divided by the number of rows, not by the sum of the weights as torch's
    `weight=` does, because that sum differs between ranks and micro-batches, and the mean of their means would no
    longer be the loss of the global batch. A class without rows gets weight 1; nothing in train uses it.
    """
    counts = np.bincount(np.asarray(labels[:]), minlength=n_classes)
    present = counts > 0
    weights = np.ones(n_classes, dtype=np.float32)
    weights[present] = counts.sum() / (present.sum() * counts[present])
    return weights


def stratified(labels: Sequence[int], total: int, seed: int, leave: int = 0) -> np.ndarray:
    """`total` row numbers, ascending, with each class in its share of the rows (largest remainder).

    Each class that has more than `leave` rows gives at least one, even where that makes more than `total`, and keeps
    `leave` of them: a class with a single row stays in train.
    """
    rng = np.random.default_rng(seed)
    of_row = np.asarray(labels[:])  # [:] reads a datasets column at once; row by row it is slow
    classes, counts = np.unique(of_row, return_counts=True)
    most = np.maximum(counts - leave, 0)
    exact = counts * (total / max(1, counts.sum()))
    take = np.clip(np.floor(exact).astype(int), np.minimum(1, most), most)
    while take.sum() < total and (take < most).any():
        take[np.argmax(np.where(take < most, exact - take, -np.inf))] += 1
    while take.sum() > total and (take > 1).any():
        take[np.argmax(np.where(take > 1, take - exact, -np.inf))] -= 1
    chosen = [rng.permutation(np.flatnonzero(of_row == name))[:n] for name, n in zip(classes, take, strict=True)]
    return np.sort(np.concatenate(chosen)) if chosen else np.array([], dtype=int)


def _pick(source: Splits, name: str, option: str, config: TrainConfig) -> Dataset:
    if name not in source.tables:
        raise UserError(
            f"{config.dataset} has no split '{name}' ({option}). Splits present: {', '.join(source.tables)}."
            f"{nearest(name, source.tables)} Name one of them with --{option}."
        )
    return source.tables[name]


def _labelled(rows: Rows, index: dict[str, int]) -> Dataset:
    labels = np.array([index[label] for label in rows.labels], dtype=np.int64)
    return rows.table.add_column("label", labels, feature=ClassLabel(names=list(index)))


def _held_out(table: Dataset, share: float, option: str, seed: int) -> tuple[Dataset, Dataset]:
    """What stays, and the stratified `share` that is held out; raises UserError where that is not a single row."""
    chosen = stratified(table["label"], round(share * len(table)), seed, leave=1) if share else np.array([], dtype=int)
    if not len(chosen):
        raise UserError(
            f"{option} {share} of {len(table):,} rows of train leaves no row to hold out. Raise --{option} (0.1 is usual for few rows), "
            "or give more rows: at least two of a class, so that one can stay in train."
        )
    return table.select(np.setdiff1d(np.arange(len(table)), chosen)), table.select(chosen)


def _repeated(train: Dataset, test: Dataset, label_names: list[str]) -> tuple[dict[str, int], list[str]]:
    """How many texts occur twice, and warnings of them; capitals and white space do not make a text another one."""
    texts, labels = train["text"][:], train["label"][:]
    first: dict[str, int] = {}
    repeats: list[int] = []
    contradicting: dict[str, int] = {}
    for row, text in enumerate(texts):
        key = " ".join(text.casefold().split())
        seen = first.setdefault(key, row)
        if seen != row:
            repeats.append(row)
            if labels[seen] != labels[row]:
                contradicting.setdefault(key, row)
    leaked = [text for text in test["text"][:] if " ".join(text.casefold().split()) in first]
    warnings = []
    if repeats:
        share = len(repeats) / len(texts)
        warnings.append(f"train has {len(repeats):,} duplicate rows ({share:.1%}), for example {short(texts[repeats[0]])}.")
    if contradicting:
        key, row = next(iter(contradicting.items()))
        pair = f"'{label_names[labels[first[key]]]}' and '{label_names[labels[row]]}'"
        warnings.append(f"train has {len(contradicting):,} texts with different labels, for example {pair} for {short(texts[row])}.")
    if leaked:
        share = len(leaked) / len(test)
        warnings.append(
            f"{len(leaked):,} test rows ({share:.1%}) also stand in train, so the test score flatters: for example {short(leaked[0])}."
        )
    return {"duplicates": len(repeats), "contradictions": len(contradicting), "leaked": len(leaked)}, warnings


def _fingerprint(dataset: Dataset, tokenizer: Any, max_length: int) -> str:
    digest = hashlib.sha256()
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        settings = json.loads(backend.to_str())
        settings["truncation"] = settings["padding"] = None  # left over from the last call, overridden by the next
    else:
        settings = [type(tokenizer).__name__, sorted(tokenizer.get_vocab().items())]
    how = [TOKENS_VERSION, settings, max_length, tokenizer.truncation_side, datasets.__version__]
    digest.update(json.dumps(how, sort_keys=True).encode())
    for batch in dataset.iter(10_000):
        digest.update(json.dumps([batch["text"], batch["label"]]).encode())
    return digest.hexdigest()[:32]


def describe(data: TextData) -> str:
    """What was loaded, for people: rows, classes with their counts, warnings."""
    counts, rows = data.provenance["class_counts"], data.provenance["rows"]
    lines = [f"{data.provenance['dataset']} ({data.provenance['revision']})", "  ".join(f"{name} {n:,}" for name, n in rows.items())]
    lines += [f"  {name}: {n:,} rows of train ({n / rows['train']:.1%})" for name, n in counts.items()]
    return "\n".join(lines + [f"warning: {text}" for text in data.warnings])


def main(argv: list[str]) -> None:
    print(describe(load_texts(parse(argv, "python -m pipeline.data"), show_progress=sys.stderr.isatty())))


if __name__ == "__main__":
    sys.exit(run_entry(main))
