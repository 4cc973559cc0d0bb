"""Is a card true? A real run's release, and copies of it in which one thing each was changed, told apart in words."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, ModelCard
from launching import ROOT
from real_release import DATA, ROWS, put_dataset, trained
from safetensors.torch import load, save

from benchmarks.tiny_release import LABELS
from pipeline.card import figures
from pipeline.hub import publish
from pipeline.verify import _allowed

pytestmark = pytest.mark.timeout(300)
REPO = "local/true-news"
# Each in one process: the imports take longer than the work.
DRIVER = """
import contextlib, io, json, sys
from pipeline.errors import run_entry
from pipeline.verify import main
for arguments in json.loads(sys.stdin.read()):
    sys.argv = ["verify", *arguments]
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = run_entry(main)
    print(json.dumps([code, out.getvalue(), err.getvalue()]), flush=True)
"""

Said = tuple[int, str, str]  # exit code, stdout, stderr
Verify = Callable[[list[list[str]]], list[Said]]


@pytest.fixture(scope="module")
def released(local_hub: Any, tiny_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The files of v1, as they lie on the Hub."""
    folder, api = tmp_path_factory.mktemp("verify"), HfApi(endpoint=local_hub.url, token=local_hub.token)
    assert publish(trained(local_hub, tiny_model_dir) / "release", REPO, api=api).tag == "v1"
    pulled = Path(api.snapshot_download(REPO, revision="v1", cache_dir=folder / "cache"))
    return {str(path.relative_to(pulled)): path.read_bytes() for path in pulled.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def branch(local_hub: Any, released: dict[str, bytes]) -> Callable[..., None]:
    """Make a branch of v1 with some files changed (None: deleted)."""
    api = HfApi(endpoint=local_hub.url, token=local_hub.token)

    def make(name: str, **changed: bytes | str | None) -> None:
        paths = {"card": "README.md", "run": "run.json", "golden": "golden.json", "weights": "model.safetensors", "onnx": "onnx/model.onnx"}
        api.create_branch(REPO, branch=name, revision="v1")
        operations: list[Any] = []
        for key, content in changed.items():
            data = content.encode() if isinstance(content, str) else content
            operations.append(CommitOperationDelete(paths[key]) if data is None else CommitOperationAdd(paths[key], data))
        api.create_commit(REPO, operations, commit_message=name, revision=name)

    return make


@pytest.fixture(scope="module")
def verify(local_hub: Any, tmp_path_factory: pytest.TempPathFactory) -> Verify:
    environment = {**os.environ, **local_hub.env, "HF_HOME": str(tmp_path_factory.mktemp("home"))}

    def run(commands: list[list[str]]) -> list[Said]:
        done = subprocess.run(
            [sys.executable, "-c", DRIVER],
            cwd=ROOT,
            env=environment,
            input=json.dumps(commands),
            capture_output=True,
            text=True,
            timeout=200,
        )
        assert done.returncode == 0, done.stderr
        return [tuple(json.loads(line)) for line in done.stdout.splitlines()]

    return run


def test_the_card_of_a_real_run_is_true(released: dict[str, bytes], verify: Verify) -> None:
    record, card = json.loads(released["run.json"]), ModelCard(released["README.md"].decode())
    assert card.data.datasets == [DATA] and "Data local/tiny-news: cc-by-4.0." in card.text, "the licence on the dataset's own page"
    assert 0.5 < record["test"]["accuracy"] < 1 and record["test"]["examples"] == ROWS["test"]
    whole, sample = verify([["--repo", REPO, "--revision", "v1"], ["--repo", REPO, "--samples", "60"]])
    assert whole[0] == 0 and whole[1].rstrip().endswith("The card is true."), whole
    assert sample[0] == 0 and sample[1].rstrip().endswith("The card is true as far as 60 of 160 rows can tell."), sample
    assert f"test of {DATA} at {record['data']['revision']}" in whole[1]
    rows = {line[:38].rstrip(): line[38:].split(maxsplit=3) for line in whole[1].splitlines() if line.endswith("as claimed")}
    assert set(rows) == set(figures(record["test"])) and len(rows) == 8
    for name, (_, value, _) in figures(record["test"]).items():
        claimed, torch, runtime, _ = rows[name]
        assert float(claimed) == pytest.approx(value, abs=1e-6) == float(torch)
        assert float(runtime) == pytest.approx(value, abs=1e-4)
    assert sample[1].count("not judged") == 2, "a sample says little of likelihood and calibration"
    assert "160/160 texts" not in whole[1] and "Scoring, torch" in whole[2] and "Scoring, ONNX" in whole[2], "a bar on stderr"


def test_what_was_changed_is_told_apart(
    local_hub: Any, released: dict[str, bytes], branch: Callable[..., None], verify: Verify, tmp_path: Path
) -> None:
    card, record, golden = released["README.md"].decode(), json.loads(released["run.json"]), json.loads(released["golden.json"])
    other_data = put_dataset(local_hub, DATA, seed=1)
    accuracy, revision = f"{round(record['test']['accuracy'], 6)}", record["data"]["revision"]

    def changed(**values: Any) -> str:
        return json.dumps(record | values)

    better_card = card.replace(f"value: {accuracy}\n", "value: 0.991\n", 1)
    branch("card", card=better_card)
    branch("tables", card=card.replace(f"| {record['test']['accuracy']:.4f} |", "| 0.9910 |"))
    branch("card-data", card=card.replace(f"revision: {revision}", f"revision: {other_data}"))

    weights = load(released["model.safetensors"])
    warmer = weights | {"classifier.weight": weights["classifier.weight"] * 1.2}
    branch("weights", weights=save(warmer, metadata={"format": "pt"}))
    swapped = {name: tensor[[1, 0, 2, 3]] if name.startswith("classifier.") else tensor for name, tensor in weights.items()}
    for example in golden["examples"]:
        example["logits"][:2] = example["logits"][1::-1]
    branch("both", weights=save(swapped, metadata={"format": "pt"}), golden=json.dumps(golden), onnx=None)
    graph = onnx.load_from_string(released["onnx/model.onnx"])
    bias = next(tensor for tensor in graph.graph.initializer if list(tensor.dims) == [4])
    bias.CopyFrom(onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(bias) + np.float32([0, 9, 0, 0]), bias.name))
    branch("onnx", onnx=graph.SerializeToString())
    branch("no-model", weights=b"these are no tensors")

    claim = better_card.replace(f"| {record['test']['accuracy']:.4f} |", "| 0.9910 |", 1)
    branch("claim", card=claim, run=changed(test=record["test"] | {"accuracy": 0.991}))
    for name, commit in (("other-data", other_data), ("lost-data", "f" * 40)):
        branch(name, card=card.replace(revision, commit), run=changed(data=record["data"] | {"revision": commit}))
    local = changed(data=record["data"] | {"revision": "sha256:abc", "dataset": ".../news"})
    branch("local-data", card=card.replace(revision, "sha256:abc"), run=local)
    branch("local-lie", card=better_card.replace(revision, "sha256:abc"), run=local)
    branch("no-release", run=None)
    branch("damaged", run="{")
    (tmp_path / "train.csv").write_text("text,label\n" + "a b c,World\nd e f,Sports\n" * 20)
    (tmp_path / "test.csv").write_text("text,label\na b,World\n")

    expected: list[tuple[list[str], int, str]] = [
        (["card"], 1, rf"changed after the run: Accuracy is 0\.991 in the card, {accuracy}\d* in run\.json\.$"),
        (["tables"], 1, r"changed after the run: its tables lack the row `\| 0\.\d{4} \| 0\.\d{4} \| 0\.\d{4} \| 0\.\d{4} \|`\.$"),
        (["card-data"], 1, f"changed after the run: the dataset's revision is {other_data} in the card, {revision} in run.json"),
        (["weights"], 1, "weights are not those that were released: torch's logits differ from the golden ones"),
        (["both"], 1, r"does not reach Accuracy, Macro F1, .*or the model was replaced together with its golden\.json\.$"),
        (["both", "--samples", "80"], 1, "does not reach Accuracy, Macro F1"),
        (["onnx"], 1, r"onnx/model\.onnx is not the model of model\.safetensors: ONNX's logits differ"),
        (["no-model"], 1, "What lies there is no model: it cannot be loaded"),
        (["claim"], 1, r"the model does not reach Accuracy: the figures were made up or belong to other rows"),
        (["other-data"], 1, r"The test rows are not those that were scored: {'Business': \d+"),
        (["lost-data"], 2, f"dataset local/tiny-news has no revision '{'f' * 40}'"),
        (["local-data"], 2, r"scored on its author's own files .* Give the same files with --dataset\."),
        (["local-data", "--dataset", str(tmp_path)], 2, r"is not the data that was scored: sha256:\w{64} here, sha256:abc in run\.json"),
        (["local-lie"], 1, r"^Its test rows were not scored: .* Give the same files with --dataset\.$"),
        (["no-release"], 2, r"no release of this project: it has no run\.json"),
        (["damaged"], 2, r"cannot be checked: its card or run\.json is damaged"),
        (["v9"], 2, "model local/true-news has no revision 'v9'"),
        (["v1", "--samples", "0"], 2, "samples is 0: allowed is 1 or more"),
        (["v1", "--sample", "9"], 2, r"unrecognized arguments: --sample 9\. Usage: python -m pipeline\.verify"),
    ]
    answers = verify([["--repo", REPO, "--revision", *arguments] for arguments, _, _ in expected])
    for (arguments, code, said), (found, out, err) in zip(expected, answers, strict=True):
        assert found == code, (arguments, found, out, err)
        last = (out if code == 1 else err).rstrip().rpartition("\n")[2]
        assert re.search(said, last), (arguments, found, out, err)
        assert "The card is not true. " in out if code == 1 else last.startswith("error: "), (arguments, last)
    shown = dict(zip([arguments[0] for arguments, _, _ in expected], [out for _, out, _ in answers], strict=True))
    assert re.search(rf"^Accuracy +0\.991000 +{accuracy}\d* +{accuracy}\d* +NOT TRUE$", shown["claim"], re.MULTILINE)


def test_an_honest_sample_is_believed_and_a_liar_is_not() -> None:
    """Against the confusion matrix of a real AG News run: 300 honest samples of 200 rows each, and a model 10 points worse."""
    confusion = np.array([[856, 31, 39, 24], [8, 934, 4, 4], [32, 5, 817, 96], [15, 5, 86, 844]])
    taken = np.array([50, 50, 50, 50])
    allowed, whole = _allowed(confusion, taken, LABELS), np.trace(confusion) / confusion.sum()
    assert set(allowed) == {"Accuracy", "Macro F1", *(f"F1 of {name}" for name in LABELS)}
    random = np.random.default_rng(7)
    drawn = [sum(random.multivariate_hypergeometric(confusion[i], 50)[i] for i in range(4)) / 200 for _ in range(300)]
    assert max(abs(value - whole) for value in drawn) <= allowed["Accuracy"] < 0.17
    everything = _allowed(confusion, confusion.sum(axis=1), LABELS)
    assert everything["Negative log-likelihood (nats)"] < 0.002 and everything["Accuracy"] == pytest.approx(0.001 + 2 / 3800)
