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
from launching import ROOT, alive, family, kill, launch, started

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


def levels(shown: str) -> dict[str, list[str]]:
    """What was found ok, warned of, failed and skipped, by the lines that were shown."""
    lines = re.findall(r"^(ok|warn|FAIL|skip) +(\S+(?: \S+)*)", shown, flags=re.MULTILINE)
    return {level: [what for its, what in lines if its == level] for level in ("ok", "warn", "FAIL", "skip")}


def test_a_launch_that_is_well(config: Path) -> None:
    began = time.monotonic()
    done = launch([str(config), "--launch", "configs/accelerate/cpu2.yaml"], module="pipeline.doctor")
    assert done.returncode == 0, done.stdout + done.stderr
    assert time.monotonic() - began < 60
    found = levels(done.stdout)
    assert not found["FAIL"] and not found["skip"]
    # The link's share of a step of a tiny model on a machine that others use may be large, and a warning then says so.
    assert set(found["warn"]) <= {"all-reduce"}, done.stdout
    for what in ("world size", "device", "versions", "batch", "Hub", "right to write", "model", "dataset", "duplicates",
                 "test in train", "epoch's rows", "frozen", "unused", "memory", "shared memory", "disk", "precision", "gradient",
                 "longest batch", "epoch"):  # fmt: skip
        assert what in found["ok"], done.stdout
    assert "2 ranks, of which Accelerate sees 2" in done.stdout and "All is well" in done.stdout.splitlines()[-1]


def test_a_sharded_launch_is_checked_and_then_examined_as_ddp(config: Path, tmp_path: Path) -> None:
    launch_file = ROOT / "configs/accelerate/gpu2_fsdp.yaml"
    done = launch([str(config), "--launch", str(launch_file)], module="pipeline.doctor", CUDA_VISIBLE_DEVICES="")
    assert done.returncode == 0, done.stdout + done.stderr
    found = levels(done.stdout)
    assert "FSDP" in found["warn"] and "gradient" in found["ok"] and not found["FAIL"] + found["skip"], done.stdout
    settings = launch_file.read_text(encoding="utf-8").rstrip() + "\n  fsdp_offload_params: true\n"
    (tmp_path / "offload.yaml").write_text(settings, encoding="utf-8")
    done = launch([str(config), "--launch", str(tmp_path / "offload.yaml")], module="pipeline.doctor", CUDA_VISIBLE_DEVICES="")
    assert done.returncode == 1 and "fsdp_offload_params is true: allowed is false" in " ".join(done.stdout.split()), done.stdout


def test_one_process_where_two_are_asked_for_and_bad_data(config: Path, tmp_path: Path) -> None:
    """MULTI_CPU silently launches one process; fp16 does not exist on the CPU; rows are repeated, relabelled, leaked."""
    multi_cpu = (ROOT / "configs/accelerate/cpu2.yaml").read_text(encoding="utf-8").replace("MULTI_GPU\n", "MULTI_CPU\n")
    (tmp_path / "multi_cpu.yaml").write_text(multi_cpu, encoding="utf-8")
    lines = (config.parent / "train.csv").read_text(encoding="utf-8").splitlines()
    tested = (config.parent / "test.csv").read_text(encoding="utf-8").splitlines()
    text, label = lines[1].rsplit(",", 1)
    lines += [lines[2], f"{text},{2 - int(label)}", tested[1], tested[2]]
    (tmp_path / "train.csv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    done = launch(
        [str(config), "--launch", str(tmp_path / "multi_cpu.yaml"), "--dataset", str(tmp_path / "train.csv"), "--precision", "fp16"],
        module="pipeline.doctor",
    )
    assert done.returncode == 1
    found = levels(done.stdout)
    assert found["FAIL"] == ["world size", "configured", "test in train"], done.stdout
    assert "duplicates" in found["warn"] and "2 rows of train, 1 texts with several labels" in done.stdout
    assert "MULTI_CPU starts one" in done.stdout
    assert "2 test rows (3.3%)" in done.stdout
    assert done.stdout.splitlines()[-1].startswith("3 FAILED")


