"""`python -m pipeline.predict` on real files and real (small, random) models, from folders and from the local Hub."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pandas
import pytest
import torch
from datasets import ClassLabel, Dataset, Features, Value

from pipeline.errors import UserError
from pipeline.predict import load_classifier, main, score
from pipeline.readers import read_file

ROOT = Path(__file__).resolve().parent.parent
NAMES = ["billing", "technical", "other"]
TEXTS = [
    "I was charged twice",
    "the app crashes " * 40,  # longer than the model reads
    "hello",
    'He said "no", then\nleft',
    "  ",
    "Ünïcode 漢字 text",
    "cancel it",
    "my invoice is wrong, please correct it before the end of this week",
]


def save_classifier(folder: Path, tiny: Path, seed: int, **settings: Any) -> Path:
    """A small classifier with random weights, scaled up so that its confidences differ from text to text."""
    from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer

    config = AutoConfig.from_pretrained(tiny)
    config.id2label, config.label2id = dict(enumerate(NAMES)), {name: i for i, name in enumerate(NAMES)}
    for name, value in settings.items():
        setattr(config, name, value)
    torch.manual_seed(seed)
    model = AutoModelForSequenceClassification.from_config(config)
    with torch.no_grad():
        model.pre_classifier.weight.mul_(10)
        model.classifier.weight.mul_(50)
    model.save_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(tiny)
    tokenizer.model_max_length = 32
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def model_dir(tiny_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_classifier(tmp_path_factory.mktemp("classifier"), tiny_model_dir, seed=1)


@pytest.fixture(scope="module")
def plain(model_dir: Path) -> np.ndarray:
    """Probabilities `(texts, classes)` as anybody computes them: one text at a time, no padding."""
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    model, tokenizer = AutoModelForSequenceClassification.from_pretrained(model_dir), AutoTokenizer.from_pretrained(model_dir)
    with torch.no_grad():
        rows = [model(**tokenizer(text, truncation=True, max_length=32, return_tensors="pt")).logits[0].softmax(-1) for text in TEXTS]
    return torch.stack(rows).numpy()


def predict(model: Any, source: Path, output: Path, *more: str) -> pandas.DataFrame:
    main(["--model", str(model), "--input", str(source), "--output", str(output), "--device", "cpu", *more])
    return read_file(output).to_pandas()


def message(*arguments: Any) -> str:
    with pytest.raises(UserError) as caught:
        main([str(argument) for argument in arguments])
    return str(caught.value)


@pytest.mark.parametrize("ending", ["csv", "tsv", "jsonl", "parquet"])
def test_every_row_and_column_in_its_place(model_dir: Path, plain: np.ndarray, tmp_path: Path, ending: str) -> None:
    frame = pandas.DataFrame({"id": [f"{i:03d}" for i in range(len(TEXTS))], "body": TEXTS})
    frame.to_csv(tmp_path / "in.csv", index=False)
    done = predict(model_dir, tmp_path / "in.csv", tmp_path / f"out.{ending}", "--text_column", "body", "--batch_size", "3")
    assert list(done.columns) == ["id", "body", "predicted_label", "confidence", *(f"probability_{name}" for name in NAMES)]
    assert list(done["id"]) == list(frame["id"]), "007 stays 007, in the order of the file"
    assert list(done["body"]) == TEXTS
    written = done[[f"probability_{name}" for name in NAMES]].astype(float).to_numpy()
    scored = [i for i, text in enumerate(TEXTS) if text.strip()]
    assert np.allclose(written[scored], plain[scored], atol=2e-6)
    assert [done["predicted_label"][i] for i in scored] == [NAMES[i] for i in plain[scored].argmax(axis=1)]
    assert np.allclose(done["confidence"].astype(float)[scored], plain[scored].max(axis=1), atol=2e-6)
    assert done.iloc[4][["predicted_label", "confidence", "probability_other"]].isna().all(), "a row without text has no prediction"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.csv", f"out.{ending}"], "no labels, no report; no part file"


def test_text_file_and_new_folder(model_dir: Path, plain: np.ndarray, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "in.txt").write_text("\n".join([TEXTS[0], TEXTS[1], "", TEXTS[2]]) + "\n", "utf-8")
    done = predict(model_dir, tmp_path / "in.txt", tmp_path / "new" / "out.parquet")
    assert np.allclose(done["confidence"][[0, 1, 3]], plain[[0, 1, 2]].max(axis=1), atol=2e-6)
    printed = capsys.readouterr().out
    assert "3 texts scored" in printed and "1 rows have no text" in printed and "1 texts fill all 32 tokens" in printed


@pytest.mark.parametrize("kind", ["names", "numbers", "class label", "class label with other names"])
def test_report_of_a_labelled_file(
    model_dir: Path, plain: np.ndarray, tmp_path: Path, kind: str, capsys: pytest.CaptureFixture[str]
) -> None:
    labels = [0, 1, 2, 0, 1, 2, None, 1]  # the row without text has a label, another row has none
    values: list[Any] = [None if i is None else NAMES[i] for i in labels] if kind == "names" else labels
    feature: Any = {"names": Value("string"), "numbers": Value("int64"), "class label": ClassLabel(names=NAMES)}.get(kind)
    feature = feature or ClassLabel(names=["Rechnung", "Technik", "Anderes"])
    table = Dataset.from_dict({"text": TEXTS, "label": values}, features=Features({"text": Value("string"), "label": feature}))
    table.to_parquet(tmp_path / "in.parquet")
    predict(model_dir, tmp_path / "in.parquet", tmp_path / "out.csv")

    known = [0, 1, 2, 3, 5, 7]
    truth, predicted = np.array([labels[i] for i in known]), plain[known].argmax(axis=1)
    report = json.loads((tmp_path / "out.report.json").read_text())
    confusion = np.zeros((3, 3), dtype=int)
    np.add.at(confusion, (truth, predicted), 1)
    assert report["metrics"]["confusion_matrix"] == confusion.tolist()
    assert report["metrics"]["accuracy"] == pytest.approx((truth == predicted).mean())
    assert report["rows"] == 8 and report["scored"] == 7 and report["metrics"]["examples"] == 6

    errors = report["worst_errors"]
    wrong = [i for i, right in zip(known, truth == predicted, strict=True) if not right]
    assert errors and sorted(error["row"] for error in errors) == [i + 1 for i in wrong]
    assert [e["confidence"] for e in errors] == sorted((e["confidence"] for e in errors), reverse=True)
    first = errors[0]
    assert first["text"] == TEXTS[first["row"] - 1]
    assert first["confidence"] == pytest.approx(plain[first["row"] - 1].max(), abs=1e-5)
    assert NAMES[labels[first["row"] - 1] or 0] == first["label"] != first["predicted_label"]

    page = (tmp_path / "out.report.md").read_text()
    assert f"| {report['metrics']['accuracy']:.4f} |" in page and "![Confusion matrix](out.confusion.png)" in page
    printed = capsys.readouterr().out
    assert f"accuracy {report['metrics']['accuracy']:.4f}" in printed and "most confident errors" in printed
    from matplotlib.image import imread

    picture = imread(tmp_path / "out.confusion.png")
    assert min(picture.shape[:2]) > 300 and picture[..., :3].std() > 0.05, "the picture is blank"


def test_report_can_be_left_out(model_dir: Path, tmp_path: Path) -> None:
    pandas.DataFrame({"text": ["a", "b"], "label": ["who", "knows"]}).to_csv(tmp_path / "in.csv", index=False)
    predict(model_dir, tmp_path / "in.csv", tmp_path / "out.csv", "--label_column", "none")
    assert not (tmp_path / "out.report.json").exists()


def test_order_and_batch_size_change_nothing(model_dir: Path, plain: np.ndarray) -> None:
    classifier = load_classifier(str(model_dir), "cpu")
    for size in (1, 3, 100):
        logits, full = score(TEXTS, classifier, size)
        probabilities = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
        assert np.allclose(probabilities, plain, atol=2e-6)
        assert full == 1


def test_nothing_is_overwritten_unasked(model_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "in.txt").write_text("one\n")
    for there in ("out.csv", "out.report.md"):
        (tmp_path / there).write_text("precious")
        text = message("--model", model_dir, "--input", tmp_path / "in.txt", "--output", tmp_path / "out.csv")
        assert f"{there} is already there" in text and "--overwrite" in text
        assert (tmp_path / there).read_text() == "precious"
        (tmp_path / there).unlink()
    (tmp_path / "out.csv").write_text("old")
    assert len(predict(model_dir, tmp_path / "in.txt", tmp_path / "out.csv", "--overwrite")) == 1


def test_errors_name_given_and_allowed(model_dir: Path, tiny_model_dir: Path, tmp_path: Path) -> None:
    source = tmp_path / "in.csv"
    pandas.DataFrame({"text": ["a", "b", "c"], "label": ["billing", "tecnical", "x"]}).to_csv(source, index=False)
    out = ("--output", tmp_path / "out.csv")
    given = ("--model", model_dir, "--input", source, *out)

    assert "'tecnical', 'x'" in (text := message(*given)) and "billing, technical, other (or 0 to 2)" in text
    assert "Did you mean 'technical'?" in text
    assert "no column 'body'" in message(*given, "--text_column", "body")
    assert "no column 'topic'" in message(*given, "--label_column", "topic")
    assert "'out.xls'" in message("--model", model_dir, "--input", source, "--output", "out.xls")
    assert "No file" in message("--model", model_dir, "--input", tmp_path / "im.csv", *out)
    assert "no folder here" in message("--model", tmp_path / "nowhere", "--input", source, *out)
    assert "batch_size is 0" in message(*given, "--batch_size", "0")
    assert "--help" in message(*given, "--bach_size", "3")
    assert "--help" in message("--input", source, *out)

    # A pre-trained encoder has no head: transformers would make one of random numbers, and predictions of it.
    text = message("--model", tiny_model_dir, "--input", source, *out)
    assert "not a trained classifier" in text and "classifier.weight" in text and "pipeline.train" in text

    pickled = tmp_path / "pickled"
    pickled.mkdir()
    (pickled / "config.json").write_bytes((model_dir / "config.json").read_bytes())
    torch.save({}, pickled / "pytorch_model.bin")
    assert "safetensors" in message("--model", pickled, "--input", source, *out)

    multi = save_classifier(tmp_path / "multi", tiny_model_dir, seed=1, problem_type="multi_label_classification")
    assert "multi_label_classification" in message("--model", multi, "--input", source, *out)

    pandas.DataFrame({"text": ["a"], "confidence": [1]}).to_csv(source, index=False)
    assert "already has the column 'confidence'" in message(*given)
    pandas.DataFrame({"text": [" ", ""]}).to_csv(source, index=False)
    assert "no row has a text" in message(*given)
    assert not (tmp_path / "out.csv").exists()


DRIVER = """
import json, sys
from pipeline.errors import run_entry
from pipeline.predict import main
print(json.dumps([run_entry(lambda _: main(arguments)) for arguments in json.loads(sys.argv[1])]))
"""


def python(env: dict[str, str], *arguments: Any) -> subprocess.CompletedProcess[str]:
    """A process of its own: the Hub's clients read their environment at import."""
    return subprocess.run(
        [sys.executable, *map(str, arguments)], cwd=ROOT, env={**os.environ, **env}, capture_output=True, text=True, timeout=120
    )


