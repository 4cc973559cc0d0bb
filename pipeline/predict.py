"""Label a file of texts with a trained model: no server, no code to write.

    python -m pipeline.predict --model owner/name@v1 --input texts.csv --output scored.parquet
    python -m pipeline.predict --model outputs/own_data/release --input tickets.jsonl --text_column message --output scored.csv

The output has every column of the input, in its order, plus `predicted_label`, `confidence` and one `probability_<label>`
each. Where the input has labels too, a report is printed and written beside the output: figures, a picture of the
confusion matrix, and the most confident errors with their texts (the first place to look for wrong labels).
"""

from __future__ import annotations

import argparse
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import Any, NoReturn

import datasets
import numpy as np
from datasets import ClassLabel, Dataset, Value

from pipeline.columns import label_words, require_column, text_values
from pipeline.errors import UserError, nearest, run_entry
from pipeline.readers import read_file
from pipeline.report import report_files, write_report
from pipeline.sources import find_model

OUTPUT_TYPES = (".csv", ".tsv", ".jsonl", ".parquet")


@dataclass(frozen=True)
class Classifier:
    model: Any  # a sequence-classification model in fp32 and evaluation mode
    tokenizer: Any
    label_names: list[str]
    max_length: int  # tokens, special ones included
    name: str  # as it was asked for: owner/name@revision or a folder
    commit: str | None  # of the Hub repository; None for a folder


def load_classifier(name: str, device: str = "auto") -> Classifier:
    """A model from `owner/name[@revision]` on the Hub or from a folder: safetensors only, never code from the repository.

    Raises UserError where it is not there or is no classifier that was trained.
    """
    # owner/name@revision; a folder of that name, "@" and all, comes first
    hub_id, _, revision = (name, "", "") if Path(name).expanduser().is_dir() else name.partition("@")
    source = find_model(hub_id, revision or None)
    folder, commit = source.folder, source.commit
    if source.warning:
        print(f"warning: {source.warning}", file=sys.stderr)
    import torch  # this and transformers take seconds: a wrong name is told before
    import transformers
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("device is cuda, but torch sees no GPU here. Use --device cpu, or auto.")
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    verbosity, bars = transformers.logging.get_verbosity(), transformers.logging.is_progress_bar_enabled()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        model, loading = AutoModelForSequenceClassification.from_pretrained(
            folder, use_safetensors=True, trust_remote_code=False, dtype=torch.float32, output_loading_info=True
        )
    except (ValueError, OSError) as error:
        raise UserError(f"'{name}' cannot be loaded as a text classifier: {str(error).splitlines()[0]}") from error
    finally:
        transformers.logging.set_verbosity(verbosity)
        if bars:
            transformers.logging.enable_progress_bar()
    if loading["missing_keys"]:
        # transformers would fill them with random numbers, and every prediction would be noise.
        raise UserError(
            f"'{name}' is not a trained classifier: it lacks {', '.join(sorted(loading['missing_keys'])[:3])}. Train one from it "
            f"first: python -m pipeline.train CONFIG.yaml --model {name.partition('@')[0]}"
        )
    settings = model.config
    if settings.num_labels < 2 or settings.problem_type in ("regression", "multi_label_classification"):
        raise UserError(f"'{name}' does {settings.problem_type or 'regression'}; allowed is a model that chooses one of several labels.")
    # A tokenizer without a limit says 1e30; then the model's own positions are the limit.
    max_length = min(tokenizer.model_max_length, getattr(settings, "max_position_embeddings", None) or 512)
    label_names = [settings.id2label[i] for i in range(settings.num_labels)]
    return Classifier(model.eval().to(device), tokenizer, label_names, max_length, name, commit)


def score(texts: list[str], classifier: Classifier, batch_size: int = 64, show_progress: bool = False) -> tuple[np.ndarray, int]:
    """Logits `(texts, classes)` float32 in the order of the texts, and how many texts fill the model's whole length."""
    import torch
    from tqdm import tqdm

    model, tokenizer = classifier.model, classifier.tokenizer
    logits = np.empty((len(texts), len(classifier.label_names)), dtype=np.float32)
    full = 0
    # Texts of similar length share a batch: little padding. The longest come first, so that memory runs out at once or not at all.
    order = sorted(range(len(texts)), key=lambda row: -len(texts[row]))
    with torch.inference_mode(), tqdm(total=len(texts), unit=" texts", desc="Predicting", disable=not show_progress) as bar:
        for start in range(0, len(texts), batch_size):
            rows = order[start : start + batch_size]
            batch = tokenizer(
                [texts[row] for row in rows], truncation=True, max_length=classifier.max_length, padding=True, return_tensors="pt"
            )
            full += int((batch["attention_mask"].sum(dim=1) >= classifier.max_length).sum())
            logits[rows] = model(**batch.to(model.device)).logits.float().cpu().numpy()
            bar.update(len(rows))
    return logits, full


