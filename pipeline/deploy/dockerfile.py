"""A Dockerfile carried out without a container engine: its own steps, in order, below a folder that stands for the image's root.

    image = Image(root, context)
    for step in steps(text):
        image.carry_out(*step)
    image.start({"DISTRINEWS_PORT": "7860"}, log)

Enough of the language for an image that is `FROM python:`; whatever else is refused rather than guessed. Libraries go into a fresh
virtual environment. Where we are root, steps after USER and the command run as that user, else as ourselves; either way libraries
and code cannot be written to once all is built. No sandbox: the steps run on this machine, and see its files.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

from pipeline.errors import UserError

STEP_SECONDS = 900
# What a step may know of this machine: the way to the package registry, and nothing of the person.
OUTSIDE = re.compile(r"PATH|LANG|LC_\w+|TMPDIR|PIP_\w+|SSL_CERT_\w+|REQUESTS_CA_BUNDLE|\w+_PROXY", re.IGNORECASE)


def steps(dockerfile: str) -> list[tuple[str, str]]:
    """The instructions of a Dockerfile with their arguments; comments and broken lines are resolved."""
    lines = [line for line in dockerfile.splitlines() if not line.lstrip().startswith("#")]
    whole = re.sub(r"\\\s*\n", " ", "\n".join(lines)).splitlines()
    return [(words[0].upper(), words[1].strip()) for line in whole if len(words := line.split(None, 1)) == 2]


class Image:
    """An image being built. `root` is its /, a folder for it alone; `context` holds the files that COPY may take."""

    def __init__(self, root: Path, context: Path) -> None:
        self.root, self.context = root, context
        self.environment: dict[str, str] = {}  # as the Dockerfile says it, with the image's paths
        self.folder = "/"
        self.user: int | None = None  # None: ourselves
        self.command: list[str] = []
        self._uids: dict[str, int] = {}
        self.libraries = root / "usr" / "venv"

    def place(self, path: str) -> Path:
        """Where a path of the image is here."""
        return self.root / os.path.normpath(f"{self.folder}/{path}" if not path.startswith("/") else path).lstrip("/")

    def carry_out(self, instruction: str, argument: str) -> None:
        """One step. Raises UserError for one that is not understood or fails."""
        method = getattr(self, f"_{instruction.lower()}", None)
        if method is None:
            raise UserError(f"The rehearsal does not know the step {instruction} {argument}: build this Dockerfile with Docker.")
        if instruction not in ("RUN", "CMD"):  # there it is the shell's business, or nobody's
            argument = re.sub(r"\$\{?(\w+)\}?", lambda name: self.environment.get(name[1], ""), argument)
        try:
            method(argument)
        except UserError:
            raise
        except (OSError, ValueError, KeyError, subprocess.SubprocessError) as error:
            raise UserError(f"The step {instruction} {argument} cannot be carried out here ({type(error).__name__}: {error}).") from error

    def _from(self, image: str) -> None:
        found = re.fullmatch(r"python:(\d+\.\d+)\S*", image)
        if not found:
            raise UserError(f"The rehearsal stands in for python images only, and this one is FROM {image}: build it with Docker.")
        python, version = _find_python(found[1], 1000 if os.getuid() == 0 else None)
        if version != found[1]:
            print(f"note        the image has Python {found[1]}; this is a rehearsal with {version}", flush=True)
        if self.libraries.exists():  # kept from before, and closed
            return
        # pip stays outside: what is in there at the end is what the steps have installed.
        subprocess.run([python, "-m", "venv", "--without-pip", str(self.libraries)], check=True, timeout=120)
        pip = self.libraries / "bin" / "pip"
        words = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--python", str(self.libraries / "bin" / "python")]
        pip.write_text(f'#!/bin/sh\nexec {shlex.join(words)} "$@"\n', encoding="utf-8")
        pip.chmod(0o755)

    def _env(self, pairs: str) -> None:
        self.environment |= dict(pair.split("=", 1) for pair in shlex.split(pairs))

    def _workdir(self, path: str) -> None:
        self.place(path).mkdir(parents=True, exist_ok=True)
        self.folder = path

    def _copy(self, words: str) -> None:
        source, target = words.split()
        if (self.context / source).is_dir():
            shutil.copytree(self.context / source, self.place(target), dirs_exist_ok=True)
        else:
            self.place(target).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(self.context / source, self.place(target))

    def _user(self, name: str) -> None:
        uid = int(name) if name.isdigit() else self._uids[name]
        self.user = uid if os.getuid() == 0 else None

    def _expose(self, port: str) -> None:
        pass  # a note for the reader of the image

    def _cmd(self, words: str) -> None:
        self.command = json.loads(words)

    def _run(self, command: str) -> None:
        words = shlex.split(command)
        if words[0] == "useradd":  # in the image; this machine gets no new user
            name, uid = words[-1], int(words[words.index("--uid") + 1])
            self._uids[name] = uid
            self.place(f"/home/{name}").mkdir(parents=True)
            if os.getuid() == 0:
                os.chown(self.place(f"/home/{name}"), uid, uid)
            return
        if any(word.startswith("/") for word in words):
            raise UserError(f"The rehearsal runs no step with an absolute path, which would be this machine's: RUN {command}.")
        options = {**self._process({}), "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        with subprocess.Popen(["/bin/sh", "-c", command], start_new_session=True, **options) as process:
            try:
                output = process.communicate(timeout=STEP_SECONDS)[0]
            except BaseException as error:
                os.killpg(process.pid, signal.SIGKILL)  # pip works in a child of its own
                if isinstance(error, subprocess.TimeoutExpired):
                    raise UserError(f"RUN {command} takes longer than {STEP_SECONDS} s.") from error
                raise
        if process.returncode:
            raise UserError(f"RUN {command} ended with code {process.returncode}: {' '.join(output.split())[-400:]}")

    def _process(self, extra: Mapping[str, str]) -> dict[str, Any]:
        """What a process of the image is started with."""
        outside = {name: value for name, value in os.environ.items() if OUTSIDE.fullmatch(name)}
        outside["PATH"] = f"{self.libraries / 'bin'}{os.pathsep}{outside.get('PATH', os.defpath)}"
        inside = {name: str(self.place(value)) if value.startswith("/") else value for name, value in self.environment.items()}
        home = {} if "HOME" in inside else {"HOME": os.environ.get("HOME", "/")}  # pip's own settings are there
        who = {} if self.user is None else {"user": self.user, "group": self.user, "extra_groups": []}
        return {"cwd": self.place("."), "env": {**home, **outside, **inside, **extra}, "stdin": subprocess.DEVNULL, **who}

    def close(self) -> None:
        """From here on nobody writes to libraries and code."""
        for top in (self.libraries, self.place(".")):
            for path in (top, *top.rglob("*")):
                if not path.is_symlink():
                    path.chmod(path.stat().st_mode & ~0o222)

    def start(self, extra: Mapping[str, str], log: IO[bytes]) -> subprocess.Popen[bytes]:
        """The image's command with further environment, which wins over the image's."""
        process = self._process(extra)
        process["env"] = {name: value for name, value in process["env"].items() if not name.startswith("PIP_")}
        return subprocess.Popen(self.command, **process, stdout=log, stderr=subprocess.STDOUT)

    def installed(self) -> tuple[int, int]:
        """Bytes of the libraries that the steps have installed, and how many packages they are."""
        files = [path for path in self.libraries.rglob("*") if path.is_file() and not path.is_symlink()]
        return sum(path.stat().st_size for path in files), len(list(self.libraries.glob("lib/*/site-packages/*.dist-info")))

    def clear(self, keep_libraries: bool = False) -> None:
        """Away with all that was built, but for the libraries where the same are wanted again."""
        for path in (self.root, *self.root.rglob("*")):
            if path.is_dir() and not path.is_symlink():
                path.chmod(0o755)
        for path in self.root.iterdir():
            if not (keep_libraries and path in self.libraries.parents):
                shutil.rmtree(path, ignore_errors=True)


def _find_python(wanted: str, uid: int | None) -> tuple[str, str]:
    """A Python that the user `uid` may run, of the version wanted where there is one; and its version."""
    who: dict[str, Any] = {} if uid is None else {"user": uid, "group": uid, "extra_groups": []}
    ask = "import sys, venv; print('%d.%d' % sys.version_info[:2])"
    base: str = getattr(sys, "_base_executable", sys.executable)  # not one in a virtual environment: it may be out of reach
    for candidate in filter(None, (shutil.which(f"python{wanted}"), base, shutil.which("python3", path=os.defpath))):
        try:
            done = subprocess.run([candidate, "-c", ask], cwd="/", capture_output=True, text=True, timeout=60, check=False, **who)
        except PermissionError:
            continue
        if done.returncode == 0:
            return candidate, done.stdout.strip()
    raise UserError("No Python here may be run by an ordinary user: install one for all, such as Debian's python3.")
