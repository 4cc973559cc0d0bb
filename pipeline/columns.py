"""From a table as it was read to texts and labels that can be learnt from, or one line about what is wrong with them.

A label is handled as a word from here on: 1, 1.0, "1" and "1.0" are the same word, a ClassLabel's number is its name.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from datasets import ClassLabel, Dataset, Features, Value

from pipeline.config import TrainConfig
from pipeline.errors import UserError, nearest

_WHOLE = re.compile(r"([+-]?\d+)\.0+")
_NUMBER = re.compile(r"[+-]?\d+(\.\d+)?")


@dataclass(frozen=True)
class Rows:
    """One split after the checks: texts that are not blank, and each row's label as a word."""

    table: Dataset  # one column, `text`
    labels: list[str]
    names: list[str] | None  # of a ClassLabel column, in its order


def label_word(value: Any) -> str | None:
    """One label as a word: 1, 1.0, "1" and "1.0" are all "1"; None where it is missing. Raises TypeError for a list."""
    if value is None or value != value:
        return None
    if isinstance(value, list | tuple | dict):
        raise TypeError("a list")
    word = str(value).strip()
    whole = _WHOLE.fullmatch(word)
    return (whole[1] if whole else word) or None


def label_words(column: Dataset, name: str, where: str) -> list[str | None]:
    """The labels of a column as words, by a ClassLabel's names where it has them. Raises UserError for lists of labels."""
    feature = column.features[name]
    values = column[name][:]
    if isinstance(feature, ClassLabel):
        return [None if value is None or value < 0 else feature.names[value] for value in values]
    try:
        return [label_word(value) for value in values]
    except TypeError as error:
        raise UserError(
            f"{where}: the labels in column '{name}' are lists or groups of values. One label per text is allowed; multi-label "
            "classification is not offered. Keep one label per row, or choose another --label_column."
        ) from error


def require_column(table: Dataset, name: str, option: str, where: str) -> None:
    """Raises UserError, naming the columns that are there, where `name` is none of them."""
    if name not in table.column_names:
        raise UserError(
            f"{where}: there is no column '{name}' ({option}). Columns present: {', '.join(table.column_names)}."
            f"{nearest(name, table.column_names)} Name the right one with --{option}."
        )


def text_values(table: Dataset, name: str, where: str) -> list[str]:
    """The texts of a column, a missing one as "". Raises UserError where the column holds anything but text."""
    values = table[name][:]
    for row, value in enumerate(values):
        if value is not None and not isinstance(value, str):
            raise UserError(
                f"{where}: column '{name}' holds {type(value).__name__} {short(str(value))} in row {row + 1}; allowed is text. "
                f"Choose another --text_column (present: {', '.join(table.column_names)}), or write it as text."
            )
    return [value or "" for value in values]


def checked_rows(table: Dataset, config: TrainConfig, where: str, warnings: list[str]) -> Rows:
    """Texts and label words of the rows that have a text; the rows without one are dropped, with a warning."""
    if not len(table):
        raise UserError(f"{where}: the split is empty. Give data with at least one row in it.")
    require_column(table, config.text_column, "text_column", where)
    require_column(table, config.label_column, "label_column", where)
    texts = text_values(table, config.text_column, where)
    labels = label_words(table, config.label_column, where)
    blank = [row for row, text in enumerate(texts) if not text.strip()]
    if len(blank) == len(texts):
        raise UserError(f"{where}: all {len(texts):,} rows have an empty '{config.text_column}'. Choose another --text_column.")
    if blank:
        # A text of nothing teaches nothing, and one such row in a large file must not stop a run.
        warnings.append(f"{where}: {len(blank):,} rows with an empty text are left out (the first: row {blank[0] + 1}).")
    dropped = set(blank)
    keep = [row for row in range(len(texts)) if row not in dropped]
    missing = [row for row in keep if labels[row] is None]
    if len(missing) == len(keep):
        raise UserError(
            f"{where}: no row has a label in '{config.label_column}' (on benchmark sites the labels of test are often hidden, as -1). "
            f"Choose another split, for example --test_split validation, or another --label_column."
        )
    if missing:
        raise UserError(
            f"{where}: {len(missing):,} of {len(texts):,} rows have no label in '{config.label_column}' (the first: row "
            f"{missing[0] + 1}, {short(texts[missing[0]])}). Label them or take them out of the file."
        )
    feature = table.features[config.label_column]
    if table.features[config.text_column] == Value("string"):
        # A view: the texts stay where they are, usually in a file mapped into memory.
        column = table.select_columns([config.text_column])
        column = column if config.text_column == "text" else column.rename_column(config.text_column, "text")
        column = column.select(keep) if blank else column
    else:
        column = Dataset.from_dict({"text": [texts[row] for row in keep]}, features=Features({"text": Value("string")}))
    names = list(feature.names) if isinstance(feature, ClassLabel) else None
    return Rows(column, [str(labels[row]) for row in keep], names)


def make_label_names(train: Rows, config: TrainConfig, where: str, warnings: list[str]) -> list[str]:
    """The classes in the order of their numbers: a ClassLabel's own, else numbers by size, else words by alphabet."""
    present = set(train.labels)
    column = f"{where}: column '{config.label_column}'"
    if len(present) < 2:
        raise UserError(
            f"{column} has one class only ('{next(iter(present))}'); at least two are needed to learn a difference. "
            "Add rows of another class, or choose another --label_column."
        )
    if len(present) > max(2, len(train.labels) // 2):
        raise UserError(
            f"{column} has {len(present):,} different values in {len(train.labels):,} rows: that is no set of classes. "
            "Choose another --label_column, or add rows until each class has several."
        )
    if train.names is not None:
        return train.names
    by_case: dict[str, list[str]] = {}
    for name in sorted(present):
        by_case.setdefault(name.casefold(), []).append(name)
    for variants in by_case.values():
        if len(variants) > 1:
            warnings.append(f"{column} has the classes {' and '.join(map(repr, variants))}, which differ in capitals only; are they one?")
    if not all(_NUMBER.fullmatch(name) for name in present):
        return sorted(present)
    if any(not float(name).is_integer() for name in present):
        warnings.append(f"{column} holds fractions: each different number is learnt as a class of its own, not as a quantity.")
    return sorted(present, key=lambda name: (float(name), name))


def check_seen(labels: list[str], seen: list[str], label_names: list[str], where: str) -> None:
    """A model cannot be right about a class it was never shown, so its score would mislead."""
    unseen = sorted(set(labels) - set(seen))
    if unseen:
        rows = sum(label in set(unseen) for label in labels)
        more = f" and {len(unseen) - 5} more" if len(unseen) > 5 else ""
        raise UserError(
            f"{where}: {len(unseen)} label(s) in {rows:,} rows do not occur in train: {', '.join(map(repr, unseen[:5]))}{more}. Train has "
            f"{', '.join(map(repr, label_names[:5]))}{', ...' if len(label_names) > 5 else ''}.{nearest(unseen[0], label_names)} "
            "Correct them, take these rows out, or add rows with them to train."
        )


def short(text: str) -> str:
    text = " ".join(text.split())
    return f"'{text[:77]}...'" if len(text) > 80 else f"'{text}'"