def label_numbers(table: Dataset, column: str, label_names: list[str], where: str) -> np.ndarray:
    """The model's class number of each row `(rows,)`, -1 where the row has no label.

    The file may hold the model's names or, throughout, its class numbers. Raises UserError for labels it does not know.
    """
    words = label_words(table, column, where)
    feature = table.features[column]
    spellings = [words]
    if isinstance(feature, ClassLabel):  # its names may be others than the model's while the numbers are the same
        spellings.append([None if word is None else str(feature.str2int(word)) for word in words])
    by_name = {name: i for i, name in enumerate(label_names)}
    by_number = {str(i): i for i in range(len(label_names))}
    for spelling in spellings:
        for known in (by_name, by_number):
            if set(spelling) <= {*known, None}:
                return np.array([-1 if word is None else known[word] for word in spelling], dtype=np.int64)
    unknown = sorted({word for word in words if word is not None} - set(by_name))
    more = f" and {len(unknown) - 5} more" if len(unknown) > 5 else ""
    raise UserError(
        f"{where}: the model does not know the label{'s' * (len(unknown) > 1)} {', '.join(map(repr, unknown[:5]))}{more}. It knows "
        f"{', '.join(label_names[:10])}{', ...' if len(label_names) > 10 else ''} (or 0 to {len(label_names) - 1})."
        f"{nearest(unknown[0], label_names)} Correct them, name another --label_column, or use --label_column none for no report."
    )


def predict_file(options: argparse.Namespace) -> dict[str, Any]:
    """Read, score, write; returns the summary that is printed (and the report, where there are labels). Raises UserError."""
    output = Path(options.output).expanduser()
    _check_output(output, options.overwrite)
    table = read_file(options.input, show_progress=False)
    require_column(table, options.text_column, "text_column", options.input)
    texts = text_values(table, options.text_column, options.input)
    label_column = options.label_column or "label"
    if options.label_column not in (None, "none"):
        require_column(table, label_column, "label_column", options.input)
    rows = [row for row, text in enumerate(texts) if text.strip()]
    if not rows:
        raise UserError(f"{options.input}: no row has a text in '{options.text_column}'. Choose another --text_column.")

    classifier = load_classifier(options.model, options.device)
    names = classifier.label_names
    taken = {"predicted_label", "confidence", *(f"probability_{name}" for name in names)} & set(table.column_names)
    if taken:
        raise UserError(f"{options.input} already has the column '{sorted(taken)[0]}', which predicting adds. Rename or drop it first.")
    labels = None
    if options.label_column != "none" and label_column in table.column_names:
        labels = label_numbers(table, label_column, names, options.input)

    started = perf_counter()
    logits, full = score([texts[row] for row in rows], classifier, options.batch_size, show_progress=True)
    seconds = perf_counter() - started
    shifted = np.exp(logits.astype(np.float64) - logits.max(axis=1, keepdims=True))
    probabilities = shifted / shifted.sum(axis=1, keepdims=True)
    _write(_with_predictions(table, rows, probabilities, names), output)

    summary: dict[str, Any] = {
        "model": classifier.name,
        "commit": classifier.commit,
        "input": str(options.input),
        "output": str(output),
        "rows": len(texts),
        "scored": len(rows),
        "full_length": full,
        "max_length": classifier.max_length,
        "seconds": round(seconds, 3),
        "texts_per_second": round(len(rows) / seconds, 1),
        "predicted": {name: int(n) for name, n in zip(names, np.bincount(logits.argmax(axis=1), minlength=len(names)), strict=True)},
    }
    if labels is not None and (labels[rows] >= 0).any():
        known = np.flatnonzero(labels[rows] >= 0)
        numbered = [(rows[i], texts[rows[i]]) for i in known]
        summary["report"] = write_report(output, summary, numbered, logits[known], labels[rows][known], names)
    return summary


