"""One measuring process of `benchmarks.explain`: the steps of `pipeline.train_ddp`, with a time stamp between their parts.

    torchrun --standalone --nproc_per_node 2 -m benchmarks.explain.worker PORT NAME configs/ag_news.yaml --device cpu

`entry` runs that script's own loop, in which there are no time stamps, for they do not belong into a script that teaches: the
loader, the model, the loss scaler and the recorder that it is given set them. Only steps that no training takes, without
communication or with each all-reduce noted, are written again here. The worker waits for tasks in a key-value store at PORT, under NAME, and does nothing in
between: several launches can be kept ready and measured in turns (`benchmarks.explain.measure`).
"""

from __future__ import annotations

import contextlib
import gc
import itertools
import json
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.nn.modules.module import register_module_forward_pre_hook
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader

from pipeline.batches import training_loader
from pipeline.config import TrainConfig, parse
from pipeline.doctor.check_training import now
from pipeline.errors import run_entry
from pipeline.model import build_model, classification_loss
from pipeline.record import Recorder
from pipeline.run import prepare, seed_dropout, training_sampler
from pipeline.stopping import Stopper
from pipeline.topology import Topology, find_topology, plan_batches
from pipeline.train_ddp import from_rank_zero, initial_state, join_process_group, largest_of_ranks, leave_process_group, train, wrap
from pipeline.watch import Watch

PROG = "python -m benchmarks.explain.worker PORT NAME"
WARM_UP = 4  # batches before those that count, in two steps or more: DDP orders its buckets anew after its first one
STEPS_IN_ALL = 1_000_000  # of the learning rate's schedule, which so stays in its warm-up
PATIENCE = timedelta(minutes=30)

Span = tuple[str, float, float]  # part, begin and end in seconds of a clock that all processes of the machine share


