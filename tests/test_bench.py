"""The training benchmark: its arithmetic against torch's own, its runs really launched in small, its pages made of them."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from launching import launch

from benchmarks import bench, bench_page, bench_report, gpu_step
from benchmarks.common import RESULTS, provenance
from pipeline.batches import Collator, training_loader
from pipeline.config import TrainConfig
from pipeline.errors import UserError
from pipeline.record import Recorder
from pipeline.sampler import GlobalBatchSampler
from pipeline.speed import FIRST_STEPS, speed, training_flops, work
from pipeline.topology import Topology, plan_batches


def distilbert(**settings: Any) -> Any:
    from transformers import DistilBertConfig, DistilBertForSequenceClassification

    return DistilBertForSequenceClassification(DistilBertConfig(num_labels=4, **settings))


@pytest.mark.parametrize("seq", [16, 128, 512])
def test_operations_are_those_that_torch_counts(seq: int) -> None:
    """A layer of DistilBERT in its real shapes; what the formula leaves out is the head, on one token a row."""
    from torch.utils.flop_counter import FlopCounterMode

    rows, ids = 2, torch.full((2, seq), 7)
    model = distilbert(n_layers=1, attn_implementation="eager")
    with FlopCounterMode(display=False) as counter:
        model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits.sum().backward()
    head = 6 * rows * sum(layer.weight.numel() for layer in (model.pre_classifier, model.classifier))
    assert training_flops(model, rows * seq, rows * seq**2) + head == pytest.approx(counter.get_total_flops(), rel=0.01)


@pytest.mark.parametrize("grouping", [True, False])
def test_work_is_what_the_ranks_loaders_yield(grouping: bool) -> None:
    """Two ranks, two micro-batches a step, over the end of an epoch, padded to a multiple of 8."""
    lengths = torch.randint(3, 60, (203,), generator=torch.Generator().manual_seed(0)).tolist()
    rows = Dataset.from_dict({"input_ids": [[7] * n for n in lengths], "length": lengths, "labels": [0] * len(lengths)})
    seen = {"tokens": 0, "squares": 0, "padded_tokens": 0, "padded_squares": 0}
    first, last = 9, 17  # of 12 steps an epoch
    for rank in range(2):
        sampler = GlobalBatchSampler(
            lengths, global_batch_size=16, accumulation=2, num_replicas=2, rank=rank, seed=3, length_grouping=grouping
        )
        batches = []
        for epoch in range(2):
            sampler.set_epoch(epoch)
            batches += list(training_loader(rows, sampler, Collator(0, multiple_of=8), workers=0, pin_memory=False))
        for batch in batches[2 * first : 2 * last]:
            real, (count, longest) = batch["attention_mask"].sum(1), batch["input_ids"].shape
            seen["tokens"] += int(real.sum())
            seen["squares"] += int(real.square().sum())
            seen["padded_tokens"] += count * longest
            seen["padded_squares"] += count * longest**2
    found = vars(work(sampler, first, last, multiple_of=8))
    assert found == {"rows": 16 * (last - first), **seen}


def test_speed_is_of_the_session_that_trained(monkeypatch: pytest.MonkeyPatch) -> None:
    """Six steps, resumed for nine more; the clock stands still but for the steps and a checkpoint."""
    import time

    now = [1.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    config = TrainConfig(global_batch_size=8, output_dir="unused")
    topology = Topology(2, 0, 0, 2, "cpu", "gloo", "fp32", 1)
    model, lengths = distilbert(n_layers=1), list(range(5, 45))

    def session(recorder: Recorder, steps: int, seconds: float) -> Recorder:
        recorder.start()
        for step in range(recorder.step + 1, recorder.step + steps + 1):
            now[0] += seconds
            recorder.stepped(step)
            with recorder.pause("checkpoint"):
                now[0] += 100
        return recorder

    def new() -> Recorder:
        recorder = Recorder(config, replace(topology, rank=1), plan_batches(config, 2), steps_per_epoch=5)
        return recorder

    first = session(new(), 6, 9.0)
    second = new()
    second.load(json.loads(json.dumps(first.state())))
    session(second, 9, 2.0).stop()
    found = speed(second, lengths, model, [0.5, 0.6])
    assert found["steps"] == 9 - FIRST_STEPS and found["seconds"] == pytest.approx(2.0 * found["steps"])
    assert found["samples_per_second"] == pytest.approx(8 / 2.0) and set(found["step_seconds"].values()) == {2.0}
    assert second.step_times == [9.0] * 6 + [2.0] * 9
    # A run that is only scored again tells the same.
    third = new()
    third.load(json.loads(json.dumps(second.state())))
    assert speed(third, lengths, model, [0.5, 0.6]) == found


@pytest.fixture(scope="module")
def measured(tiny_model_dir: Path, r8_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Two processes by both entries, the plain loop and the peak, once: real launches of a tiny model."""
    scale = bench.Scale(steps=8, plain_steps=5, test_rows=60, rounds=1, names=("raw, 2 processes", "Trainer, 2 processes"))
    results = bench.Bench(str(tiny_model_dir), str(r8_dir), scale, tmp_path_factory.mktemp("bench"), "cpu").measure()
    return json.loads(json.dumps({"format": 1, **provenance(), **results}))


