"""Is a model card true? Pulls a release from the Hub, scores its test split again and compares.

    python -m pipeline.verify --repo your-name/ag-news --revision v1
    python -m pipeline.verify --repo your-name/ag-news --samples 500        (or: make verify REPO=your-name/ag-news)

Four things are compared: the card (its model-index and its tables) with run.json; the weights and the ONNX file with the
golden logits; the test rows with what run.json says of them; and the figures of both engines with the card's. So what was
changed is told apart. Exit code 0: the card is true; 1: it is not; 2: it could not be checked, and what to do
(`make verify` ends with 2 for either of the last two).
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
from huggingface_hub import HfApi, ModelCard

from pipeline.card import figures, result_rows
from pipeline.config import TrainConfig
from pipeline.errors import UserError, run_entry
from pipeline.hub_access import limit_waiting
from pipeline.metrics import compute_metrics, counts_size, from_counts
from pipeline.proof import Loaded, golden_differences, load, logits, pulled, unloadable
from pipeline.sources import find_commit

# What scoring elsewhere may change: a rounding error, and by it the label of two rows.
ROUNDING, ROWS = 0.001, 2
DRAWS = 500


@dataclass
class Verdict:
    """What was compared. `findings` says why the card is not true, a sentence each; none: it is."""

    repo: str
    commit: str
    of: str = ""  # which rows, in words
    rows: int = 0  # scored; 0: none could be
    all_rows: int = 0  # of the test split
    golden: dict[str, float] = field(default_factory=dict)  # largest difference of a logit by engine
    table: list[tuple[str, float | None, dict[str, float], str]] = field(default_factory=list)  # figure, claimed, by engine, judgement
    findings: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        engines = list(self.golden)
        width = max([len("figure"), *(len(name) for name, *_ in self.table)])
        lines = [f"repository  {self.repo} at {self.commit}", f"test rows   {self.of}"] if self.of else [f"repository  {self.repo}"]
        if self.golden:
            lines.append("golden      " + ", ".join(f"{engine} {x:.1e}" for engine, x in self.golden.items()) + " from the recorded logits")
        if self.table:
            lines.append(f"\n{'figure':{width}}   claimed" + "".join(f"{engine:>10}" for engine in engines))
        for name, claimed, found, judgement in self.table:
            shown = [claimed, *(found.get(engine) for engine in engines)]
            lines.append(f"{name:{width}}" + "".join(f"{'-' if x is None else f'{x:.6f}':>10}" for x in shown) + f"  {judgement}")
        part = "" if self.rows == self.all_rows else f" as far as {self.rows:,} of {self.all_rows:,} rows can tell"
        verdict = [f"The card is not true. {finding}" for finding in self.findings[:1]] + self.findings[1:]
        return "\n".join([*lines, "", *(verdict or [f"The card is true{part}."])])


def verify(
    repo: str,
    revision: str | None = None,
    *,
    samples: int | None = None,
    dataset: str | None = None,
    test_file: str | None = None,
    show_progress: bool = False,
) -> Verdict:
    """Compare a release with what its card claims.

    Args:
        repo: owner/name of a model repository on the Hub that HF_ENDPOINT names.
        revision: branch, tag or commit; None: main.
        samples: score so many test rows only, each class in its share; NLL and calibration error, which a sample
            estimates badly, are then shown and not judged.
        dataset: where the data lie here, for a release that was trained on local files; test_file likewise.

    Raises:
        UserError: what was asked for is not there, or is no release, or its test rows cannot be had.
    """
    limit_waiting()
    if find_commit("model", repo, revision) is None:
        raise UserError("The Hub cannot be asked, and verifying means pulling from it. Check the network, HF_ENDPOINT and HF_HUB_OFFLINE.")
    with pulled(repo, revision, HfApi()) as (commit, folder):
        card, record = _papers(folder, f"{repo} at {commit[:12]}")
        verdict = Verdict(repo, commit, findings=_card_against_record(card, record))
        try:
            loaded = load(folder)
            differences = golden_differences(folder, loaded)
        except Exception as error:
            verdict.findings.append(f"What lies there is no model: {unloadable(error)}.")
            return verdict
        verdict.golden = {engine: difference.largest for engine, difference in differences.items()}
        verdict.findings += _model_against_golden({engine: d.complaint for engine, d in differences.items()})
        if loaded.label_names != record["data"]["label_names"]:
            verdict.findings.append(f"config.json names the classes {loaded.label_names}, run.json {record['data']['label_names']}.")
        try:
            test = _test_rows(record, dataset, test_file, show_progress)
        except UserError as error:
            if not verdict.findings:
                raise
            verdict.findings.append(f"Its test rows were not scored: {error}")  # it is not true without that
            return verdict
        verdict.of = f"{record['config']['test_split']} of {dataset or record['data']['dataset']} at {record['data']['revision']}"
        support = {name: test["label"][:].count(i) for i, name in enumerate(test.features["label"].names)}
        recorded = {name: row["support"] for name, row in record["test"]["per_class"].items()}
        if support != recorded:  # no figure of theirs would say anything
            verdict.findings.append(f"The test rows are not those that were scored: {support} there, {recorded} in run.json.")
            return verdict
        _score(verdict, _claims(card), record["test"], loaded, test, samples, show_progress)
    return verdict


def _papers(folder: Path, where: str) -> tuple[Any, dict[str, Any]]:
    """The card and the run's record. Raises UserError for a repository that is no release."""
    missing = [name for name in ("README.md", "run.json", "golden.json", "config.json") if not (folder / name).is_file()]
    if missing:
        raise UserError(
            f"{where} is no release of this project: it has no {', '.join(missing)}. Name one that `make push` made, or another --revision."
        )
    try:
        card, record = ModelCard.load(folder / "README.md"), json.loads((folder / "run.json").read_text(encoding="utf-8"))
        figures(record["test"]), _claims(card)
        assert {"dataset", "label_names"} <= set(record["data"]) and record["config"]["test_split"], "parts are missing"
        assert isinstance(record["data"]["revision"], str), "it names no revision of its data"
        support = [row["support"] for row in record["test"]["per_class"].values()]
        assert [sum(row) for row in record["test"]["confusion_matrix"]] == support, "its confusion matrix has other rows than its classes"
    except Exception as error:  # the YAML of a card and what a record holds are anybody's
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise UserError(f"{where} cannot be checked: its card or run.json is damaged ({reason}). Name another --revision.") from error
    if not card.data.eval_results:
        raise UserError(f"{where} claims nothing: its card has no model-index. Name a revision whose card has results.")
    return card, record


