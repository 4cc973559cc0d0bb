"""A release as the service reads it: the tokens transformers would make, an answer that company does not change, and
every broken release refused in one line."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from serving import LABELS, MAX_LENGTH, make_release, make_text, variant

from benchmarks.tiny_release import tiny_release
from serve.engine import Engine, OnnxEngine, OpenVinoEngine, TorchEngine, known, open_engine, pad
from serve.errors import UserError
from serve.machine import _cgroup_quota, allowed_cores, computes_bf16
from serve.model import Model, load
from serve.proof import prove
from serve.release import pull
from serve.settings import ENGINES, Settings
from serve.text import TextTokenizer, softmax

# Where bf16 is emulated it is no candidate.
NAMES = [name for name in ENGINES if name != "auto" and (computes_bf16() or not name.endswith("bf16"))]


@pytest.fixture(scope="module")
def release_dir(encoder_dir: Path) -> Path:
    return make_release(encoder_dir)


@pytest.fixture(scope="module")
def models(release_dir: Path, encoder_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Model]:
    # Random weights amplify bf16's rounding more than trained ones do: with a sharp head on top the proof turns bf16 away.
    # A label of the 40 may flip that is nearly a tie; the probabilities have to hold all the same.
    calm_dir = tiny_release(encoder_dir, tmp_path_factory.mktemp("calm"), sharpness=1)
    options: dict[str, Any] = {"device": "cpu", "threads": 2, "min_agreement": 0.9}
    folders = {name: str(calm_dir if name.endswith("bf16") else release_dir) for name in NAMES}
    return {name: load(pull(folder), Settings(folder, engine=name, **options)) for name, folder in folders.items()}


# ---- text to tokens

EXAMPLES = [
    "Oil prices rise", " ", "", "\u200b", "naïve café", "日本の株価", "العربية من اليمين", "😀 emoji 👩‍👩‍👧", "[SEP] [MASK] in a text", "a" * 5000,
    "x\ty\r\nz", "don't stop-now: 3.14%", "\ufffd\u0000\u00ad", "Ⅷ ﬁ ½", make_text(500, 0),
]  # fmt: skip


@pytest.mark.parametrize("length", [4, MAX_LENGTH, 512])
def test_tokens_are_those_of_transformers(encoder_dir: Path, tmp_path: Path, length: int) -> None:
    from transformers import AutoTokenizer

    reference = AutoTokenizer.from_pretrained(encoder_dir, model_max_length=length)
    reference.save_pretrained(tmp_path / "saved")
    for folder in (encoder_dir, tmp_path / "saved"):  # the encoder's own file pads to 128 and cuts there
        ours = TextTokenizer(folder, fallback_length=512)
        ours = ours if folder != encoder_dir else TextTokenizer(_with_length(folder, tmp_path / "own", length), 512)
        assert ours.max_length == length
        expected = [reference(text, truncation=True)["input_ids"] for text in EXAMPLES]
        found = ours.encode(EXAMPLES)
        assert [tokens.ids for tokens in found] == expected
        assert [tokens.truncated for tokens in found] == [len(reference(text)["input_ids"]) > length for text in EXAMPLES]
        assert [tokens.empty for tokens in found] == [len(ids) == 2 for ids in expected]


def _with_length(folder: Path, copy: Path, length: int) -> Path:
    copy.mkdir()
    shutil.copy(folder / "tokenizer.json", copy)
    config = json.loads((folder / "tokenizer_config.json").read_text())
    (copy / "tokenizer_config.json").write_text(json.dumps(config | {"model_max_length": length}))
    return copy


@settings(max_examples=60, deadline=None)
@given(text=st.text(st.characters(exclude_categories=["Cs"]), max_size=300))
def test_tokens_of_any_text_are_those_of_transformers(release_dir: Path, text: str) -> None:
    reference, ours = _both_tokenizers(release_dir)
    assert ours.encode([text])[0].ids == reference(text, truncation=True)["input_ids"]


_TOKENIZERS: dict[Path, tuple[Any, TextTokenizer]] = {}


def _both_tokenizers(folder: Path) -> tuple[Any, TextTokenizer]:
    from transformers import AutoTokenizer

    return _TOKENIZERS.setdefault(folder, (AutoTokenizer.from_pretrained(folder), TextTokenizer(folder, 512)))


def test_a_tokenizer_without_a_limit_takes_the_models(release_dir: Path, tmp_path: Path) -> None:
    folder = variant(release_dir, tmp_path / "r", tokenizer_config={"model_max_length": int(1e30)})
    model = load(pull(str(folder)), Settings(str(folder)))
    assert model.tokenizer.max_length == MAX_LENGTH  # its positions


# ---- engines


@pytest.mark.parametrize("name", NAMES)
def test_an_engine_proves_itself_and_answers(models: dict[str, Model], name: str) -> None:
    model = models[name]
    precision = "bf16" if name.endswith("bf16") else "fp32"
    assert (model.engine.name, model.engine.device, model.engine.precision) == (name, "cpu", precision)
    assert model.proof.examples == 40
    assert model.proof.agreement == 1 or (precision == "bf16" and model.proof.agreement >= 0.9)
    assert model.proof.max_probability_change < (1e-4 if precision == "fp32" else 0.03)
    assert model.release.labels == LABELS
    assert re.fullmatch("folder-[0-9a-f]{12}", model.release.commit)


@settings(max_examples=40, deadline=None)
@given(lengths=st.lists(st.integers(1, 60), min_size=1, max_size=24), seed=st.integers(0, 10_000))
@pytest.mark.parametrize("name", NAMES)
def test_company_does_not_change_an_answer(models: dict[str, Model], name: str, lengths: list[int], seed: int) -> None:
    model = models[name]
    texts = [text.ids for text in model.tokenizer.encode([make_text(n, seed + i) for i, n in enumerate(lengths)])]
    together = softmax(model.engine.logits(texts))
    alone = softmax(np.concatenate([model.engine.logits([text]) for text in texts]))
    most = 0.01 if name.endswith("bf16") else 1e-4
    assert np.abs(together - alone).max() <= most
    # A tie may fall either way; the label must not differ where there is none.
    ranked = np.sort(alone, axis=1)
    clear = ranked[:, -1] - ranked[:, -2] > 2 * most
    assert (together.argmax(1) == alone.argmax(1))[clear].all()


def test_padding_is_masked() -> None:
    ids, mask = pad([[5, 6, 7], [8]], pad_id=1)
    assert ids.tolist() == [[5, 6, 7], [8, 1, 1]]
    assert mask.tolist() == [[1, 1, 1], [1, 0, 0]]
    assert ids.dtype == mask.dtype == np.int64


def test_a_graph_gets_only_the_inputs_it_has(release_dir: Path, tmp_path: Path) -> None:
    import onnx
    from onnx import TensorProto, helper

    def engines(path: Path) -> list[Engine]:
        return [OnnxEngine("onnxruntime", path, 0, 1), OpenVinoEngine("openvino-fp32", path, 0, MAX_LENGTH, "fp32", 1, tmp_path)]

    path = release_dir / "onnx" / "model.onnx"
    ids = [[101, 5, 6, 102], [101, 102]]
    graph = onnx.load(str(path))
    extra = helper.make_tensor_value_info("token_type_ids", TensorProto.INT64, ["rows", "columns"])
    graph.graph.input.append(extra)  # as an export of BERT has it
    onnx.save(graph, str(tmp_path / "three.onnx"))
    for with_two, with_three in zip(engines(path), engines(tmp_path / "three.onnx"), strict=True):
        assert np.allclose(with_three.logits(ids), with_two.logits(ids), atol=1e-5)
    extra.name = "pixel_values"
    del graph.graph.input[-1]
    graph.graph.input.append(extra)
    onnx.save(graph, str(tmp_path / "other.onnx"))
    with pytest.raises(ValueError, match="pixel_values"):
        OnnxEngine("onnxruntime", tmp_path / "other.onnx", 0, 1)
    with pytest.raises(ValueError, match="pixel_values"):
        OpenVinoEngine("openvino-fp32", tmp_path / "other.onnx", 0, MAX_LENGTH, "fp32", 1, tmp_path)


def test_the_engines_follow_settings_and_release(release_dir: Path, tmp_path: Path) -> None:
    def names(folder: Path, **options: Any) -> list[str]:
        return known(Settings(str(folder), device="cpu", **options), pull(str(folder)))

    assert sorted(names(release_dir)) == ["onnxruntime", *(["openvino-bf16"] if computes_bf16() else []), "openvino-fp32"]
    assert names(release_dir, engine="torch-fp32") == ["torch-fp32"]
    without = variant(release_dir, tmp_path / "without", onnx=None)
    assert names(without)[0] == "torch-fp32"
    with pytest.raises(UserError, match="no onnx/model"):
        names(without, engine="openvino-fp32")
    neither = variant(without, tmp_path / "neither", model=None)
    with pytest.raises(UserError, match="no model"):
        names(neither)


def test_cuda_is_used_where_it_is_and_refused_where_not(release_dir: Path) -> None:
    import torch

    release = pull(str(release_dir))
    if not torch.cuda.is_available():
        with pytest.raises(UserError, match="--device is cuda and torch finds no GPU"):
            known(Settings(str(release_dir), device="cuda"), release)
        return
    model = load(release, Settings(str(release_dir)))
    assert model.engine.name.startswith("torch-") and model.engine.device == "cuda"


def test_threads_are_the_cores_really_allowed(tmp_path: Path) -> None:
    import os

    assert 1 <= allowed_cores() <= len(os.sched_getaffinity(0))
    own = tmp_path / "own"
    own.write_text("0::/user.slice/job.service\n")
    job = tmp_path / "user.slice" / "job.service"
    job.mkdir(parents=True)
    assert _cgroup_quota(tmp_path, own) == float("inf")
    (job / "cpu.max").write_text("max 100000\n")
    assert _cgroup_quota(tmp_path, own) == float("inf")
    (tmp_path / "cpu.max").write_text("250000 100000\n")  # a container's own root
    assert _cgroup_quota(tmp_path, own) == _cgroup_quota(tmp_path, tmp_path / "none") == 2.5
    (tmp_path / "user.slice" / "cpu.max").write_text("150000 100000\n")  # and a limit on the way holds too
    assert _cgroup_quota(tmp_path, own) == 1.5
    (tmp_path / "cpu.max").unlink()
    (tmp_path / "user.slice" / "cpu.max").unlink()
    own.write_text("4:memory:/a\n3:cpu,cpuacct:/\n")
    (tmp_path / "cpu").mkdir()
    (tmp_path / "cpu" / "cpu.cfs_quota_us").write_text("50000\n")
    (tmp_path / "cpu" / "cpu.cfs_period_us").write_text("100000\n")
    assert _cgroup_quota(tmp_path, own) == 1.0  # half a core is still one thread


# ---- proof


class Shifted:
    """An engine that is wrong by a known amount."""

    def __init__(self, engine: Engine, shift: float) -> None:
        self.engine, self.shift, self.batch_tokens, self.lanes = engine, shift, engine.batch_tokens, 1

    def logits(self, texts: Any) -> Any:
        logits = self.engine.logits(texts)
        logits[:, 0] += self.shift
        return logits


def test_the_proof_measures_what_is_wrong(models: dict[str, Model]) -> None:
    model = models["onnxruntime"]
    golden = [text.ids for text in model.tokenizer.encode(model.release.golden_texts)]
    expected = model.release.golden_logits
    for shift in (0.05, 1.0, float("nan")):
        proof = prove(Shifted(model.engine, shift), golden, expected)  # type: ignore[arg-type]
        shifted = expected + np.array([shift, 0, 0, 0])
        change = np.abs(softmax(shifted) - softmax(expected)).max()
        assert proof.max_probability_change == (pytest.approx(change, abs=1e-4) if np.isfinite(shift) else 1.0)
        if np.isfinite(shift):
            assert proof.agreement == (shifted.argmax(1) == expected.argmax(1)).mean()


def test_an_engine_whose_answers_depend_on_the_company_is_turned_away(models: dict[str, Model]) -> None:
    class Sociable(Shifted):
        def logits(self, texts: Any) -> Any:
            logits = self.engine.logits(texts)
            return np.add(logits, [self.shift * (len(texts) - 1), 0, 0, 0])

    model = models["onnxruntime"]
    golden = [text.ids for text in model.tokenizer.encode(model.release.golden_texts)]
    lax = Settings("x", max_probability_change=1, min_agreement=0)
    assert prove(model.engine, golden, model.release.golden_logits).complaint(lax) is None
    proof = prove(Sociable(model.engine, 0.02), golden, model.release.golden_logits)  # type: ignore[arg-type]
    assert "with the texts it is batched with" in (proof.complaint(lax) or "")


def test_torch_serves_where_no_engine_on_the_onnx_file_does(release_dir: Path, tmp_path: Path) -> None:
    folder = variant(release_dir, tmp_path / "r", onnx="not a graph")
    model = load(pull(str(folder)), Settings(str(folder), device="cpu"))
    assert model.engine.name == "torch-fp32" and len(model.rejected) >= 2


def test_a_gpu_that_cannot_have_the_model_leaves_it_to_the_onnx_file(
    release_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """There is none here, so it is as if it had no room; and where a release has no weights for torch, it is not asked."""
    monkeypatch.setattr("serve.engine.on_gpu", lambda settings: settings.engine == "auto")
    model = load(pull(str(release_dir)), Settings(str(release_dir)))
    assert model.engine.device == "cpu" and not model.engine.name.startswith("torch") and "torch-fp32" in model.rejected[0]
    without = variant(release_dir, tmp_path / "r")
    for path in without.glob("model*.safetensors*"):
        path.unlink()
    model = load(pull(str(without)), Settings(str(without)))
    assert model.engine.device == "cpu" and not any("torch" in line for line in model.rejected)


def test_the_limits_of_the_proof_can_be_set(release_dir: Path, tmp_path: Path) -> None:
    golden = json.loads((release_dir / "golden.json").read_text())
    for example in golden["examples"]:
        example["logits"][0] += 1.0
    folder = variant(release_dir, tmp_path / "r", golden={"examples": golden["examples"]})
    with pytest.raises(UserError, match=r"a probability is off by 0\.\d+ \(allowed: at most 0.03\)"):
        load(pull(str(folder)), Settings(str(folder)))
    lax = Settings(str(folder), min_agreement=0.5, max_probability_change=0.5)
    assert 0.03 < load(pull(str(folder)), lax).proof.max_probability_change < 0.5


def test_an_engine_that_fails_its_proof_makes_way_for_the_next(release_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import serve.model

    def opened(name: str, *arguments: Any) -> Any:
        engine = open_engine(name, *arguments)
        return Shifted(engine, 5.0) if name == "openvino-fp32" else engine

    monkeypatch.setattr(serve.model, "open_engine", opened)
    folder = variant(release_dir, tmp_path / "r", model="no weights")
    release, choice = pull(str(folder)), Settings(str(folder), device="cpu")
    model = load(release, choice, ["torch-fp32", "openvino-fp32", "onnxruntime"])
    assert model.engine.name == "onnxruntime"
    assert [line.split(":")[0] for line in model.rejected] == ["torch-fp32", "openvino-fp32"]
    earlier = model.proof
    assert load(release, choice, ["onnxruntime"], proven=earlier).proof is earlier
    with pytest.raises(UserError, match=r"openvino-fp32: .* is off by"):  # a spot check is a check
        load(release, choice, ["openvino-fp32"], proven=earlier)


# ---- releases that cannot be served

BAD: dict[str, tuple[dict[str, Any], str]] = {
    "no golden": ({"golden": None}, "it has no golden.json"),
    "no tokenizer": ({"tokenizer": None, "tokenizer_config": None}, "it has no tokenizer.json, tokenizer_config.json"),
    "other task": ({"config": {"architectures": ["DistilBertForMaskedLM"]}}, "is a DistilBertForMaskedLM: only text classifiers"),
    "no architecture": ({"config": {"architectures": None}}, "only text classifiers"),
    "multi-label": ({"config": {"problem_type": "multi_label_classification"}}, "is for multi label classification"),
    "one label": ({"config": {"id2label": {"0": "all"}}}, "two or more different"),
    "labels twice": ({"config": {"id2label": {"0": "a", "1": "a"}}}, "two or more different"),
    "labels not numbered": ({"config": {"id2label": {"x": "a", "y": "b"}}}, "config.json of the release cannot be read"),
    "config no JSON": ({"config": "{"}, "config.json of the release cannot be read"),
    "config a list": ({"config": "[]"}, "config.json of the release cannot be read"),
    "golden too deep": ({"golden": "[" * 100_000}, "golden.json of the release cannot be read"),
    "golden of the future": ({"golden": {"format": 2}}, "is of format 2"),
    "golden other labels": ({"golden": {"label_names": ["a", "b", "c", "d"]}}, "names other labels"),
    "golden empty": ({"golden": {"examples": []}}, "golden.json of the release cannot be read"),
    "golden ragged": ({"golden": {"examples": [{"text": "a", "logits": [1]}]}}, "golden.json of the release cannot be read"),
    "golden not a number": ({"golden": {"examples": [{"text": "a", "logits": [1, 2, 3, float("nan")]}]}}, "golden.json of the release cannot be read"),
    "tokenizer broken": ({"tokenizer": "{}"}, "tokenizer of the release cannot be read"),
    "ONNX and weights broken": ({"onnx": "not a graph", "model": "no weights"}, "did not prove itself"),
    "weights broken": ({"onnx": None, "model": "no weights"}, "did not prove itself"),
    "other weights": ({"golden": {"examples": [{"text": "a", "logits": [9, 0, 0, 0]}]}}, "did not prove itself"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_a_bad_release_is_refused_in_one_line(release_dir: Path, tmp_path: Path, case: str) -> None:
    changes, said = BAD[case]
    folder = variant(release_dir, tmp_path / "bad", **changes)
    with pytest.raises(UserError, match=re.escape(said)) as error:
        load(pull(str(folder)), Settings(str(folder)))
    assert "\n" not in str(error.value) and len(str(error.value)) < 700


def test_what_is_neither_folder_nor_hub_id_is_refused(release_dir: Path, tmp_path: Path) -> None:
    for model in (str(tmp_path / "gone"), "./gone", "a/b/c", "~/gone-too"):
        with pytest.raises(UserError, match="no folder"):
            pull(model)
    with pytest.raises(UserError, match="a folder has no revisions"):
        pull(str(release_dir), "v1")
    with pytest.raises(UserError, match="neither a folder here nor a Hub id"):
        pull("not a name!")


def test_torch_loads_no_pickle(release_dir: Path, tmp_path: Path) -> None:
    import torch

    folder = variant(release_dir, tmp_path / "pickled", onnx=None, model=None)
    torch.save({}, folder / "pytorch_model.bin")
    with pytest.raises(UserError, match="no pickle"):
        load(pull(str(folder)), Settings(str(folder)))
    with pytest.raises(OSError):
        TorchEngine("torch-fp32", folder, 0, "cpu", "fp32", 1)
