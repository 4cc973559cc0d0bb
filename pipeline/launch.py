"""What the Make targets run: pick the topology of this machine, launch, and give a failure back as one line and its code.

    python -m pipeline.launch train configs/ag_news.yaml --epochs 1        # one process
    python -m pipeline.launch train-ddp configs/ag_news.yaml               # two processes, or one per GPU
    python -m pipeline.launch train-raw-ddp configs/ag_news.yaml           # the hand-written script
    python -m pipeline.launch train-ddp configs/ag_news.yaml --max_restarts 3   # goes on by itself after a failed rank
    python -m pipeline.launch torchrun --nnodes 2 ... -m pipeline.train CONFIG  # any bare command, for schedulers that look at the code

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
from typing import Any

from pipeline.config import parse
from pipeline.errors import EXIT_HUNG, EXIT_INTERRUPTED, EXIT_PEER_LOST, EXIT_STOPPED, EXIT_USER_ERROR, UserError, nearest, run_entry

KINDS = ("train", "train-ddp", "train-raw-ddp")


def build_command(kind: str, arguments: list[str], device: str, gpus: int, restarts: int = 0) -> tuple[list[str], str]:
    """The bare command a user would type for a configured `device` and this many GPUs, and a few words on why."""
    if device == "cpu":
        gpus = 0
    processes = 1 if kind == "train" else (gpus or 2)
    name = f"{'gpu' if gpus else 'cpu'}{min(processes, 2)}"
    found = f"{gpus} GPU{'s' * (gpus > 1)} here" if gpus else "no GPU in use"
    why = f"{name[:3].upper()} topology, {processes} process{'es' * (processes > 1)}: {found}"
    if gpus == 1 and kind != "train":
        why += " (two processes on the CPU: --device cpu)"
    if kind == "train-raw-ddp":
        again = ["--max_restarts", str(restarts)] if restarts else []
        return ["torchrun", "--standalone", "--nproc_per_node", str(processes), *again, "-m", "pipeline.train_ddp", *arguments], why
    count = ["--num_processes", str(processes)] if processes > 2 else []
    count += ["--max_restarts", str(restarts)] if restarts else []
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
        return _verdict({rank: failure.exitcode for rank, failure in sorted(error.failures.items())})
    except subprocess.CalledProcessError as error:
        return _verdict({0: error.returncode})
    except SignalException as error:
        # The workers have saved and ended; should one have been too slow for that, there is still all to go on from.
        return EXIT_STOPPED if error.sigval == signal.SIGTERM else 128 + int(error.sigval)
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED
    return 0


def _verdict(codes: dict[int, int]) -> int:
    """The exit code that tells why, of all failed ranks' codes (negative: ended by that signal)."""
    for code in (EXIT_USER_ERROR, EXIT_INTERRUPTED, EXIT_HUNG):
        if code in codes.values():
            return code
    # The launcher ends the other ranks by SIGTERM, and a rank that lost its peer fails as well: neither is the cause.
    for rank, code in codes.items():
        if code < 0 and code != -signal.SIGTERM:
            name = signal.Signals(-code).name
            memory = "Usually memory ran out: lower --max_per_device_batch_size (the result stays the same). " if name == "SIGKILL" else ""
            print(
                f"error: rank {rank} was ended by {name}. {memory}The same command goes on from the newest complete checkpoint.",
                file=sys.stderr,
            )
            return 128 - code
    # A rank that failed alone has the others ended by SIGTERM, which they answer with 75: that is no reason to try again.
    own = [code for code in codes.values() if code > 0 and code not in (EXIT_STOPPED, EXIT_PEER_LOST)]
    if own:
        return own[0]
    if EXIT_STOPPED in codes.values():
        if 0 not in codes:  # rank 0 has no chance to say it when another one, asked alone, leaves first
            print("\nStopped by SIGTERM. Complete checkpoints are kept: run the same command again to go on.", file=sys.stderr)
        return EXIT_STOPPED
    # Ended by SIGTERM before they could hear it: nothing was there to be saved.
    return next((code for code in codes.values() if code > 0), EXIT_STOPPED)


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


def take_restarts(arguments: list[str]) -> int:
    """Take `--max_restarts N`, the launchers' option, out of the entry's arguments."""
    for i, argument in enumerate(arguments):
        if argument.split("=")[0] in ("--max_restarts", "--max-restarts"):
            value = argument.partition("=")[2] if "=" in argument else (arguments[i + 1 : i + 2] or [""])[0]
            if not value.isdigit():
                raise UserError(f"--max_restarts is '{value}': allowed is a whole number, how often to start again after a failed rank.")
            del arguments[i : i + (1 if "=" in argument else 2)]
            return int(value)
    return 0


def main(argv: list[str]) -> int:
    if argv[:1] in (["-h"], ["--help"]):
        print(f"{__doc__}\nTargets: {', '.join(KINDS)}, or a whole `torchrun ...` or `accelerate launch ...` line. Options: TARGET --help.")
        return 0
    if argv[:1] == ["torchrun"] or argv[:2] == ["accelerate", "launch"]:
        os.environ["DISTRINEWS_COMMAND"] = shlex.join(argv)
        return launch(argv + ["--debug"] * ("--debug" in sys.argv))
    if not argv or argv[0] not in KINDS:
        given = argv[0] if argv else "nothing"
        raise UserError(f"'{given}' is no launch target; allowed is {', '.join(KINDS)}.{nearest(given, KINDS)}")
    # Parsed here already: a mistake in it needs no launcher to be found.
    kind, *arguments = argv
    restarts = take_restarts(arguments)
    if restarts and kind == "train":
        raise UserError(
            "--max_restarts needs a launch of several processes: Accelerate starts a single one without a watch over it. Use train-ddp."
        )
    config = parse(arguments, f"python -m pipeline.launch {kind}")
    import torch

    arguments += ["--debug"] * ("--debug" in sys.argv)
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    command, why = build_command(kind, arguments, config.device, gpus, restarts)
    print(f"{why}\n$ {shlex.join(command)}", flush=True)
    os.environ["DISTRINEWS_COMMAND"] = shlex.join(command)
    return launch(command)


if __name__ == "__main__":
    sys.exit(run_entry(main))