def test_both_entries_are_measured_and_learn_the_same(measured: dict[str, Any]) -> None:
    raw, trainer = (measured["runs"][name][0] for name in ("raw, 2 processes", "Trainer, 2 processes"))
    assert raw["weights_sha256"] == trainer["weights_sha256"] and measured["same_weights"] == {"2": True}
    plain = measured["runs"]["plain loop"][0]
    assert raw["accuracy"] == trainer["accuracy"] and raw["scored"] == plain["scored"] == 60
    assert 0 <= plain["accuracy"] <= 1 and plain["config"]["learning_rate"] == raw["config"]["learning_rate"]
    for name in ("padded_share", "steps", "config"):
        assert raw[name] == trainer[name], name
    assert raw["config"]["model"] == Path(raw["config"]["model"]).name, "no folder of this machine"
    for run in (raw, trainer, measured["runs"]["plain loop"][0]):
        assert len(run["peak_memory_gib"]) == run["topology"]["world_size"] and min(run["peak_memory_gib"]) > 0.05
        assert run["step_seconds"]["p10"] <= run["step_seconds"]["p50"] <= run["step_seconds"]["p99"] <= run["seconds"]
        assert (
            0 < run["flops_per_second"] < run["flops_per_second_with_padding"] < 1.5 * max(measured["runs"]["matrix multiply"][0].values())
        )
    assert measured["runs"]["plain loop"][0]["padded_share"] > raw["padded_share"], "length grouping pads less"
    ratio = trainer["samples_per_second"] / raw["samples_per_second"]
    assert measured["ratios"]["trainer_against_raw"]["median"] == pytest.approx(ratio)
    for name, runs in measured["runs"].items():
        if name != bench.MATMUL:
            peak = measured["runs"][bench.MATMUL][0][runs[0]["topology"]["precision"]]
            assert runs[0]["share_of_peak"] == pytest.approx(runs[0]["flops_per_second_with_padding"] / peak) and "config" in runs[0]
    assert measured["minutes_in_all"] > 0 and measured["dataset_rows"]["train"] > 4000
    assert sum(measured["lengths"]) == 4000 and len(measured["lengths"]) == 128