def _with_predictions(table: Dataset, rows: list[int], probabilities: np.ndarray, names: list[str]) -> Dataset:
    """The table and its new columns; null in the rows (those without a text) that were not scored."""

    def add(table: Dataset, column: str, values: list[Any], kind: str) -> Dataset:
        whole: list[Any] = [None] * len(table)
        for row, value in zip(rows, values, strict=True):
            whole[row] = value
        return table.add_column(column, whole, feature=Value(kind))

    table = add(table, "predicted_label", [names[i] for i in probabilities.argmax(axis=1)], "string")
    table = add(table, "confidence", probabilities.max(axis=1).tolist(), "float32")
    for i, name in enumerate(names):
        table = add(table, f"probability_{name}", probabilities[:, i].tolist(), "float32")
    return table


def _check_output(output: Path, overwrite: bool) -> None:
    """Everything that would otherwise fail after the long part."""
    if output.suffix.lower() not in OUTPUT_TYPES:
        raise UserError(f"output is '{output}'; allowed are names that end in {' '.join(OUTPUT_TYPES)}.")
    present = [path for path in (output, *report_files(output)) if path.exists()]
    if present and not overwrite:
        raise UserError(f"{present[0]} is already there. Choose another --output, or add --overwrite to replace it.")
    output.parent.mkdir(parents=True, exist_ok=True)
    if not os.access(output.parent, os.W_OK):
        raise UserError(f"No permission to write in {output.parent}. Choose another folder for --output.")


def _write(table: Dataset, output: Path) -> None:
    """Whole or not at all: written beside its place and renamed in."""
    part = output.with_name(f".{output.name}.{os.getpid()}.part")
    kind = output.suffix.lower()
    try:
        if kind == ".parquet":
            table.to_parquet(part)
        elif kind == ".jsonl":
            table.to_json(part, orient="records", lines=True, force_ascii=False)
        else:
            table.to_csv(part, sep="\t" if kind == ".tsv" else ",", index=False)
        part.replace(output)
    finally:
        part.unlink(missing_ok=True)


def parse_options(argv: list[str]) -> argparse.Namespace:
    class Parser(argparse.ArgumentParser):
        def error(self, message: str) -> NoReturn:
            raise UserError(f"{message}. All options: python -m pipeline.predict --help")

    parser = Parser(
        prog="python -m pipeline.predict",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--model", required=True, help="owner/name[@branch, tag or commit] on the Hub, or a folder")
    parser.add_argument("--input", required=True, help=".csv .tsv .json .jsonl .parquet, or .txt with one text per line")
    parser.add_argument("--output", required=True, help=" ".join(OUTPUT_TYPES))
    parser.add_argument("--text_column", default="text", help="column with the text (default: text)")
    parser.add_argument(
        "--label_column", help="column with the true label, for a report (default: `label` where there is one; none: no report)"
    )
    parser.add_argument("--batch_size", type=int, default=64, help="texts scored at once (default: 64)")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="auto: the GPU where there is one")
    parser.add_argument("--overwrite", action="store_true", help="replace output and report where they exist")
    options = parser.parse_args(argv)
    if options.batch_size < 1:
        raise UserError(f"batch_size is {options.batch_size}: allowed is 1 or more.")
    return options


def main(argv: list[str]) -> None:
    options = parse_options(argv)
    datasets.disable_progress_bars()
    summary = predict_file(options)
    print(f"{summary['scored']:,} texts scored by {summary['model']}" + (f" at {summary['commit']}" if summary["commit"] else ""), end="")
    print(f" in {summary['seconds']:.1f} s ({summary['texts_per_second']:,.0f} texts/s) -> {summary['output']}")
    print("predicted: " + ", ".join(f"{name} {n:,}" for name, n in summary["predicted"].items()))
    if summary["rows"] > summary["scored"]:
        print(f"note: {summary['rows'] - summary['scored']:,} rows have no text; their prediction is left empty.")
    if summary["full_length"]:
        print(f"note: {summary['full_length']:,} texts fill all {summary['max_length']} tokens of the model; what was longer is cut.")
    if "report" in summary:
        print(f"\n{summary['report']}")


if __name__ == "__main__":
    sys.exit(run_entry(main))
