"""The servers that are compared, each as a process that can be started, asked, held still, weighed and ended."""

from __future__ import annotations

import hashlib
import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

import psutil

from benchmarks.common import GRACE_SECONDS, ROOT, kill, last_words
from pipeline.topology import allowed_cores

PEERS = ROOT / "benchmarks" / "peers"
PEERS_ENVIRONMENT = ROOT / ".cache" / "peers"
PEERS_PYTHON = PEERS_ENVIRONMENT / "bin" / "python"
START_SECONDS = 120.0
SETTLE_SECONDS = 180.0
STEADY_SECONDS = 2.0
MIB = 1 << 20


class ServerError(RuntimeError):
    """A server did not start, or ended; its text says which, and the last thing it said."""


@dataclass(frozen=True)
class Server:
    """One way to serve the release. `program` is a module's arguments for ours, a script and its for a peer."""

    name: str
    title: str
    program: tuple[str, ...]
    dtype: str = ""  # a peer's; "" for ours

    @property
    def is_peer(self) -> bool:
        return bool(self.dtype)

    def command(self, model: Path, port: int) -> list[str]:
        if self.is_peer:
            return [str(PEERS_PYTHON), str(PEERS / self.program[0]), "--port", str(port), *self.program[1:]]
        return [sys.executable, "-m", "serve", "--model", str(model), "--port", str(port), *self.program]

    def environment(self, model: Path, state: Path) -> dict[str, str]:
        # A thread count or a service setting of the person's own would change what is compared.
        inherited = {name: value for name, value in os.environ.items() if not name.startswith(("DISTRINEWS_", "OMP_", "MKL_", "PEER_"))}
        own = {"PYTHONUNBUFFERED": "1", "HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "TOKENIZERS_PARALLELISM": "false"}
        if self.is_peer:
            own |= {"PEER_MODEL": str(model), "PEER_DTYPE": self.dtype, "PEER_THREADS": str(allowed_cores())}
        else:
            own |= {"DISTRINEWS_STATE_DIR": str(state)}
        return inherited | own


MOSEC = ("mosec_app.py", "--address", "127.0.0.1", "--timeout", "60000")
SERVERS = {
    server.name: server
    for server in (
        Server("ours", "this service", ()),
        Server("ours-fp32", "this service, bf16 off (OpenVINO fp32)", ("--engine", "openvino-fp32")),
        Server("ours-onnxruntime", "this service, ONNX Runtime", ("--engine", "onnxruntime")),
        Server("ours-openvino", "this service, OpenVINO bf16", ("--engine", "openvino-bf16")),
        Server("ours-torch", "this service, torch fp32", ("--engine", "torch-fp32")),
        Server("naive", "FastAPI + transformers pipeline", ("naive.py",), "float32"),
        Server("litserve", "LitServe", ("litserve_app.py",), "float32"),
        Server("litserve-bf16", "LitServe, bf16", ("litserve_app.py",), "bfloat16"),
        Server("mosec", "mosec", MOSEC, "float32"),
        Server("mosec-bf16", "mosec, bf16", MOSEC, "bfloat16"),
    )
}


def make_peers_environment() -> str | None:
    """Make or bring up to date .cache/peers with the peers' pins. Returns None, or why there are no peers."""
    pins = [PEERS / "requirements.txt", ROOT / "requirements.txt", ROOT / "requirements-base.txt"]
    wanted = hashlib.sha256(b"".join(path.read_bytes() for path in pins)).hexdigest()
    stamp = PEERS_ENVIRONMENT / "requirements.sha256"
    if stamp.exists() and stamp.read_text() == wanted and PEERS_PYTHON.exists():
        return None
    print(f"Installing the peers' requirements into {PEERS_ENVIRONMENT.relative_to(ROOT)} ...", flush=True)
    install = [str(PEERS_PYTHON), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--requirement", str(pins[0])]
    for command in ([sys.executable, "-m", "venv", str(PEERS_ENVIRONMENT)], install):
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=1800, check=False)
        except subprocess.TimeoutExpired:
            return "their environment could not be made in 30 minutes"
        if done.returncode:
            lines = (done.stderr.strip() or done.stdout.strip() or "no reason given").splitlines()
            return f"their environment could not be made: {lines[-1]}"
    stamp.write_text(wanted)
    return None


def peer_versions() -> dict[str, str]:
    """Versions in the peers' environment of what decides their speed."""
    names = ("torch", "transformers", "fastapi", "uvicorn", "litserve", "mosec")
    code = f"import importlib.metadata as m, json; print(json.dumps({{n: m.version(n) for n in {names!r}}}))"
    done = subprocess.run([str(PEERS_PYTHON), "-c", code], capture_output=True, text=True, timeout=60, check=False)
    return json.loads(done.stdout) if done.returncode == 0 else {}


@dataclass
class Running:
    """A started server; ended, with all its processes, when the context ends.

    `folder` is for logs and for what our service remembers between starts: nothing of the person's own is used or touched.
    """

    server: Server
    model: Path
    folder: Path
    port: int = 0
    log: Path = field(default_factory=Path)

    def __enter__(self) -> Running:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.log = self.folder / f"{self.server.name}-{self.port}.log"
        self.spawned = time.perf_counter()
        with self.log.open("wb") as sink:
            # A session of its own: the terminal's Ctrl-C comes to us alone, and we end the servers in order.
            self.process = subprocess.Popen(
                self.server.command(self.model, self.port), cwd=ROOT, env=self.server.environment(self.model, self.folder / "state"), stdin=subprocess.DEVNULL,
                stdout=sink, stderr=subprocess.STDOUT, start_new_session=True,
            )  # fmt: skip
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        members = self.family()
        for member in members:
            with suppress(psutil.NoSuchProcess):
                member.resume()  # a process held still would not hear the signal
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
            with suppress(subprocess.TimeoutExpired):
                self.process.wait(GRACE_SECONDS)
        kill(members)
        self.process.wait()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/predict"

    def family(self) -> list[psutil.Process]:
        """The server's processes; empty when it has ended."""
        try:
            top = psutil.Process(self.process.pid)
            return [top, *top.children(recursive=True)]
        except psutil.NoSuchProcess:
            return []

    def ask(self, method: str, path: str, body: bytes | None = None, timeout: float = 60) -> tuple[int, bytes]:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=timeout)
        try:
            connection.request(method, path, body, {"Content-Type": "application/json"})
            answer = connection.getresponse()
            return answer.status, answer.read()
        finally:
            connection.close()

    def first_answer(self) -> float:
        """Waits until a text is answered with a label; returns the seconds since the process was started."""
        body = json.dumps({"text": "Oil prices rise as cartel cuts output"}).encode()
        while time.perf_counter() - self.spawned < START_SECONDS:
            with suppress(OSError, http.client.HTTPException):
                status, answer = self.ask("POST", "/predict", body)
                if status == 200 and b'"label"' in answer:
                    return time.perf_counter() - self.spawned
            if self.process.poll() is not None:
                raise ServerError(f"{self.server.name} ended with code {self.process.returncode}: {last_words(self.log)}")
            time.sleep(0.01)
        raise ServerError(f"{self.server.name} did not answer in {START_SECONDS:.0f} s: {last_words(self.log)}")

    def settle(self) -> dict[str, Any]:
        """Waits until our service has chosen its engine (it answers before it has). Returns its /info; of a peer, nothing."""
        if self.server.is_peer:
            return {}
        # Before the first engine is tried, and while the chosen one is loaded, nothing is being measured either.
        steady = 0.0 if "--engine" in self.server.program else STEADY_SECONDS
        deadline = time.monotonic() + SETTLE_SECONDS
        engine, since = None, time.monotonic()
        while time.monotonic() < deadline:
            about = json.loads(self.ask("GET", "/info")[1])
            state = (about.get("engine_choice") or {}).get("state", "settled")
            if state != "settled" or about.get("engine") != engine:
                engine, since = about.get("engine"), time.monotonic()
            if state == "settled" and engine and time.monotonic() - since >= steady:
                return about
            time.sleep(0.2)
        raise ServerError(f"{self.server.name} had not chosen its engine after {SETTLE_SECONDS:.0f} s; /info says what it waits for.")

    def hold(self) -> None:
        """Stops all its processes, so that an idle server takes nothing from the one that is measured."""
        for member in self.family():
            member.suspend()

    def go_on(self) -> None:
        for member in self.family():
            member.resume()


