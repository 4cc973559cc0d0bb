"""Labelled texts from every kind of source, what is checked on the way, and the tokens made of them."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pandas
import pytest
from datasets import ClassLabel, Dataset, DatasetDict, Features, Value

from pipeline.config import TrainConfig
from pipeline.data import TextData, class_weights, load_texts, stratified, tokenize
from pipeline.errors import UserError
from pipeline.readers import read_file

ROOT = Path(__file__).resolve().parent.parent
FORMATS = ("csv", "tsv", "json", "jsonl", "parquet")
KINDS: dict[str, tuple[list[Any], list[str]]] = {  # a cycle of labels, the class names they make
    "words": (["spam", "ham", "eggs"], ["eggs", "ham", "spam"]),
    "numbers": ([10, 2, 4], ["2", "4", "10"]),
    "whole floats": ([1.0, 0.0, 1.0], ["0", "1"]),
    "bools": ([True, False, True], ["False", "True"]),
}


def write(folder: Path, name: str, rows: list[dict[str, Any]]) -> str:
    """The rows as a file of the kind its name says."""
    path, frame = folder / name, pandas.DataFrame(rows)
    match path.suffix[1:]:
        case "csv":
            frame.to_csv(path, index=False)
        case "tsv":
            frame.to_csv(path, index=False, sep="\t")
        case "json":
            frame.to_json(path, orient="records")
        case "jsonl":
            frame.to_json(path, orient="records", lines=True)
        case "parquet":
            frame.to_parquet(path)
    return str(path)


def make_rows(n: int = 60, labels: list[Any] | None = None, start: int = 0) -> list[dict[str, Any]]:
    labels = labels or ["spam", "ham", "eggs"]
    return [{"text": f'row {i}: "quoted", done', "label": labels[i % len(labels)]} for i in range(start, start + n)]


def load(dataset: str | Path, **fields: Any) -> TextData:
    return load_texts(TrainConfig(dataset=str(dataset), **{"validation_share": 0.2, **fields}))


def message(dataset: str | Path, **fields: Any) -> str:
    """The text of the UserError that loading ends with; it is one line when printed."""
    with pytest.raises(UserError) as caught:
        load(dataset, **fields)
    return str(caught.value)


def named(data: TextData, split: str) -> dict[str, str]:
    """text -> name of its class."""
    table = getattr(data, split)
    return {row["text"]: data.label_names[row["label"]] for row in table}


# --- sources, formats, kinds of labels ------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("ending", FORMATS)
def test_formats_and_kinds_of_labels(tmp_path: Path, ending: str, kind: str) -> None:
    cycle, names = KINDS[kind]
    rows, test_rows = make_rows(60, cycle), make_rows(9, cycle, start=60)
    data = load(write(tmp_path, f"all.{ending}", rows), test_file=write(tmp_path, f"held.{ending}", test_rows))
    assert data.label_names == names
    assert data.train.column_names == data.validation.column_names == data.test.column_names == ["text", "label"]
    assert data.provenance["rows"] == {"train": 48, "validation": 12, "test": 9}

    def word(value: Any) -> str:
        return str(int(value)) if isinstance(value, float) else str(value)

    assert named(data, "train") | named(data, "validation") == {row["text"]: word(row["label"]) for row in rows}
    assert named(data, "test") == {row["text"]: word(row["label"]) for row in test_rows}
    assert data.warnings == []


def test_class_label_keeps_its_names_and_numbers(tmp_path: Path) -> None:
    features = Features({"text": Value("string"), "label": ClassLabel(names=["zebra", "ant"])})
    table = Dataset.from_list([{"text": f"row {i}", "label": i % 2} for i in range(20)], features=features)
    table.to_parquet(tmp_path / "all.parquet")
    data = load(tmp_path / "all.parquet")
    assert data.label_names == ["zebra", "ant"]
    assert named(data, "train") == {text: ["zebra", "ant"][int(text[4:]) % 2] for text in data.train["text"]}
    assert data.train.features["label"] == ClassLabel(names=["zebra", "ant"])


@pytest.mark.parametrize("ending", FORMATS)
def test_folder_of_files_named_after_splits(tmp_path: Path, ending: str) -> None:
    write(tmp_path, f"train.{ending}", make_rows(30))
    write(tmp_path, f"test.{ending}", make_rows(9, start=30))
    data = load(tmp_path)
    assert data.provenance["rows"] == {"train": 24, "validation": 6, "test": 9}
    assert data.provenance["revision"].startswith("sha256:")


def test_folder_in_hub_layout(ag_news_dir: Path) -> None:
    data = load(ag_news_dir, validation_share=0.05, max_train_samples=402)
    assert data.label_names == ["World", "Sports", "Business", "Sci/Tech"]
    assert data.provenance["rows"] == {"train": 402, "validation": 560, "test": 3800}
    assert sorted(data.provenance["class_counts"].values()) == [100, 100, 101, 101]
    assert Counter(data.validation["label"]) == dict.fromkeys(range(4), 140)


def test_folder_written_by_save_to_disk(tmp_path: Path) -> None:
    DatasetDict(train=Dataset.from_list(make_rows(30)), test=Dataset.from_list(make_rows(6, start=30))).save_to_disk(tmp_path / "saved")
    assert load(tmp_path / "saved").provenance["rows"] == {"train": 24, "validation": 6, "test": 6}


def test_own_column_names_and_a_held_out_test(tmp_path: Path) -> None:
    rows = [{"id": i, "body": f"ticket {i}", "team": "ab"[i % 2], "text": 1} for i in range(50)]
    data = load(write(tmp_path, "t.csv", rows), text_column="body", label_column="team", test_share=0.2)
    assert data.provenance["rows"] == {"train": 32, "validation": 8, "test": 10}
    everything = [named(data, split) for split in ("train", "validation", "test")]
    assert len(everything[0] | everything[1] | everything[2]) == 50, "a row stands in two splits"
    assert "no test split: 10 rows" in data.warnings[0]


def test_csv_cells_stay_the_words_they_are(tmp_path: Path) -> None:
    cells = '0,NA,None\n1,"two\nlines, ""quoted""",007\n2,12,None\n3,null,007\n'
    (tmp_path / "t.csv").write_text("\ufeff,text,label\n" + cells + "4,a,None\n5,b,007\n6,c,None\n7,d,007\n", "utf-8")
    table = read_file(tmp_path / "t.csv")
    assert table["text"][:4] == ["NA", 'two\nlines, "quoted"', "12", "null"]
    assert table["Unnamed: 0"][0] == "0"
    assert load(tmp_path / "t.csv").label_names == ["007", "None"]


