"""Both entries, really launched: one and two processes, the same weights, stopped and resumed, published and served."""

from __future__ import annotations

import json
import signal
import time
import urllib.request
from pathlib import Path
from typing import Any

import psutil
import pytest
from launching import alive, family, launch, short_run, started, wait_until

SETTINGS = """
validation_share: 0.1
epochs: 2
evals_per_epoch: 2
logging_steps: 1
"""


@pytest.fixture(scope="module")
def workshop(tmp_path_factory: pytest.TempPathFactory, tiny_model_dir: Path, r8_dir: Path) -> Path:
    """A folder with a configuration for real texts and a tiny model."""
    folder = tmp_path_factory.mktemp("workshop")
    short_run(folder, tiny_model_dir, r8_dir, SETTINGS)
    return folder


def train(workshop: Path, kind: str, name: str, *options: str, **environment: str) -> dict[str, Any]:
    done = launch([kind, str(workshop / "run.yaml"), "--output_dir", str(workshop / name), *options], timeout=400, **environment)
    assert done.returncode == 0, done.stderr
    record = json.loads((workshop / name / "run.json").read_text(encoding="utf-8"))
    return {"record": record, "out": done.stdout, "err": done.stderr, "folder": workshop / name}


@pytest.fixture(scope="module")
def trainer2(workshop: Path) -> dict[str, Any]:
    return train(workshop, "train-ddp", "trainer2", "--tracker", "tensorboard")


@pytest.fixture(scope="module")
def raw2(workshop: Path) -> dict[str, Any]:
    return train(workshop, "train-raw-ddp", "raw2")


def weights(folder: Path, step: int) -> dict[str, Any]:
    from safetensors.torch import load_file

    return load_file(folder / f"checkpoint-{step}" / "model.safetensors")


def furthest(a: dict[str, Any], b: dict[str, Any]) -> float:
    """The largest difference between two runs' weights after their last step."""
    step = a["record"]["steps"]
    first, second = weights(a["folder"], step), weights(b["folder"], step)
    return max(float((first[name] - second[name]).abs().max()) for name in first)


def losses(run: dict[str, Any]) -> list[tuple[int, float, float, float]]:
    return [(h["step"], h["loss"], h["grad_norm"], h["learning_rate"]) for h in run["record"]["history"]]


def test_raw_script_and_trainer_reach_the_same_weights_bit_for_bit(trainer2: dict[str, Any], raw2: dict[str, Any]) -> None:
    assert trainer2["record"]["topology"]["world_size"] == raw2["record"]["topology"]["world_size"] == 2
    assert losses(trainer2) == losses(raw2)
    assert len(losses(raw2)) == raw2["record"]["steps"] == 112
    assert furthest(trainer2, raw2) == 0.0
    assert trainer2["record"]["weights_sha256"] == raw2["record"]["weights_sha256"]
    assert trainer2["record"]["test"]["confusion_matrix"] == raw2["record"]["test"]["confusion_matrix"]
    assert trainer2["record"]["test"]["nll"] == pytest.approx(raw2["record"]["test"]["nll"], abs=1e-9)
    assert trainer2["record"].keys() == raw2["record"].keys()
    assert sorted(p.name for p in (trainer2["folder"] / "release").iterdir()) == sorted(
        p.name for p in (raw2["folder"] / "release").iterdir()
    )


def test_the_all_reduce_is_tuned_alike_in_both_entries(workshop: Path, raw2: dict[str, Any]) -> None:
    """Rounded to fp16, in small buckets, over a static graph: the same bits from both, and other ones than without."""
    options = ("--comm_hook", "fp16", "--bucket_mb", "1", "--static_graph", "true", "--max_steps", "12")
    told = {"TORCH_CPP_LOG_LEVEL": "INFO", "TORCH_DISTRIBUTED_DEBUG": "INFO"}
    trainer, raw = (train(workshop, kind, f"tuned-{kind}", *options, **told) for kind in ("train-ddp", "train-raw-ddp"))
    assert losses(trainer) == losses(raw)
    assert furthest(trainer, raw) == 0.0
    for run in (trainer, raw):
        assert "bucket_bytes_cap: 1048576" in run["err"]
        (_, loss, norm, _), (_, plain_loss, plain_norm, _) = losses(run)[0], losses(raw2)[0]
        assert loss == pytest.approx(plain_loss, abs=1e-6) and plain_norm != norm == pytest.approx(plain_norm, rel=1e-3)


