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
from pipeline.doctor import check_launch, check_sources
from pipeline.doctor.examine import CHECKS
from pipeline.doctor.frame import Context, Finding, attempt, verdict
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
    context = Context(config, ALONE, folder, asked=1, launch="one.yaml")
    look(context, "batch", "model", "dataset", "parameters")
    assert {"batch", "model", "dataset", "parameters"} <= context.done
    yield context
    dist.destroy_process_group()
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    os.environ.clear()
    os.environ.update(environment)


@pytest.fixture
def context(base: Context) -> Context:
    """A copy to plant a fault in."""
    return dataclasses.replace(base, done=set(base.done))


def look(context: Context, *names: str) -> list[Finding]:
    """The findings of these checks."""
    known = {name for name, _, _ in CHECKS}
    assert known >= set(names), f"{names} are not all among {known}"
    return [finding for name, check, needs in CHECKS if name in names for finding in attempt(context, name, check, needs)]


def bad(findings: list[Finding]) -> dict[str, Finding]:
    found = {finding.what: finding for finding in findings if finding.level != "ok"}
    assert all(finding.next or finding.level == "skip" for finding in found.values()), "what is wrong has a next step"
    return found


def test_what_is_well_is_found_well(context: Context) -> None:
    found = look(context, *(name for name, _, _ in CHECKS if name != "dataset"))
    assert not bad(found), "\n".join(map(str, found))
    assert len(found) >= 15 and "All is well" in verdict(found)
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

    found = bad(look(changed(context, change), "parameters"))
    assert "pre_classifier.weight" in found["frozen"].found and found["frozen"].level == "warn"
    assert "forgotten" in found["unused"].found


def test_accumulation_counted_twice_by_trainer(context: Context) -> None:
    """The same trap as with the world size, with one process and accumulation 2."""
    found = bad(look(changed(context, lambda model: setattr(model, "accepts_loss_kwargs", True)), "gradient"))
    assert list(found) == ["gradient"] and "2 times the loss" in found["gradient"].found


def test_layers_that_escape_autocast(context: Context) -> None:
    context.topology = dataclasses.replace(ALONE, precision="bf16")

    def change(model: Any) -> None:
        plain = model.classifier.forward
        model.classifier.forward = lambda x: torch.autocast("cpu", enabled=False)(plain)(x.float())

    assert not bad(look(context, "parameters"))
    found = bad(look(changed(context, change), "parameters"))
    assert "1 of " in found["precision"].found and "float32" in found["precision"].found and "bfloat16" in found["precision"].found


def test_a_launch_file_that_overrides_the_precision(context: Context, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "fp16")
    assert bad(look(context, "devices"))["mixed_precision"].level == "FAIL"


def test_a_global_batch_that_does_not_divide_skips_what_builds_on_it(context: Context) -> None:
    context.topology, context.done = dataclasses.replace(ALONE, world_size=3), set()
    findings = look(context, "batch", "dataset", "epoch's rows")
    found = {finding.what: finding for finding in findings}
    assert found["batch"].level == "FAIL" and found["batch"].next.startswith("Use --global_batch_size 15 or 18")
    assert found["dataset"].level == "ok", "the texts are looked at all the same"
    assert found["epoch's rows"].level == "skip" and "it builds on batch" in found["epoch's rows"].found
    assert verdict(findings).startswith("1 FAILED") and "1 not looked at" in verdict(findings)


def test_an_order_that_repeats(context: Context) -> None:
    deal = context.sampler

    def without_epochs(*place: Any) -> Any:
        sampler = deal(*place)
        sampler.set_epoch = lambda _epoch: None
        return sampler

    context.sampler = without_epochs  # type: ignore[method-assign]
    assert "next epoch in the same order" in bad(look(context, "epoch's rows"))["epoch's rows"].found


