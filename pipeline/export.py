"""One portable ONNX file from the trained model, compared with the model before anybody else sees it.

The file is fp32 with its weights inside, has the inputs `input_ids` and `attention_mask` `(batch, sequence)` int64, the
output `logits` `(batch, classes)` float32, and only operators of the ONNX standard, so that ONNX Runtime, OpenVINO and
browsers all run it. The exporter's own fusions (`ort_fusions`) would put `com.microsoft` operators in, for no gain:
ONNX Runtime fuses the standard ones itself when it loads them.
"""

from __future__ import annotations

import contextlib
import io
import logging
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from pipeline.errors import UserError

INPUTS = ("input_ids", "attention_mask")
OPSET = 18  # what the exporter speaks natively; read by the runtimes of the last three years
TOLERANCE = 1e-4  # largest allowed difference of a logit from torch; about 1e-7 is usual


class ExportError(UserError):
    """This model does not become an ONNX file that gives the same logits."""


def reference_copy(model: nn.Module) -> Any:
    """The model as a client will load it: a fresh fp32 instance on the CPU, in eval mode, with the same weights.

    A copy of configuration and weights alone leaves behind what training hung onto the instance: the DDP wrapper,
    hooks, and the autocast that Accelerate wraps around `forward` and that would round the logits to bf16.
    """
    source: Any = getattr(model, "module", model)
    config = type(source.config).from_dict(source.config.to_dict())
    # Straight from the class, so with freshly drawn weights: they are overwritten, but the caller's random state is not.
    with torch.random.fork_rng(devices=[]):
        copy = type(source)(config)
    copy.float().load_state_dict({name: tensor.detach().cpu() for name, tensor in source.state_dict().items()})
    return copy.eval()


def export_onnx(model: nn.Module, path: Path, max_length: int) -> Path:
    """Write `model` as ONNX to `path` and prove that it gives torch's logits for texts of 2 to `max_length` tokens.

    The model itself is not touched: device, mode and weights stay as they are. Prints one line with size, seconds and
    the largest difference.

    Raises:
        ExportError: the exporter does not know the architecture, or the file's logits differ by 1e-4 or more.
    """
    import onnx

    path = Path(path)
    started = time.perf_counter()
    reference = reference_copy(model)
    try:
        with _quiet():
            program = _exported_program(reference, max_length)
    except Exception as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ExportError(f"{type(reference).__name__} cannot be exported to ONNX: {reason[:300]}") from error
    proto = _named_axes(program)
    path.parent.mkdir(parents=True, exist_ok=True)
    onnx.save_model(proto, path, save_as_external_data=False)
    onnx.checker.check_model(str(path))
    difference = largest_difference(reference, path, max_length)
    # `not <`: a NaN must fail too.
    if not difference < TOLERANCE:
        path.unlink()
        raise ExportError(f"The ONNX file's logits differ from torch's by {difference:.1e}; allowed is less than {TOLERANCE:.0e}.")
    print(
        f"ONNX export: {path.stat().st_size / 1e6:.1f} MB in {time.perf_counter() - started:.1f} s, "
        f"largest difference from torch's logits {difference:.1e}",
        flush=True,
    )
    return path


def largest_difference(reference: nn.Module, path: Path, max_length: int) -> float:
    """Largest absolute difference of a logit, torch against ONNX Runtime, over batches of 1, 2 and 7 padded rows and
    lengths from 2 to `max_length` tokens. `reference` is an fp32 CPU model in eval mode."""
    session = onnx_session(path)
    random = np.random.default_rng(0)
    worst = 0.0
    for length in sorted({2, 3, max(2, max_length // 2), max_length}):
        for batch in (1, 2, 7):
            ids, mask = _sample(reference, random, batch, length)
            with torch.inference_mode():
                expected = reference(input_ids=torch.from_numpy(ids), attention_mask=torch.from_numpy(mask)).logits.numpy()
            (logits,) = session.run(["logits"], {"input_ids": ids, "attention_mask": mask})
            worst = float(np.max([worst, np.abs(logits - expected).max()]))  # np.max keeps a NaN
    return worst


def onnx_session(path: Path) -> Any:
    """An ONNX Runtime session on the CPU that uses the cores this process may use, and does not spin while it waits."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def _exported_program(reference: Any, max_length: int) -> Any:
    from transformers.exporters import OnnxConfig, OnnxExporter

    # Two rows: torch.export takes a dimension of size 1 for a constant. Padding in it: without any, some models take
    # a shortcut that ignores the mask.
    ids, mask = _sample(reference, np.random.default_rng(0), batch=2, length=min(16, max_length))
    batch, sequence = torch.export.Dim("batch"), torch.export.Dim("sequence", min=2, max=max_length)
    config = OnnxConfig(opset_version=OPSET, dynamic_shapes={name: {0: batch, 1: sequence} for name in INPUTS})
    inputs: dict[str, Any] = dict(zip(INPUTS, (torch.from_numpy(ids), torch.from_numpy(mask)), strict=True))
    return OnnxExporter().export(reference, inputs, config).program


def _sample(model: Any, random: np.random.Generator, batch: int, length: int) -> tuple[np.ndarray, np.ndarray]:
    """Random token ids and their mask, each `(batch, length)` int64; all rows but the first end in padding."""
    padding = model.config.pad_token_id or 0
    ids = random.integers(0, model.config.vocab_size, (batch, length))
    ids[ids == padding] = (padding + 1) % model.config.vocab_size  # RoBERTa numbers positions by what is not padding
    mask = np.ones_like(ids)
    for row in range(1, batch):
        mask[row, random.integers(1, length + 1) :] = 0
    if batch == 2:
        mask[1, max(1, length // 2) :] = 0
    return np.where(mask == 1, ids, padding), mask


def _named_axes(program: Any) -> Any:
    """The exporter's in-memory graph as a protobuf whose axes are called batch and sequence instead of s43 and s53.

    Raises ExportError unless inputs and output are exactly what every client of a release relies on.
    """
    import onnx_ir

    proto = onnx_ir.to_proto(program)
    graph = proto.graph
    inputs, outputs = tuple(i.name for i in graph.input), tuple(o.name for o in graph.output)
    if set(inputs) != set(INPUTS) or outputs != ("logits",):
        raise ExportError(f"The exported graph takes {inputs} and gives {outputs}; expected is {INPUTS} and ('logits',).")
    foreign = {node.domain for node in graph.node} - {"", "ai.onnx"}
    if foreign:
        raise ExportError(f"The exported graph uses operators outside the ONNX standard: {sorted(foreign)}.")
    batch, sequence = (axis.dim_param for axis in graph.input[0].type.tensor_type.shape.dim)
    names = {batch: "batch", sequence: "sequence"}
    for value in (*graph.input, *graph.output, *graph.value_info):
        for axis in value.type.tensor_type.shape.dim:
            if axis.dim_param in names:
                axis.dim_param = names[axis.dim_param]
    return proto


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """The exporter announces every stage, on stdout, in logs and as warnings; none of it is for the user."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