def _claims(card: Any) -> dict[str, float]:
    return {str(result.metric_name): float(result.metric_value) for result in card.data.eval_results or []}


def _card_against_record(card: Any, record: Mapping[str, Any]) -> list[str]:
    claimed, recorded = _claims(card), {name: value for name, (_, value, _) in figures(record["test"]).items()}
    wrong = [
        f"{name} is {claimed[name]:g} in the card, {recorded[name]:.6f} in run.json" if name in recorded else f"{name} is not in run.json"
        for name in claimed
        if name not in recorded or not abs(claimed[name] - recorded[name]) <= 1e-6
    ]
    result = (card.data.eval_results or [])[0]
    for what, said, known in (
        ("revision", result.dataset_revision, record["data"]["revision"]),
        ("split", result.dataset_split, record["config"]["test_split"]),
    ):
        if said != known:
            wrong.append(f"the dataset's {what} is {said} in the card, {known} in run.json")
    wrong += [f"its tables lack the row `{row}`" for row in result_rows(record["test"]) if row not in card.text]
    return [f"The card was changed after the run: {'; '.join(wrong)}."] if wrong else []


def _model_against_golden(complaints: Mapping[str, str | None]) -> list[str]:
    if complaint := complaints["torch"]:
        return [f"The weights are not those that were released: {complaint}."]
    if complaint := complaints.get("ONNX"):
        return [f"onnx/model.onnx is not the model of model.safetensors: {complaint}."]
    return []


def _test_rows(record: Mapping[str, Any], dataset: str | None, test_file: str | None, show_progress: bool) -> Any:
    """The test rows (see `TextData`) of the dataset and revision that the record names. Raises UserError for any other."""
    from pipeline.data import load_texts  # seconds of imports

    config, data = record["config"], record["data"]
    local = data["revision"].startswith("sha256:")
    give = f"Give the same files with --dataset{' and --test_file' if config.get('test_file') else ''}."
    if local and dataset is None and not Path(data["dataset"]).expanduser().exists():
        raise UserError(
            f"This release was scored on its author's own files ({data['dataset']}, {data['revision']}), which are not here. {give}"
        )
    kept = ("dataset_config", "train_split", "test_split", "test_share", "validation_share", "text_column", "label_column", "seed")
    settings = dataclasses.replace(
        TrainConfig(**{name: config[name] for name in kept if name in config}),
        dataset=dataset or data["dataset"],
        dataset_revision=None if local or dataset else data["revision"].split(" + ")[0],
        test_file=test_file or config.get("test_file"),
    )
    texts = load_texts(settings, show_progress=show_progress)
    if (here := texts.provenance["revision"]) != data["revision"]:
        raise UserError(f"{settings.dataset} is not the data that was scored: {here} here, {data['revision']} in run.json. {give}")
    return texts.test


