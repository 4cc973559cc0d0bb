"""Each check of the doctor with its fault planted, in this process as a group of one."""

from __future__ import annotations

import dataclasses
import os
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

from pipeline.config import TrainConfig
from pipeline.doctor import check_data, check_hub, check_launch, check_machine, check_model, check_step
from pipeline.doctor.findings import Finding, table
from pipeline.doctor.frame import Check, Context, Ranks, run_checks
from pipeline.topology import Topology

ALONE = Topology(1, 0, 0, 1, device="cpu", backend="gloo", precision="fp32", threads=1)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory, tiny_model_dir: Path, r8_dir: Path) -> Iterator[Context]:
    """A context with data and model, as the checks before leave it; accumulation is 2."""
    from accelerate.state import AcceleratorState, GradientState

    environment = dict(os.environ)
    os.environ["ACCELERATE_USE_CPU"] = "true"
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    folder = tmp_path_factory.mktemp("notes")
    config = TrainConfig(
        model=str(tiny_model_dir), dataset=str(r8_dir), max_length=32, max_train_samples=200, global_batch_size=16,
        max_per_device_batch_size=8, precision="fp32", device="cpu", output_dir=str(folder / "run"),
    )  # fmt: skip
    context = Context(config, ALONE, Ranks(0, folder), asked=1, launch="one.yaml")
    look(context, check_launch.batches, check_hub.model, check_data.texts, check_model.parameters)
    yield context
    dist.destroy_process_group()
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    os.environ.clear()
    os.environ.update(environment)


@pytest.fixture
def context(base: Context) -> Context:
    """A copy to plant a fault in."""
    return dataclasses.replace(base)


def look(context: Context, *checks: Callable[[Context], list[Finding]]) -> list[Finding]:
    return [finding for found in run_checks(context, [Check("check", check) for check in checks]) for finding in found]


def bad(findings: list[Finding]) -> dict[str, Finding]:
    return {finding.what: finding for finding in findings if finding.level != "ok"}


def test_what_is_well_is_found_well(context: Context) -> None:
    found = look(context, check_launch.world_size, check_launch.devices, check_launch.same_everywhere, check_launch.batches,
                 check_hub.reachable, check_hub.write_access, check_data.coverage, check_machine.room, check_model.precision,
                 check_model.gradient, check_step.longest_batch, check_step.speed)  # fmt: skip
    assert not bad(found), table(found)
    assert len(found) >= 15
    assert "not needed: one process" in str(found)


def changed(context: Context, change: Callable[[Any], None]) -> Context:
    """The context, whose models are built with a fault."""
    build = context.build

    def faulty(config: TrainConfig) -> nn.Module:
        model = build(config)
        change(model)
        return model

    context.build = faulty  # type: ignore[method-assign]
    return context


def test_frozen_and_unused_parameters(context: Context) -> None:
    def change(model: Any) -> None:
        model.pre_classifier.weight.requires_grad_(False)
        model.forgotten = nn.Parameter(torch.zeros(3))

    found = bad(look(changed(context, change), check_model.parameters))
    assert "pre_classifier.weight" in found["frozen"].found and found["frozen"].level == "warn"
    assert "forgotten" in found["unused"].found


def test_accumulation_counted_twice_by_trainer(context: Context) -> None:
    """The same trap as with the world size, with one process and accumulation 2."""
    found = bad(look(changed(context, lambda model: setattr(model, "accepts_loss_kwargs", True)), check_model.gradient))
    assert list(found) == ["gradient, Trainer"] and "2 times the loss" in found["gradient, Trainer"].found


def test_layers_that_escape_autocast_and_emulated_precision(context: Context, monkeypatch: pytest.MonkeyPatch) -> None:
    context.topology = dataclasses.replace(ALONE, precision="bf16")
    layer: Any = context.model.classifier
    plain = layer.forward
    monkeypatch.setattr(layer, "forward", lambda x: torch.autocast("cpu", enabled=False)(plain)(x.float()))
    found = bad(look(context, check_model.precision))
    assert "float32" in found["precision"].found and "bfloat16" in found["precision"].found
    # Of the machine's own speed nothing can be planted: told that a bf16 product takes three times as long, it says so.
    monkeypatch.setattr(check_model, "seconds_of_product", lambda _device, dtype: 3.0 if dtype == torch.bfloat16 else 1.0)
    found = bad(look(context, check_model.precision))
    assert "emulated" in found["bf16 speed"].next and "3.00" in found["bf16 speed"].found


