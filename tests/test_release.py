"""The release: chosen, built, described; published to a running local Hub, proven, and refused where it should be."""

from __future__ import annotations

import copy
import dataclasses
import functools
import json
import math
import operator
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from hub_helpers import raw
from huggingface_hub import HfApi, ModelCard
from release_record import LABELS, run_record
from safetensors.torch import load_file, save_file
from transformers import AutoModelForSequenceClassification, AutoTokenizer, pipeline

from pipeline import release as release_module
from pipeline.card import hub_id, licence, model_card, without_local_paths
from pipeline.card_images import card_images
from pipeline.config import TrainConfig
from pipeline.energy import EnergyMeter, total
from pipeline.errors import UserError
from pipeline.export import ExportError, reference_copy
from pipeline.hub import check_before_training, main, prove, publish
from pipeline.local_hub.faults import Fault
from pipeline.local_hub.process import HubProcess
from pipeline.record import code_version
from pipeline.release import build_release, choose_golden, golden_logits, release_tokenizer

ROOT = Path(__file__).resolve().parent.parent
LONG = "A sentence of some length, again and again. " * 20
GOLDEN = [(f"Text number {i} says 'hello' | to the {word}.", i % 4) for i, word in enumerate(["world", "team", "market", "lab"] * 6)] + [
    (LONG, 1),
    ("", 0),
]


@pytest.fixture(scope="module")
def trained(tiny_model_dir: Path, encoder_dir: Path) -> tuple[Any, Any]:
    """A model as training leaves it (in train mode) and its BERT tokenizer, which makes token_type_ids."""
    torch.manual_seed(5)
    model = AutoModelForSequenceClassification.from_pretrained(tiny_model_dir, num_labels=4, dtype=torch.float32)
    torch.nn.init.normal_(model.classifier.weight, std=2.0)  # logits worth comparing
    return model.train(), AutoTokenizer.from_pretrained(encoder_dir)


