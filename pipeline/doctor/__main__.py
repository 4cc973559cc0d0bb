"""Examine a launch before hours are spent on it: `make doctor`.

    python -m pipeline.doctor configs/ag_news.yaml
    python -m pipeline.doctor configs/ag_news.yaml --launch configs/accelerate/cpu2.yaml --epochs 1

Starts the launch file's processes as `accelerate launch` would for training, has them measure together what usually goes
wrong without a word, and prints one line for each: what, found, expected, and the next step where it is not well. Writes
nothing but caches. Exit code 0: all is well (warnings allowed); 1: something FAILED; 2: the command cannot be understood;
another: a rank did not come to its end.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

import yaml

from pipeline.config import parse
from pipeline.errors import UserError, run_entry
from pipeline.launch import build_command, launch

PROG = "python -m pipeline.doctor"
USAGE = f"{PROG} [CONFIG.yaml] [--launch FILE] [--option value ...]"
ABOUT = "All options of `python -m pipeline.train --help` are understood too, and:"


def launch_command(file: Path | None, device: str) -> tuple[list[str], int]:
    """`accelerate launch --config_file FILE ...` up to its module, and the number of processes which that asks for."""
    import torch

    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    command = ["accelerate", "launch", "--config_file", str(file)] if file else build_command("train-ddp", [], device, gpus)[0][:-2]
    file = Path(command[3])
    if not file.is_file():
        there = ", ".join(sorted(str(path) for path in Path("configs/accelerate").glob("*.yaml")))
        raise UserError(f"No launch file {file}. There are {there or 'none in configs/accelerate'}.")
    settings = yaml.safe_load(file.read_text(encoding="utf-8"))
    if not isinstance(settings, dict):
        raise UserError(f"{file} is no launch file: allowed is what `accelerate config` writes, as in configs/accelerate/.")
    return command, int(command[-1] if "--num_processes" in command else settings.get("num_processes", 1))


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog=PROG, allow_abbrev=False, exit_on_error=False, usage=USAGE, description=ABOUT)
    parser.add_argument("--launch", type=Path, help="Launch file; none: cpu2.yaml without a GPU, else gpu1.yaml or gpu2.yaml.")
    try:
        options, arguments = parser.parse_known_args(argv)
    except argparse.ArgumentError as error:
        raise UserError(f"{error}. Usage: {USAGE}") from error
    config = parse(arguments, PROG)
    command, asked = launch_command(options.launch, config.device)
    print(f"{command[3]}, {asked} process{'es' * (asked > 1)}; {config.model}; {config.dataset}", flush=True)
    arguments += ["--debug"] * ("--debug" in sys.argv)
    with tempfile.TemporaryDirectory(prefix="doctor-") as folder:
        return launch([*command, "-m", "pipeline.doctor.examine", folder, str(asked), command[3], *arguments])


if __name__ == "__main__":
    sys.exit(run_entry(main))