@pytest.mark.parametrize("separator", [",", ";", "\t"])
def test_csv_separator_is_read_from_the_header(tmp_path: Path, separator: str) -> None:
    (tmp_path / "t.csv").write_text(f"text{separator}label\nHello there{separator}a\nyou{separator}b\n")
    assert read_file(tmp_path / "t.csv").to_list() == [{"text": "Hello there", "label": "a"}, {"text": "you", "label": "b"}]


def test_txt_is_one_text_per_line(tmp_path: Path) -> None:
    (tmp_path / "t.txt").write_bytes("one\r\n\r\nthree\u2028still three\n".encode())
    assert read_file(tmp_path / "t.txt")["text"][:] == ["one", "", "three\u2028still three"]


# --- splits -----------------------------------------------------------------------------------------------------------


def test_stratified_takes_each_class_in_its_share() -> None:
    labels = [0] * 700 + [1] * 250 + [2] * 47 + [3] * 2 + [4]
    chosen = stratified(labels, 100, seed=1, leave=1)
    taken = Counter(labels[row] for row in chosen)
    assert len(chosen) == 100 == len(set(chosen))
    assert taken == {0: 70, 1: 25, 2: 4, 3: 1}, "the class with one row stays where it is"
    assert sorted(chosen) == list(chosen)
    assert list(stratified(labels, 100, seed=1, leave=1)) == list(chosen)
    assert list(stratified(labels, 100, seed=2, leave=1)) != list(chosen)


