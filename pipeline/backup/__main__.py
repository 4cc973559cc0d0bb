"""`python -m pipeline.backup`: push and pull by hand; a push in the background is the same command."""

from __future__ import annotations

import argparse
import os
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from huggingface_hub import HfApi
from huggingface_hub.utils import logging

from pipeline.backup.branch import branch_of, find
from pipeline.backup.from_hub import pull
from pipeline.backup.to_hub import push
from pipeline.errors import UserError, run_entry


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}. Usage: python -m pipeline.backup push|pull --run outputs/NAME --repo owner/name [--private]")


def main(argv: Sequence[str]) -> None:
    description = "Push a run's newest checkpoint to its branch on the Hub, or pull what is there."
    parser = _Parser(prog="python -m pipeline.backup", description=description, allow_abbrev=False)
    parser.add_argument("action", choices=("push", "pull"))
    parser.add_argument("--run", required=True, type=Path, help="Folder of the run, for example outputs/ag_news.")
    parser.add_argument("--repo", required=True, help="owner/name of the model repository; push makes it if it does not exist.")
    parser.add_argument("--private", action="store_true", help="Create the repository as private.")
    parser.add_argument("--parent", type=int, help=argparse.SUPPRESS)  # of a background push: ends with that process
    arguments = parser.parse_args(argv)
    if arguments.parent:
        os.nice(10)  # the ranks go first
        threading.Thread(target=_end_with, args=(arguments.parent,), daemon=True).start()
    logging.set_verbosity_error()  # its warnings hold signed addresses
    api, branch = HfApi(), branch_of(arguments.run)
    if arguments.action == "push":
        step = push(arguments.run, arguments.repo, private=arguments.private, api=api)
        print(f"checkpoint-{step} is on the Hub: {api.endpoint}/{arguments.repo}/tree/{branch}", flush=True)
        return
    remote = find(arguments.run, arguments.repo, api)
    if remote is None:
        raise UserError(
            f"{arguments.repo} holds no checkpoints on a branch {branch}. The run's folder gives the branch its name: check --run."
        )
    print(f"{pull(remote, arguments.run, api)} is here, from {remote.repo} at {remote.commit}", flush=True)


def _end_with(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(0.5)
    os._exit(1)


if __name__ == "__main__":
    sys.exit(run_entry(main))
