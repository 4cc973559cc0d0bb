"""Read tables of texts, whatever they come in: one file, a folder, a dataset repository on the Hub.

    python -c "from pipeline.readers import read_splits as r; print(r('tickets.csv')); print(r('fancyzhx/ag_news'))"

A person's own files are read strictly: CSV cells stay the words they are (a text "NA" or a label "None" is no missing
value, "007" is no number) and a row with too many cells is an error, not a shifted row. Repositories on the Hub are
read exactly as `datasets.load_dataset` reads them, never with code from the repository.
"""

from __future__ import annotations

import csv
import hashlib
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.csv
from datasets import Dataset, DatasetDict
from huggingface_hub import constants

from pipeline.errors import UserError, explain, nearest
from pipeline.sources import find_commit

FILE_TYPES = (".csv", ".tsv", ".json", ".jsonl", ".parquet")
_COMMIT = re.compile(r"[0-9a-f]{40}")


@dataclass(frozen=True)
class Splits:
    """The tables by name of split, and what exactly was read."""

    tables: DatasetDict
    revision: str  # commit of a Hub repository, or "sha256:..." over the names and bytes of local files
    warnings: list[str] = field(default_factory=list)


def read_splits(source: str, *, name: str | None = None, revision: str | None = None, show_progress: bool = False) -> Splits:
    """All splits of a file (one split, `train`), a folder or a Hub dataset.

    Args:
        source: path of a file or folder, or a Hub id; what exists here comes before the Hub.
        name: configuration (subset) of a dataset that has several.
        revision: branch, tag or commit on the Hub.

    Raises UserError for whatever is not there or cannot be read.
    """
    path = Path(source).expanduser()
    with _quiet(show_progress):
        if path.is_dir():
            return _read_folder(path, name)
        looks_like_path = source.startswith((".", "/", "~")) or source.count("/") > 1 or path.suffix.lower() in FILE_TYPES
        if path.exists() or looks_like_path:
            return Splits(DatasetDict(train=read_file(source, show_progress=show_progress)), file_hash([path]))
        return _read_hub(source, name, revision)


def read_file(source: str | Path, *, show_progress: bool = False) -> Dataset:
    """One file as one table with all its columns; `.txt` is one text per line, in a column `text`. Raises UserError."""
    path = Path(source).expanduser()
    if not path.is_file():
        here = path.parent
        similar = nearest(path.name, (p.name for p in here.iterdir())) if here.is_dir() else f" There is no folder {here} either."
        raise UserError(f"No file {source}.{similar} Give an existing file ({' '.join(FILE_TYPES)}), a folder, or a Hub id (owner/name).")
    kind = path.suffix.lower()
    with _quiet(show_progress), _explained(str(source)):
        if kind in (".csv", ".tsv"):
            return _read_csv(path)
        if kind == ".txt":
            lines = path.read_text(encoding="utf-8-sig").removesuffix("\n").split("\n")  # splitlines() also splits inside texts
            return Dataset.from_dict({"text": lines})
        if kind in (".json", ".jsonl", ".parquet"):
            return datasets.load_dataset(kind[1:].removesuffix("l"), data_files={"train": str(path)}, split="train")
    raise UserError(f"{source} ends in '{kind}'; allowed are {' '.join(FILE_TYPES)}. Convert it, for example with pandas, or rename it.")


def file_hash(paths: list[Path]) -> str:
    """`sha256:` over the names and bytes of the files, in the order of their names: the identity of local data."""
    digest = hashlib.sha256()
    for path in sorted(paths):
        digest.update(path.name.encode() + b"\0")
        with path.open("rb") as stream:
            digest.update(hashlib.file_digest(stream, "sha256").digest())
    return f"sha256:{digest.hexdigest()}"


def _read_csv(path: Path) -> Dataset:
    """Every cell a string, an empty cell null. A `.csv` may be separated by comma, semicolon or tab: the header tells."""
    with path.open(encoding="utf-8-sig", newline="") as stream:
        header = stream.readline()
    delimiter = "\t" if path.suffix.lower() == ".tsv" else max(",;\t", key=header.count)
    names = next(csv.reader([header], delimiter=delimiter), [])
    # A table written with its row numbers has a first column without a name; pandas calls it the same.
    names = [name.strip() or f"Unnamed: {i}" for i, name in enumerate(names)]
    if not any(header.strip()):
        raise UserError(f"{path} starts with an empty line; its first line has to name the columns, for example: text{delimiter}label")
    doubled = sorted({name for name in names if names.count(name) > 1})
    if doubled:
        raise UserError(f"{path} has {names.count(doubled[0])} columns named '{doubled[0]}'; rename all but one.")
    table = pyarrow.csv.read_csv(
        path,
        # One thread, so that an error can name its row; one block where possible, because a row may not span two.
        read_options=pyarrow.csv.ReadOptions(
            use_threads=False, block_size=min(path.stat().st_size + 1, 1 << 30), column_names=names, skip_rows=1
        ),
        parse_options=pyarrow.csv.ParseOptions(delimiter=delimiter, newlines_in_values=True),
        convert_options=pyarrow.csv.ConvertOptions(
            column_types=dict.fromkeys(names, pa.string()), strings_can_be_null=True, null_values=[""], quoted_strings_can_be_null=True
        ),
    )
    return Dataset(table)


