"""What happens to gradients on their way to the optimizer: reduced too often, scaled, clipped too early."""

from __future__ import annotations

import time
from contextlib import nullcontext
from typing import Any

import torch
from matplotlib.axes import Axes
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.nn.parallel import DistributedDataParallel

from pipeline.lab.frame import BLUE, GREY, INK, RED, Experiment, Ranks
from pipeline.lab.world import World, batches, gradient


class NoNoSync(Experiment):
    """Gradients are all-reduced after every micro-batch instead of once a step.

    DDP reduces in every backward unless `no_sync` tells it to let gradients add up. The sum of averages is the average of
    sums: the result is the same, and all but the last of the all-reduces were for nothing.
    """

    name, marker = "no_no_sync", "[DDP 6] no_sync"
    says = "all-reduces a step: {reduces}, of {mb:.1f} MB together; {ms:.0f} ms a step; test loss {test_loss:.4f}"
    steps, accumulation = 20, 4

    def rank(self, world: World, broken: bool) -> dict[str, Any]:
        model = DistributedDataParallel(world.model())
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        sent: list[list[int]] = []  # bytes of each all-reduce, by micro-batch

        def counting(group, bucket):  # unannotated: DDP wants classes there, not names
            sent[-1].append(bucket.buffer().nbytes)
            return allreduce_hook(group, bucket)

        model.register_comm_hook(None, counting)
        began = time.perf_counter()
        for rows in batches(64, self.steps):
            for micro, part in enumerate(rows[world.rank :: world.size].chunk(self.accumulation)):
                sent.append([])
                last = micro == self.accumulation - 1
                with nullcontext() if broken or last else model.no_sync():
                    (world.loss(model, part.tolist()) / self.accumulation).backward()
            optimizer.step()
            optimizer.zero_grad()
        seconds = time.perf_counter() - began
        return {"sent": sent[-self.accumulation :], "seconds": seconds, "test_loss": world.test_loss(model.module)}

    def figures(self, ranks: Ranks) -> dict[str, Any]:
        sent, slowest = ranks[0]["sent"], max(rank["seconds"] for rank in ranks)
        reduces, mb = sum(len(micro) for micro in sent), sum(sum(micro) for micro in sent) / 1e6
        return {"reduces": reduces, "mb": mb, "ms": 1e3 * slowest / self.steps, "test_loss": ranks[0]["test_loss"]}

    def draw(self, axes: Axes, ranks: Ranks) -> None:
        mb = [sum(micro) / 1e6 for micro in ranks[0]["sent"]]
        axes.bar(range(1, len(mb) + 1), mb, color=BLUE, width=0.6)
        axes.set(xlabel="micro-batch of a step", ylabel="MB all-reduced")
        axes.set_xticks(range(1, len(mb) + 1))


