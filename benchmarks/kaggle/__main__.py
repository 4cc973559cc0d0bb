"""Check the notebook for Kaggle, run it here, or push it there through Kaggle's own client.

    make kaggle ARGS=--dry                                        # check; says what will be different on Kaggle; sends nothing
    make kaggle USER=your-name HUB_REPO=your-name/ag-news         # check, then push: Kaggle runs it on 2x T4
    python -m benchmarks.kaggle --run --set EPOCHS=1 --set MAX_TRAIN_SAMPLES=2000 --set QUICK=True   # here, on two CPU processes

The notebook is distrinews.ipynb beside this file; --set changes its parameters in a copy under outputs/kaggle, and that copy
is pushed or run. --run needs the packages of requirements-dev.txt, pushing those of requirements.txt beside this file.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

from benchmarks.common import ROOT
from benchmarks.kaggle.check import METADATA, NOTEBOOK, parameters, problems, read, with_parameters
from pipeline.errors import UserError, run_entry
from pipeline.record import code_version

PROG = "python -m benchmarks.kaggle"
FOLDER = ROOT / "outputs" / "kaggle"
SIGN_IN = "Kaggle does not know you: `kaggle auth login`, or KAGGLE_API_TOKEN with a token from your account's settings; then push again."


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog=PROG, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--user", help="Your name on Kaggle, to push under.")
    parser.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", help="A parameter of the notebook; repeatable.")
    parser.add_argument("--dry", action="store_true", help="Check only; nothing is sent.")
    parser.add_argument("--run", action="store_true", help="Run it on this machine instead, in outputs/kaggle.")
    options = parser.parse_args(argv)
    values = dict(pair.partition("=")[::2] for pair in options.set)
    if options.run:
        device = "cuda" if shutil.which("nvidia-smi") else "cpu"
        values = {"WORK": str(FOLDER / "work"), "KEEP": str(FOLDER), "REPO": str(ROOT), "DEVICE": device} | values
    else:
        values = {"REPO": code_version()["origin"] or ""} | values
    notebook = with_parameters(read(), values)
    if found := problems(notebook, os.environ):
        raise UserError(f"The notebook is not fit to be run: {'; '.join(found)}.")
    if options.run:
        execute(notebook, FOLDER / "executed.ipynb")
        return 0
    print(differences(parameters(notebook)))
    if not options.dry:
        push(notebook, options.user)
    return 0


def differences(values: dict[str, Any]) -> str:
    """What will be different on Kaggle, a line each. What is said of Kaggle is from its documentation and client as of September 2026."""
    gpus = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, check=False).stdout if shutil.which("nvidia-smi") else ""
    shape = read(METADATA)["machine_shape"]
    here = code_version()
    code = values["REPO"] or "what address? Give --set REPO=https://..."
    changed = ", without what is changed here and not committed" if here["dirty"] else ""
    secret = f"HF_TOKEN, attached under Add-ons > Secrets, with the right to write to {values['HUB_REPO']}" if values["HUB_REPO"] else \
        "none: HUB_REPO is empty, so nothing is published and a session cut off loses its checkpoints"  # fmt: skip
    rows = [
        ("", "here", "on Kaggle"),
        ("accelerator", f"{gpus.count('GPU ') or 'no'} GPU", f"GPU T4 x2 ({shape}): NCCL instead of gloo"),
        ("precision", "as found", "fp16 with loss scaling: a T4 has no bf16"),
        ("torch", version("torch"), "Kaggle's own is kept: requirements-base.txt names none"),
        ("Python", platform.python_version(), "Kaggle's own; 3.11 or newer is needed"),
        ("session", "no limit", "ended after 12 h at the latest; 30 h of GPU a week (`kaggle quota` shows the rest)"),
        (
            "what stays",
            "all",
            f"results, runs and release in {values['KEEP']}, if the session came to its own end, else only what is on the Hub",
        ),
        ("internet", "as found", "to be switched on, which needs an account verified by phone"),
        ("code", (here["commit"] or "no git checkout")[:12], f"git clone of {code}{changed}"),
        ("secret", "none", secret),
    ]
    return "\n".join(f"{what:<13}{here:<17}{there}" for what, here, there in rows)


def push(notebook: dict[str, Any], user: str | None) -> None:
    """Write notebook and kernel-metadata.json to outputs/kaggle/push and hand that folder to Kaggle's client.

    Raises UserError where something is missing or Kaggle refuses.
    """
    if not user or not re.fullmatch(r"[A-Za-z0-9-]+", user):
        raise UserError(
            f"the name on Kaggle is '{user or ''}': give --user your-name (make kaggle USER=your-name), or --dry to check only."
        )
    if not parameters(notebook)["REPO"]:
        raise UserError("Kaggle has to get the code from somewhere: give its public git address, --set REPO=https://...")
    client = shutil.which("kaggle", path=os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")]))
    if client is None:
        requirements = METADATA.with_name("requirements.txt").relative_to(ROOT)
        raise UserError(f"Kaggle's client is not installed: {sys.executable} -m pip install -r {requirements}, then push again.")
    folder = FOLDER / "push"
    folder.mkdir(parents=True, exist_ok=True)
    metadata = read(METADATA) | {"id": f"{user}/distrinews"}
    (folder / METADATA.name).write_text(json.dumps(metadata, indent=2), encoding="utf-8")
    (folder / NOTEBOOK.name).write_text(json.dumps(notebook, indent=1), encoding="utf-8")
    done = subprocess.run([client, "kernels", "push", "-p", str(folder)], capture_output=True, text=True, timeout=300, check=False)
    said = (done.stdout + done.stderr).strip()
    if "Authentication required" in said:
        raise UserError(SIGN_IN)
    if done.returncode or "error" in said.lower():  # for what the server refuses the client ends with code 0
        raise UserError(f"Kaggle's client refused: {said.splitlines()[-1] if said else f'code {done.returncode}'}")
    name = metadata["id"]
    print(
        f"{said}\n\nkaggle kernels status {name}                                   # how far it is\n"
        f"kaggle kernels output {name} -p outputs/kaggle/output        # when it is done: results to put into benchmarks/results"
    )


def execute(notebook: dict[str, Any], path: Path) -> None:
    """Run every cell in a kernel of this Python and write the executed copy to `path`, also where a cell fails.

    Raises UserError for a failing cell, with what it printed last.
    """
    try:
        import nbformat
        from nbclient import NotebookClient
        from nbclient.exceptions import CellExecutionError
        from traitlets.config import Config
    except ImportError as error:
        raise UserError(
            f"{error.name} is not installed: {sys.executable} -m pip install -r requirements-dev.txt, then run it again."
        ) from error
    nb = nbformat.reads(json.dumps(notebook), as_version=4)
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as sockets:
        # Through files of this user instead of open ports of the machine.
        config = Config({"KernelManager": {"transport": "ipc", "ip": f"{sockets}/kernel"}})
        client = NotebookClient(nb, kernel_name="python3", timeout=None, coalesce_streams=True, config=config, on_cell_execute=tell_cell)
        try:
            client.execute()
        except CellExecutionError as error:
            raise UserError(f"The notebook stopped: {error.evalue} The executed copy: {path}") from error
        finally:
            nbformat.write(nb, path)


def tell_cell(cell: Any, cell_index: int) -> None:
    print(f"cell {cell['id']}", flush=True)


if __name__ == "__main__":
    sys.exit(run_entry(main))
