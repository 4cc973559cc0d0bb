"""Time stamps between the parts of a training step, set by what the training script's loop is given.

The script itself has none, for they do not belong into a script that teaches: its loader, its recorder, its loss scaler, the
model it calls and the model's parameters set them.
"""

from __future__ import annotations

import contextlib
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.nn.modules.module import register_module_forward_pre_hook
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader

from pipeline.doctor.check_training import now
from pipeline.record import Recorder

Span = tuple[str, float, float]  # part, begin and end in seconds of a clock that all processes of the machine share


class Timeline:
    """The parts of a step, one after the other."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.asleep = device, False
        self.begin()

    def begin(self) -> None:
        """Anew, from now."""
        self.spans, self._last = list[Span](), now(self.device)

    def stamp(self, part: str) -> None:
        """What came since the last stamp was `part`."""
        if not self.asleep:
            self._add(part, now(self.device))

    def last_gradient(self) -> None:
        """Backward has made its last gradient, for all that this rank computes; all-reduces may still be under way."""
        if self.asleep:
            return
        if self.device.type == "cuda":
            torch.cuda.current_stream(self.device).synchronize()  # DDP talks in another stream
        self._add("backward", time.perf_counter())

    def after_backward(self) -> None:
        """The end of what follows the last gradient; of all of backward where nobody has noted it."""
        self.stamp("reduce" if self.spans and self.spans[-1][0] == "backward" else "backward")

    def _add(self, part: str, end: float) -> None:
        self.spans.append((part, self._last, end))
        self._last = end

    def seconds(self) -> dict[str, float]:
        """Summed up by part."""
        parts: dict[str, float] = defaultdict(float)
        for part, begin, end in self.spans:
            parts[part] += end - begin
        return parts


class StampingRecorder(Recorder):
    """Keeps the time of each step; of every other one its parts as well, and when its last gradient was made, `ready`.

    For the training loop alone: no checkpoint, and no validation at its end."""

    owes_evaluation = False
    line: Timeline
    stamped: int  # the even steps, 0, or the odd ones, 1

    def should_save(self, step: int) -> bool:
        return False

    def start(self) -> None:
        super().start()
        self.line, self.parts = Timeline(self.topology.torch_device), list[dict[str, float]]()

    def stepped(self, step: int) -> None:
        self.line.stamp("optimizer")
        now(self.topology.torch_device)  # waits for a GPU, so that a step without stamps has its whole time as well
        super().stepped(step)
        parts = {"step": self.step_times[-1]}
        if not self.line.asleep:
            ready = next(end for part, _, end in reversed(self.line.spans) if part == "backward")
            parts |= {"ready": ready, **self.line.seconds()}
        self.parts.append(parts)
        self.line.asleep = step % 2 != self.stamped  # the step after this one has number `step`, from 0
        if not self.line.asleep:
            self.line.begin()


class StampingLoader:
    """`loader`, whose batches end what came before and are themselves part `data`."""

    def __init__(self, loader: DataLoader[Any], recorder: StampingRecorder) -> None:
        self.batch_sampler, self._loader, self._recorder = loader.batch_sampler, loader, recorder

    def __iter__(self) -> Iterator[Any]:
        line = self._recorder.line
        line.stamp("rest")
        for batch in self._loader:
            line.stamp("data")
            yield batch
            if line.spans and line.spans[-1][0] in ("forward", "backward"):  # another micro-batch of the same step
                line.after_backward()
            else:
                line.stamp("rest")


class StampingScaler:
    """`scaler`, to which the loop comes with the loss, the end of forward, and with the gradients, the end of backward."""

    def __init__(self, scaler: torch.amp.GradScaler, recorder: StampingRecorder) -> None:
        self._scaler, self._recorder = scaler, recorder

    def __getattr__(self, name: str) -> Any:
        return getattr(self._scaler, name)

    def scale(self, loss: torch.Tensor) -> torch.Tensor:
        self._recorder.line.stamp("forward")
        return self._scaler.scale(loss)

    def unscale_(self, optimizer: torch.optim.Optimizer) -> None:
        self._recorder.line.after_backward()
        self._scaler.unscale_(optimizer)


@contextlib.contextmanager
def last_gradients_noted(model: torch.nn.Module, line: Callable[[], Timeline]) -> Iterator[None]:
    """Within it, each backward tells `line()` when it has made its last gradient, before DDP comes to know of it."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    left = len(parameters)

    def made(_: torch.Tensor) -> None:
        nonlocal left
        left -= 1
        if not left:
            left = len(parameters)
            line().last_gradient()

    handles = [p.register_post_accumulate_grad_hook(made) for p in parameters]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextlib.contextmanager
def ddp_calls_noted(line: Callable[[], Timeline]) -> Iterator[None]:
    """Within it, a call of a DDP ends the part `to_device`."""

    def called(module: torch.nn.Module, _: Any) -> None:
        if isinstance(module, DistributedDataParallel):
            line().stamp("to_device")

    handle = register_module_forward_pre_hook(called)  # of all modules: the script makes its DDP itself
    try:
        yield
    finally:
        handle.remove()
