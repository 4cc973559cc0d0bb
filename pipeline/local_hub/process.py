"""A local Hub in a process of its own, for quickstart, tests and benchmarks:

with HubProcess() as hub:
    subprocess.run(["hf", "upload", f"{hub.user}/demo", "folder"], env={**os.environ, **hub.env})
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType

from pipeline.local_hub.accounts import OWNER, Accounts
from pipeline.local_hub.faults import Fault, Switch

PROXIES = ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY")


def environment(url: str, token: str) -> dict[str, str]:
    """What the Hub's clients need to find in their environment to use the Hub at `url`. They read it at import."""
    found = {
        "HF_ENDPOINT": url,
        "HF_TOKEN": token,
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_DISABLE_UPDATE_CHECK": "1",
        "HF_UPDATE_DOWNLOAD_COUNTS": "0",  # else `datasets` knocks at a host on the internet
    }
    if any(os.environ.get(name) for name in PROXIES):  # a proxy cannot reach this machine's loopback
        around = [entry for entry in os.environ.get("NO_PROXY", os.environ.get("no_proxy", "")).split(",") if entry]
        found["NO_PROXY"] = found["no_proxy"] = ",".join(dict.fromkeys([*around, "127.0.0.1", "localhost"]))
    return found


class HubProcess:
    """A local Hub server as a child process. Starts on `start` or on entering the context; gone after `stop` or leaving it.

    Without `root` its repositories live in a temporary folder and go with it. The child also ends by itself when this
    process dies. With `faults` it can be told to misbehave (see faults.py).
    """

    user = OWNER
    env: dict[str, str]  # what a client needs in its environment

    def __init__(self, root: Path | None = None, port: int = 0, options: Sequence[str] = (), faults: bool = False) -> None:
        self._temporary = tempfile.TemporaryDirectory(prefix="local-hub-") if root is None else None
        self.root = Path(self._temporary.name if self._temporary else root or "")
        self.log = self.root / "server.log"
        self._port = port
        self._options = ["--root", str(self.root), "--with-parent", *(["--faults"] if faults else []), *options]
        self._switch = Switch(self.root) if faults else None
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        return self.env["HF_ENDPOINT"]

    @property
    def token(self) -> str:
        return self.env["HF_TOKEN"]

    @property
    def pid(self) -> int | None:
        return self._process.pid if self._process else None

    def add_user(self, name: str, role: str = "write", organizations: tuple[str, ...] = ()) -> str:
        """Another user of the running Hub; returns their token."""
        return Accounts(self.root).add(name, role, organizations=organizations)

    def fault(self, fault: Fault) -> None:
        """Misbehave from the next request on; replaces the fault before."""
        assert self._switch, "HubProcess(faults=True) has the switch"
        self._switch.set(fault)

    def heal(self) -> None:
        """Behave again."""
        assert self._switch, "HubProcess(faults=True) has the switch"
        self._switch.clear()

    def hits(self) -> list[str]:
        """The requests that faults have hit since the Hub was made: `kind METHOD path`."""
        assert self._switch, "HubProcess(faults=True) has the switch"
        return self._switch.log.read_text().splitlines() if self._switch.log.exists() else []

    def revoke(self) -> None:
        """The token of `env` is good for nothing from now on, until `restore`."""
        Accounts(self.root).revoke(self.token)

    def restore(self) -> None:
        Accounts(self.root).add(self.user, token=self.token)

    def vanish(self) -> None:
        """Gone from one moment to the next, as by a power cut. `start` brings it back at the same address."""
        assert self._process is not None
        process, self._process = self._process, None
        process.kill()
        process.wait()

    def start(self, timeout: float = 60) -> HubProcess:
        """Returns when the server accepts connections. Raises RuntimeError with its log when it does not within `timeout` s.

        Started again it listens on the same port: clients know it by that.
        """
        self.root.mkdir(parents=True, exist_ok=True, mode=0o700)
        # The project's folder, so that `-m` finds the package whatever folder the caller works in.
        source = str(Path(__file__).resolve().parents[2])
        path = os.pathsep.join(filter(None, [source, os.environ.get("PYTHONPATH")]))
        self.log.unlink(missing_ok=True)
        with os.fdopen(os.open(self.log, os.O_WRONLY | os.O_CREAT, 0o600), "wb") as log:  # it holds the token
            command = [sys.executable, "-m", "pipeline.local_hub", "--port", str(self._port), *self._options]
            self._process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT, env={**os.environ, "PYTHONPATH": path}
            )
        deadline = time.monotonic() + timeout
        try:
            while "Try:" not in (printed := self.log.read_text()):  # the last words of what it prints once it listens
                if self._process.poll() is not None or time.monotonic() > deadline:
                    raise RuntimeError(f"The local Hub did not start: {printed[-2000:]}")
                time.sleep(0.02)
        except BaseException:
            self.stop()
            raise
        exports = [line.removeprefix("export ") for line in printed.splitlines() if line.startswith("export ")]
        self.env = dict(line.split("=", 1) for line in exports)
        self._port = int(self.url.rsplit(":", 1)[1])
        return self

    def stop(self) -> None:
        """End the server and wait for it. Safe to call twice."""
        process, self._process = self._process, None
        if process is not None:
            process.terminate()
            try:
                process.wait(timeout=10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        if self._temporary:
            self._temporary.cleanup()

    def __enter__(self) -> HubProcess:
        return self.start()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.stop()