def test_faults_between_two_ranks(config: Path, tmp_path: Path) -> None:
    result = tmp_path / "found.json"
    command = ["--standalone", "--nproc_per_node", "2", str(ROOT / "tests/doctor_faults.py"), str(result), str(config)]
    done = launch(command, module="torch.distributed.run", timeout=120, CUDA_VISIBLE_DEVICES="")
    assert done.returncode == 0, done.stderr
    found = json.loads(result.read_text(encoding="utf-8"))

    def bad(fault: str) -> dict[str, dict[str, str]]:
        return {f["what"]: f for f in found[fault] if f["level"] in ("warn", "FAIL")}

    assert not bad("nothing") and len(found["nothing"]) >= 9
    assert "1 on several" in bad("a_row_on_both_ranks")["epoch's rows"]["found"]
    assert "10 or 11 micro-batches" in bad("a_rank_with_less_to_do")["epoch's rows"]["found"]
    assert "gradient" in bad("rows_dealt_wrongly")
    assert "2 times the loss" in bad("loss_times_world_size")["gradient"]["found"]
    assert "unlike on the ranks" in bad("a_parameter_kept_out_of_the_all_reduce")["gradient"]["found"]
    assert bad("an_unused_parameter")["unused"]["level"] == "FAIL"
    slow = bad("a_link_too_slow_for_the_model")["all-reduce"]
    assert slow["level"] == "warn" and "at most 100% of a step" in slow["found"], slow
    assert "1 x CPU, gloo, fp32; 1 x Tesla T4, gloo, fp32" in bad("another_device_on_one_rank")["device"]["found"]
    assert {"memory, rank 1"} == set(bad("a_full_machine_at_the_second_rank")), "the first rank's machine has room"
    assert "rank 1 0.1.2" in bad("another_library_on_one_rank")["versions"]["found"]
    assert bad("other_rows_on_one_rank")["dataset"]["found"] == "ranks loaded another dataset"
    assert "Accelerate sees 1" in bad("two_groups_of_one")["world size"]["found"]
    assert bad("fewer_than_asked")["world size"]["expected"].startswith("4")
    assert "rank 1: OSError: the cable is loose" in bad("an_exception_on_one_rank")["an_exception_on_one_rank"]["found"]


@pytest.mark.parametrize(
    ("sent", "code", "words"),
    [(signal.SIGKILL, 137, "rank 1 was ended by SIGKILL"), (signal.SIGSTOP, 70, r"one that hangs \(rank 1 on .*, at: ")],
)
def test_a_rank_that_dies_or_hangs_is_named_and_nothing_is_left(
    config: Path, encoder_dir: Path, sent: signal.Signals, code: int, words: str
) -> None:
    # Large enough to be met in the middle of a check.
    large = ["--model", str(encoder_dir), "--max_length", "128", "--global_batch_size", "32", "--hang_seconds", "1"]
    with started([str(config), "--launch", "configs/accelerate/cpu2.yaml", *large], module="pipeline.doctor") as process:
        assert process.stdout is not None and process.stderr is not None
        while not (line := process.stdout.readline()).startswith("ok    disk"):
            assert line, "the doctor ended before its longest batch"
        members = family(process)
        second = next(p for p in members if p.environ().get("RANK") == "1" and "pipeline.doctor.examine" in p.cmdline())
        note = Path(second.cmdline()[second.cmdline().index("pipeline.doctor.examine") + 1]) / ".watch" / "rank-1.json"
        while json.loads(note.read_text(encoding="utf-8"))["slow"]:  # it is written once a second
            time.sleep(0.05)
        second.send_signal(sent)
        told = process.stderr.readline()
        while not told.startswith("error: "):
            assert told, "the doctor ended without a word"
            told = process.stderr.readline()
        kill([second])  # the launcher would give the rank that hangs half a minute to end
        out, err = process.communicate(timeout=60)
    assert process.returncode == code, err
    assert re.search(words, told + err), told + err
    assert "All is well" not in out
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
