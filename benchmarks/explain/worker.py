"""One measuring process of `benchmarks.explain`: the steps of `pipeline.train_ddp`, with a time stamp between their parts.

    torchrun --standalone --nproc_per_node 2 -m benchmarks.explain.worker PORT NAME configs/ag_news.yaml --device cpu

`entry` runs that script's own loop, with what it is given set to stamp (`benchmarks.explain.stamps`). Only steps that no training
takes, one rank alone or with each all-reduce noted, are written again here. The worker waits for tasks in a key-value store at
PORT, under NAME, and sleeps in between: several launches can be kept ready and measured in turns (`benchmarks.explain.measure`).
"""

from __future__ import annotations

import contextlib
import gc
import itertools
import json
import statistics
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from benchmarks.explain.stamps import StampingLoader, StampingRecorder, StampingScaler, Timeline, ddp_calls_noted, last_gradients_noted
from pipeline.batches import training_loader
from pipeline.config import TrainConfig, parse
from pipeline.doctor.check_training import now
from pipeline.errors import run_entry
from pipeline.model import build_model, classification_loss
from pipeline.run import prepare, seed_dropout, training_sampler
from pipeline.stopping import Stopper
from pipeline.topology import Topology, find_topology, plan_batches
from pipeline.train_ddp import initial_state, join_process_group, largest_of_ranks, leave_process_group, train, wrap
from pipeline.watch import Watch

PROG = "python -m benchmarks.explain.worker PORT NAME"
WARM_UP = 4  # batches before those that count, in two steps or more: DDP orders its buckets anew after its first one
STEPS_IN_ALL = 1_000_000  # of the learning rate's schedule, which so stays in its warm-up
PATIENCE = timedelta(minutes=30)