@pytest.fixture(scope="module")
def built(trained: tuple[Any, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """outputs/ag_news/release of a run; tests that change it take a copy."""
    model, tokenizer = trained
    folder = tmp_path_factory.mktemp("outputs") / "ag_news" / "release"
    record = run_record(max_length=48)
    record["command"] += f" --dataset={Path.home()}/secret/news.csv --output_dir /mnt/anna/runs/ag_news"
    return build_release(folder, model, tokenizer, record, GOLDEN)


@pytest.fixture
def release(built: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(built, tmp_path / "run" / "release"))


# -- choosing ---------------------------------------------------------------------------------------------------------


def test_golden_has_every_class_the_shortest_and_truncated_ones() -> None:
    random = np.random.default_rng(0)
    lengths = np.clip(random.integers(3, 200, 5000), 3, 128)
    labels = random.integers(0, 3, 5000)
    labels[777], labels[4001] = 3, 4  # two classes with a single row each
    texts = [f"text {i}" for i in range(5000)]
    chosen = choose_golden(texts, labels, lengths, max_length=128, seed=1)
    rows = [int(text.split()[1]) for text, _ in chosen]
    assert len(chosen) == 256 == len(set(rows)) and rows == sorted(rows)
    assert {label for _, label in chosen} == {0, 1, 2, 3, 4} and {777, 4001} <= set(rows)
    assert all(labels[row] == label for row, (_, label) in zip(rows, chosen, strict=True))
    assert sorted(lengths[rows])[:16] == sorted(lengths)[:16]
    assert (lengths[rows] == 128).sum() >= 32
    assert chosen == choose_golden(texts, labels, lengths, max_length=128, seed=1)
    assert chosen != choose_golden(texts, labels, lengths, max_length=128, seed=2)
    assert len(choose_golden(texts[:9], labels[:9], lengths[:9], max_length=128)) == 9
    assert len(choose_golden(texts, np.arange(5000), lengths, max_length=128)) == 256, "more classes than room"


# -- building ---------------------------------------------------------------------------------------------------------


def test_release_holds_what_clients_rely_on(built: Path, trained: tuple[Any, Any]) -> None:
    model, tokenizer = trained
    files = {str(path.relative_to(built)) for path in built.rglob("*") if path.is_file()}
    assert files == {
        "README.md", "model.safetensors", "config.json", "tokenizer.json", "tokenizer_config.json", "run.json", "golden.json",
        "onnx/model.onnx", "confusion_matrix.png", "training_curve.png",
    }  # fmt: skip
    assert sorted(path.name for path in built.parent.iterdir()) == ["release"], "nothing of the building is left"
    assert model.training and tokenizer.model_max_length != 48, "the caller's objects are as they were"

    config = json.loads((built / "config.json").read_text())
    assert config["id2label"] == {str(i): name for i, name in enumerate(LABELS)} and config["label2id"]["Sci/Tech"] == 3
    weights = load_file(built / "model.safetensors")
    assert all(torch.equal(weights[name], tensor) for name, tensor in model.state_dict().items())

    loaded = AutoTokenizer.from_pretrained(built)
    assert loaded.model_max_length == 48
    assert set(loaded(LONG, truncation=True)) == {"input_ids", "attention_mask"} and len(loaded(LONG, truncation=True)["input_ids"]) == 48
    from tokenizers import Tokenizer

    assert Tokenizer.from_file(str(built / "tokenizer.json")).encode(LONG).ids == loaded(LONG, truncation=True)["input_ids"]

    golden = json.loads((built / "golden.json").read_text())
    assert (golden["format"], golden["max_length"], golden["label_names"]) == (1, 48, LABELS)
    assert [(e["text"], e["label"]) for e in golden["examples"]] == GOLDEN
    classify = pipeline("text-classification", model=str(built), top_k=None)
    for example in (golden["examples"][0], golden["examples"][-2]):
        logits = np.array(example["logits"])
        assert np.array_equal(logits, logits.astype(np.float32)), "JSON holds the float32 exactly"
        expected = dict(zip(LABELS, np.exp(logits - logits.max()) / np.exp(logits - logits.max()).sum(), strict=True))
        answer = {entry["label"]: entry["score"] for entry in classify([example["text"]], truncation=True)[0]}
        assert answer == pytest.approx(expected, abs=1e-6)


def test_nothing_tells_of_the_authors_machine(built: Path) -> None:
    for path in [*built.glob("*.json"), built / "README.md"]:
        text = path.read_text(encoding="utf-8")
        assert str(Path.home()) + "/secret" not in text and "/mnt/anna" not in text and str(built.parent) not in text, path
    assert "--dataset=~/secret/news.csv --output_dir .../ag_news" in json.loads((built / "run.json").read_text())["command"]


def test_local_paths_go_and_ids_stay() -> None:
    kept = ["user/repo", "https://example.org/a/b", "Sci/Tech", "configs/ag_news.yaml", "24/12/2025", "/predict", "~/data/x.csv"]
    assert without_local_paths({"a": kept, "n": 1, "none": None}) == {"a": kept, "n": 1, "none": None}
    assert without_local_paths("--x=/data/anna/x.csv '/a/b c'") == "--x=.../x.csv '.../b c'"
    assert without_local_paths(f"{Path.home()}/x {Path.home()}") == "~/x ~"


def test_an_earlier_release_stands_until_the_new_one_is_whole(
    release: Path, trained: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    before = {path.name: path.read_bytes() for path in release.iterdir() if path.is_file()}

    def disk_full(*_: Any, **__: Any) -> str:
        raise OSError(28, "No space left on device")

    def no_onnx(*_: Any, **__: Any) -> Path:
        raise ExportError("Odd cannot be exported to ONNX: it is odd.")

    monkeypatch.setattr(release_module, "export_onnx", no_onnx)
    with monkeypatch.context() as patch:
        patch.setattr(release_module, "model_card", disk_full)
        with pytest.raises(OSError, match="No space"):
            build_release(release, *trained, run_record(max_length=48), GOLDEN)
    assert before == {path.name: path.read_bytes() for path in release.iterdir() if path.is_file()}

    # And a model that does not become ONNX is released without it, and the card does not speak of it.
    build_release(release, *trained, run_record(max_length=48), GOLDEN[:3])
    assert "warning: the release has no onnx/model.onnx. Odd cannot" in capsys.readouterr().out
    assert len(json.loads((release / "golden.json").read_text())["examples"]) == 3
    assert not (release / "onnx").exists() and "onnx" not in (release / "README.md").read_text().lower().replace("onnx 1.23.2", "")
    assert [path.name for path in release.parent.iterdir()] == ["release"]


def test_golden_logits_do_not_depend_on_neighbours(trained: tuple[Any, Any]) -> None:
    model, tokenizer = reference_copy(trained[0]), release_tokenizer(trained[1], 48)
    texts, threads = [text for text, _ in GOLDEN[-5:]], torch.get_num_threads()
    assert golden_logits(model, tokenizer, texts) == golden_logits(model, tokenizer, texts[::-1])[::-1]
    assert torch.get_num_threads() == threads


# -- the card ---------------------------------------------------------------------------------------------------------


def test_card_says_what_the_record_says(built: Path) -> None:
    record = run_record()
    record["energy_joules"] = {"cpu": 3600.0, "gpu": 9e5}
    text = model_card(record, "user/news", example='It\'s "quoted" | text', licences=("apache-2.0", licence("dataset", "fancyzhx/ag_news")))
    card = ModelCard(text)  # the Hub's own parser; raises for a malformed model-index
    data, test = card.data, record["test"]
    assert (data.pipeline_tag, data.library_name, data.base_model) == (
        "text-classification",
        "transformers",
        "distilbert/distilbert-base-uncased",
    )
    assert (data.datasets, data.language, data.license) == (["fancyzhx/ag_news"], "en", "apache-2.0")
    assert {(r.metric_type, r.metric_value) for r in data.eval_results} == {
        ("accuracy", round(test["accuracy"], 6)), ("f1", round(test["macro_f1"], 6)),
        ("nll", round(test["nll"], 6)), ("expected_calibration_error", round(test["ece"], 6)),
        *(("f1", round(row["f1"], 6)) for row in test["per_class"].values()),
    }  # fmt: skip
    assert {r.metric_name: r.metric_args for r in data.eval_results}["F1 of Sci/Tech"] == {"class": "Sci/Tech"}
    result = data.eval_results[0]
    assert (result.dataset_type, result.dataset_split, result.dataset_revision) == ("fancyzhx/ag_news", "test", "a" * 40)
    assert data.model_name == "news"
    for name, row in test["per_class"].items():
        assert f"| {name} | {row['precision']:.4f} | {row['recall']:.4f} | {row['f1']:.4f} | {row['support']} |" in card.text
    for said in (
        "2 processes x 16 rows x 1 accumulated",
        "2 min 11 s",
        record["command"],
        record["code"]["commit"],
        "12 rows of train are duplicates",
        "| Energy | 250 Wh by the GPUs (NVML), 1 Wh by the CPU packages (RAPL): all they drew during training",
        "Base model distilbert/distilbert-base-uncased: apache-2.0. Data fancyzhx/ag_news: unknown: none is stated there",
    ):
        assert said in card.text
    assert text.count("OWNER/NAME") == 0 and (built / "README.md").read_text().count("OWNER/NAME") >= 4
    assert "\n\n\n" not in card.text and "None" not in card.text and "{{" not in card.text

    assert "checkout of the training code" in card.text and "](https://git" not in card.text
    record["code"]["origin"] = "https://git.example.org/ann/news"
    linked = model_card(record, "user/news")
    assert linked.count("a checkout of [the training code](https://git.example.org/ann/news)") == 2

    curl = re.search(r"```bash\n(curl .*?)\n```", card.text, re.DOTALL)
    assert curl
    shown = subprocess.run(["bash", "-c", curl[1].replace("curl", "printf '%s\\n'", 1)], capture_output=True, text=True, check=True).stdout
    assert json.loads(shown.splitlines()[-1]) == {"text": 'It\'s "quoted" | text'}, "the shell sees valid JSON"


@pytest.mark.parametrize(
    ("remote", "address"),
    [
        ("https://example.org/ann/news.git", "https://example.org/ann/news.git"),
        ("https://ghp_key@example.org/ann/news.git", "https://example.org/ann/news.git"),
        ("https://ann@example.org:k@y@example.org:8443/news", "https://example.org:8443/news"),
        ("git@example.org:ann/news.git", "https://example.org/ann/news.git"),
        ("ssh://git@example.org:2222/ann/news.git", "https://example.org/ann/news.git"),
        *((remote, None) for remote in ("", "/srv/git/news.git", "file:///srv/news", "../news", "http://key@example.org/news", "https://key@/news",
                                        "https://example.org/news?key=1", "ann@example.org:news", "git@work:ann/news")),
    ],
)  # fmt: skip
def test_origin_is_recorded_without_its_key(remote: str, address: str | None, tmp_path: Path) -> None:
    subprocess.run(["git", "init", "--quiet", str(tmp_path)], check=True, timeout=20)
    if remote:
        subprocess.run(["git", "-C", str(tmp_path), "remote", "add", "origin", remote], check=True, timeout=20)
    assert code_version(tmp_path) == {"commit": None, "dirty": False, "origin": address}


def test_the_hub_takes_the_card_and_none_that_lacks_what_it_requires(local_hub: Any, api: HfApi, release: Path) -> None:
    def answer(head: Any) -> tuple[int, str]:
        given = raw(local_hub, "POST", "/api/validate-yaml", body={"content": f"---\n{yaml.safe_dump(head)}---\n"})
        return given.status, " ".join(error["message"] for error in given.json()["errors"])

    text = model_card(run_record(), "user/news", licences=("apache-2.0", None))
    head = yaml.safe_load(text.split("---\n")[1])
    assert answer(head) == (200, "") and (head["license"], head["language"]) == ("apache-2.0", "en")
    result = "model-index.0.results.0"
    cases: list[tuple[str, Any]] = [
        ("model-index.0.name", None), ("model-index.0.results", None), (f"{result}.task.type", ""), (f"{result}.dataset.type", None),
        (f"{result}.dataset.name", 7), (f"{result}.metrics", {}), (f"{result}.metrics.1.type", None), (f"{result}.metrics.0.value", None),
        (f"{result}.metrics.0.value", True), (f"{result}.metrics.0.value", math.nan), ("license", "Apache 2.0"), ("license", ["mit", 1.5]),
        ("language", "English"), ("language", ["en", False]),
    ]  # fmt: skip
    for place, value in cases:
        *path, last = [int(part) if part.isdigit() else part for part in place.split(".")]
        damaged = copy.deepcopy(head)
        part: Any = functools.reduce(operator.getitem, path, damaged)
        if value is None:
            del part[last]
        else:
            part[last] = value
        status, said = answer(damaged)
        assert status == 400 and place in said, (place, value, said)
    for fine in (
        {"license": ["mit", "openrail++"], "language": ["de", "yue", "code"]},
        {"model-index": [{"name": "x", "results": []}]},
        {},
    ):
        assert answer(fine) == (200, "")

    # As it comes to a person who publishes.
    (release / "README.md").write_text(text.replace("name: fancyzhx/ag_news", "name: ''", 1), encoding="utf-8")
    with pytest.raises(
        UserError, match=r"^The Hub refuses the model card: .*dataset\.name: .*Correct README\.md in the release folder\..*$"
    ):
        publish(release, f"{local_hub.user}/damaged-card", api=api)


def test_card_of_local_data_names_no_hub_repositories(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "models" / "encoder").mkdir(parents=True)
    (tmp_path / "my news.csv").touch()
    monkeypatch.chdir(tmp_path)
    assert hub_id("models/encoder") is None and hub_id(str(tmp_path)) is None and hub_id("owner/name") == "owner/name"
    labels = [f"class {i} | {'x' * 30}" for i in range(40)]
    record = run_record(labels, model="models/encoder", dataset=str(tmp_path / "my news.csv"))
    record |= {"history": [], "epochs": [], "best": None, "code": {"commit": None, "dirty": None}, "energy_joules": None}
    record["data"]["revision"] = None
    card = ModelCard(model_card(record, "user/name", onnx=False, pictures=False))
    assert (card.data.base_model, card.data.datasets, card.data.license, card.data.language) == (None, None, None, None)
    assert (card.data.eval_results[0].dataset_name, card.data.eval_results[0].dataset_type) == ("my news", "my-news")
    assert str(tmp_path) not in str(card) and "and 10 more" in card.text and "class 3 \\| x" in card.text
    assert "Energy" not in card.text and "Data my news: not known here" in card.text
    assert [path.name for path in card_images(record, tmp_path)] == ["confusion_matrix.png"]


def test_energy_is_counted_where_the_machine_counts_it(tmp_path: Path) -> None:
    """Files like those of /sys/class/powercap: two packages, one of which overflows, and a part that is counted already."""
    zones = {"intel-rapl:0": ("package-0", 5_000_000), "intel-rapl:1": ("package-1", 9_000_000), "intel-rapl:0:0": ("core", 1_000_000)}
    for zone, (name, microjoules) in zones.items():
        (tmp_path / zone).mkdir()
        for file, content in (("name", name), ("energy_uj", microjoules), ("max_energy_range_uj", 10_000_000)):
            (tmp_path / zone / file).write_text(f"{content}\n")
    meter = EnergyMeter(0, tmp_path)
    for zone, microjoules in (("intel-rapl:0", 7_000_000), ("intel-rapl:1", 500_000), ("intel-rapl:0:0", 3_000_000)):
        (tmp_path / zone / "energy_uj").write_text(str(microjoules))
    assert meter.read() == {"cpu": 2.0 + 1.5} == meter.read()
    (tmp_path / "intel-rapl:1" / "energy_uj").unlink()  # no longer to be read: no figure rather than half of one
    assert meter.read() == {} == EnergyMeter(0, tmp_path).read() == EnergyMeter(0, tmp_path / "none").read()
    sessions: list[dict[str, Any]] = [{"energy_joules": {"cpu": 1.5, "gpu": 2.0}}, {"energy_joules": {"cpu": 2.0}}]
    assert total(sessions) == {"cpu": 3.5} and total([*sessions, {}]) is None is total([])


# -- publishing -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def bad_hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[HubProcess]:
    with HubProcess(tmp_path_factory.mktemp("bad-hub"), faults=True) as hub:
        yield hub


@pytest.fixture
def api(local_hub: Any) -> HfApi:
    return HfApi(endpoint=local_hub.url, token=local_hub.token)


def commits(api: HfApi, repo: str) -> list[str]:
    return [commit.commit_id for commit in api.list_repo_commits(repo)]


def test_publish_tags_and_proves(release: Path, api: HfApi, local_hub: Any, tmp_path: Path) -> None:
    repo = f"{local_hub.user}/published"
    (release / "optimizer.pt").write_bytes(b"state")
    (release / "training_args.bin").write_bytes(b"pickle")
    api.create_repo(repo)
    api.upload_file(path_or_fileobj=b"mine", path_in_repo="notes/diary.md", repo_id=repo)
    api.upload_file(path_or_fileobj=b"hello", path_in_repo="vocab.txt", repo_id=repo)  # of an earlier tokenizer: superseded
    before = commits(api, repo)

    first = publish(release, repo, api=api)
    assert (first.repo, first.tag, first.url) == (repo, "v1", f"{local_hub.url}/{repo}/tree/v1")
    assert commits(api, repo) == [first.commit, *before], "one commit"
    proof = first.proof
    assert (proof.repo, proof.commit, proof.examples, proof.label_agreement) == (repo, first.commit, len(GOLDEN), 1.0)
    assert proof.max_difference < 1e-5 and proof.onnx_difference is not None and proof.onnx_difference < 1e-5
    names = set(api.list_repo_files(repo, revision="v1"))
    assert "notes/diary.md" in names and not names & {"optimizer.pt", "training_args.bin", "vocab.txt"}
    card = Path(api.hf_hub_download(repo, "README.md", revision="v1", cache_dir=tmp_path / "cache")).read_text()
    assert repo in card and "OWNER/NAME" not in card and "OWNER/NAME" in (release / "README.md").read_text()

    # The same again: the same commit and tag, named or not; and still when main has gone on.
    assert publish(release, repo, api=api) == publish(release, repo, tag="v1", api=api) == first
    api.upload_file(path_or_fileobj=b"---\nlicense: mit\n---\nedited by hand", path_in_repo="README.md", repo_id=repo)
    assert publish(release, repo, tag="v1", api=api) == first

    # Another release: v1 is taken, the next free one is v2.
    golden = json.loads((release / "golden.json").read_text())
    (release / "golden.json").write_text(json.dumps(golden | {"examples": golden["examples"][:20]}))
    with pytest.raises(UserError, match=r"'v1' of local/published belongs to another release\. Taken are v1; .*v2"):
        publish(release, repo, tag="v1", api=api)
    with pytest.raises(UserError, match="'main' is a branch"):
        publish(release, repo, tag="main", api=api)
    second = publish(release, repo, message="Fewer examples", api=api)
    assert second.tag == "v2" and second.commit != first.commit and second.proof.examples == 20
    assert prove(repo, "v1", api).commit == first.commit
    assert api.list_repo_commits(repo)[0].title == "Fewer examples"

    # A branch of the next name: a tag of it would be ambiguous, given or not.
    api.create_branch(repo, branch="v3")
    (release / "golden.json").write_text(json.dumps(golden | {"examples": golden["examples"][:10]}))
    with pytest.raises(UserError, match=r"'v3' is a branch .* Choose another, for example v4\."):
        publish(release, repo, tag="v3", api=api)
    assert publish(release, repo, api=api).tag == "v4"


def test_a_tampered_release_fails_its_proof(release: Path, api: HfApi, local_hub: Any) -> None:
    repo = f"{local_hub.user}/tampered"
    weights = load_file(release / "model.safetensors")
    weights["classifier.bias"] += torch.tensor([0.0, 0.0, 0.001, 0.0])
    save_file(weights, release / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(
        UserError, match=r"fails its proof: torch's logits differ .* by up to 0\.001 .*on 26 of 26 texts.*tag v1 was taken back"
    ):
        publish(release, repo, api=api)
    assert api.list_repo_refs(repo).tags == []

    # The ONNX file alone, and a golden file that is none.
    weights["classifier.bias"] -= torch.tensor([0.0, 0.0, 0.001, 0.0])
    save_file(weights, release / "model.safetensors", metadata={"format": "pt"})
    (release / "onnx" / "model.onnx").write_bytes(b"not a graph")
    with pytest.raises(UserError, match="fails its proof: it cannot be loaded"):
        publish(release, repo, tag="v3", api=api)
    shutil.rmtree(release / "onnx")
    published = publish(release, repo, tag="v3", api=api)
    assert published.proof.onnx_difference is None, "and the broken file went from the repository"
    (release / "golden.json").write_text(json.dumps({"format": 1, "max_length": 48, "label_names": LABELS, "examples": []}))
    with pytest.raises(UserError, match=r"golden\.json holds no examples"):
        publish(release, repo, api=api)
    assert [tag.name for tag in api.list_repo_refs(repo).tags] == ["v3"]


def test_a_race_fails_rather_than_overwrites(release: Path, api: HfApi, local_hub: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    repo = f"{local_hub.user}/raced"
    api.create_repo(repo)
    api.upload_file(path_or_fileobj=b"first", path_in_repo="notes.txt", repo_id=repo)
    create_commit = api.create_commit

    def somebody_is_faster(*arguments: Any, **keywords: Any) -> Any:
        HfApi(endpoint=api.endpoint, token=api.token).upload_file(path_or_fileobj=b"theirs", path_in_repo="config.json", repo_id=repo)
        return create_commit(*arguments, **keywords)

    monkeypatch.setattr(api, "create_commit", somebody_is_faster)
    with pytest.raises(UserError, match=r"Somebody else committed .* Nothing is lost: .* run `make push RUN="):
        publish(release, repo, api=api)
    assert api.list_repo_refs(repo).tags == [] and len(commits(api, repo)) >= 2


def test_private_stays_private(release: Path, api: HfApi, local_hub: Any) -> None:
    repo = f"{local_hub.user}/secret"
    published = publish(release, repo, tag="first-cut", private=True, api=api)
    assert api.model_info(repo).private and published.tag == "first-cut"
    assert publish(release, repo, api=api).tag == "v1", "a release may have two tags"
    api.create_repo(f"{local_hub.user}/open")
    with pytest.raises(UserError, match="exists already and is public"):
        publish(release, f"{local_hub.user}/open", private=True, api=api)
    assert api.list_repo_files(f"{local_hub.user}/open") in ([], [".gitattributes"])


def test_names_that_others_use(release: Path, api: HfApi, local_hub: Any, capsys: pytest.CaptureFixture[str]) -> None:
    member = HfApi(endpoint=local_hub.url, token=local_hub.add_user("anna", organizations=("team",)))
    assert publish(release, "team/news", api=member).repo == "team/news"
    with pytest.raises(UserError, match=r"You are anna and may not write to 'team2'\. Allowed are anna/\.\.\., team/\.\.\."):
        publish(release, "team2/news", api=member)

    # Another model there: nothing is written, neither at the end of a training nor before hours are spent on one.
    repo = f"{local_hub.user}/foreign"
    api.create_repo(repo)
    for name in ("pytorch_model.bin", "config.json"):
        api.upload_file(path_or_fileobj=b"{}", path_in_repo=name, repo_id=repo)
    before = commits(api, repo)
    said = rf"{repo} holds a model that is no release of this project \(pytorch_model\.bin\).*hf repos delete-files {repo} 'pytorch_model\.bin'$"
    with pytest.raises(UserError, match=said):
        publish(release, repo, api=api)
    with pytest.raises(UserError, match=said):
        check_before_training(TrainConfig(push_to_hub=True, hub_repo=repo, output_dir="outputs/x"), api)
    assert commits(api, repo) == before
    api.delete_files(repo, ["pytorch_model.bin"])
    assert publish(release, repo, api=api).tag == "v1"

    # A dataset's name is free for a model on the Hub; it may also be a slip, so it is said.
    api.create_repo(f"{local_hub.user}/both", repo_type="dataset")
    capsys.readouterr()
    publish(release, f"{local_hub.user}/both", api=api)
    assert (
        capsys.readouterr().out
        == "note: local/both is a dataset, which stays as it is; the model gets a repository of its own under that name.\n"
    )


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        (Fault("status", method="POST", path="/commit/", status=507), "has no room for local/bad-day (507: "),
        (Fault("status", method="POST", path="objects/batch", status=413), "has no room for local/bad-day (413: "),
        (Fault("status", method="POST", path="/commit/", status=409), "refused local/bad-day for a clash"),
        (Fault("status", method="POST", path="/commit/", status=403), "the token is missing, wrong or may only read"),
        (Fault("refuse", path="/api/repos/create"), "cannot be reached"),
        (Fault("lost", method="POST", path="/commit/"), "cannot be reached"),
        (Fault("refuse", path="/tag/"), "cannot be reached"),
    ],
)
def test_a_bad_day_of_the_hub_loses_nothing(release: Path, bad_hub: HubProcess, fault: Fault, said: str) -> None:
    api = HfApi(endpoint=bad_hub.url, token=bad_hub.token)
    api.delete_repo("local/bad-day", missing_ok=True)
    bad_hub.fault(fault)
    with pytest.raises(UserError, match=re.escape(said)) as error:
        publish(release, "local/bad-day", api=api)
    bad_hub.heal()
    assert "\n" not in str(error.value) and bad_hub.hits(), fault
    assert f"Nothing is lost: the release stays in {release}; run `make push RUN={release.parent} REPO=local/bad-day` again" in str(
        error.value
    )
    made = commits(api, "local/bad-day") if api.repo_exists("local/bad-day") else []
    again = publish(release, "local/bad-day", api=api)
    assert again.tag == "v1" and again.proof.label_agreement == 1
    releases = [commit for commit in api.list_repo_commits("local/bad-day") if commit.title == "Release of run"]
    assert len(releases) == 1 and (fault.kind != "lost" or again.commit in made), "what had arrived is not sent again"


def test_refusals_are_one_line(release: Path, api: HfApi, local_hub: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from pipeline.local_hub.accounts import Accounts

    reading = HfApi(endpoint=local_hub.url, token=Accounts(local_hub.root).add(local_hub.user, role="read"))
    monkeypatch.setenv("HF_TOKEN", "")  # no token from the environment, and an empty HF_HOME has none
    cases = [
        (api, "somebody/else", None, "You are local and may not write to 'somebody'. Allowed are local/"),
        (api, "no-owner", None, "names no owner"),
        (api, "local/--x..y", None, "cannot be a repository"),
        (api, "local/x", "no such tag", "cannot be a tag"),
        (reading, "local/x", None, "may only read"),
        (HfApi(endpoint=local_hub.url), "local/x", None, "needs a token"),
        (HfApi(endpoint=local_hub.url, token="hf_wrong"), "local/x", None, "does not know this token"),
        (HfApi(endpoint="http://127.0.0.1:9", token="hf_x"), "local/x", None, "cannot be reached"),
    ]
    for client, repo, tag, said in cases:
        with pytest.raises(UserError, match=re.escape(said)) as error:
            publish(release, repo, tag=tag, api=client)
        assert "\n" not in str(error.value)
        if tag is None:  # the same, asked before the training
            config = TrainConfig(push_to_hub=True, hub_repo="local/x", output_dir="outputs/x")
            if repo.count("/") == 1:
                config = dataclasses.replace(config, hub_repo=repo)
                with pytest.raises(UserError, match=re.escape(said)):
                    check_before_training(config, client)
    assert not api.repo_exists("local/x")
    with pytest.raises(UserError, match=r"publish later: make push RUN=outputs/x REPO=local/x$"):
        check_before_training(TrainConfig(push_to_hub=True, hub_repo="local/x", output_dir="outputs/x"), cases[-1][0])
    check_before_training(TrainConfig(push_to_hub=True, hub_repo="local/x"), api)
    check_before_training(TrainConfig(), HfApi(endpoint="http://127.0.0.1:9"))  # nothing to ask
    (release / "golden.json").unlink()
    with pytest.raises(UserError, match=r"no release: golden\.json missing"):
        publish(release, "local/x", api=api)


def test_command_line_and_the_cards_own_snippets(release: Path, local_hub: Any, tmp_path: Path) -> None:
    """As a user types it, then what the card tells a stranger to type."""
    environment = {**os.environ, **local_hub.env, "HF_HOME": str(tmp_path / "home"), "OMP_NUM_THREADS": "1"}

    def command(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([sys.executable, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120)

    def hub(*arguments: str) -> subprocess.CompletedProcess[str]:
        return command("-m", "pipeline.hub", *arguments)

    done = hub("--run", str(release.parent), "--repo", "local/typed", "--tag", "v7")
    assert done.returncode == 0, done.stderr
    assert "repository  local/typed\ncommit      " in done.stdout and "tag         v7" in done.stdout and "26 golden texts" in done.stdout

    missing = hub("--run", str(tmp_path / "nowhere"), "--repo", "local/typed")
    assert (
        (missing.returncode, missing.stdout) == (2, "")
        and missing.stderr.startswith("error: No run at")
        and missing.stderr.count("\n") == 1
    )
    (tmp_path / "unfinished").mkdir()
    with pytest.raises(UserError, match="holds no release: its training is not finished"):
        main(["--run", str(tmp_path / "unfinished"), "--repo", "local/typed"])
    with pytest.raises(UserError, match=r"unrecognized arguments: --repository local/typed\. Usage: python -m pipeline.hub --run"):
        main(["--run", str(release.parent), "--repo", "local/typed", "--repository", "local/typed"])

    card = HfApi(endpoint=local_hub.url, token=local_hub.token).hf_hub_download("local/typed", "README.md", cache_dir=tmp_path / "cache")
    with_pipeline, with_onnx = re.findall(r"```python\n(.*?)```", Path(card).read_text(), re.DOTALL)
    answers = []
    for snippet in (with_pipeline, with_onnx):
        shown = command("-c", snippet)
        assert shown.returncode == 0, shown.stderr
        answers.append(eval(shown.stdout.strip().splitlines()[-1]))
    best = max(answers[1], key=answers[1].get)
    assert answers[0][0]["label"] == best and answers[0][0]["score"] == pytest.approx(answers[1][best], abs=1e-3)
