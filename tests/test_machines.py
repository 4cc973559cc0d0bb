"""What docs/machines.md and configs/deploy/ tell people to type or submit is understood by what will read it."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from launching import ROOT

from pipeline.config import TrainConfig, parse

SLURM = ROOT / "configs/deploy/slurm.sbatch"


def command_lines() -> list[str]:
    """Every launch in the page, in the Slurm script and in the heads of the launch files, continued lines joined."""
    texts = [(ROOT / "docs/machines.md").read_text(encoding="utf-8"), SLURM.read_text(encoding="utf-8")]
    texts += [(ROOT / f"configs/accelerate/{name}.yaml").read_text(encoding="utf-8") for name in ("two_nodes", "gpu2_fsdp")]
    joined = [re.sub(r"\\\n#? *", "", text) for text in texts]
    return [
        line
        for text in joined
        for line in re.findall(
            r"^(?:#  )? *(?:srun )?((?:\S*python -m pipeline.launch )?(?:accelerate launch|torchrun) .+)$", text, flags=re.MULTILINE
        )
    ]


def understood(words: list[str]) -> TrainConfig:
    """The launcher's own parser takes its options, the project's takes the run's."""
    start = next(i for i, word in enumerate(words) if word == "-m" or word.endswith(".py"))
    launcher, entry = words[:start], words[start:]
    if launcher[0] == "torchrun":
        from torch.distributed.run import get_args_parser

        options: Any = get_args_parser().parse_args([*launcher[1:], *entry])
    else:
        from accelerate.commands.launch import launch_command_parser

        options = launch_command_parser().parse_args([*launcher[2:], *entry])
        assert (ROOT / options.config_file).is_file()
    assert options.module and options.training_script in ("pipeline.train", "pipeline.train_ddp")
    return parse(options.training_script_args)


@pytest.mark.parametrize("line", command_lines())
def test_launch_lines_are_understood(line: str) -> None:
    line = line.replace('"${@:-configs/ag_news.yaml}" || code=$?', "configs/ag_news.yaml").replace('"$SLURM_JOB_NUM_NODES"', "2")
    words = shlex.split(line)
    if "pipeline.launch" in words:
        words = words[words.index("pipeline.launch") + 1 :]
    assert understood(words).dataset


def test_the_lines_were_found() -> None:
    lines = " ".join(command_lines())
    assert len(command_lines()) == 6
    assert all(
        word in lines for word in ("two_nodes.yaml", "gpu2_fsdp.yaml", "pipeline.train_ddp", "--rdzv_backend c10d", "--machine_rank")
    )


@pytest.mark.parametrize("name", ["two_nodes", "gpu2_fsdp"])
def test_launch_files_are_read_as_they_are_meant(name: str) -> None:
    from accelerate.commands.config.config_args import load_config_from_file

    config: Any = load_config_from_file(str(ROOT / f"configs/accelerate/{name}.yaml"))
    assert (str(config.distributed_type.value), config.num_machines, config.num_processes) == {
        "two_nodes": ("MULTI_GPU", 2, 4),
        "gpu2_fsdp": ("FSDP", 1, 2),
    }[name]
    assert config.mixed_precision == "no", "the run's own --precision decides"


def test_the_slurm_script_is_sound() -> None:
    subprocess.run(["bash", "-n", str(SLURM)], check=True, timeout=20)
    shellcheck = Path(sys.executable).with_name("shellcheck")
    done = subprocess.run([str(shellcheck), str(SLURM)], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    directives = dict(re.findall(r"^#SBATCH --([\w-]+)(?:=(\S+))?", SLURM.read_text(encoding="utf-8"), flags=re.MULTILINE))
    assert directives["signal"].startswith("TERM@"), "with B: it would reach this script and not the run"
    assert "requeue" in directives and directives["ntasks-per-node"] == "1"
    # srun does not take it over from sbatch.
    assert f'SRUN_CPUS_PER_TASK="${{SLURM_CPUS_PER_TASK:-{directives["cpus-per-task"]}}}"' in SLURM.read_text(encoding="utf-8")


def test_the_trainjob_is_one() -> None:
    """Kubeflow's own models drop what they do not know: what comes back equal has no key but those of the API."""
    from kubeflow_trainer_api.models.trainer_v1alpha1_train_job import TrainerV1alpha1TrainJob

    job = yaml.safe_load((ROOT / "configs/deploy/trainjob.yaml").read_text(encoding="utf-8"))
    read = TrainerV1alpha1TrainJob.from_dict(job)
    assert read is not None and read.to_dict() == job
    misspelt = job | {"spec": job["spec"] | {"numNode": 2}}
    assert TrainerV1alpha1TrainJob.from_dict(misspelt).to_dict() != misspelt
    trainer = job["spec"]["trainer"]
    assert int(trainer["resourcesPerNode"]["limits"]["nvidia.com/gpu"]) == trainer["numProcPerNode"]
    words = [*trainer["command"], *trainer["args"]]
    config = understood(words[words.index("torchrun") :])
    mounts = job["spec"]["runtimePatches"][0]["trainingRuntimeSpec"]["template"]["spec"]["replicatedJobs"][0]["template"]["spec"][
        "template"
    ]["spec"]["containers"][0]["volumeMounts"]
    assert str(config.output_dir).startswith(mounts[0]["mountPath"] + "/"), "checkpoints lie on the volume"
