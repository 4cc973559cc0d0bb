"""Two machines on one: network namespaces with an address and a host name each, joined by a virtual cable (veth).

Each node also has mounts of its own, and sees the files of this machine, as two machines see storage they share.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from launching import ROOT, environment

ADDRESSES = ("10.77.0.1", "10.77.0.2")
HOSTS = ("node-0", "node-1")
PORT = 29500  # in namespaces of their own no other program can have it
CABLE = "eth0"


def ip(*words: str) -> str:
    """Run `ip WORDS`. Raises OSError where that is not there, CalledProcessError where it may not."""
    return subprocess.run(["ip", *words], check=True, capture_output=True, text=True, timeout=20).stdout


class Nodes:
    def __init__(self, folder: Path) -> None:
        self.names = [f"distrinews-{os.getpid()}-{host}" for host in HOSTS]
        self.names_file = folder / "hosts"  # so that the nodes know each other by name
        self.names_file.write_text("127.0.0.1 localhost\n" + "".join(f"{a} {h}\n" for a, h in zip(ADDRESSES, HOSTS, strict=True)))

    def command(self, node: int, setup: str = "true") -> list[str]:
        """What to put before a command for it to run on the node, after the shell command `setup`."""
        script = f'hostname {HOSTS[node]} && mount --bind {self.names_file} /etc/hosts && {setup} && exec "$@"'
        return ["ip", "netns", "exec", self.names[node], "unshare", "--uts", "sh", "-c", script, "sh"]

    def start(self, node: int, command: Sequence[str], log: Path, setup: str = "true", **extra: str) -> subprocess.Popen[str]:
        """A command on one of the nodes; all it prints goes to `log`."""
        with log.open("w", encoding="utf-8") as file:
            return subprocess.Popen(
                [*self.command(node, setup), *command],
                cwd=ROOT,
                env=environment(GLOO_SOCKET_IFNAME=CABLE, **extra),
                text=True,
                stdout=file,
                stderr=subprocess.STDOUT,
            )

    def received(self, node: int) -> int:
        """Bytes that came in over the cable."""
        return int(ip("netns", "exec", self.names[node], "cat", f"/sys/class/net/{CABLE}/statistics/rx_bytes"))

    def plug(self, node: int, state: str) -> None:
        """The node's end of the cable, `up` or `down`."""
        ip("-n", self.names[node], "link", "set", CABLE, state)

    def kill(self, node: int) -> None:
        """SIGKILL to every process of the node, launcher and workers."""
        deadline = time.monotonic() + 10
        while pids := self.processes(node):
            assert time.monotonic() < deadline, pids
            for pid in pids:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            time.sleep(0.05)

    def processes(self, node: int) -> list[int]:
        return [int(pid) for pid in ip("netns", "pids", self.names[node]).split()]


@contextmanager
def two_nodes(folder: Path) -> Iterator[Nodes]:
    """Raises OSError or CalledProcessError where this machine does not let us have network namespaces."""
    nodes = Nodes(folder)
    try:
        for name in nodes.names:
            ip("netns", "add", name)
        ip("link", "add", CABLE, "netns", nodes.names[0], "type", "veth", "peer", "name", CABLE, "netns", nodes.names[1])
        for node, name in enumerate(nodes.names):
            ip("-n", name, "addr", "add", f"{ADDRESSES[node]}/24", "dev", CABLE)
            ip("-n", name, "link", "set", "lo", "up")
            nodes.plug(node, "up")
        subprocess.run([*nodes.command(0), "true"], check=True, capture_output=True, text=True, timeout=20)
        yield nodes
    finally:
        for node, name in enumerate(nodes.names):
            with contextlib.suppress(OSError, subprocess.CalledProcessError):
                nodes.kill(node)
                ip("netns", "del", name)