def test_a_launch_file_that_overrides_the_precision(context: Context, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "fp16")
    assert bad(look(context, check_launch.batches))["mixed_precision"].level == "FAIL"


def test_a_global_batch_that_does_not_divide_skips_what_builds_on_it(context: Context) -> None:
    context.topology, context.plan, context.prepared = dataclasses.replace(ALONE, world_size=3), None, None
    checks = [Check("batch", check_launch.batches), Check("dataset", check_data.texts), Check("rows", check_data.coverage, ("prepared",))]
    found = {f.what: f for said in run_checks(context, checks) for f in said}
    assert found["batch"].level == "FAIL" and found["batch"].next.startswith("Use --global_batch_size 15 or 18")
    assert found["dataset"].level == "ok", "the texts are looked at all the same"
    assert found["rows"].level == "skip" and "it needs the data" in found["rows"].found


def test_threads_and_processes_on_shared_gpus(context: Context, monkeypatch: pytest.MonkeyPatch) -> None:
    context.topology = dataclasses.replace(ALONE, threads=1000)
    assert bad(look(context, check_launch.devices))["threads"].level == "warn"
    # No test machine has GPUs, so the answers are told: two ranks of one machine on the same device, a third on a CPU.
    gpu, cpu = ("here", "T4, nccl", "GPU-1", 1), ("there", "CPU, gloo", "", 1)
    monkeypatch.setattr(context.ranks, "gather", lambda value: [gpu, gpu, cpu] if isinstance(value, tuple) else [value])
    found = bad(look(context, check_launch.devices))
    assert "2 ranks share one" in found["GPUs"].found and "2 x T4, nccl; 1 x CPU, gloo" in found["device"].found


def test_an_order_that_repeats_and_unequal_shares(context: Context, monkeypatch: pytest.MonkeyPatch) -> None:
    deal = context.sampler

    def without_epochs(*place: int) -> Any:
        sampler = deal(*place)
        sampler.set_epoch = lambda _epoch: None
        return sampler

    context.sampler = without_epochs  # type: ignore[method-assign]
    assert bad(look(context, check_data.coverage))["next epoch"].level == "FAIL"
    # Equal numbers of micro-batches: told that a second rank has one less.
    monkeypatch.setattr(context.ranks, "gather", lambda value: [value] if value is None or isinstance(value, list) else [value, value[:-1]])
    found = bad(look(context, check_data.coverage))
    assert "rank 1 23 micro-batches" in found["ranks' shares"].found and "on several" in found["epoch's rows"].found


def test_no_room(context: Context, monkeypatch: pytest.MonkeyPatch) -> None:
    small = SimpleNamespace(available=2**20, total=2**30)
    monkeypatch.setattr(check_machine.psutil, "virtual_memory", lambda: small)
    context.config = dataclasses.replace(context.config, dataloader_workers=2)
    full = check_machine.shutil.disk_usage("/")._replace(total=64 * 2**20, free=2**20)
    monkeypatch.setattr(check_machine.shutil, "disk_usage", lambda _path: full)
    held: list[torch.Tensor] = []
    context.model = context.build(context.config)
    context.model.register_forward_hook(lambda *_: held.append(torch.ones(10_000_000)))  # 40 MB each time
    found = bad(look(context, check_machine.room, check_step.longest_batch))
    assert found["memory"].level == "FAIL" and "1.0 MiB free of 1.0 GiB" in found["memory"].found
    assert found["disk"].level == "FAIL" and "4 checkpoints" in found["disk"].expected
    assert "1.0 MiB free of 64.0 MiB" in found["shared memory"].found and "--shm-size=1g" in found["shared memory"].next
    assert "--max_per_device_batch_size" in found["longest batch"].next