def test_no_room(context: Context, monkeypatch: pytest.MonkeyPatch) -> None:
    small = SimpleNamespace(available=2**20, total=2**30)
    monkeypatch.setattr(check_launch.psutil, "virtual_memory", lambda: small)
    context.config = dataclasses.replace(context.config, dataloader_workers=2)
    full = check_launch.shutil.disk_usage("/")._replace(total=64 * 2**20, free=2**20)
    monkeypatch.setattr(check_launch.shutil, "disk_usage", lambda _path: full)
    held: list[torch.Tensor] = []
    context.model = context.build(context.config)
    context.model.register_forward_hook(lambda *_: held.append(torch.ones(10_000_000)))  # 40 MB each time
    found = bad(look(context, "room", "longest batch"))
    assert found["memory"].level == "FAIL" and "0.000977 GiB free of 1 GiB" in found["memory"].found
    assert found["disk"].level == "FAIL" and "4 checkpoints" in found["disk"].expected
    assert "0.000977 GiB free of 0.0625 GiB" in found["shared memory"].found and "--shm-size=1g" in found["shared memory"].next
    assert "--max_per_device_batch_size" in found["longest batch"].next


def test_a_device_without_the_memory_is_a_line(context: Context) -> None:
    def full(*_: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    model = context.build(context.config)
    model.register_forward_pre_hook(full)
    context.model = model
    found = bad(look(context, "longest batch", "speed"))["longest batch"]
    assert found.found == "The device ran out of memory" and "--max_per_device_batch_size" in found.next


def test_a_training_of_weeks(context: Context) -> None:
    context.config = dataclasses.replace(context.config, epochs=1e7)
    assert "less than 24 h" in bad(look(context, "longest batch", "speed"))["epoch"].expected


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
        found = look(context, "Hub")[0]
        assert (found.what, found.level) == ("Hub", "FAIL") and "HF_ENDPOINT" in found.next
        context.config = dataclasses.replace(context.config, push_to_hub=False, model="me/mine")
        found = look(context, "Hub")[0]
        assert (found.what, found.level) == ("Hub", "warn") and "HF_ENDPOINT" in found.next, "the cache may do"


def test_a_token_that_may_only_read(context: Context, monkeypatch: pytest.MonkeyPatch, local_hub: Any) -> None:
    context.config = dataclasses.replace(context.config, hub_checkpoints=True, hub_repo=f"{local_hub.user}/mine")
    at(monkeypatch, local_hub.url, local_hub.token)
    assert not bad(look(context, "Hub"))
    at(monkeypatch, local_hub.url, local_hub.add_user("reader", "read"))
    found = bad(look(context, "Hub"))["Hub"]
    assert "may only read" in found.found and "hf auth login" in found.next


def test_no_such_model_and_no_such_dataset(context: Context, monkeypatch: pytest.MonkeyPatch, local_hub: Any) -> None:
    at(monkeypatch, local_hub.url, local_hub.token)
    context.config = dataclasses.replace(context.config, model="nobody/nothing", dataset="nobody/no-texts")
    context.done = set()
    first, second = look(context, "model", "dataset")
    assert "nobody/nothing" in first.found + first.next and first.level == "FAIL"
    assert "nobody/no-texts" in second.found + second.next and second.level == "FAIL"


def test_leaks_beyond_a_percent_fail_and_below_warn(context: Context) -> None:
    def found(**counts: int) -> list[Finding]:
        none = {"duplicates": 0, "contradictions": 0, "leaked": 0}
        return check_sources.repeats(dataclasses.replace(context.prepared.texts, repeats=none | counts))

    percent = len(context.prepared.texts.test) // 100
    assert bad(found(leaked=percent))["test in train"].level == "warn"
    assert bad(found(leaked=percent + 1))["test in train"].level == "FAIL"
    assert list(bad(found(duplicates=2))) == list(bad(found(contradictions=1))) == ["duplicates"]
    assert not bad(found())


def test_a_check_that_breaks_is_a_line_and_the_next_ones_go_on(context: Context) -> None:
    def breaks(_: Context) -> list[Finding]:
        raise KeyError("surprise")

    found = attempt(context, "check", breaks)
    assert found[0].level == "FAIL" and "KeyError: 'surprise'" in found[0].found
    assert str(found[0]).startswith("FAIL  check") and "\n" in str(found[0]) and "next: " in str(found[0])
    assert not bad(look(context, "world size"))


def test_in_fp64_the_gradients_agree_to_fp64(context: Context) -> None:
    context.config = dataclasses.replace(context.config, precision="fp64")
    context.topology = dataclasses.replace(ALONE, precision="fp64")
    found = look(context, "gradient")
    assert not bad(found) and "within 1e-10" in found[0].expected, found
