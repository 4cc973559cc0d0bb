"""Ranks that watch each other, without a training around it: who is named, and when nobody is."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from launching import ROOT

from pipeline.errors import PeerLost
from pipeline.stopping import Stopped
from pipeline.watch import Note, Watch

# One rank: `beats` steps, then it sits still, or, for `busy` seconds, makes small moves as one that validates a larger share does, or,
# for -`busy` seconds, waits for the others.
RANK = """
import sys, time
from pathlib import Path
from pipeline.watch import Watch
folder, rank, beats = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
busy, seconds, move = (float(word) for word in sys.argv[4:])
with Watch(folder, rank, 3, seconds) as watch:
    while len(list((folder / ".watch").glob("rank-*.json"))) < 3:
        time.sleep(0.05)
    time.sleep(2)  # all have seen all
    for step in range(beats):
        watch.beat(f"step {step + 1}")
        time.sleep(0.1)
    end = time.monotonic() + busy
    while time.monotonic() < end:
        watch.tick()
        time.sleep(move)
    if busy <= 0:
        time.sleep(-busy or 60)
"""


def ranks(
    folder: Path, beats: tuple[int, ...], busy: tuple[float, ...], seconds: float = 4, suspended: float = 0, move: float = 0.1
) -> list[subprocess.CompletedProcess[str]]:
    environment = os.environ | {"PYTHONPATH": str(ROOT), "MASTER_ADDR": "here", "MASTER_PORT": "1"}
    running = [
        subprocess.Popen(
            [sys.executable, "-c", RANK, str(folder), str(rank), str(beats[rank]), str(busy[rank]), str(seconds), str(move)],
            env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )
        for rank in range(3)
    ]  # fmt: skip
    try:
        if suspended:  # all of them, as a terminal, a container or a scheduler does it
            time.sleep(5)
            for number, pause in ((signal.SIGSTOP, suspended), (signal.SIGCONT, 0)):
                for process in running:
                    process.send_signal(number)
                time.sleep(pause)
        return [subprocess.CompletedProcess(p.args, 0, *p.communicate(timeout=40)) if p.wait(40) == 0 else _failed(p) for p in running]
    finally:
        for process in running:
            process.kill()
            process.wait()


def _failed(process: subprocess.Popen[str]) -> subprocess.CompletedProcess[str]:
    return subprocess.CompletedProcess(process.args, process.returncode, *process.communicate(timeout=10))


def test_the_one_furthest_behind_is_named_by_one_rank(tmp_path: Path) -> None:
    """Its process lives, its main thread does not go on: a data loader that waits for ever, say."""
    done = ranks(tmp_path, beats=(9, 6, 9), busy=(0, 0, 0))
    assert [p.returncode for p in done] == [70, 70, 70]
    lines = [line for p in done for line in p.stderr.splitlines() if line.startswith("error")]
    assert len(lines) == 1 and "All ranks wait for one that hangs (rank 1 on" in lines[0] and "at: step 6" in lines[0], lines


def test_ranks_that_wait_for_a_busy_one_are_not_hung(tmp_path: Path) -> None:
    done = ranks(tmp_path, beats=(6, 6, 6), busy=(10, -8, -8))
    assert [p.returncode for p in done] == [0, 0, 0], [p.stderr for p in done]
    assert not (tmp_path / ".watch").exists(), "the last to leave cleans up"


def test_a_suspended_job_is_not_hung(tmp_path: Path) -> None:
    done = ranks(tmp_path, beats=(6, 6, 6), busy=(22, 22, 22), seconds=3, suspended=14, move=1.5)
    assert [p.returncode for p in done] == [0, 0, 0], [p.stderr for p in done]


def test_zero_seconds_switch_it_off(tmp_path: Path) -> None:
    done = ranks(tmp_path, beats=(6, 6, 6), busy=(3, 4, 5), seconds=0)
    assert [p.returncode for p in done] == [0, 0, 0]


def test_a_launcher_that_is_faster_than_the_end_of_the_peer_hides_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The peer's connection breaks a moment before its process has ended; SIGTERM comes in between."""
    before = signal.getsignal(signal.SIGTERM)
    peer = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    try:
        watch = Watch(tmp_path, rank=1, world_size=2, seconds=0)
        watch._peers[0] = Note(host=socket.gethostname(), pid=peer.pid, doing="step 3")

        def meanwhile(_: float) -> None:
            peer.kill()
            peer.wait()
            raise Stopped

        with pytest.raises(PeerLost, match=r"Rank 0 on .* has ended in mid-run, at: step 3"), watch:
            (watch.folder / "rank-0.json").write_text("{}", encoding="utf-8")
            monkeypatch.setattr(time, "sleep", meanwhile)
            raise RuntimeError("Connection closed by peer [127.0.0.1]:1234")
        assert signal.getsignal(signal.SIGTERM) is signal.SIG_IGN, "what it has to say is not cut off"
    finally:
        signal.signal(signal.SIGTERM, before)
        peer.kill()
        peer.wait()
