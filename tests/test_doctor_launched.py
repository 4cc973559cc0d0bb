"""The doctor as people run it: a launch that is well, launches with planted faults, ranks that die or hang."""

from __future__ import annotations

import json
import re
import signal
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pyarrow.parquet
import pytest
from launching import ROOT, alive, family, launch, started

OPTIONS = {"max_length": "32", "global_batch_size": "16", "validation_share": "0.1", "precision": "fp32", "device": "cpu"}


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory, tiny_model_dir: Path, r8_dir: Path) -> Path:
    """A configuration with 200 texts to train on and 60 to test, none of them twice, and a tiny model."""
    folder = tmp_path_factory.mktemp("doctor")
    rows = pyarrow.parquet.read_table(r8_dir / "data" / "train.parquet").to_pylist()
    unique = list({" ".join(row["text"].split()): row["label"] for row in rows if row["label"] in (0, 2)}.items())
    write_csv(folder / "train.csv", unique[:200])
    write_csv(folder / "test.csv", unique[200:260])
    settings = OPTIONS | {"model": str(tiny_model_dir), "dataset": str(folder / "train.csv"), "test_file": str(folder / "test.csv")}
    (folder / "run.yaml").write_text("".join(f"{name}: {value}\n" for name, value in settings.items()), encoding="utf-8")
    return folder / "run.yaml"


def write_csv(path: Path, rows: list[tuple[str, Any]]) -> None:
    quoted = [text.replace('"', "'") for text, _ in rows]
    path.write_text(
        "text,label\n" + "".join(f'"{text}",{label}\n' for text, (_, label) in zip(quoted, rows, strict=True)), encoding="utf-8"
    )


def levels(report: Path) -> dict[str, list[str]]:
    findings = json.loads(report.read_text(encoding="utf-8"))["findings"]
    return {level: [f["what"] for f in findings if f["level"] == level] for level in ("ok", "warn", "FAIL", "skip")}


def test_a_launch_that_is_well(config: Path, tmp_path: Path) -> None:
    report, began = tmp_path / "doctor.json", time.monotonic()
    done = launch([str(config), "--launch", "configs/accelerate/cpu2.yaml", "--json", str(report)], module="pipeline.doctor")
    assert done.returncode == 0, done.stdout + done.stderr
    assert time.monotonic() - began < 60
    found = levels(report)
    assert not found["FAIL"] and not found["skip"]
    # Timings on a machine that others use: warnings there say so.
    assert set(found["warn"]) <= {"slowest rank", "all-reduce", "threads"}, done.stdout
    for what in ("world size", "device", "versions", "batch", "Hub", "right to write", "model", "dataset", "duplicates", "contradictions",
                 "test in train", "epoch's rows", "frozen", "unused", "memory", "shared memory", "disk", "precision", "gradient, DDP",
                 "gradient, Trainer", "longest batch", "epoch"):  # fmt: skip
        assert what in found["ok"], done.stdout
    assert "2 ranks, of which Accelerate sees 2" in done.stdout and "All is well" in done.stdout.splitlines()[-1]
    assert "[1/15] world size" in done.stderr, "progress"