def test_pages_are_made_of_the_results(measured: dict[str, Any], tmp_path: Path) -> None:
    """What was measured stands in the page, what was not says so, and another machine is a further column."""
    found = {"bench": measured}
    pages = bench_report.pages(found)
    rate = f"{measured['runs']['Trainer, 2 processes'][0]['samples_per_second']:.1f}"
    assert rate in pages["ddp_2gpu.md"] and rate not in pages["single_gpu.md"]
    assert "| Trainer, 1 process, samples/s | not measured | not measured |" in pages["single_gpu.md"]
    assert (
        "2x T4 (Kaggle): not measured. By one run of the notebook in benchmarks/kaggle, or on such a machine `make bench ARGS="
        in pages["ddp_2gpu.md"]
    )
    assert "Not measured: `python -m benchmarks.gpu_step`" in pages["single_gpu.md"]
    assert "p99 is of 5 and 2 steps a round" in pages["single_gpu.md"] and "not scored" not in pages["single_gpu.md"]
    unscored = {name: value for name, value in measured["runs"]["plain loop"][0].items() if name not in ("accuracy", "scored")}
    old = {**measured, "runs": {**measured["runs"], "plain loop": [unscored]}}
    assert "| not scored |" in bench_report.pages({"bench": old})["single_gpu.md"], "results from before it was"
    gpus = {**measured["provenance"]["hardware"], "gpus": ["Tesla T4", "Tesla T4"]}
    t4 = {**measured, "device": "cuda", "provenance": {**measured["provenance"], "hardware": gpus}}
    both = bench_report.pages(found | {"bench-t4x2": t4})
    assert "## 2x Tesla T4" in both["ddp_2gpu.md"] and "(Kaggle)" not in both["single_gpu.md"]
    bench_report.pictures(found | {"bench-t4x2": t4}, tmp_path)
    names = {"single_gpu.png", "single_gpu-t4x2.png", "ddp_2gpu.png", "ddp_2gpu-t4x2.png"}
    assert {path.name for path in tmp_path.iterdir() if path.stat().st_size > 10_000} == names
    # What `make explain` found there has sections and pictures of its own, whatever this machine measured.
    explained = {name: json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8")) for name in ("explain", "scaling")}
    there = {f"{name}-t4x2": results for name, results in explained.items()}
    page = bench_report.pages(found | explained | there)["ddp_2gpu.md"]
    assert "make explain ARGS" not in page and "make explain ARGS" in pages["ddp_2gpu.md"]
    for name in (
        "Where the missing speed-up went, on t4x2",
        "More ranks: predictions, from t4x2",
        "(explain-t4x2.png)",
        "(scaling-t4x2.png)",
    ):
        assert page.count(name) == 1 and name not in pages["ddp_2gpu.md"], name
    (tmp_path / "labelled").mkdir()
    bench_report.pictures({"bench": measured, "explain-t4x2": explained["explain"]}, tmp_path / "labelled")
    assert (tmp_path / "labelled" / "explain-t4x2.png").stat().st_size > 10_000
    readme = f"before\n{bench_report.BEGIN}\nold\n{bench_report.END}\nafter"
    new = bench_report.with_results(readme, found)
    assert rate in new and "old" not in new and new.startswith("before\n") and new.endswith("\nafter")
    assert bench_report.with_results(new, found) == new


def test_a_broken_bound_is_told(measured: dict[str, Any]) -> None:
    row = measured["ratios"]["trainer_against_raw"] | {"median": 0.5, "held": False}
    assert "at least 0.95, NOT held" in bench_page.ratio_cell({"ratios": {"trainer_against_raw": row}}, "trainer_against_raw")


def test_a_broken_bound_stops_only_the_strict(
    measured: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    ratios = {"trainer_against_raw": measured["ratios"]["trainer_against_raw"] | {"median": 0.5, "held": False}}
    monkeypatch.setattr(bench.Bench, "measure", lambda _: {**measured, "ratios": ratios})
    monkeypatch.setattr(bench, "write_results", lambda *_: tmp_path)
    monkeypatch.setattr(bench.signal, "signal", lambda *_: None)
    for options, code in (([], 0), (["--strict"], 1)):
        assert bench.main(["--model", "unused", *options]) == code
        assert "BOUND BROKEN" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("kernel", "kind"),
    [
        ("triton_per_fused_native_layer_norm_3", "torch.compile"),
        ("triton_poi_fused_gelu_5", "torch.compile"),
        ("triton_poi_fused__to_copy_add_2", "torch.compile"),
        ("cpp_fused_native_layer_norm_0", "torch.compile"),
        ("void pytorch_flash::flash_fwd_kernel<Flash_fwd_kernel_traits<64, 128, 128, 4>>", "attention"),
        ("fmha_cutlassF_bf16_aligned_64x64_rf_sm80(PyTorchMemEffAttention::AttentionKernel)", "attention"),
        ("sm90_xmma_gemm_bf16bf16_bf16f32_f32_tn_n_tilesize128x128x64_cublas", "matrix products"),
        ("void cutlass::Kernel2<cutlass_80_tensorop_bf16_s16816gemm_relu_bf16_256x128_32x3_nn_align8>", "matrix products"),
        ("nvjet_tst_128x256_64x4_1x2_h_bz_coopA_TNT", "matrix products"),
        ("void at::native::multi_tensor_apply_kernel<FusedOptimizerTensorListMetadata<4>, FusedAdamMathFunctor<float>>", "optimizer"),
        ("aten::_fused_adamw_", "optimizer"),
        ("aten::_foreach_norm", "optimizer"),
        ("Memcpy DtoD (Device -> Device)", "copies"),
        ("void at::native::unrolled_elementwise_kernel<direct_copy_kernel_cuda>", "copies"),
        ("void at::native::(anonymous namespace)::vectorized_layer_norm_kernel<float, float>", "other element-wise"),
    ],
)
def test_kernels_are_known_by_their_names(kernel: str, kind: str) -> None:
    assert kind in gpu_step.kind_of(kernel)


def test_a_step_is_taken_apart(tmp_path: Path) -> None:
    """`gpu_step` on the CPU, in small: the same program that a GPU runs."""
    arguments = ["--device", "cpu", "--rows", "2,4", "--steps", "3", "--layers", "1", "--eager_only", "--out", str(tmp_path)]
    done = launch(arguments, module="benchmarks.gpu_step", timeout=200)
    assert done.returncode == 0, done.stderr
    results = json.loads((tmp_path / "gpu_step.json").read_text(encoding="utf-8"))
    assert [row["rows"] for row in results["sweep"]] == [2, 4]
    padding = {how: row["padded_share"] for how, row in results["padding"].items()}
    assert padding["to 128"] > padding["to the longest of a random batch"] >= padding["grouped"]
    assert sum(results["profile"].values()) == pytest.approx(1, abs=0.15) and results["profile"]["matrix products"] > 0.05
    assert "| 4 | off |" in done.stdout and "Half of the peak is" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "words"),
    [(["--rounds", "0"], "--rounds is 0"), (["--label", "T4 x2"], "small letters and digits")],
)
def test_mistakes_are_named(arguments: list[str], words: str) -> None:
    with pytest.raises(UserError, match=words):
        bench.main(arguments)