def test_what_a_run_says_and_records(trainer2: dict[str, Any], raw2: dict[str, Any]) -> None:
    for run in (trainer2, raw2):
        assert "2 process(es), backend gloo" in run["out"]
        assert "16 rows a step = 2 processes x 1 accumulation x 8 rows on a device" in run["out"]
        assert run["out"].count("validation accuracy") == 4, "one line an evaluation, from rank 0 only"
        assert "112/112" in run["err"] and "Traceback" not in run["err"]
        record = run["record"]
        assert record["data"]["rows"] == {"train": 900, "validation": record["validation"]["examples"], "test": 2189}
        assert record["test"]["examples"] == 2189
        assert record["best"]["step"] in {e["step"] for e in record["epochs"]}
        assert max(e["macro_f1"] for e in record["epochs"]) == record["best"]["value"]
        loss = [h["loss"] for h in record["history"]]
        assert sum(loss[-20:]) < 0.8 * sum(loss[:20]), "it learns"
        assert record["train_seconds"] > 0 and record["samples_per_second"] > 0
        speed = record["speed"]
        assert speed["steps"] == 112 - 3 and 0 < speed["padded_share"] < 0.5 and len(speed["peak_memory_gib"]) == 2
        assert speed["seconds"] < record["train_seconds"] and speed["step_seconds"]["p50"] < 5 * speed["seconds"] / speed["steps"]
    assert list((trainer2["folder"] / "runs").glob("events*")), "TensorBoard was asked for"
    assert not (raw2["folder"] / "runs").exists()


def test_checkpoints_kept_are_the_newest_and_the_best(raw2: dict[str, Any]) -> None:
    kept = {int(p.name.removeprefix("checkpoint-")) for p in raw2["folder"].glob("checkpoint-*")}
    assert kept == {84, 112, raw2["record"]["best"]["step"]}


def test_one_process_and_accumulation_learn_the_same(workshop: Path) -> None:
    """Dropout off: its masks depend on the rank. What is left is rounding, which Adam amplifies."""
    options = ("--dropout", "0", "--max_steps", "20", "--class_weights", "balanced")
    one = train(workshop, "train", "one", *options)
    accumulated = train(workshop, "train-raw-ddp", "accumulated", *options, "--max_per_device_batch_size", "4")
    assert one["record"]["batch"] == {"global": 16, "per_device": 16, "accumulation": 1, "world_size": 1}
    assert accumulated["record"]["batch"] == {"global": 16, "per_device": 4, "accumulation": 2, "world_size": 2}
    for (step, *a), (other, *b) in zip(losses(one), losses(accumulated), strict=True):
        assert step == other
        assert a == pytest.approx(b, abs=1e-6)
    assert furthest(one, accumulated) < 5e-6
    for name in ("accuracy", "macro_f1"):
        assert one["record"]["test"][name] == pytest.approx(accumulated["record"]["test"][name], abs=1e-9)


@pytest.mark.parametrize("kind", ["train-ddp", "train-raw-ddp"])
def test_ctrl_c_loses_nothing_and_the_same_command_goes_on(workshop: Path, raw2: dict[str, Any], kind: str) -> None:
    folder = workshop / f"stopped-{kind}"
    arguments = [kind, str(workshop / "run.yaml"), "--output_dir", str(folder)]
    with started(arguments) as process:
        wait_until(process, lambda: list(folder.glob("checkpoint-*/manifest.json")))
        members = family(process)
        assert len(members) >= 3, "a launcher and two workers"
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert err.count("Interrupted") == 1 and "Traceback" not in err, err
    psutil.wait_procs(members, timeout=5)
    assert not alive(members)
    assert not (folder / "run.json").exists(), "it was stopped in mid-run"
    again = train(workshop, kind, folder.name)
    assert "resumed     after step" in again["out"]
    assert losses(again) == losses(raw2), "as if it had never been stopped"
    assert again["record"]["weights_sha256"] == raw2["record"]["weights_sha256"]


def test_a_finished_run_is_not_trained_again(workshop: Path, raw2: dict[str, Any]) -> None:
    again = train(workshop, "train-raw-ddp", "raw2")
    assert "resumed     this run is finished, trained by 2 process(es)" in again["out"]
    for name in ("weights_sha256", "history", "epochs", "test", "sessions"):
        assert again["record"][name] == raw2["record"][name], name
    # Another launch of it scores and releases, but trained nothing, and its record does not claim so.
    options = ["--output_dir", str(raw2["folder"]), str(workshop / "run.yaml")]
    alone = launch([options[2], *options[:2]], module="pipeline.train_ddp")
    assert alone.returncode == 0, alone.stderr
    record = json.loads((raw2["folder"] / "run.json").read_text(encoding="utf-8"))
    assert record["topology"]["world_size"] == 2
    assert record["test"]["confusion_matrix"] == raw2["record"]["test"]["confusion_matrix"]