@pytest.mark.parametrize("total", [0, 1, 5, 9, 10, 50])
def test_stratified_never_takes_more_than_there_is(total: int) -> None:
    labels = [0, 0, 0, 1, 1, 1, 1, 2, 2, 3]
    assert len(stratified(labels, total, seed=0)) == min(max(total, 4), 10)
    kept = Counter(labels) - Counter(labels[row] for row in stratified(labels, total, seed=0, leave=1))
    assert set(kept) == {0, 1, 2, 3}


def test_validation_has_every_class_and_train_keeps_the_rare_one(tmp_path: Path) -> None:
    rows = [{"text": f"row {i}", "label": label} for i, label in enumerate(["often"] * 80 + ["seldom"] * 2 + ["once"])]
    data = load(write(tmp_path, "t.csv", rows), test_file=write(tmp_path, "test.csv", rows[-3:]), validation_share=0.05)
    assert set(named(data, "validation").values()) == {"often", "seldom"}
    assert set(named(data, "train").values()) == {"often", "seldom", "once"}
    assert data.provenance["class_counts"] == {"often": 77, "once": 1, "seldom": 1}


def test_splits_depend_on_rows_and_seed_alone(tmp_path: Path) -> None:
    path = write(tmp_path, "t.csv", make_rows(90))
    first, again, other = load(path), load(path), load(path, seed=43)
    for split in ("train", "validation", "test"):
        assert getattr(first, split)["text"][:] == getattr(again, split)["text"][:]
    assert first.test["text"][:] != other.test["text"][:]
    assert first.provenance == again.provenance


def test_fewer_training_rows_keep_the_same_validation(tmp_path: Path) -> None:
    path = write(tmp_path, "t.csv", make_rows(90))
    whole, few = load(path), load(path, max_train_samples=10)
    assert few.validation["text"][:] == whole.validation["text"][:]
    assert len(few.train) == 10 and set(few.train["text"]) <= set(whole.train["text"])
    assert sorted(few.provenance["class_counts"].values()) == [3, 3, 4]


# --- warnings -----------------------------------------------------------------------------------------------------------


def test_duplicates_leaks_and_contradictions_are_named(tmp_path: Path) -> None:
    rows = make_rows(30)
    rows += [{"text": rows[0]["text"], "label": rows[0]["label"]}, {"text": '  ROW 1:   "quoted", done', "label": "eggs"}]
    test_rows = [*make_rows(3, start=100), {"text": 'Row 5: "quoted", done', "label": "eggs"}]
    data = load(write(tmp_path, "t.csv", rows), test_file=write(tmp_path, "test.csv", test_rows))
    duplicate, contradiction, leak = data.warnings
    assert "2 duplicate rows (6.2%)" in duplicate and "row 0" in duplicate
    assert "1 texts with different labels" in contradiction and "'ham' and 'eggs'" in contradiction
    assert "1 test rows (25.0%) also stand in train" in leak and "Row 5" in leak


def test_rows_without_text_are_left_out_with_a_warning(tmp_path: Path) -> None:
    rows = [*make_rows(4), {"text": "  ", "label": "ham"}, {"text": None, "label": None}, *make_rows(30, start=4)]
    data = load(write(tmp_path, "t.jsonl", rows))
    assert "2 rows with an empty text are left out (the first: row 5)" in data.warnings[0]
    assert sum(data.provenance["rows"].values()) == 34
    assert named(data, "train") | named(data, "validation") | named(data, "test") == {r["text"]: r["label"] for r in make_rows(34)}


def test_doubtful_labels_are_named(tmp_path: Path) -> None:
    assert "differ in capitals only" in load(write(tmp_path, "a.csv", make_rows(30, ["spam", "Spam", "ham"]))).warnings[0]
    assert "holds fractions" in load(write(tmp_path, "b.csv", make_rows(30, [0.5, 1.0, 2.5]))).warnings[0]