def test_from_the_hub_at_a_revision(local_hub: Any, tiny_model_dir: Path, model_dir: Path, plain: np.ndarray, tmp_path: Path) -> None:
    from huggingface_hub import HfApi

    api, repo = HfApi(endpoint=local_hub.url, token=local_hub.token), f"{local_hub.user}/tickets-model"
    api.create_repo(repo)
    first = api.upload_folder(repo_id=repo, folder_path=model_dir).oid
    api.create_tag(repo, tag="v1", revision=first)
    api.upload_folder(repo_id=repo, folder_path=save_classifier(tmp_path / "second", tiny_model_dir, seed=2))
    source, env = tmp_path / "in.jsonl", {**local_hub.env, "HF_HOME": str(tmp_path / "home")}
    source.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS[:4]))

    done = python(env, "-m", "pipeline.predict", "--model", f"{repo}@v1", "--input", source, "--output", tmp_path / "v1.parquet")
    assert done.returncode == 0, done.stderr
    assert f"by {repo}@v1 at {first}" in done.stdout
    written = read_file(tmp_path / "v1.parquet").to_pandas()
    assert np.allclose(written["confidence"], plain[:4].max(axis=1), atol=2e-6)

    others = [repo, f"{repo}@v7", f"{local_hub.user}/tickets-modle"]
    calls = [["--model", name, "--input", str(source), "--output", str(tmp_path / f"{i}.parquet")] for i, name in enumerate(others)]
    done = python(env, "-c", DRIVER, json.dumps(calls))
    assert json.loads(done.stdout.splitlines()[-1]) == [0, 2, 2], done.stderr
    assert not np.allclose(read_file(tmp_path / "0.parquet").to_pandas()["confidence"], written["confidence"], atol=1e-3)
    no_revision, no_repository = [line for line in done.stderr.splitlines() if line.startswith("error")]
    assert "v7" in no_revision and "tickets-modle" in no_repository
    assert not (tmp_path / "1.parquet").exists() and not (tmp_path / "2.parquet").exists()