def _read_folder(path: Path, name: str | None) -> Splits:
    """A folder in the Hub's layout, of files named after their splits, or written by `save_to_disk`."""
    with _explained(str(path)):
        builder = datasets.load_dataset_builder(str(path), name=name)
        files = {split: [Path(file) for file in found] for split, found in (builder.config.data_files or {}).items()}
        if builder.name == "csv":
            tables = DatasetDict({split: datasets.concatenate_datasets([_read_csv(f) for f in found]) for split, found in files.items()})
        else:
            tables = datasets.load_dataset(str(path), name=name)
    tables = DatasetDict({str(split): table for split, table in tables.items()})
    return Splits(tables, file_hash([file for found in files.values() for file in found]))


def _read_hub(source: str, name: str | None, revision: str | None) -> Splits:
    commit = find_commit("dataset", source, revision)
    if commit is None:
        return _read_hub_cache(source, name, revision, constants.ENDPOINT)
    with _explained(f"dataset '{source}'" + (f" at revision '{revision}'" if revision else "")):
        return Splits(datasets.load_dataset(source, name=name, revision=commit), commit)


def _read_hub_cache(source: str, name: str | None, revision: str | None, endpoint: str) -> Splits:
    """What an earlier run left in the cache, for a machine without network."""
    before = datasets.config.HF_HUB_OFFLINE
    datasets.config.HF_HUB_OFFLINE = True  # what the environment variable sets: no retries, the cache at once
    try:
        tables = datasets.load_dataset(source, name=name)
    except (ConnectionError, FileNotFoundError, ValueError) as error:
        raise UserError(
            f"The Hub at {endpoint} cannot be reached and the dataset '{source}' is not in the local cache. Check the network and "
            "HF_ENDPOINT, or start a local Hub with `make hub` and set the environment it prints, or give a file or folder as dataset."
        ) from error
    finally:
        datasets.config.HF_HUB_OFFLINE = before
    # datasets keeps the tables in .../<configuration>/<version>/<commit>/
    folder = Path(next(iter(tables.values())).cache_files[0]["filename"]).parent.name
    if revision and _COMMIT.fullmatch(revision) and folder != revision:
        raise UserError(
            f"The Hub at {endpoint} cannot be reached and the cache holds the dataset {source} at commit {folder}, not {revision}. "
            "Check the network, or set dataset_revision to the commit that is there."
        )
    return Splits(tables, folder, [f"The Hub at {endpoint} cannot be reached: {source} is read from the cache, at commit {folder}."])


@contextmanager
def _quiet(show_progress: bool) -> Iterator[None]:
    """No bars (unless asked for) and none of the library's log lines: what matters comes as one error or warning of ours."""
    bars, verbosity = datasets.are_progress_bars_disabled(), datasets.logging.get_verbosity()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)
    if not show_progress:
        datasets.disable_progress_bars()
    try:
        yield
    finally:
        datasets.logging.set_verbosity(verbosity)
        if not bars:
            datasets.enable_progress_bars()


@contextmanager
def _explained(what: str) -> Iterator[None]:
    """Turn what the readers raise about a person's data into one UserError; a full disk and the like pass through."""
    try:
        yield
    except UnicodeDecodeError as error:
        raise _not_utf8(what) from error
    except (datasets.exceptions.DatasetsError, FileNotFoundError, ValueError, RuntimeError) as error:
        if isinstance(error, datasets.exceptions.DatasetNotFoundError) or explain(error) is None:
            raise _unreadable(what, error) from error
        raise


def _unreadable(what: str, error: BaseException) -> UserError:
    if isinstance(error, datasets.exceptions.DatasetGenerationError) and error.__cause__ is not None:
        error = error.__cause__
    reason = " ".join(str(error).split("\n\n")[0].split())[:300]
    if isinstance(error, FileNotFoundError) and not isinstance(error, datasets.exceptions.DatasetNotFoundError):
        return UserError(f"{what} holds no data files. Allowed are {' '.join(FILE_TYPES)}, named after their split: train.csv, test.csv.")
    if "invalid UTF8" in reason:
        return _not_utf8(what)
    if "BatchSize must be greater than 0" in reason or "corresponds to no data" in reason or reason == "Empty CSV file":
        return UserError(f"{what} holds no rows in at least one split. Give a file with at least one row for each split.")
    if "dataset scripts are no longer supported" in reason.lower():
        return UserError(f"{what} is a script, which is not run. Try --dataset_revision refs/convert/parquet, the Hub's own conversion.")
    if "onfig" in reason:  # "BuilderConfig 'x' not found. Available: [...]", "Config name is missing. Please pick one among ..."
        return UserError(f"{what}: {reason} Choose one with --dataset_config.")
    return UserError(f"{what} cannot be read: {reason}. Correct the file there, or save it again as one of {' '.join(FILE_TYPES)}.")


def _not_utf8(what: str) -> UserError:
    return UserError(f"{what} is not UTF-8 text. Save it as UTF-8 (in Excel: 'CSV UTF-8'), or convert it: iconv -f latin1 -t utf-8")
