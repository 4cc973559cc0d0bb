"""What computes logits: OpenVINO or ONNX Runtime on the release's one ONNX file, or torch on its safetensors.

Libraries are imported only for the engine that is opened. `known` lists what could serve a release here, the one to
begin with first; which of them is fastest is measured by `serve.choice`, and none serves that has not proven itself.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from serve.compiled import compiled, identity
from serve.errors import UserError
from serve.machine import allowed_cores, computes_bf16, gpu_present, has
from serve.settings import Settings
from serve.state import State

Batch = Sequence[Sequence[int]]  # token ids, unpadded
Logits = npt.NDArray[np.float32]  # (texts, classes)
ONNX_FILE = "onnx/model.onnx"
# On a CPU, batches beside each other, a core each: threads that share a short batch wait for each other more than they
# compute. Measured on two cores, 32 callers: a fifth to a third more answers than one batch at a time on both.
MOST_LANES = 4


class Engine(Protocol):
    name: str  # library and precision, as --engine takes it
    device: str
    precision: str
    threads: int
    # What one batch should hold. On a CPU time goes with tokens, so padding is loss and large batches only fall out of
    # the cache; on a GPU a batch of 1 costs nearly what one of 64 does.
    batch_tokens: int  # padding included
    max_padding: float  # share of a batch, 0-1
    length_step: int  # texts are padded to a multiple of it
    lanes: int  # batches that it computes well at the same time, each in a thread of its own

    def logits(self, texts: Batch) -> Logits: ...


class Weights(Protocol):
    """The part of a release that an engine needs."""

    folder: Path
    pad_id: int
    positions: int  # longest text the model has positions for, in tokens

    def fetch(self, pattern: str) -> bool:
        """Brings the files into `folder`; False where the release has none."""
        ...


def pad(texts: Batch, pad_id: int, length: int = 0) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """`(input_ids, attention_mask)`, both (texts, longest or `length`), padded on the right."""
    shape = len(texts), max(length, *map(len, texts))
    ids, mask = np.full(shape, pad_id, np.int64), np.zeros(shape, np.int64)
    for row, text in enumerate(texts):
        ids[row, : len(text)] = text
        mask[row, : len(text)] = 1
    return ids, mask


def _check_graph(inputs: Sequence[str], outputs: Sequence[str]) -> None:
    if unknown := set(inputs) - {"input_ids", "attention_mask", "token_type_ids"}:
        raise ValueError(f"the graph wants inputs this service does not know: {', '.join(sorted(unknown))}")
    if "logits" not in outputs:
        raise ValueError(f"the graph has no output 'logits', only {', '.join(outputs)}")


def _feed(texts: Batch, pad_id: int, inputs: Sequence[str], length: int = 0) -> dict[str, npt.NDArray[np.int64]]:
    """Both runtimes refuse an input that the graph does not have."""
    ids, mask = pad(texts, pad_id, length)
    every = {"input_ids": ids, "attention_mask": mask, "token_type_ids": np.zeros_like(ids)}
    return {name: every[name] for name in inputs}


class OnnxEngine:
    """The ONNX file on ONNX Runtime's CPU provider, in fp32, with the transformer fusions it makes as it loads."""

    device, precision = "cpu", "fp32"
    batch_tokens, max_padding, length_step = 1024, 0.1, 1

    def __init__(self, name: str, path: Path, pad_id: int, threads: int) -> None:
        """Raises ValueError for a graph with other inputs or outputs; onnxruntime's own error for a broken file."""
        import onnxruntime  # type: ignore[import-untyped]

        self.name, self.threads, self.pad_id = name, threads, pad_id
        self.lanes = min(threads, MOST_LANES)  # calls share the session's threads, so one alone has them all
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 4  # errors are raised as well; a text that makes it fail must not fill the log
        options.intra_op_num_threads = threads
        options.inter_op_num_threads = 1
        # Its own memory pool grows with the largest batch met and gives nothing back.
        options.enable_cpu_mem_arena = options.enable_mem_pattern = False
        # Spinning threads burn the cores that tokenising and HTTP need, and collapse beside a busy neighbour.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        self._session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        self._inputs = [entry.name for entry in self._session.get_inputs()]
        _check_graph(self._inputs, [entry.name for entry in self._session.get_outputs()])

    def logits(self, texts: Batch) -> Logits:
        (logits,) = self._session.run(["logits"], _feed(texts, self.pad_id, self._inputs))
        return np.asarray(logits, np.float32)