# --- errors -------------------------------------------------------------------------------------------------------------


def test_missing_file_names_the_nearest(tmp_path: Path) -> None:
    write(tmp_path, "tickets.csv", make_rows())
    text = message(tmp_path / "ticket.csv")
    assert "No file" in text and "Did you mean 'tickets.csv'?" in text
    assert "There is no folder" in message("nowhere/at/all.csv")
    assert "No file" in message(tmp_path / "tickets.csv", test_file="missing.csv")


def test_unsupported_ending(tmp_path: Path) -> None:
    (tmp_path / "t.xlsx").write_bytes(b"PK")
    text = message(tmp_path / "t.xlsx")
    assert "'.xlsx'" in text and ".parquet" in text


def test_missing_column_lists_those_present(tmp_path: Path) -> None:
    path = write(tmp_path, "t.csv", [{"Text": "a", "topic": "x"}])
    text = message(path)
    assert (
        "no column 'text'" in text
        and "Columns present: Text, topic." in text
        and "Did you mean 'Text'?" in text
        and "--text_column" in text
    )
    assert "no column 'label'" in message(path, text_column="Text")


def test_one_class_only(tmp_path: Path) -> None:
    assert "one class only ('spam')" in message(write(tmp_path, "t.csv", make_rows(30, ["spam"])))


def test_a_column_of_identifiers_is_no_label(tmp_path: Path) -> None:
    rows = [{"text": f"row {i}", "label": f"id-{i}"} for i in range(30)]
    assert "30 different values in 30 rows" in message(write(tmp_path, "t.csv", rows))


@pytest.mark.parametrize("ending", ["csv", "tsv"])
def test_header_alone_is_an_empty_split(tmp_path: Path, ending: str) -> None:
    (tmp_path / f"t.{ending}").write_text({"csv": "text,label\n", "tsv": "text\tlabel\n"}[ending])
    assert "empty" in message(tmp_path / f"t.{ending}")


def test_empty_splits(tmp_path: Path) -> None:
    empty = Dataset.from_dict({"text": [], "label": []}, features=Features({"text": Value("string"), "label": Value("int64")}))
    empty.to_parquet(tmp_path / "empty.parquet")
    assert "holds no rows" in message(tmp_path / "empty.parquet")
    path = write(tmp_path, "t.csv", make_rows())
    assert "holds no rows" in message(path, test_file=str(tmp_path / "empty.parquet"))
    (tmp_path / "nothing.csv").write_text("")
    assert "empty line" in message(tmp_path / "nothing.csv")
    (tmp_path / "folder").mkdir()
    assert "holds no data files" in message(tmp_path / "folder")
    assert "all 2 rows have an empty 'text'" in message(write(tmp_path, "b.csv", [{"text": " ", "label": "a"}, {"text": "", "label": "b"}]))


def test_missing_split_lists_those_present(tmp_path: Path) -> None:
    write(tmp_path, "train.csv", make_rows())
    write(tmp_path, "validation.csv", make_rows(6, start=60))
    text = message(tmp_path, test_split="validatoin")
    assert "no split 'validatoin' (test_split)" in text and "train, validation" in text and "Did you mean 'validation'?" in text
    assert "(train_split)" in message(tmp_path, train_split="learn")
    assert load(tmp_path, test_split="validation").provenance["rows"]["test"] == 6
    held_out = load(tmp_path)
    assert "no test split (present: train, validation)" in held_out.warnings[0]


def test_labels_in_test_unseen_in_train(tmp_path: Path) -> None:
    strange = [{"text": f"odd {i}", "label": f"spam{i}"} for i in range(7)]
    text = message(write(tmp_path, "t.csv", make_rows()), test_file=write(tmp_path, "test.csv", make_rows(3, start=60) + strange))
    assert "7 label(s) in 7 rows do not occur in train: 'spam0', 'spam1', 'spam2', 'spam3', 'spam4' and 2 more" in text
    assert "Did you mean 'spam'?" in text