def rss_mib(processes: Sequence[psutil.Process]) -> float:
    """Resident memory, summed; pages shared between processes count once for each, as `ps` counts them."""
    total = 0
    for process in processes:
        with suppress(psutil.NoSuchProcess):
            total += process.memory_info().rss
    return total / MIB


def uss_mib(processes: Sequence[psutil.Process]) -> float:
    """Memory that would be free if the processes ended, summed; pages shared between them are in none."""
    total = 0
    for process in processes:
        with suppress(psutil.NoSuchProcess, psutil.AccessDenied):
            total += process.memory_full_info().uss
    return total / MIB


def own_peak_mib(process: psutil.Process) -> float:
    """The highest resident memory one process ever had, as Linux keeps it; 0 where it does not."""
    with suppress(OSError):
        for line in Path(f"/proc/{process.pid}/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) / 1024
    return 0.0


class Scales:
    """Weighs a server five times a second for as long as the context lasts: `rss`, MiB, in order of time."""

    def __init__(self, running: Running) -> None:
        self.running, self.rss = running, list[float]()
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._weigh, daemon=True)

    def _weigh(self) -> None:
        while not self._end.wait(0.2):
            if weight := rss_mib(self.running.family()):
                self.rss.append(weight)

    def __enter__(self) -> Scales:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._end.set()
        self._thread.join()

    def peak(self) -> float:
        """MiB, of all its processes together; what one process had between two samples is seen too."""
        return max([*self.rss, *(own_peak_mib(process) for process in self.running.family())])