def test_early_stopping_takes_the_best_checkpoint(workshop: Path) -> None:
    """A learning rate that only does harm after the first evaluations; plain `python` as a group of one."""
    options = [
        "--learning_rate",
        "0.05",
        "--early_stopping_patience",
        "2",
        "--evals_per_epoch",
        "6",
        "--save_total_limit",
        "1",
        "--best_metric",
        "nll",
    ]
    folder = workshop / "early"
    done = launch([str(workshop / "run.yaml"), "--output_dir", str(folder), *options], module="pipeline.train_ddp")
    assert done.returncode == 0, done.stderr
    record = json.loads((folder / "run.json").read_text(encoding="utf-8"))
    assert "Stopped early: 2 evaluations without a better nll." in done.stdout
    assert record["steps"] < 112
    by_step = {e["step"]: e["nll"] for e in record["epochs"]}
    assert record["best"]["step"] == min(by_step, key=by_step.__getitem__) == sorted(by_step)[-3]
    assert {p.name for p in folder.glob("checkpoint-*")} == {f"checkpoint-{record['best']['step']}", f"checkpoint-{record['steps']}"}


def test_the_missions_command_from_hub_to_service(
    workshop: Path, local_hub: Any, ag_news_dir: Path, tiny_model_dir: Path, tmp_path: Path
) -> None:
    """configs/ag_news.yaml unchanged, a few steps: data and model from a Hub, release to it, service from it."""
    from huggingface_hub import HfApi

    for repository, kind, folder in (
        ("fancyzhx/ag_news", "dataset", ag_news_dir), ("distilbert/distilbert-base-uncased", "model", tiny_model_dir),
    ):  # fmt: skip
        owner = HfApi(endpoint=local_hub.url, token=local_hub.token)  # the local Hub's user owns these namespaces too
        owner.create_repo(repository, repo_type=kind)
        owner.upload_folder(repo_id=repository, repo_type=kind, folder_path=folder)
    environment = local_hub.env | {"HF_HOME": str(tmp_path / "home")}
    push = ["--push_to_hub", "--hub_repo", f"{local_hub.user}/ag-news"]
    arguments = ["train-ddp", "configs/ag_news.yaml", "--device", "cpu", "--max_steps", "4", "--output_dir", str(workshop / "mission")]
    done = launch([*arguments, *push], **environment)
    assert done.returncode == 0, done.stderr
    published = json.loads((workshop / "mission" / "published.json").read_text(encoding="utf-8"))
    refs = HfApi(endpoint=local_hub.url, token=local_hub.token).list_repo_refs(published["repo"])
    assert [(tag.name, tag.target_commit) for tag in refs.tags] == [("v1", published["commit"])]
    record = json.loads((workshop / "mission" / "run.json").read_text(encoding="utf-8"))
    assert (record["config"]["learning_rate"], record["config"]["max_length"], record["test"]["examples"]) == (2e-5, 128, 3800)

    with started(["--model", published["repo"], "--revision", "v1", "--port", "0"], module="serve", **environment) as process:
        assert process.stdout is not None
        line = ""
        while not line.startswith("listening on"):
            line = process.stdout.readline()
            assert line or process.poll() is None, process.communicate()[1]
        url = line.split()[-1]
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        body = json.dumps({"text": "The striker scored twice in the cup final"}).encode()
        for attempt in range(100):
            try:
                opener.open(f"{url}/ready", timeout=10).read()
                break
            except OSError:
                time.sleep(0.2)
                assert attempt < 99
        with opener.open(urllib.request.Request(f"{url}/predict", body, {"Content-Type": "application/json"}), timeout=30) as response:
            answer = json.loads(response.read())
    assert answer["revision"] == published["commit"]
    assert answer["label"] in ("World", "Sports", "Business", "Sci/Tech")
    assert sum(answer["probabilities"].values()) == pytest.approx(1, abs=1e-4)


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_two_processes_learn_ag_news_to_88_percent(tmp_path: Path, ag_news_dir: Path, encoder_dir: Path) -> None:
    options = [
        "--model",
        str(encoder_dir),
        "--dataset",
        str(ag_news_dir),
        "--epochs",
        "1",
        "--learning_rate",
        "1e-4",
        "--global_batch_size",
        "16",
    ]
    done = launch(["train-ddp", "configs/ag_news.yaml", *options, "--device", "cpu", "--output_dir", str(tmp_path / "run")], timeout=1400)
    assert done.returncode == 0, done.stderr
    record = json.loads((tmp_path / "run" / "run.json").read_text(encoding="utf-8"))
    assert record["topology"]["world_size"] == 2
    assert record["test"]["examples"] == 3800
    assert record["test"]["accuracy"] >= 0.88
