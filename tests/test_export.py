"""The ONNX file: same logits as torch, portable, and made without touching the model or the terminal."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir
import pytest
import torch
from transformers import AutoTokenizer, BertConfig, BertForSequenceClassification, DistilBertConfig, DistilBertForSequenceClassification

from pipeline import export
from pipeline.export import ExportError, export_onnx, largest_difference, onnx_session, reference_copy

TEXTS = ["Short.", "A somewhat longer text about a match that nobody won, and the weather.", "word " * 60]


def tiny(kind: str) -> Any:
    torch.manual_seed(3)
    if kind == "bert":
        sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48}
        return BertForSequenceClassification(BertConfig(**sizes, num_labels=4))
    return DistilBertForSequenceClassification(DistilBertConfig(dim=32, n_layers=2, n_heads=2, hidden_dim=48, num_labels=4))


@pytest.mark.parametrize("kind", ["distilbert", "bert"])
def test_export(kind: str, encoder_dir: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny(kind).train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    random_state = torch.get_rng_state()
    capfd.readouterr()
    path = export_onnx(model, tmp_path / "onnx" / "model.onnx", max_length=32)

    printed = capfd.readouterr()
    assert printed.out.startswith("ONNX export: ") and printed.out.count("\n") == 1, "the exporter's chatter is not for the user"
    assert not printed.err
    assert model.training and all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert torch.equal(random_state, torch.get_rng_state())
    assert [file.name for file in path.parent.iterdir()] == ["model.onnx"], "one file, its weights inside"

    graph = onnx.load(path, load_external_data=False).graph
    int64, float32 = onnx.TensorProto.INT64, onnx.TensorProto.FLOAT
    assert {i.name: (i.type.tensor_type.elem_type, axes(i)) for i in graph.input} == {
        "input_ids": (int64, ["batch", "sequence"]),
        "attention_mask": (int64, ["batch", "sequence"]),
    }
    assert [(o.name, o.type.tensor_type.elem_type, axes(o)) for o in graph.output] == [("logits", float32, ["batch", 4])]
    assert {node.domain for node in graph.node} <= {"", "ai.onnx"}, "OpenVINO and browsers know only the standard's operators"

    # Real texts, padded; the BERT tokenizer's token_type_ids go to torch alone and are all zero there.
    tokenizer = AutoTokenizer.from_pretrained(encoder_dir)
    tokens = tokenizer(TEXTS, truncation=True, max_length=32, padding=True, return_tensors="pt")
    arguments = dict(tokens) if kind == "bert" else {name: tokens[name] for name in ("input_ids", "attention_mask")}
    with torch.no_grad():
        expected = model.eval()(**arguments).logits.numpy()
    (logits,) = onnx_session(path).run(["logits"], {name: tokens[name].numpy() for name in ("input_ids", "attention_mask")})
    assert logits.dtype == np.float32 and np.abs(logits - expected).max() < 1e-5
    assert largest_difference(reference_copy(model), path, max_length=32) < 1e-5

    # Were the graph another model's, it would be refused and the file removed.
    torch.nn.init.normal_(model.classifier.bias, std=0.1)
    monkeypatch.setattr(export, "_exported_program", lambda reference, max_length: onnx_ir.load(path))
    with pytest.raises(ExportError, match="differ from torch's"):
        export_onnx(model, tmp_path / "wrong.onnx", max_length=32)
    assert not (tmp_path / "wrong.onnx").exists()


def axes(value: Any) -> list[Any]:
    return [axis.dim_param or axis.dim_value for axis in value.type.tensor_type.shape.dim]


def test_reference_copy_sheds_what_training_hung_on() -> None:
    """Accelerate leaves bf16 autocast around `forward`; a release must hold the logits of the plain fp32 model."""
    from accelerate import Accelerator

    model = tiny("distilbert").eval()
    ids = torch.randint(5, 30000, (3, 20))
    with torch.no_grad():
        plain = model(input_ids=ids).logits
        prepared = Accelerator(cpu=True, mixed_precision="bf16").prepare_model(model)
        rounded = prepared(input_ids=ids).logits
        assert not torch.equal(plain, rounded), "autocast is on"
        copy = reference_copy(prepared.train())
        assert torch.equal(copy(input_ids=ids).logits, plain)
    assert prepared.training and not copy.training


class Undecided(DistilBertForSequenceClassification):
    """Goes one way or another by what is in the batch: no graph can hold that."""

    def forward(self, input_ids: Any = None, **rest: Any) -> Any:
        if int(input_ids.sum()) % 2:
            input_ids = input_ids + 1
        return super().forward(input_ids=input_ids, **rest)


def test_a_model_that_cannot_be_exported_is_one_clear_line(tmp_path: Path) -> None:
    model = Undecided(DistilBertConfig(dim=16, n_layers=1, n_heads=2, hidden_dim=16, vocab_size=100, num_labels=2))
    with pytest.raises(ExportError, match="Undecided cannot be exported to ONNX") as error:
        export_onnx(model, tmp_path / "model.onnx", max_length=16)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "model.onnx").exists()