class Rank:
    """One rank, set up as `pipeline.train_ddp.run` does it. Each method named in a task is called on all ranks at once."""

    def __init__(self, config: TrainConfig, topology: Topology) -> None:
        self.config, self.topology, self.plan = config, topology, plan_batches(config, topology.world_size)
        self.stopper = Stopper(largest_of_ranks)
        self.turns: Counter[Any] = Counter()  # of `entry`, by its way
        self.asleep = dist.new_group(backend="gloo")  # who waits in NCCL keeps a core and its GPU busy
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

        `step` is what the script's recorder says, and all there is of every other step, in which the stamps sleep: of those that
        had them the last time. `rest` is what the loop does between the steps. `accumulation` joins that many steps' backwards to
        one all-reduce and one optimizer step. `changes`: configuration.
        """
        plan = replace(self.plan, accumulation=self.plan.accumulation * accumulation)
        config = replace(self.config, max_steps=(WARM_UP + steps) // accumulation, **changes)
        recorder = StampingRecorder(config, self.topology, plan, steps_per_epoch=len(self.loader) // plan.accumulation)
        way = (accumulation, *changes.items())
        recorder.stamped, self.turns[way] = self.turns[way] % 2, self.turns[way] + 1
        loader: Any = StampingLoader(self.loader, recorder)
        scaler: Any = StampingScaler(self.state.scaler, recorder)
        state, topology = replace(self.state, scaler=scaler), self.topology
        with (
            ddp_calls_noted(lambda: recorder.line),
            last_gradients_noted(state.model, lambda: recorder.line),
            Watch(Path(self.config.output_dir or ""), topology.rank, topology.world_size, config.hang_seconds) as watch,
            self.stopper.held(),
        ):
            train(config, topology, plan, self.prepared, loader, state, recorder, None, self.stopper, watch)
        recorder.stop()
        gc.collect()  # its DDP holds buckets of the gradient's size
        return recorder.parts[WARM_UP // accumulation :]

    def own(self, steps: int, together: bool) -> list[dict[str, float]]:
        """Seconds of each part of the same steps as `entry`'s with nothing exchanged, `(steps,)`: on all ranks together, or on one
        after another, the others asleep.

        DDP fills its buckets as ever, but nobody is asked for an average: each rank goes on with its own gradients.
        """

        def kept(_, bucket):  # type: ignore[no-untyped-def]  # torch looks at annotations, and wants types there, not strings
            done: torch.futures.Future[torch.Tensor] = torch.futures.Future()
            done.set_result(bucket.buffer())
            return done

        ddp, batches = self._begin()
        ddp.broadcast_buffers = False  # rank 0 would wait in it for the others
        ddp.register_comm_hook(None, kept)
        line = Timeline(self.topology.torch_device)
        measured: list[dict[str, float]] = []
        with last_gradients_noted(self.state.model, lambda: line):
            for _ in range(WARM_UP):
                line = Timeline(self.topology.torch_device)
                self._step(ddp, batches, line)
            for turn in range(1 if together else self.topology.world_size):
                dist.barrier(self.asleep)
                for _ in range(steps if together or turn == self.topology.rank else 0):
                    line = Timeline(self.topology.torch_device)
                    self._step(ddp, batches, line)
                    measured.append(line.seconds())
                    if together:  # as after an all-reduce: the ranks begin their next step at the same time
                        dist.barrier(self.asleep)
            dist.barrier(self.asleep)
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
        drawn = []
        for _ in range(WARM_UP + steps):
            reduced.clear()
            line = Timeline(self.topology.torch_device)
            self._step(ddp, batches, line)
            drawn.append([*line.spans, *reduced])
        return drawn[WARM_UP:]

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

    def passes(self, repeats: int) -> dict[str, float]:
        """Median seconds of passes over all gradients, on all ranks at once: `casts`, to fp16 and back, which its hook takes each
        step, and `sum`, which adds a backward's gradients to those of the one before."""
        size = sum(p.numel() for p in self.state.model.parameters() if p.requires_grad)
        old, new = torch.zeros(2, size, device=self.topology.torch_device)
        ways: dict[str, Callable[[], object]] = {
            "casts": lambda: old.copy_(old.to(torch.float16).div_(self.topology.world_size)),
            "sum": lambda: old.add_(new),
        }
        figures: dict[str, list[float]] = {name: [] for name in ways}
        for _ in range(repeats):
            for name, go in ways.items():
                dist.barrier(self.asleep)
                began = now(self.topology.torch_device)
                go()
                figures[name].append(now(self.topology.torch_device) - began)
        return {name: statistics.median(seconds) for name, seconds in figures.items()}

    def _begin(self, **changes: Any) -> tuple[DistributedDataParallel, Iterator[Any]]:
        """A fresh wrap, which gives all ranks rank 0's weights again, and the micro-batches of the first epoch from its start."""
        gc.collect()
        ddp = wrap(self.state.model, replace(self.config, **changes), self.topology)
        ddp.train()
        self.loader.batch_sampler.set_epoch(0)  # type: ignore[union-attr]
        return ddp, iter(self.loader)

    def _step(self, ddp: DistributedDataParallel, batches: Iterator[Any], line: Timeline) -> None:
        """One optimizer step, line by line as in `pipeline.train_ddp.train`."""
        place, state = self.topology, self.state
        for micro in range(self.plan.accumulation):
            batch = next(batches)
            line.stamp("data")
            batch = {name: tensor.to(place.torch_device, non_blocking=True) for name, tensor in batch.items()}
            labels = batch.pop("labels")
            line.stamp("to_device")
            with ddp.no_sync() if micro < self.plan.accumulation - 1 else contextlib.nullcontext():
                with torch.autocast(place.device, dtype=place.autocast, enabled=place.autocast is not None):
                    logits = ddp(**batch).logits
                loss = classification_loss(logits, labels, self.class_weights) / self.plan.accumulation
                line.stamp("forward")
                state.scaler.scale(loss).backward()
                line.after_backward()
            state.loss += loss.detach()
        state.scaler.unscale_(state.optimizer)
        if self.config.max_grad_norm > 0:
            torch.nn.utils.clip_grad_norm_(ddp.parameters(), self.config.max_grad_norm)
        state.scaler.step(state.optimizer)
        state.scaler.update()
        state.scheduler.step()
        state.optimizer.zero_grad()
        line.stamp("optimizer")


def serve(rank: Rank, store: dist.Store | None, name: str) -> None:
    """Do the tasks `NAME/0`, `NAME/1`, ... as they come, until one is null; each answer, a list over ranks, goes to `.../done`."""
    for turn in itertools.count():
        box: list[Any] = [json.loads(store.get(f"{name}/{turn}")) if store else None]
        dist.broadcast_object_list(box, src=0, group=rank.asleep)
        task = box[0]
        if task is None:
            return
        mine = getattr(rank, task.pop("method"))(**task)
        answers: list[Any] = [None] * rank.topology.world_size
        dist.all_gather_object(answers, mine, group=rank.asleep)
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