@pytest.mark.parametrize("ending", ["jsonl", "parquet"])
def test_lists_of_labels_are_not_offered(tmp_path: Path, ending: str) -> None:
    assert "multi-label classification is not offered" in message(write(tmp_path, f"t.{ending}", make_rows(30, [["a", "b"], ["c"]])))


@pytest.mark.parametrize("missing", ["", None, float("nan")])
@pytest.mark.parametrize("ending", FORMATS)
def test_missing_labels_name_count_and_first_row(tmp_path: Path, ending: str, missing: Any) -> None:
    rows = make_rows(30)
    rows[6]["label"] = rows[9]["label"] = missing
    text = message(write(tmp_path, f"t.{ending}", rows))
    assert "2 of 30 rows have no label in 'label' (the first: row 7" in text


def test_hidden_test_labels(tmp_path: Path) -> None:
    features = Features({"text": Value("string"), "label": ClassLabel(names=["no", "yes"])})
    for split, value in (("train", None), ("test", -1)):
        rows = [{"text": f"{split} {i}", "label": i % 2 if value is None else value} for i in range(12)]
        Dataset.from_list(rows, features=features).to_parquet(tmp_path / f"{split}.parquet")
    assert "often hidden, as -1" in message(tmp_path)


def test_texts_that_are_none(tmp_path: Path) -> None:
    rows = [{"text": i, "label": "ab"[i % 2]} for i in range(20)]
    assert "holds int" in message(write(tmp_path, "t.jsonl", rows))
    assert load(write(tmp_path, "t.csv", rows)).train["text"][0].isdigit(), "in CSV every cell is a word"


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("more.csv", b"text,label\nok,a\nHello, world,b\n", "Row #3: Expected 2 columns, got 3"),
        ("quote.csv", b'text,label\nok,a\n"open,b\nx,c\n', "Expected 2 columns"),
        ("latin.csv", "text,label\ncaf\xe9,a\nb,b\n".encode("latin-1"), "not UTF-8"),
        ("utf16.csv", "text,label\na,a\nb,b\n".encode("utf-16"), "not UTF-8"),
        ("latin.tsv", "text\tl\xe4bel\n".encode("latin-1"), "not UTF-8"),
        ("twice.csv", b"text,text\na,b\n", "2 columns named 'text'"),
        ("bad.jsonl", b'{"text":"a","label":1}\n{"text":"b" "label":2}\n', "JSON parse error"),
        ("bad.json", b'[{"text":"a","label":1},', "cannot be read"),
        ("bad.parquet", b"this is no parquet file", "cannot be read"),
    ],
)
def test_malformed_files(tmp_path: Path, name: str, content: bytes, expected: str, capfd: pytest.CaptureFixture[str]) -> None:
    (tmp_path / name).write_bytes(content)
    text = message(tmp_path / name)
    assert name in text and expected in text
    assert capfd.readouterr().err == "", "the library's own log lines would come before the one line"


def test_shares_that_leave_no_row(tmp_path: Path) -> None:
    path = write(tmp_path, "t.csv", make_rows(30))
    assert "validation_share 0.0 of 27 rows" in message(path, validation_share=0.0)
    assert "test_share 0.0" in message(path, test_share=0.0)
    pair = write(tmp_path, "pair.csv", make_rows(2, ["a", "b"]))
    assert "Raise --validation_share" in message(pair, test_file=pair)
    assert "max_train_samples is 2, but there are 3 classes" in message(path, max_train_samples=2)


def test_unknown_dataset_config(ag_news_dir: Path) -> None:
    text = message(ag_news_dir, dataset_config="large")
    assert "'large' not found" in text and "default" in text and "--dataset_config" in text