class OpenVinoEngine:
    """The ONNX file on OpenVINO's CPU plugin, in fp32 or, with half the memory traffic and on AMX units, bf16.

    Compiled for one batch a core. In bf16 once more for a text alone on all cores, which is faster by a third; in fp32
    that would take the memory of the service above 400 MiB with a model of 91 MB. What was compiled is kept in a file.
    """

    device = "cpu"
    # It prepares every shape it meets, which costs time, and keeps it, which costs memory (1 GiB and growing in a
    # measurement without these two): lengths are rounded up to a multiple, and what is kept is bounded.
    length_step, SHAPES_KEPT = 8, 64
    batch_tokens, max_padding = 512, 0.2

    def __init__(self, name: str, path: Path, pad_id: int, positions: int, precision: str, threads: int, kept: Path) -> None:
        """`kept` is the folder of compiled models.

        Raises ValueError for a graph with other inputs or outputs; OpenVINO's own error for a broken file.
        """
        import openvino

        self.name, self.precision, self.threads, self.pad_id, self.positions = name, precision, threads, pad_id, positions
        core = openvino.Core()
        options = {
            "INFERENCE_PRECISION_HINT": "bf16" if precision == "bf16" else "f32",
            "INFERENCE_NUM_THREADS": threads,
            "CPU_RUNTIME_CACHE_CAPACITY": self.SHAPES_KEPT,
            "ENABLE_CPU_PINNING": False,  # pinned threads wait for a core that a neighbour holds while another is free
        }
        self.lanes = min(threads, MOST_LANES)

        def compile() -> memoryview:
            model = core.read_model(path)
            _check_graph([entry.any_name for entry in model.inputs], [entry.any_name for entry in model.outputs])
            if precision == "bf16":
                # What `openvino.save_model` does to a file: fp16 holds more digits than bf16 will use, in half the memory.
                from openvino._offline_transformations import compress_model_transformation

                compress_model_transformation(model)
            exported: memoryview = core.compile_model(model, "CPU", options).export_model().getbuffer()
            return exported

        # What is imported keeps reading its weights from there, and crashes where they are gone.
        self._weights = openvino.Tensor(
            compiled(kept, [*identity(path), openvino.__version__, precision, threads], compile), shared_memory=True
        )
        self._beside = core.import_model(self._weights, "CPU", {**options, "NUM_STREAMS": self.lanes})
        if precision == "bf16" and self._beside.get_property("INFERENCE_PRECISION_HINT") != openvino.Type.bf16:
            raise ValueError("OpenVINO does not compute in bf16 on this CPU")
        self._inputs = [entry.any_name for entry in self._beside.inputs]
        twice = precision == "bf16" and self.lanes > 1
        self._alone = core.import_model(self._weights, "CPU", {**options, "NUM_STREAMS": 1}) if twice else self._beside
        self._requests = threading.local()
        self._running = 0  # calls at this moment; not exact to the last call, and it need not be
        # The library's first call must have no company: it sets up what it keeps once for all under a lock of its own, and
        # two threads, one with that lock and one with the interpreter's, would wait for each other for ever.
        self.logits([[pad_id]])

    def logits(self, texts: Batch) -> Logits:
        length = -(-max(map(len, texts)) // self.length_step) * self.length_step
        feed = _feed(texts, self.pad_id, self._inputs, min(length, self.positions))
        request = self._request(self._alone if self._running == 0 and len(texts) == 1 else self._beside)
        self._running += 1
        try:
            answer = request.infer(feed, share_inputs=True)
        finally:
            self._running -= 1
        return np.array(answer["logits"], np.float32)  # a copy: the request's own memory is written over by the next batch

    def _request(self, compiled: Any) -> Any:
        """This thread's own: a request runs one batch at a time."""
        if not hasattr(self._requests, "of"):
            self._requests.of = {}
        of: dict[int, Any] = self._requests.of
        if id(compiled) not in of:
            of[id(compiled)] = compiled.create_infer_request()
        return of[id(compiled)]


class TorchEngine:
    """`model.safetensors` on transformers, on a GPU or on the CPU."""

    length_step = lanes = 1

    def __init__(self, name: str, folder: Path, pad_id: int, device: str, precision: str, threads: int) -> None:
        import torch
        from transformers import AutoModelForSequenceClassification
        from transformers.utils import logging

        logging.disable_progress_bar()  # type: ignore[no-untyped-call]
        on_gpu = device == "cuda"
        if not on_gpu:
            torch.set_num_threads(threads)
        self.name, self.device, self.precision, self.pad_id, self.threads = name, device, precision, pad_id, threads
        self.batch_tokens, self.max_padding = (32768, 0.5) if on_gpu else (1024, 0.1)
        self._model: Any = AutoModelForSequenceClassification.from_pretrained(
            folder,
            dtype=torch.bfloat16 if precision == "bf16" else torch.float32,
            use_safetensors=True,
            trust_remote_code=False,
            local_files_only=True,
        )
        self._model.to(device).eval()
        # bf16 has 8 bits: two labels near each other would come out as equal. The last layer is computed in fp32.
        *_, head = (module for module in self._model.modules() if isinstance(module, torch.nn.Linear))
        if head.out_features != self._model.config.num_labels:
            raise ValueError(f"the last layer of {type(self._model).__name__} does not give the labels")
        head.float().register_forward_pre_hook(lambda _, inputs: (inputs[0].float(),))

    def logits(self, texts: Batch) -> Logits:
        import torch

        ids, mask = (torch.from_numpy(array).to(self.device) for array in pad(texts, self.pad_id))
        with torch.inference_mode():
            output = self._model(input_ids=ids, attention_mask=mask).logits
        return np.asarray(output.float().cpu())


def open_engine(name: str, release: Weights, settings: Settings) -> Engine:
    """Loads the engine `name`, one of `known`, from files that are there. Raises whatever its library raises."""
    library, _, precision = name.partition("-")
    threads = settings.threads or allowed_cores()
    path = release.folder / ONNX_FILE
    if library == "onnxruntime":
        return OnnxEngine(name, path, release.pad_id, threads)
    if library == "openvino":
        return OpenVinoEngine(name, path, release.pad_id, release.positions, precision, threads, State(settings).folder / "compiled")
    device = "cuda" if on_gpu(settings) else "cpu"
    return TorchEngine(name, release.folder, release.pad_id, device, precision, threads)


def on_gpu(settings: Settings) -> bool:
    """Whether torch on CUDA serves: asked for, or there and nothing else is asked for."""
    if settings.device != "auto":
        return settings.device == "cuda"
    return settings.engine.startswith(("auto", "torch")) and gpu_present() and has("torch", "transformers") and _cuda_works()


def _cuda_works() -> bool:
    import torch

    return torch.cuda.is_available()


def known(settings: Settings, release: Weights) -> list[str]:
    """Names of the engines that could serve `release` under `settings`, at least one, the one to begin with first.

    Fetches the weights they need. Raises UserError, which says what is missing.
    """
    if settings.engine != "auto":
        wanted = [settings.engine]
    elif on_gpu(settings) and (settings.device == "cuda" or release.fetch("model*.safetensors*")):
        import torch

        # Older cards than Ampere compute bf16 by emulation; there fp32 is the faithful choice.
        fast = torch.cuda.is_available() and torch.cuda.get_device_capability()[0] >= 8
        wanted = ["torch-bf16", "torch-fp32"] if fast else ["torch-fp32"]
    elif has_onnx(settings, release):
        wanted = _on_onnx()
    else:
        wanted = ["torch-fp32"] + ["torch-bf16"] * computes_bf16()
    _require(wanted[0], settings, release)
    return wanted


def last_resort(settings: Settings, release: Weights) -> Iterator[str]:
    """What serves where nothing that was known does; asked for only then, since it fetches weights.

    After the engines on the ONNX file torch in fp32, where it is installed; after torch on a GPU those on the ONNX file.
    """
    if settings.engine != "auto" or settings.device == "cuda" or not has_onnx(settings, release):
        return
    if on_gpu(settings):
        yield from _on_onnx()
    elif has("torch", "transformers") and release.fetch("model*.safetensors*"):
        yield "torch-fp32"


def _on_onnx() -> list[str]:
    """Most likely the fastest first: if the timings agree, no second engine is ever loaded."""
    bf16 = ["openvino-bf16"] * computes_bf16()
    return [*bf16, "openvino-fp32"] * has("openvino") + ["onnxruntime"] * has("onnxruntime")


def has_onnx(settings: Settings, release: Weights) -> bool:
    return (has("onnxruntime") or has("openvino")) and release.fetch(ONNX_FILE)


def _require(name: str, settings: Settings, release: Weights) -> None:
    library, _, precision = name.partition("-")
    if precision == "bf16" and not on_gpu(settings) and not computes_bf16():
        fp32 = f"{library}-fp32"
        raise UserError(f"--engine is {name}, and this CPU has no instructions for bf16: give --engine {fp32}, or leave it out.")
    if library != "torch":
        if not has(library):
            raise UserError(f"--engine is {name}, and {library} is not installed here: pip install {library}, or leave --engine out.")
        if not release.fetch(ONNX_FILE):
            raise UserError(f"the release has no {ONNX_FILE}, which --engine {name} needs: publish it with one, or leave --engine out.")
        return
    if not has("torch", "transformers"):
        why = f"--engine is {name}" if settings.engine == name else "the release has no ONNX file, or nothing here that runs it"
        why = "--device is cuda" if settings.device == "cuda" else why
        raise UserError(
            f"{why}, and torch or transformers is not installed here: pip install torch transformers, "
            "or serve a release with ONNX on the CPU."
        )
    if settings.device == "cuda" and not _cuda_works():
        raise UserError("--device is cuda and torch finds no GPU here: give --device cpu or auto, or install a torch built for CUDA.")
    if not release.fetch("model*.safetensors*"):
        raise UserError("the release has no model.safetensors, the only weights torch loads here (no pickle): publish it with them.")
