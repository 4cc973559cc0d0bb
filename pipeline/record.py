"""What a run tells while it goes on and what it leaves behind: progress, one line per evaluation, and run.json.

The same recorder serves both entries, so their logs, their early stopping and their `run.json` are alike. It lives on
every rank, because all ranks must agree on when to stop; only rank 0 speaks and writes.
"""

from __future__ import annotations

import importlib.metadata
import math
import os
import platform
import re
import shlex
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

import torch
from tqdm.auto import tqdm

from pipeline import energy
from pipeline.config import TrainConfig
from pipeline.topology import BatchPlan, Topology, allowed_cores

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = (
    "torch", "transformers", "accelerate", "datasets", "evaluate", "huggingface_hub", "tokenizers", "numpy", "onnx", "onnxruntime", "openvino",
)  # fmt: skip


def evaluation_steps(steps_per_epoch: int, total_steps: int, evals_per_epoch: int) -> set[int]:
    """Optimizer steps (1-based) after which to validate and save: evenly within each epoch, and the very last one."""
    marks = [max(1, round(steps_per_epoch * (k + 1) / evals_per_epoch)) for k in range(evals_per_epoch)]
    epochs = -(-total_steps // steps_per_epoch)
    return {e * steps_per_epoch + m for e in range(epochs) for m in marks if e * steps_per_epoch + m <= total_steps} | {total_steps}


class Recorder:
    """History, best checkpoint, early stopping and timing of one run; resumable through `state` and `load`.

    `samples_per_second` counts training rows against the time spent in training steps: data wait, forward, backward,
    all-reduce and optimizer, without validation and checkpoints, which `pauses` counts in seconds. `train_seconds` is the
    whole loop, with them.
    """

    def __init__(self, config: TrainConfig, topology: Topology, plan: BatchPlan, steps_per_epoch: int) -> None:
        self.config, self.topology, self.plan = config, topology, plan
        self.steps_per_epoch = steps_per_epoch
        self.total_steps = config.max_steps if config.max_steps > 0 else math.ceil(config.epochs * steps_per_epoch)
        self.evaluation_steps = evaluation_steps(steps_per_epoch, self.total_steps, config.evals_per_epoch)
        self.speaks = topology.rank == 0
        self.run_id = uuid.uuid4().hex  # of all sessions of one run; another after `--resume none`
        self.step = 0
        self.history: list[dict[str, float]] = []  # one entry per logged training loss
        self.epochs: list[dict[str, float]] = []  # one entry per evaluation
        self.best: dict[str, Any] | None = None
        self.worse_in_a_row = 0
        self.finished = False  # all steps done, or stopped early
        self.step_seconds = 0.0
        self.step_times: list[float] = []  # seconds of each step, without what `pause` excludes
        self.train_seconds = 0.0
        self.pauses = {"validation": 0.0, "checkpoint": 0.0}
        self.sessions: list[dict[str, Any]] = []  # what trained it, one entry for each time it was started or resumed
        self._mark: dict[str, float] = {"step": 0, "seconds": 0.0, "logs": 0}  # where the last evaluation stood
        self._started = self._resumed = self._stepped = 0.0
        self._bar: Any = None
        self._board: Any = None
        self._meter: energy.EnergyMeter | None = None

    # -- timing ---------------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Training begins, or goes on after `load`."""
        self._resumed = self._started = time.perf_counter()
        self._stepped = self.step_seconds
        place = {name: value for name, value in asdict(self.topology).items() if "rank" not in name and name != "local_world_size"}
        session = {"after_step": self.step, "topology": place, "batch": self.plan.to_dict()}
        self.sessions.append(session | (surroundings() if self.speaks else {}))
        if self.speaks:
            if self.topology.world_size == self.topology.local_world_size:  # of other machines nothing is known
                self._meter = energy.EnergyMeter(self.topology.world_size if self.topology.device == "cuda" else 0)
            self._bar = tqdm(total=self.total_steps, initial=self.step, unit="step", desc="training", dynamic_ncols=True, mininterval=0.5)
            if self.config.tracker == "tensorboard":
                from torch.utils.tensorboard import SummaryWriter

                self._board = SummaryWriter(log_dir=f"{self.config.output_dir}/runs", purge_step=self.step + 1)

    @contextmanager
    def pause(self, what: Literal["validation", "checkpoint"]) -> Iterator[None]:
        """Around validation and checkpoints: their time is not training time."""
        began = time.perf_counter()
        if self._started:
            self.step_seconds += began - self._resumed
        try:
            yield
        finally:
            self._resumed = time.perf_counter()
            self.pauses[what] += self._resumed - began

    def stop(self) -> None:
        """Training has ended (or is being left by an exception, perhaps before it began)."""
        if not self._started:
            return
        now = time.perf_counter()
        self.step_seconds += now - self._resumed
        self.train_seconds += now - self._started
        self._resumed = self._started = now
        self._count_energy()
        for sink in (self._bar, self._board):
            if sink is not None:
                sink.close()
        self._bar = self._board = None

    # -- events ---------------------------------------------------------------------------------------------------

    def stepped(self, step: int) -> None:
        """An optimizer step is done."""
        self.step = step
        now = self.step_seconds + time.perf_counter() - self._resumed
        self.step_times.append(round(now - self._stepped, 6))
        self._stepped = now
        if self._bar is not None:
            self._bar.update(step - self._bar.n)

    def should_log(self, step: int) -> bool:
        """Every `logging_steps`, and before each evaluation, so that its line can give the training loss."""
        return step % self.config.logging_steps == 0 or step in self.evaluation_steps

    def should_save(self, step: int) -> bool:
        """Every `checkpoint_steps`, and before each evaluation, which judges that checkpoint."""
        every = self.config.checkpoint_steps
        return step in self.evaluation_steps or (every > 0 and step % every == 0)

    @property
    def owes_evaluation(self) -> bool:
        """The run was ended between a checkpoint and its validation."""
        return self.step in self.evaluation_steps and (not self.epochs or self.epochs[-1]["step"] != self.step)

    @property
    def logged_step(self) -> int:
        """The step after which a training loss was last logged."""
        return int(self.history[-1]["step"]) if self.history else 0

    def logged(self, step: int, loss: float, learning_rate: float, grad_norm: float | None) -> None:
        """The training loss, mean over all ranks and over the steps since the last log."""
        entry = {"step": step, "epoch": step / self.steps_per_epoch, "loss": loss, "learning_rate": learning_rate}
        if grad_norm is not None:
            entry["grad_norm"] = grad_norm
        self.history.append(entry)
        self._count_energy()
        if self._bar is not None:
            self._bar.set_postfix(loss=f"{loss:.3f}", lr=f"{learning_rate:.1e}", refresh=False)
        self._scalars("train", entry, step)

    def evaluated(self, step: int, metrics: Mapping[str, Any]) -> bool:
        """A validation is done (call inside `pause`). Returns whether training should stop."""
        rows = (step - self._mark["step"]) * self.plan.global_rows
        seconds = self.step_seconds - self._mark["seconds"]
        logs = self.history[int(self._mark["logs"]) :]
        spans = [b["step"] - a for a, b in zip([self._mark["step"], *[log["step"] for log in logs]], logs, strict=False)]
        loss = sum(log["loss"] * n for log, n in zip(logs, spans, strict=True)) / max(1, sum(spans))
        scores = {name: metrics[name] for name in ("accuracy", "macro_f1", "nll", "ece")}
        entry = {
            "step": step,
            "epoch": step / self.steps_per_epoch,
            "loss": loss,
            "seconds": seconds,
            "samples_per_second": rows / max(seconds, 1e-9),
        }
        self.epochs.append(entry | scores)
        self._mark = {"step": step, "seconds": self.step_seconds, "logs": len(self.history)}
        value = scores[self.config.best_metric]
        better = self.best is None or (value < self.best["value"] if self.config.best_metric == "nll" else value > self.best["value"])
        if better:
            self.best, self.worse_in_a_row = {"step": step, "metric": self.config.best_metric, "value": value}, 0
        else:
            self.worse_in_a_row += 1
        stop = 0 < self.config.early_stopping_patience <= self.worse_in_a_row
        self.finished = stop or step >= self.total_steps
        self.say(
            f"epoch {entry['epoch']:.2f}  step {step}/{self.total_steps}  loss {loss:.4f}  validation accuracy {scores['accuracy']:.4f}  "
            f"macro F1 {scores['macro_f1']:.4f}  nll {scores['nll']:.4f}  {seconds:.1f} s  {entry['samples_per_second']:.1f} samples/s"
            f"{'  best so far' if better else ''}"
        )
        if stop:
            self.say(f"Stopped early: {self.worse_in_a_row} evaluations without a better {self.config.best_metric}.")
        self._scalars("validation", scores, step)
        return stop

    def say(self, line: str) -> None:
        """One line on rank 0's stdout, above the progress bar where there is one."""
        if self.speaks:
            if self._bar is not None:
                self._bar.clear()
            print(line, flush=True)

    def _count_energy(self) -> None:
        if self._meter is not None and (joules := self._meter.read()):
            self.sessions[-1]["energy_joules"] = joules

    def _scalars(self, group: str, values: Mapping[str, float], step: int) -> None:
        if self._board is not None:
            for name, value in values.items():
                self._board.add_scalar(f"{group}/{name}", value, step)

    # -- state in a checkpoint ------------------------------------------------------------------------------------

    _KEPT = ("run_id", "step", "history", "epochs", "best", "worse_in_a_row", "finished", "step_seconds", "step_times", "train_seconds", "pauses",
             "sessions", "_mark")  # fmt: skip

    def state(self) -> dict[str, Any]:
        """What a resumed run needs, for a checkpoint's manifest (call inside `pause`)."""
        running = time.perf_counter() - self._started if self._started else 0.0
        return {name: getattr(self, name) for name in self._KEPT} | {"train_seconds": self.train_seconds + running}

    def load(self, state: Mapping[str, Any]) -> None:
        for name in self._KEPT:
            setattr(self, name, state[name] if name != "step_times" else state.get(name, []))  # older checkpoints lack these


def run_record(
    entry: str, config: TrainConfig, topology: Topology, plan: BatchPlan, recorder: Recorder, data: Mapping[str, Any], **results: Any
) -> dict[str, Any]:
    """Everything there is to know about a finished run, as the dictionary that becomes `run.json`."""
    return {
        "format": 1,
        "entry": entry,
        "finished": datetime.now(UTC).isoformat(timespec="seconds"),
        "config": config.to_dict(),
        # Of the last session that trained: a finished run may be scored and released again elsewhere.
        **{name: value for name, value in recorder.sessions[-1].items() if name not in ("after_step", "energy_joules")},
        "sessions": recorder.sessions,
        "data": dict(data),
        "steps": recorder.step,
        "train_seconds": recorder.train_seconds,
        "pauses": recorder.pauses,
        "energy_joules": energy.total(recorder.sessions),
        "samples_per_second": recorder.step * plan.global_rows / max(recorder.step_seconds, 1e-9),
        "history": recorder.history,
        "epochs": recorder.epochs,
        "best": recorder.best,
        **results,
    }  # fmt: skip


def surroundings() -> dict[str, Any]:
    """Command, versions, code and hardware of this process."""
    versions = {"python": platform.python_version()} | {name: _version(name) for name in PACKAGES}
    return {"command": command_line(), "versions": versions, "code": code_version(), "hardware": hardware()}


def command_line() -> str:
    """The command of this run: the launcher's where `pipeline.launch` started it, else that of this process."""
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    alone = f"python -m {spec.name.removesuffix('.__main__') if spec else 'pipeline'} {shlex.join(sys.argv[1:])}".strip()
    return os.environ.get("DISTRINEWS_COMMAND", alone)


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def https_address(remote: str) -> str | None:
    """A git remote's https address, without user, password or token; None for a path on this machine or another protocol."""
    address = re.sub(r"^(?:ssh://git@([^/:]+\.[^/:]+)(?::\d+)?/|git@([^/:]+\.[^/:]+):)", r"https://\1\2/", remote)
    found = re.fullmatch(r"https://(?:[^/\s]*@)?([\w.-]+(?::\d+)?/[^\s?#()<>]+)", address)
    return f"https://{found[1]}" if found else None


def code_version(root: Path = ROOT) -> dict[str, Any]:
    """Commit of this code, whether it was changed since (documentation and results apart), and origin's https address; None what is not known, as outside a git checkout."""

    def git(*arguments: str) -> str | None:
        try:
            done = subprocess.run(["git", "-C", str(root), *arguments], capture_output=True, text=True, timeout=20, check=False)
        except (OSError, subprocess.TimeoutExpired):
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    # What a benchmark writes, results, pages and pictures, is no change of the code that the next one measures.
    made = [f":(exclude){name}" for name in ("README.md", "docs", "benchmarks/results", "benchmarks/*.md", "benchmarks/*.png")]
    commit, changes = git("rev-parse", "HEAD"), git("status", "--porcelain", "--untracked-files=no", "--", ".", *made)
    dirty = None if changes is None else bool(changes)
    return {"commit": commit, "dirty": dirty, "origin": https_address(git("remote", "get-url", "origin") or "")}


def hardware() -> dict[str, Any]:
    """CPU model, its flags that matter here, cores this process may use, memory in GiB, GPU names."""
    info = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    model = re.search(r"model name\s*:\s*(.+)", info)
    flags = [f for f in ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_bf16", "amx_int8") if f in info]
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30 if hasattr(os, "sysconf") else None
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())] if torch.cuda.is_available() else []
    return {
        "cpu": model.group(1).strip() if model else platform.processor(),
        "cpu_flags": flags,
        "cores": allowed_cores(),
        "memory_gib": round(memory, 1) if memory else None,
        "gpus": gpus,
    }