def command(*arguments: str, env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "pipeline.data", *arguments],
        cwd=ROOT,
        env={**os.environ, **(env or {})},
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_command_ends_with_one_line_and_code_2(tmp_path: Path) -> None:
    (tmp_path / "bad.jsonl").write_text('{"text":"a","label":1}\n{"text":"b" "label":2}\n')
    done = command("--dataset", str(tmp_path / "bad.jsonl"))
    assert done.returncode == 2 and done.stdout == ""
    line = done.stderr.strip().split("\r")[-1].splitlines()
    assert len(line) == 1 and line[0].startswith("error: ") and "JSON parse error" in line[0]


def test_example_of_own_data_is_described() -> None:
    done = command("configs/own_data.yaml")
    assert done.returncode == 0, done.stderr
    assert "train 60  validation 10  test 18" in done.stdout
    assert "cancellation: 11 rows of train (18.3%)" in done.stdout


# --- the Hub ------------------------------------------------------------------------------------------------------------

ASK = """
import json, sys
from pipeline.config import TrainConfig
from pipeline.data import load_texts
from pipeline.errors import explain
for fields in json.loads(sys.argv[1]):
    try:
        data = load_texts(TrainConfig(**fields))
        print(json.dumps({**data.provenance, "warnings": data.warnings}))
    except Exception as error:
        print(json.dumps({"error": explain(error) or f"DEFECT {error!r}"}))
"""


