"""What the tests of the service share: a small real release, and the service as a child process."""

from __future__ import annotations

import functools
import json
import os
import select
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import httpx2 as httpx  # the HTTP client that huggingface_hub brings

from benchmarks.tiny_release import LABELS, MAX_LENGTH, WORDS, make_text, tiny_release

__all__ = ["LABELS", "MAX_LENGTH", "WORDS", "Serve", "make_release", "make_text", "variant"]

ROOT = Path(__file__).resolve().parent.parent


@functools.cache
def make_release(encoder_dir: Path) -> Path:
    """The tiny release of these tests. Do not change it."""
    return tiny_release(encoder_dir, Path(tempfile.mkdtemp(dir=os.environ["HF_HOME"])) / "tiny-release")  # goes when the tests end


def variant(release: Path, folder: Path, **files: dict[str, Any] | str | None) -> Path:
    """A copy of `release` in `folder`; `files` by name without extension: values to change in the JSON, new text, or None: gone."""
    shutil.copytree(release, folder, symlinks=True)
    for stem, change in files.items():
        name = "onnx/model.onnx" if stem == "onnx" else "model.safetensors" if stem == "model" else f"{stem}.json"
        path = folder / name
        if change is None:
            path.unlink()
        elif isinstance(change, str):
            path.write_text(change, encoding="utf-8")
        else:
            path.write_text(json.dumps(json.loads(path.read_text(encoding="utf-8")) | change), encoding="utf-8")
    return folder


class Serve:
    """The service on a free port, in a child process that is gone when the context ends. `.client` speaks to it."""

    def __init__(self, *arguments: str | Path, env: dict[str, str] | None = None, program: Sequence[str] = ("-m", "serve")) -> None:
        self.command = [sys.executable, *program, *map(str, arguments), "--port", "0"]
        self.env = {**os.environ, "OMP_NUM_THREADS": "1", **(env or {})}

    def __enter__(self) -> Serve:
        self.errors = tempfile.TemporaryFile("w+", encoding="utf-8")
        self.process = subprocess.Popen(self.command, cwd=ROOT, env=self.env, stdout=subprocess.PIPE, stderr=self.errors, text=True)
        try:
            assert self.process.stdout
            assert select.select([self.process.stdout], [], [], 30)[0], "the service said nothing in 30 s"
            line = self.process.stdout.readline()
            assert line.startswith("listening on "), f"{line!r}; {self.log()}"
            self.url = line.removeprefix("listening on ").strip()
            self.client = httpx.Client(base_url=self.url, timeout=30, trust_env=False)
            self.wait_ready()
        except BaseException:
            self.__exit__(None, None, None)
            raise
        return self

    def wait_ready(self) -> None:
        end = time.monotonic() + 60
        while self.client.get("/ready").status_code != 200:
            assert self.process.poll() is None, self.log()
            assert time.monotonic() < end, "not ready in 60 s"
            time.sleep(0.05)

    def log(self) -> str:
        self.errors.seek(0)
        return self.errors.read()

    def metric(self, name: str) -> float:
        """A metric's value by its full name with labels; 0 where it was never counted."""
        for line in self.client.get("/metrics").text.splitlines():
            if line.startswith(f"{name} "):
                return float(line.split()[-1])
        return 0.0

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if hasattr(self, "client"):
            self.client.close()
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait(10)
        if self.process.stdout:
            self.process.stdout.close()
        self.errors.close()