def test_a_device_without_the_memory_is_a_line(context: Context) -> None:
    def full(*_: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    model = context.build(context.config)
    model.register_forward_pre_hook(full)
    context.model = model
    found = bad(look(context, check_step.longest_batch))["check"]
    assert found.found == "The device ran out of memory" and "--max_per_device_batch_size" in found.next


def test_a_training_of_weeks(context: Context) -> None:
    context.config = dataclasses.replace(context.config, epochs=1e7)
    assert "in all less than 24 h" in bad(look(context, check_step.speed))["epoch"].expected


def at(monkeypatch: pytest.MonkeyPatch, url: str, token: str | None = None) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "ENDPOINT", url)
    if token:
        monkeypatch.setenv("HF_TOKEN", token)


def test_a_hub_that_is_not_there(context: Context, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        at(monkeypatch, f"http://127.0.0.1:{free.getsockname()[1]}")
        context.config = dataclasses.replace(context.config, push_to_hub=True, hub_repo="me/mine")
        found = look(context, check_hub.reachable)[0]
        assert (found.what, found.level) == ("Hub", "FAIL") and "HF_ENDPOINT" in found.next
        context.config = dataclasses.replace(context.config, push_to_hub=False, model="me/mine")
        assert look(context, check_hub.reachable)[0].level == "warn", "the cache may do"


def test_a_token_that_may_only_read(context: Context, monkeypatch: pytest.MonkeyPatch, local_hub: Any) -> None:
    context.config = dataclasses.replace(context.config, hub_checkpoints=True, hub_repo=f"{local_hub.user}/mine")
    at(monkeypatch, local_hub.url, local_hub.token)
    assert not bad(look(context, check_hub.reachable, check_hub.write_access))
    at(monkeypatch, local_hub.url, local_hub.add_user("reader", "read"))
    found = bad(look(context, check_hub.reachable, check_hub.write_access))["check"]
    assert "may only read" in found.found and "hf auth login" in found.next


def test_no_such_model_and_no_such_dataset(context: Context, monkeypatch: pytest.MonkeyPatch, local_hub: Any) -> None:
    at(monkeypatch, local_hub.url, local_hub.token)
    context.config = dataclasses.replace(context.config, model="nobody/nothing", dataset="nobody/no-texts")
    context.model_found, context.prepared = None, None
    first, second = look(context, check_hub.model, check_data.texts)
    assert "nobody/nothing" in first.found + first.next and first.level == "FAIL"
    assert "nobody/no-texts" in second.found + second.next and second.level == "FAIL"


def test_leaks_beyond_a_percent_fail_and_below_warn() -> None:
    line = "{} test rows ({}%) also stand in train, so the test score flatters: for example 'x'."
    assert bad(check_data.warnings([line.format(4, 0.9)]))["test in train"].level == "warn"
    assert bad(check_data.warnings([line.format(40, 1.1)]))["test in train"].level == "FAIL"
    assert [f.what for f in check_data.warnings([])] == ["duplicates", "contradictions", "test in train"]
    assert "Look at it" in bad(check_data.warnings(["Something odd."]))["dataset"].next


def test_a_check_that_breaks_is_a_line_and_the_next_ones_go_on(context: Context) -> None:
    def breaks(_: Context) -> list[Finding]:
        raise KeyError("surprise")

    found = look(context, breaks, check_launch.world_size)
    assert found[0].level == "FAIL" and "KeyError: 'surprise'" in found[0].found
    assert found[1].what == "world size" and found[1].level == "ok"
    shown = table(found)
    assert shown.splitlines()[0].startswith("FAIL  check") and "1 of 2 FAILED" in shown and "next:" in shown


def test_in_fp64_the_gradients_agree_to_fp64(context: Context) -> None:
    context.config = dataclasses.replace(context.config, precision="fp64")
    context.topology = dataclasses.replace(ALONE, precision="fp64")
    found = look(context, check_model.gradient)
    assert not bad(found) and all("within 1e-10" in f.expected for f in found), table(found)
