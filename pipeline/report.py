"""What a model got right and wrong on a labelled file: figures (JSON), a page (Markdown) and a picture (PNG).

Written by `python -m pipeline.predict` beside its output; `write_report` is the whole interface.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.columns import short
from pipeline.metrics import compute_metrics, log_softmax

WORST = 20  # errors listed


def report_files(output: Path) -> tuple[Path, Path, Path]:
    """Where the report of an output goes: figures, page, picture."""
    figures, page, picture = (output.with_name(output.stem + end) for end in (".report.json", ".report.md", ".confusion.png"))
    return figures, page, picture


def write_report(
    output: Path, about: dict[str, Any], texts: list[tuple[int, str]], logits: np.ndarray, labels: np.ndarray, label_names: list[str]
) -> str:
    """Write the three files beside `output` and return the part that is shown on the terminal.

    Args:
        about: what was scored by what, kept in the JSON.
        texts: (row number in the file from 0, text) of each labelled row.
        logits: `(rows, classes)`; labels: `(rows,)`.
    """
    figures_file, page_file, picture_file = report_files(output)
    metrics = compute_metrics(logits, labels, label_names)
    errors = worst_errors(texts, logits, labels, label_names)
    figures_file.write_text(json.dumps({**about, "metrics": metrics, "worst_errors": errors}, indent=2, ensure_ascii=False) + "\n", "utf-8")
    draw_confusion(np.array(metrics["confusion_matrix"]), label_names, picture_file)
    page_file.write_text(_page(about, metrics, errors, picture_file.name), "utf-8")

    width = max(len("label"), *(len(name) for name in label_names))
    lines = [
        f"accuracy {metrics['accuracy']:.4f}   macro F1 {metrics['macro_f1']:.4f}   negative log-likelihood {metrics['nll']:.4f}   "
        f"calibration error {metrics['ece']:.4f}   on {metrics['examples']:,} labelled rows",
        f"{'label':{width}}  precision  recall      F1    rows",
    ]
    for name, one in metrics["per_class"].items():
        lines.append(f"{name:{width}}  {one['precision']:9.4f}  {one['recall']:6.4f}  {one['f1']:6.4f}  {one['support']:6,}")
    if errors:
        lines.append("most confident errors:")
        lines += [
            f"  row {e['row']}: {e['label']} taken for {e['predicted_label']} ({e['confidence']:.3f}) {short(e['text'])}"
            for e in errors[:5]
        ]
    lines.append(f"report: {page_file}, {figures_file.name}, {picture_file.name}")
    return "\n".join(lines)


def worst_errors(
    texts: list[tuple[int, str]], logits: np.ndarray, labels: np.ndarray, label_names: list[str], most: int = WORST
) -> list[dict[str, Any]]:
    """The wrong predictions the model was surest of, surest first; `row` counts from 1, the header apart."""
    probabilities = np.exp(log_softmax(logits))
    predicted = logits.argmax(axis=1)
    wrong = np.flatnonzero(predicted != labels)
    wrong = wrong[np.argsort(-probabilities[wrong, predicted[wrong]], kind="stable")][:most]
    return [
        {
            "row": texts[i][0] + 1,
            "label": label_names[labels[i]],
            "predicted_label": label_names[predicted[i]],
            "confidence": round(float(probabilities[i, predicted[i]]), 6),
            "probability_of_label": round(float(probabilities[i, labels[i]]), 6),
            "text": texts[i][1],
        }
        for i in wrong
    ]


def draw_confusion(confusion: np.ndarray, label_names: list[str], path: Path) -> None:
    """The confusion matrix `(classes, classes)`, row = true label, as a PNG that looks like the model card's."""
    from pipeline.card_images import STYLE, confusion_matrix  # matplotlib is slow to import; without labels nobody needs it

    figure = confusion_matrix(confusion, label_names)
    right, rows = int(confusion.trace()), int(confusion.sum())
    figure.axes[0].set_title(f"{right:,} of {rows:,} labelled texts right ({right / rows:.1%})", fontsize=10)
    figure.savefig(path, **STYLE)


def _page(about: dict[str, Any], metrics: dict[str, Any], errors: list[dict[str, Any]], picture: str) -> str:
    commit = f" at commit `{about['commit']}`" if about["commit"] else ""
    lines = [
        f"# {Path(about['input']).name}, scored by {about['model']}",
        "",
        f"{metrics['examples']:,} labelled rows of {about['rows']:,}; model `{about['model']}`{commit}.",
        "",
        "| accuracy | macro F1 | negative log-likelihood (nats) | expected calibration error |",
        "|---|---|---|---|",
        f"| {metrics['accuracy']:.4f} | {metrics['macro_f1']:.4f} | {metrics['nll']:.4f} | {metrics['ece']:.4f} |",
        "",
        "| label | precision | recall | F1 | rows |",
        "|---|---|---|---|---|",
    ]
    for name, one in metrics["per_class"].items():
        lines.append(f"| {_cell(name)} | {one['precision']:.4f} | {one['recall']:.4f} | {one['f1']:.4f} | {one['support']:,} |")
    absent = [name for name, one in metrics["per_class"].items() if not one["support"]]
    if absent:
        lines += ["", f"No row of this file has the label {', '.join(absent)}: such a class has F1 0 and lowers the macro F1."]
    lines += ["", f"![Confusion matrix]({picture})", "", "## The most confident errors", ""]
    if not errors:
        return "\n".join([*lines, "None: every labelled row is right.", ""])
    lines += ["Wrong with high confidence is often a wrong label in the file: look at these first.", ""]
    lines += ["| row | true label | predicted | confidence | text |", "|---|---|---|---|---|"]
    for error in errors:
        label, predicted, text = (_cell(error[key]) for key in ("label", "predicted_label", "text"))
        lines.append(f"| {error['row']} | {label} | {predicted} | {error['confidence']:.4f} | {text} |")
    return "\n".join([*lines, ""])


def _cell(text: str) -> str:
    """Safe inside a Markdown table, and no longer than a paragraph."""
    text = " ".join(text.split())
    text = text if len(text) <= 500 else f"{text[:497]}..."
    for mark in ("\\", "|", "<", "`", "*", "_", "[", "#"):
        text = text.replace(mark, f"\\{mark}")
    return text