class Timeline:
    """The parts of a step, one after the other."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.spans, self._last = device, list[Span](), now(device)

    def stamp(self, part: str) -> None:
        """What came since the last stamp was `part`."""
        time_now = now(self.device)
        self.spans.append((part, self._last, time_now))
        self._last = time_now

    def seconds(self) -> dict[str, float]:
        """Summed up by part."""
        parts: dict[str, float] = defaultdict(float)
        for part, begin, end in self.spans:
            parts[part] += end - begin
        return parts


class LoopOnly(Recorder):
    """For the training loop alone, no checkpoint and no validation at its end; keeps the parts of each step."""

    owes_evaluation = False
    line: Timeline

    def should_save(self, step: int) -> bool:
        return False

    def start(self) -> None:
        super().start()
        self.line, self.parts = Timeline(self.topology.torch_device), list[dict[str, float]]()

    def stepped(self, step: int) -> None:
        self.line.stamp("optimizer")
        super().stepped(step)
        self.parts.append({"step": self.step_times[-1], **self.line.seconds()})
        self.line.spans.clear()


class StampingLoader:
    """`loader`, whose batches end what came before and are themselves part `data`."""

    def __init__(self, loader: DataLoader[Any], recorder: LoopOnly) -> None:
        self.batch_sampler, self._loader, self._recorder = loader.batch_sampler, loader, recorder

    def __iter__(self) -> Iterator[Any]:
        line = self._recorder.line
        line.stamp("rest")
        for batch in self._loader:
            line.stamp("data")
            yield batch
            # Between the micro-batches of a step: the end of a backward. After a step: what the loop does besides.
            line.stamp("backward" if line.spans and line.spans[-1][0] == "forward" else "rest")


class StampingScaler:
    """`scaler`, to which the loop comes with the loss, the end of forward, and with the gradients, the end of backward."""

    def __init__(self, scaler: torch.amp.GradScaler, recorder: LoopOnly) -> None:
        self._scaler, self._recorder = scaler, recorder

    def __getattr__(self, name: str) -> Any:
        return getattr(self._scaler, name)

    def scale(self, loss: torch.Tensor) -> torch.Tensor:
        self._recorder.line.stamp("forward")
        return self._scaler.scale(loss)

    def unscale_(self, optimizer: torch.optim.Optimizer) -> None:
        self._recorder.line.stamp("backward")
        self._scaler.unscale_(optimizer)


class Rank:
    """One rank, set up as `pipeline.train_ddp.run` does it. Each method named in a task is called on all ranks at once."""

    def __init__(self, config: TrainConfig, topology: Topology) -> None:
        self.config, self.topology, self.plan = config, topology, plan_batches(config, topology.world_size)
        self.stopper = Stopper(largest_of_ranks)
        prepared = prepare(config, topology, self.plan) if topology.local_rank == 0 else None
        dist.barrier()
        self.prepared = prepared or prepare(config, topology, self.plan)
        self.loader = training_loader(
            self.prepared.train, training_sampler(config, topology, self.plan, self.prepared.train), self.prepared.collator,
            workers=config.dataloader_workers, pin_memory=topology.device == "cuda",
        )  # fmt: skip
        model = build_model(self.prepared.source, config, self.prepared.label_names, topology.attention).to(topology.torch_device)
        self.state = initial_state(config, topology, model, STEPS_IN_ALL)
        weights = self.prepared.class_weights
        self.class_weights = weights.to(topology.torch_device) if weights is not None else None
        seed_dropout(config, topology)

    def about(self) -> dict[str, Any]:
        place, trainable = self.topology, [p for p in self.state.model.parameters() if p.requires_grad]
        return {
            "processes": place.world_size, "threads": place.threads, "device": place.device, "backend": place.backend,
            "precision": place.precision, "batch": self.plan.to_dict(), "gradient_bytes": sum(p.numel() * p.element_size() for p in trainable),
        }  # fmt: skip

    def entry(self, steps: int, accumulation: int = 1, **changes: Any) -> list[dict[str, float]]:
        """Seconds of each part of the same first steps of an epoch in the script's own loop, `(steps / accumulation,)`.

        `step` is what the script's recorder says; `rest` what its loop does between the steps. `accumulation` joins that many
        steps' backwards to one all-reduce and one optimizer step. `changes`: configuration.
        """
        plan = replace(self.plan, accumulation=self.plan.accumulation * accumulation)
        config = replace(self.config, max_steps=(WARM_UP + steps) // accumulation, **changes)
        recorder = LoopOnly(config, self.topology, plan, steps_per_epoch=len(self.loader) // plan.accumulation)
        loader: Any = StampingLoader(self.loader, recorder)
        scaler: Any = StampingScaler(self.state.scaler, recorder)

        def called(module: torch.nn.Module, _: Any) -> None:
            if isinstance(module, DistributedDataParallel):
                recorder.line.stamp("to_device")

        watched = register_module_forward_pre_hook(called)  # of all modules: the script makes its DDP itself
        try:
            with (
                Watch(Path(self.config.output_dir or ""), self.topology.rank, self.topology.world_size, config.hang_seconds) as watch,
                self.stopper.held(),
            ):
                state = replace(self.state, scaler=scaler)
                train(config, self.topology, plan, self.prepared, loader, state, recorder, None, self.stopper, watch)
        finally:
            watched.remove()
        recorder.stop()
        gc.collect()  # its DDP holds buckets of the gradient's size
        return recorder.parts[WARM_UP // accumulation :]

    def silent(self, steps: int, how: str) -> list[dict[str, float]]:
        """Seconds of each part of the same steps as `entry`'s, with every gradient kept local (no_sync), `(steps,)`.

        `how`: `quiet`, and the ranks meet at a timed barrier after backward, part `wait`; or `alone`, one rank after another,
        the others asleep.
        """
        ddp, batches = self._begin()
        for _ in range(WARM_UP):
            self._step(ddp, batches, quiet=True)
        turns = range(self.topology.world_size) if how == "alone" else [self.topology.rank]
        measured: list[dict[str, float]] = []
        for turn in turns:
            dist.barrier()
            if turn == self.topology.rank:
                measured += [self._step(ddp, batches, quiet=True, meet=how == "quiet").seconds() for _ in range(steps)]
        dist.barrier()
        return measured

    def timeline(self, steps: int, **changes: Any) -> list[list[tuple[Any, ...]]]:
        """Spans of each step; those of part `all-reduce` have their bytes as well, and lie beside the others.

        A communication hook in the place of DDP's own all-reduce does the same and notes when a bucket was full and when
        its average was there.
        """
        ddp, batches = self._begin(**changes)
        reduced: list[tuple[str, float, float, int]] = []
        size = self.topology.world_size

        def noted(_, bucket):  # type: ignore[no-untyped-def]  # torch looks at annotations, and wants types there, not strings
            began, buffer = time.perf_counter(), bucket.buffer()
            work = dist.all_reduce(buffer.div_(size), async_op=True)
            assert work is not None

            def done(future: torch.futures.Future[Any]) -> torch.Tensor:
                reduced.append(("all-reduce", began, time.perf_counter(), buffer.nbytes))
                return future.value()[0]

            return work.get_future().then(done)

        ddp.register_comm_hook(None, noted)
        for _ in range(WARM_UP):
            self._step(ddp, batches, quiet=False)
        drawn = []
        for _ in range(steps):
            reduced.clear()
            drawn.append([*self._step(ddp, batches, quiet=False).spans, *reduced])
        return drawn

    def link(self, sizes: list[int], repeats: int, dtype: str = "float32") -> list[float]:
        """Median seconds of an all-reduce of each size in bytes, while nothing else is computed."""
        seconds = []
        for size in sizes:
            vector = torch.zeros(size // getattr(torch, dtype).itemsize, dtype=getattr(torch, dtype), device=self.topology.torch_device)
            figures = []
            dist.all_reduce(vector)  # the first one sets up connections; it also makes the ranks begin together
            for _ in range(repeats):
                began = now(self.topology.torch_device)
                dist.all_reduce(vector)
                figures.append(now(self.topology.torch_device) - began)
            seconds.append(statistics.median(figures))
        return seconds

    def _begin(self, **changes: Any) -> tuple[DistributedDataParallel, Iterator[Any]]:
        """A fresh wrap, which gives all ranks rank 0's weights again, and the micro-batches of the first epoch from its start."""
        gc.collect()
        ddp = wrap(self.state.model, replace(self.config, **changes), self.topology)
        ddp.train()
        self.loader.batch_sampler.set_epoch(0)  # type: ignore[union-attr]
        return ddp, iter(self.loader)

    def _step(self, ddp: DistributedDataParallel, batches: Iterator[Any], *, quiet: bool, meet: bool = False) -> Timeline:
        """One optimizer step, line by line as in `pipeline.train_ddp.train`."""
        place, state = self.topology, self.state
        line = Timeline(place.torch_device)
        for micro in range(self.plan.accumulation):
            batch = next(batches)
            line.stamp("data")
            batch = {name: tensor.to(place.torch_device, non_blocking=True) for name, tensor in batch.items()}
            labels = batch.pop("labels")
            line.stamp("to_device")
            with ddp.no_sync() if quiet or micro < self.plan.accumulation - 1 else contextlib.nullcontext():
                with torch.autocast(place.device, dtype=place.autocast, enabled=place.autocast is not None):
                    logits = ddp(**batch).logits
                loss = classification_loss(logits, labels, self.class_weights) / self.plan.accumulation
                line.stamp("forward")
                state.scaler.scale(loss).backward()
                line.stamp("backward")
            state.loss += loss.detach()
        if meet:
            dist.barrier()
            line.stamp("wait")
        state.scaler.unscale_(state.optimizer)
        if self.config.max_grad_norm > 0:
            torch.nn.utils.clip_grad_norm_(ddp.parameters(), self.config.max_grad_norm)
        state.scaler.step(state.optimizer)
        state.scaler.update()
        state.scheduler.step()
        state.optimizer.zero_grad()
        line.stamp("optimizer")
        return line


def serve(rank: Rank, store: dist.Store | None, name: str) -> None:
    """Do the tasks `NAME/0`, `NAME/1`, ... as they come, until one is null; each answer, a list over ranks, goes to `.../done`."""
    for turn in itertools.count():
        task = from_rank_zero(json.loads(store.get(f"{name}/{turn}")) if store else None)
        if task is None:
            return
        mine = getattr(rank, task.pop("method"))(**task)
        answers: list[Any] = [None] * rank.topology.world_size
        dist.all_gather_object(answers, mine)
        if store:
            store.set(f"{name}/{turn}/done", json.dumps(answers))


def main(argv: list[str]) -> None:
    port, name, *options = argv
    config = parse(options, PROG)
    topology = find_topology(config)
    join_process_group(topology)
    failed = True
    try:
        rank = Rank(config, replace(topology, backend=dist.get_backend()))
        serve(rank, dist.TCPStore("127.0.0.1", int(port), is_master=False, timeout=PATIENCE) if topology.rank == 0 else None, name)
        failed = False
    finally:
        leave_process_group(failed)


if __name__ == "__main__":
    sys.exit(run_entry(main))