def _score(
    verdict: Verdict, claims: Mapping[str, float], recorded: Mapping[str, Any], loaded: Loaded, test: Any, samples: int | None, show: bool
) -> None:
    """Fill in the table, and add what the figures show beyond what is known already."""
    from pipeline.data import stratified

    names, labels = test.features["label"].names, np.asarray(test["label"][:])
    rows = np.arange(len(test)) if samples is None or samples >= len(test) else stratified(labels.tolist(), samples, seed=0)
    texts, labels = test.select(rows)["text"][:], labels[rows]
    verdict.rows, verdict.all_rows = len(rows), len(test)
    found = {engine: figures(compute_metrics(logits(texts, loaded, engine, show), labels, names)) for engine in loaded.engines}
    allowed = _allowed(np.array(recorded["confusion_matrix"]), np.bincount(labels, minlength=len(names)), names)
    fits = "as claimed" if len(rows) == len(test) else "within the sample's error"
    off: dict[str, list[str]] = {engine: [] for engine in found}
    for name in figures(recorded):
        measured, judgement = {engine: by_name[name][1] for engine, by_name in found.items()}, fits
        if name not in claims:
            judgement = "not claimed"
        elif name not in allowed:
            judgement = "not judged"
        else:
            for engine, value in measured.items():
                if not abs(value - claims[name]) <= allowed[name]:  # a NaN is no figure either
                    judgement = "NOT TRUE"
                    off[engine].append(name)
        verdict.table.append((name, claims.get(name), measured, judgement))
    if verdict.findings:
        return  # the reason is known; the table shows what comes of it
    if off["torch"]:
        verdict.findings.append(
            f"The weights fit golden.json and the card fits run.json, but the model does not reach {', '.join(off['torch'])}: the figures "
            "were made up or belong to other rows, or the model was replaced together with its golden.json."
        )
    elif off.get("ONNX"):
        verdict.findings.append(f"onnx/model.onnx does not reach {', '.join(off['ONNX'])}, though it gives the golden logits.")


def _allowed(confusion: np.ndarray, taken: np.ndarray, names: Sequence[str]) -> dict[str, float]:
    """The largest honest difference of each figure, of `taken[class]` rows out of the recorded `(classes, classes)` confusion.

    All rows: a rounding error. A sample: also twice the largest deviation in 500 samples drawn from the recorded
    confusion; then figures of the probabilities, of which it knows nothing, are missing.
    """

    def of(matrix: np.ndarray) -> dict[str, float]:
        vector = np.concatenate([matrix.ravel(), np.zeros(counts_size(len(names)) - matrix.size)])
        return {name: value for name, (_, value, _) in figures(from_counts(vector.astype(float), names)).items()}

    whole, fewest = of(confusion), max(1, int(taken.min()))
    # Two rows move most what counts the fewest of them.
    allowed = {name: ROUNDING + ROWS / (fewest if name.startswith("F1 of ") else taken.sum()) for name in whole}
    allowed["Macro F1"] = ROUNDING + ROWS / fewest / len(names)
    if (taken < confusion.sum(axis=1)).any():
        random = np.random.default_rng(0)
        drawn = [
            of(np.stack([random.multivariate_hypergeometric(row, n) for row, n in zip(confusion, taken, strict=True)]))
            for _ in range(DRAWS)
        ]
        for name in whole:
            allowed[name] += 2 * max(abs(one[name] - whole[name]) for one in drawn)
        allowed = {name: value for name, value in allowed.items() if name in ("Accuracy", "Macro F1") or name.startswith("F1 of ")}
    return allowed


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}. Usage: python -m pipeline.verify --repo owner/name [--revision v1] [--samples 500]")


def main(argv: Sequence[str]) -> int:
    parser = _Parser(
        prog="python -m pipeline.verify", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--repo", required=True, help="owner/name of the model repository")
    parser.add_argument("--revision", help="branch, tag or commit (default: main)")
    parser.add_argument("--samples", type=int, help="score so many test rows only, each class in its share (default: all)")
    parser.add_argument("--dataset", help="file or folder with the data, for a release that was trained on local files")
    parser.add_argument("--test_file", help="file with the test rows, where the run had one")
    options = parser.parse_args(argv)
    if options.samples is not None and options.samples < 1:
        raise UserError(f"samples is {options.samples}: allowed is 1 or more, or nothing for all test rows.")
    verdict = verify(
        options.repo, options.revision, samples=options.samples, dataset=options.dataset, test_file=options.test_file, show_progress=True
    )
    print(verdict, flush=True)
    return 1 if verdict.findings else 0


if __name__ == "__main__":
    sys.exit(run_entry(main))