def test_one_process_where_two_are_asked_for_and_bad_data(config: Path, tmp_path: Path) -> None:
    """MULTI_CPU silently launches one process; fp16 does not exist on the CPU; rows are repeated, relabelled, leaked."""
    multi_cpu = (ROOT / "configs/accelerate/cpu2.yaml").read_text(encoding="utf-8").replace("MULTI_GPU\n", "MULTI_CPU\n")
    (tmp_path / "multi_cpu.yaml").write_text(multi_cpu, encoding="utf-8")
    lines = (config.parent / "train.csv").read_text(encoding="utf-8").splitlines()
    tested = (config.parent / "test.csv").read_text(encoding="utf-8").splitlines()
    text, label = lines[1].rsplit(",", 1)
    lines += [lines[2], f"{text},{2 - int(label)}", tested[1], tested[2]]
    (tmp_path / "train.csv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    report = tmp_path / "doctor.json"
    done = launch(
        [str(config), "--launch", str(tmp_path / "multi_cpu.yaml"), "--json", str(report), "--dataset", str(tmp_path / "train.csv"),
         "--precision", "fp16"], module="pipeline.doctor",
    )  # fmt: skip
    assert done.returncode == 1
    found = levels(report)
    assert found["FAIL"] == ["world size", "device, precision", "test in train"], done.stdout
    assert {"duplicates", "contradictions"} <= set(found["warn"])
    assert "MULTI_CPU starts one" in done.stdout
    assert "2 test rows (3.3%)" in done.stdout
    assert "3 of " in done.stdout.splitlines()[-1]


def test_faults_between_two_ranks(config: Path, tmp_path: Path) -> None:
    result = tmp_path / "found.json"
    command = ["--standalone", "--nproc_per_node", "2", str(ROOT / "tests/doctor_faults.py"), str(result), str(config)]
    done = launch(command, module="torch.distributed.run", timeout=120, CUDA_VISIBLE_DEVICES="")
    assert done.returncode == 0, done.stderr
    found = json.loads(result.read_text(encoding="utf-8"))

    def bad(fault: str) -> dict[str, dict[str, str]]:
        return {f["what"]: f for f in found[fault] if f["level"] in ("warn", "FAIL")}

    assert set(bad("nothing")) <= {"slowest rank"}
    assert found["nothing"]
    assert "1 on several" in bad("a_row_on_both_ranks")["epoch's rows"]["found"]
    assert set(bad("rows_dealt_wrongly")) == {"gradient, DDP", "gradient, Trainer"}
    scaled = bad("loss_times_world_size")
    assert set(scaled) == {"gradient, Trainer"} and "2 times the loss" in scaled["gradient, Trainer"]["found"]
    assert "unlike on the ranks" in bad("a_parameter_kept_out_of_the_all_reduce")["gradient, DDP"]["found"]
    assert bad("an_unused_parameter")["unused"]["level"] == "FAIL"
    assert "(rank 1)" in bad("a_slow_rank")["slowest rank"]["found"]
    slow = bad("a_link_too_slow_for_the_model")["all-reduce"]
    assert slow["level"] == "warn" and slow["found"].startswith("3.9 MiB in"), slow
    assert "rank 1 0.1.2" in bad("another_library_on_one_rank")["versions"]["found"]
    assert bad("other_rows_on_one_rank")["dataset"]["found"] == "ranks loaded different rows"
    assert "Accelerate sees 1" in bad("two_groups_of_one")["world size"]["found"]
    assert bad("fewer_than_asked")["world size"]["expected"].startswith("4")
    assert "rank 1: OSError: the cable is loose" in bad("an_exception_on_one_rank")["an_exception_on_one_rank"]["found"]


@pytest.mark.parametrize(("sent", "words"), [(signal.SIGKILL, "SIGKILL"), (signal.SIGSTOP, "rank 1 has not moved for 8 s. Last")])
def test_a_rank_that_dies_or_hangs_is_named_and_nothing_is_left(config: Path, sent: signal.Signals, words: str) -> None:
    with started([str(config), "--launch", "configs/accelerate/cpu2.yaml", "--timeout", "8"], module="pipeline.doctor") as process:
        assert process.stderr is not None
        # Not all checks are shown: the quick ones end between two looks at them.
        while not re.match(r"\[([4-9]|1\d)/", line := process.stderr.readline()):
            assert line, "the doctor ended before its fourth check"
        members = family(process)
        second = next(p for p in members if p.environ().get("RANK") == "1" and "pipeline.doctor" in p.cmdline())
        second.send_signal(sent)
        out, err = process.communicate(timeout=60)
    assert process.returncode == 1
    assert words in out, out + err
    assert re.search(r"Last seen: .*rank 1 in '[\w ]+' \(its process is (gone|stopped)\)", out), out
    assert "ok    world size" in out, "what had been found is told"
    psutil.wait_procs(members, timeout=5)
    assert not alive(members)


def test_mistakes_on_the_command_line_are_one_line(
    config: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from pipeline.doctor.__main__ import main
    from pipeline.errors import run_entry

    for arguments, words in (
        (["--launch", "configs/accelerate/cpu3.yaml"], "configs/accelerate/cpu2.yaml"),
        (["--epoch", "1"], "Did you mean '--epochs'?"),
        (["--launch"], "expected one argument"),
    ):
        monkeypatch.setattr(sys, "argv", ["doctor", str(config), *arguments])
        assert run_entry(main) == 2
        told = capsys.readouterr().err
        assert told.count("\n") == 1 and words in told