class LossTimesWorld(Experiment):
    """The stock Trainer believes that the model divides its loss by the rows of the global batch.

    It infers so from `**kwargs` in DistilBERT's forward, which ignores the number, and multiplies by the world size and the
    accumulation to make up for it. Adam hides that; the logged loss, the clipping threshold and every comparison are wrong.
    """

    name, file, marker = "loss_times_world", "pipeline/model.py", "accepts_loss_kwargs = False"
    says = "loss logged for the first step: {factor:.2f} times that of one process; gradient norm {grad_norm:.2f}; test loss at the end {test_loss:.3f}"
    steps, accumulation, per_device = 24, 2, 8

    def rank(self, world: World, broken: bool) -> dict[str, Any]:
        from transformers import PrinterCallback, Trainer, TrainingArguments

        model: Any = world.model()
        if not broken:
            model.accepts_loss_kwargs = False
        rows = torch.cat(batches(self.accumulation * self.per_device * world.size, self.steps)).tolist()
        untrained = world.score(model, rows)[0] / len(rows)
        arguments = TrainingArguments(
            output_dir=str(world.folder / "trainer"), use_cpu=True, per_device_train_batch_size=self.per_device, learning_rate=1e-3,
            gradient_accumulation_steps=self.accumulation, num_train_epochs=1, lr_scheduler_type="constant", logging_steps=1,
            ddp_find_unused_parameters=False, save_strategy="no", report_to="none", disable_tqdm=True, remove_unused_columns=False,
        )  # fmt: skip
        trainer = Trainer(
            model, arguments, train_dataset=rows, data_collator=lambda part: {**world.batch(part), "labels": world.labels[torch.tensor(part)]}
        )  # fmt: skip
        trainer.remove_callback(PrinterCallback)
        trainer.train()
        logged = [entry for entry in trainer.state.log_history if "grad_norm" in entry]
        return {
            "loss": [entry["loss"] for entry in logged],
            "grad_norm": [entry["grad_norm"] for entry in logged],
            "untrained": untrained,
            "test_loss": world.test_loss(model),
        }

    def figures(self, ranks: Ranks) -> dict[str, Any]:
        first = ranks[0]
        return {"factor": first["loss"][0] / first["untrained"], "grad_norm": first["grad_norm"][0], "test_loss": first["test_loss"]}

    def draw(self, axes: Axes, ranks: Ranks) -> None:
        loss = ranks[0]["loss"]
        axes.plot(range(1, len(loss) + 1), loss, "o-", color=BLUE, markersize=3, linewidth=1.4, label="logged by Trainer")
        axes.axhline(ranks[0]["untrained"], color=GREY, linestyle="--", linewidth=1.2, label="untrained, one process")
        axes.set(xlabel="optimizer step", ylabel="training loss (nats)")
        axes.set_ylim(bottom=0)
        axes.legend(frameon=False, fontsize=8)


class ClipBeforeAverage(Experiment):
    """Each rank clips its own gradient, and then they are averaged.

    Clipping cuts each rank's gradient by another factor, so a rank with a steep batch loses its say, and the average is no
    longer the direction of the global batch, nor as long as the threshold. One process and two then learn different things.
    """

    name, marker = "clip_before_average", "[DDP 7] Mixed precision, in order"
    says = "distance from the gradient that one process takes: up to {apart:.0%}; length after clipping to {threshold}: {shortest:.2f} to {longest:.2f}"
    steps, threshold = 20, 0.5

    def rank(self, world: World, broken: bool) -> dict[str, Any]:
        model = world.model()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)

        def clip() -> None:
            torch.nn.utils.clip_grad_norm_(model.parameters(), self.threshold)

        def average() -> None:
            world.average_gradients(model)

        apart, lengths = [], []
        for rows in batches(16, self.steps):
            world.loss(model, rows.tolist()).backward()  # what one process does with the whole batch
            clip()
            alone = gradient(model)
            optimizer.zero_grad()
            world.loss(model, rows[world.rank :: world.size].tolist()).backward()
            for stage in (clip, average) if broken else (average, clip):
                stage()
            applied = gradient(model)
            apart.append(float((applied - alone).norm() / alone.norm()))
            lengths.append(float(applied.norm()))
            optimizer.step()
            optimizer.zero_grad()
        return {"apart": apart, "lengths": lengths}

    def figures(self, ranks: Ranks) -> dict[str, Any]:
        apart, lengths = ranks[0]["apart"], ranks[0]["lengths"]
        return {"apart": max(apart), "threshold": self.threshold, "shortest": min(lengths), "longest": max(lengths)}

    def draw(self, axes: Axes, ranks: Ranks) -> None:
        apart = ranks[0]["apart"]
        axes.bar(range(1, len(apart) + 1), [100 * value for value in apart], color=RED, width=0.8)
        axes.text(0.98, 0.98, f"largest: {max(apart):.1%}", ha="right", va="top", transform=axes.transAxes, fontsize=9, color=INK)
        axes.set(xlabel="optimizer step", ylabel="% away from one process's gradient", xticks=range(5, len(apart) + 1, 5))
        axes.margins(y=0.15)  # for the words


EXPERIMENTS = (NoNoSync, LossTimesWorld, ClipBeforeAverage)