def ask(env: dict[str, str], *fields: dict[str, Any]) -> list[dict[str, Any]]:
    """What `load_texts` answers in a process of its own: the Hub's clients read their environment at import."""
    done = subprocess.run(
        [sys.executable, "-c", ASK, json.dumps(fields)], cwd=ROOT, env={**os.environ, **env}, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_hub_datasets_at_a_revision_private_unknown_and_offline(local_hub: Any, tmp_path: Path) -> None:
    from huggingface_hub import HfApi

    api = HfApi(endpoint=local_hub.url, token=local_hub.token)
    repo, secret = f"{local_hub.user}/tickets", f"{local_hub.user}/secret-tickets"
    commits = []
    for n in (30, 60):
        write(tmp_path, "train.csv", make_rows(n))
        write(tmp_path, "test.csv", make_rows(6, start=100))
        api.create_repo(repo, repo_type="dataset", exist_ok=True)
        commits.append(api.upload_folder(repo_id=repo, repo_type="dataset", folder_path=tmp_path).oid)
    api.create_tag(repo, tag="v1", revision=commits[0], repo_type="dataset")
    api.create_repo(secret, repo_type="dataset", private=True)
    api.upload_folder(repo_id=secret, repo_type="dataset", folder_path=tmp_path)
    home = {"HF_HOME": str(tmp_path / "home")}

    tagged, latest, private, no_revision, unknown, no_id = ask(
        {**local_hub.env, **home},
        {"dataset": repo, "dataset_revision": "v1"},
        {"dataset": repo},
        {"dataset": secret},
        {"dataset": repo, "dataset_revision": "v9"},
        {"dataset": f"{local_hub.user}/tickest"},
        {"dataset": "not an id"},
    )
    assert tagged["revision"] == commits[0] and sum(tagged["rows"].values()) == 36
    assert latest["revision"] == commits[1] and sum(latest["rows"].values()) == 66
    assert latest["label_names"] == ["eggs", "ham", "spam"] and latest["warnings"] == []
    assert sum(private["rows"].values()) == 66
    assert "has no revision 'v9'" in no_revision["error"] and local_hub.url in no_revision["error"]
    assert "No dataset" in unknown["error"] and "HF_TOKEN" in unknown["error"]
    assert "No dataset 'not an id'" in no_id["error"]

    (refused,) = ask({**local_hub.env, "HF_TOKEN": "", "HF_HOME": str(tmp_path / "other")}, {"dataset": secret})
    assert "private" in refused["error"] and "HF_TOKEN" in refused["error"]

    with socket.socket() as free:  # bound, not listening: nobody answers there
        free.bind(("127.0.0.1", 0))
        gone = {**local_hub.env, **home, "HF_ENDPOINT": f"http://127.0.0.1:{free.getsockname()[1]}"}
        cached, pinned, wrong, absent = ask(
            gone,
            {"dataset": repo},
            {"dataset": secret, "dataset_revision": private["revision"]},
            {"dataset": secret, "dataset_revision": "0" * 40},
            {"dataset": f"{local_hub.user}/never-read"},
        )
    assert cached["revision"] in commits and "read from the cache, at commit" in cached["warnings"][0]
    assert pinned["revision"] == private["revision"]
    assert "not " + "0" * 40 in wrong["error"]
    assert "cannot be reached" in absent["error"] and "make hub" in absent["error"]


# --- tokens -------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tokenizer(tiny_model_dir: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(tiny_model_dir)


def test_tokens_equal_a_plain_tokenizer_call(ag_news_dir: Path, tokenizer: Any) -> None:
    table = load(ag_news_dir, max_train_samples=300).train
    tokens = tokenize(table, tokenizer, 48)
    plain = tokenizer(table["text"][:], truncation=True, max_length=48)["input_ids"]
    assert tokens.column_names == ["input_ids", "length", "labels"], "nothing else takes memory"
    assert tokens["input_ids"][:] == plain
    assert tokens["length"][:] == [len(ids) for ids in plain]
    assert max(tokens["length"]) == 48 and min(tokens["length"]) < 48
    assert tokens["labels"][:] == table["label"][:]


def test_tokens_are_computed_once(tmp_path: Path, tokenizer: Any, tiny_model_dir: Path) -> None:
    from transformers import AutoTokenizer

    path = write(tmp_path, "t.csv", make_rows())
    first = tokenize(load(path).train, tokenizer, 32)
    file = Path(first.cache_files[0]["filename"])
    before = file.stat()
    # As another rank or a later run does it: the rows read anew, a tokenizer loaded anew and already used otherwise.
    other = AutoTokenizer.from_pretrained(tiny_model_dir)
    other("something else", truncation=True, max_length=7, padding="max_length")
    again = tokenize(load(path).train, other, 32)
    after = file.stat()
    assert again.cache_files == first.cache_files
    assert (before.st_ino, before.st_mtime_ns) == (after.st_ino, after.st_mtime_ns), "tokenised again"
    assert again.to_list() == first.to_list()
    assert (other.backend_tokenizer.truncation or {})["max_length"] == 7, "the tokenizer is left as it was"

    others = [tokenize(load(path).train, tokenizer, 31), tokenize(load(path, seed=7).train, tokenizer, 32)]
    side = AutoTokenizer.from_pretrained(tiny_model_dir, truncation_side="left")
    others.append(tokenize(load(path).train, side, 32))
    added = AutoTokenizer.from_pretrained(tiny_model_dir)
    added.add_tokens(["quoted"])
    others.append(tokenize(load(path).train, added, 32))
    names = {table.cache_files[0]["filename"] for table in (first, *others)}
    assert len(names) == 5, "another length, other rows, another side or another vocabulary, and an old file was read"


def test_progress_is_shown_only_when_asked(tmp_path: Path, tokenizer: Any, capfd: pytest.CaptureFixture[str]) -> None:
    table = load(write(tmp_path, "t.csv", make_rows())).train
    tokenize(table, tokenizer, 20)
    assert capfd.readouterr().err == ""
    tokenize(table, tokenizer, 21, show_progress=True)
    assert "Tokenising" in capfd.readouterr().err
    assert not datasets.are_progress_bars_disabled()


# --- class weights --------------------------------------------------------------------------------------------------------


def test_class_weights_average_to_one_over_the_rows() -> None:
    labels = [0] * 90 + [1] * 9 + [2]
    weights = class_weights(labels, 3)
    assert weights.dtype == np.float32
    assert np.allclose(weights, [100 / 270, 100 / 27, 100 / 3])
    assert weights[labels].mean() == pytest.approx(1.0)
    assert class_weights([0, 0, 2, 2], 3)[1] == 1.0, "a class without rows has a finite weight"
    assert np.allclose(class_weights([0, 0, 2, 2], 3), 1.0)
