"""What the Make targets run: pick the topology of this machine, launch, and give a failure back as one line and its code.

    python -m pipeline.launch train configs/ag_news.yaml --epochs 1        # one process
    python -m pipeline.launch train-ddp configs/ag_news.yaml               # two processes, or one per GPU
    python -m pipeline.launch train-raw-ddp configs/ag_news.yaml           # the hand-written script

It prints the plain `accelerate launch` or `torchrun` command it stands for. Those launchers turn any failure into exit
code 1 and forty lines of traceback; here the entry's own line is the last word and its code comes through.
"""

from __future__ import annotations

import logging
import os
import shlex
import signal
import subprocess
import sys
from typing import Any, Literal

from pipeline.errors import EXIT_INTERRUPTED, UserError, nearest, run_entry

Kind = Literal["train", "train-ddp", "train-raw-ddp"]
KINDS = ("train", "train-ddp", "train-raw-ddp")


def topology_file(kind: str, gpus: int, device: str) -> tuple[str, int, str]:
    """Launch file (without folder and ending), processes, and why, for this many GPUs and this `--device`."""
    if device == "cpu":
        gpus = 0
    if kind == "train":
        return ("gpu1", 1, f"{gpus} GPU(s) here, one is used") if gpus else ("cpu1", 1, "no GPU in use")
    if gpus >= 2:
        return "gpu2", gpus, f"{gpus} GPUs here"
    reason = "one GPU here, two processes need two" if gpus else "no GPU in use"
    return "cpu2", 2, reason


def build_command(kind: str, arguments: list[str], gpus: int) -> tuple[list[str], str]:
    """The bare command a user would type, and a few words on the topology that was chosen."""
    device = next((b for a, b in zip(arguments, [*arguments[1:], ""], strict=True) if a == "--device"), "auto")
    device = next((a.split("=", 1)[1] for a in arguments if a.startswith("--device=")), device)
    name, processes, reason = topology_file(kind, gpus, device)
    if name.startswith("cpu") and device == "auto" and gpus:
        arguments = [*arguments, "--device", "cpu"]
    why = f"{'GPU' if name.startswith('gpu') else 'CPU'} topology, {processes} process{'es' * (processes > 1)}: {reason}"
    if kind == "train-raw-ddp":
        return ["torchrun", "--standalone", "--nproc_per_node", str(processes), "-m", "pipeline.train_ddp", *arguments], why
    count = ["--num_processes", str(processes)] if processes > 2 else []
    return ["accelerate", "launch", "--config_file", f"configs/accelerate/{name}.yaml", *count, "-m", "pipeline.train", *arguments], why


def launch(command: list[str]) -> int:
    """Run a bare `accelerate launch` or `torchrun` command in this process; returns the exit code of its entry.

    Ctrl-C and SIGTERM reach the workers (which run in sessions of their own) and are waited for.
    """
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    # The launchers' reports on a failed child; the child has already said what is to be said.
    logging.getLogger("torch.distributed").setLevel(logging.CRITICAL + 1)
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # only until the entry sets its own; else the launcher warns
    try:
        if command[0] == "torchrun":
            from torch.distributed.run import main as torchrun

            torchrun(command[1:])
        else:
            _accelerate_launch(command[2:])
    except ChildFailedError as error:
        codes = [failure.exitcode for _, failure in sorted(error.failures.items())]
        return next((code for code in codes if code > 0), 1)
    except subprocess.CalledProcessError as error:
        return error.returncode if error.returncode > 0 else 128 - error.returncode
    except SignalException as error:
        return 128 + int(error.sigval)
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED
    return 0


def _accelerate_launch(arguments: list[str]) -> None:
    from accelerate.commands.launch import launch_command, launch_command_parser

    parser: Any = launch_command_parser()
    # For a single process Accelerate starts a plain child and waits. It has the terminal's Ctrl-C itself; we have to
    # outlive it, and hand a SIGTERM on. (For several processes torchrun's agent replaces these handlers by its own.)
    signal.signal(signal.SIGINT, lambda *_: None)
    signal.signal(signal.SIGTERM, _hand_to_children)
    launch_command(parser.parse_args(arguments))


def _hand_to_children(number: int, _: Any) -> None:
    import psutil

    for child in psutil.Process().children():
        child.send_signal(number)


def main(argv: list[str]) -> int:
    if not argv or argv[0] not in KINDS:
        given = argv[0] if argv else "nothing"
        raise UserError(f"'{given}' is no launch target; allowed is {', '.join(KINDS)}.{nearest(given, KINDS)}")
    import torch

    command, why = build_command(argv[0], argv[1:], torch.cuda.device_count() if torch.cuda.is_available() else 0)
    print(f"{why}\n$ {shlex.join(command)}", flush=True)
    return launch(command)


if __name__ == "__main__":
    sys.exit(run_entry(lambda: main(sys.argv[1:])))
