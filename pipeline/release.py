"""The release: the folder that becomes a model repository, and all that anyone needs to use or check the model.

README.md             the model card, with its two pictures
model.safetensors     fp32 weights, the temperature already folded in;  config.json  architecture and label names
tokenizer.json ...    the tokenizer, truncating to the training length in every client
onnx/model.onnx       the same model for other runtimes
golden.json           texts with the logits they must get: how a copy proves itself
run.json              the record of the run
"""

from __future__ import annotations

import contextlib
import copy
import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from torch import nn

from pipeline.card import licence, model_card, without_local_paths
from pipeline.card_images import card_images
from pipeline.checkpoint import write_json
from pipeline.export import INPUTS, ExportError, export_onnx, reference_copy

ONNX_FILE = "onnx/model.onnx"


def choose_golden(
    texts: Sequence[str], labels: Sequence[int], lengths: Sequence[int], max_length: int, count: int = 256, seed: int = 0
) -> list[tuple[str, int]]:
    """Up to `count` (text, label) pairs for proofs: one of every class first, then the shortest, then truncated ones
    (`length == max_length`), then at random; in the rows' own order. `lengths` are in tokens, after truncation.

    The same rows and seed give the same choice. Of more classes than `count`, only the first `count` are in.
    """
    texts = list(texts)
    order = np.random.default_rng(seed).permutation(len(texts))
    shuffled_labels, shuffled_lengths = np.asarray(labels[:])[order], np.asarray(lengths[:])[order]
    first_of_class = order[np.unique(shuffled_labels, return_index=True)[1]]
    shortest = order[np.argsort(shuffled_lengths, kind="stable")][: count // 16]
    truncated = order[shuffled_lengths >= max_length][: count // 8]
    wanted = [int(i) for part in (first_of_class, shortest, truncated, order) for i in part]
    chosen = sorted(list(dict.fromkeys(wanted))[:count])
    return [(texts[i], int(labels[i])) for i in chosen]


def build_release(folder: Path, model: nn.Module, tokenizer: Any, record: Mapping[str, Any], golden: Sequence[tuple[str, int]]) -> Path:
    """Write the release of a finished run to `folder` and return it.

    It is built in a folder beside and renamed in when it is whole; an earlier release stands until then. Model and
    tokenizer are left as they are. A model that cannot become ONNX is released without it, with a warning: the
    training is not lost for that.

    Args:
        model: the trained sequence classification model, on any device, wrapped by DDP or Accelerate or not, the
            temperature folded in.
        record: the run record; gives label names and `max_length`. `run.json` and card hold it without local paths.
        golden: (text, label) pairs, see `choose_golden`.
    """
    folder = Path(folder)
    building = folder.with_name(f".{folder.name}.building")
    shutil.rmtree(building, ignore_errors=True)
    building.mkdir(parents=True)
    max_length, label_names = record["config"]["max_length"], list(record["data"]["label_names"])

    reference = reference_copy(model)
    reference.config.id2label = dict(enumerate(label_names))
    reference.config.label2id = {name: i for i, name in enumerate(label_names)}
    with no_progress_bar():
        reference.save_pretrained(building, max_shard_size="100GB")  # one file, whatever its size
    # The file is made readable by its owner only; whoever serves the folder may be another user.
    (building / "model.safetensors").chmod((building / "config.json").stat().st_mode)
    tokenizer = release_tokenizer(tokenizer, max_length)
    tokenizer.save_pretrained(building)

    logits = golden_logits(reference, tokenizer, [text for text, _ in golden])
    examples = [{"text": text, "label": label, "logits": row} for (text, label), row in zip(golden, logits, strict=True)]
    write_json(building / "golden.json", {"format": 1, "max_length": max_length, "label_names": label_names, "examples": examples})
    try:
        if record["config"]["onnx"]:
            export_onnx(reference, building / ONNX_FILE, max_length)
    except ExportError as error:
        print(f"warning: the release has no {ONNX_FILE}. {error}", flush=True)
    card_images(record, building)
    onnx = (building / ONNX_FILE).exists()
    licences = licence("model", record["config"]["model"]), licence("dataset", record["data"]["dataset"])
    card = model_card(record, None, example=_showpiece(golden), onnx=onnx, licences=licences)
    (building / "README.md").write_text(card, encoding="utf-8")
    write_json(building / "run.json", without_local_paths(record))
    _swap_in(building, folder)
    return folder


def release_tokenizer(tokenizer: Any, max_length: int) -> Any:
    """A copy that truncates to `max_length` and makes no `token_type_ids`, in whatever client loads it."""
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.model_max_length = max_length
    # A BERT tokenizer over DistilBERT would otherwise make an input that neither DistilBERT nor the ONNX file takes.
    tokenizer.model_input_names = list(INPUTS)
    tokenizer.init_kwargs["model_input_names"] = list(INPUTS)  # what save_pretrained writes
    for leftover in ("is_local", "local_files_only"):  # how it was loaded here means nothing to others
        tokenizer.init_kwargs.pop(leftover, None)
    # tokenizer.json used without transformers (the `tokenizers` package) truncates too, and does not pad.
    tokenizer.backend_tokenizer.enable_truncation(max_length)
    tokenizer.backend_tokenizer.no_padding()
    return tokenizer


def golden_logits(model: nn.Module, tokenizer: Any, texts: Sequence[str]) -> list[list[float]]:
    """`(texts, classes)` logits, each text alone: padding beside a longer one moves the last bits, and this is what a client
    gets for this text whatever else it asks. A float32 is a JSON number without loss."""
    threads = torch.get_num_threads()
    # One thread: the order of summation does not hang on the machine, and on cores shared with others it is the faster way
    # for such small pieces (threads that wait for each other spin).
    torch.set_num_threads(1)
    try:
        with torch.inference_mode():
            return [model(**tokenizer(text, truncation=True, return_tensors="pt")).logits[0].tolist() for text in texts]
    finally:
        torch.set_num_threads(threads)


def _showpiece(golden: Sequence[tuple[str, int]]) -> str | None:
    """A golden text of a pleasant length to show the model's use with."""
    texts = [" ".join(text.split()) for text, _ in golden]
    text = min(texts, key=lambda text: abs(len(text) - 90), default=None)
    return text if text is None or len(text) <= 160 else text[:160].rsplit(" ", 1)[0]


@contextlib.contextmanager
def no_progress_bar() -> Iterator[None]:
    """transformers shows a bar for the one file it writes."""
    shown = transformers.logging.is_progress_bar_enabled()
    transformers.logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            transformers.logging.enable_progress_bar()


def _swap_in(building: Path, folder: Path) -> None:
    earlier = folder.with_name(f".{folder.name}.earlier")
    if folder.exists():
        shutil.rmtree(earlier, ignore_errors=True)
        folder.rename(earlier)
    building.rename(folder)
    shutil.rmtree(earlier, ignore_errors=True)


def read_golden(folder: Path) -> dict[str, Any]:
    """golden.json of a release folder."""
    return json.loads((Path(folder) / "golden.json").read_text(encoding="utf-8"))
