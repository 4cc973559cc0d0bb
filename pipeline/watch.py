"""Ranks that watch each other: when one hangs or dies, the others end and say which one it was.

In data-parallel training every rank waits for every other at each all-reduce. When one never comes, the rest waits as
well, for half an hour by default, with full machines and no word. Here each rank notes its progress in a small file
under the run's folder, from a thread of its own, and reads the others'. When nobody has moved for too long, the one that
is furthest behind, or whose notes have stopped coming, is the one all wait for.

Files and not messages: the main thread of a waiting rank sits inside the all-reduce and could not send any.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import sys
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from pipeline.errors import EXIT_HUNG, PeerLost
from pipeline.stopping import Stopped

PULSE_SECONDS = 1.0
START_SECONDS = 120.0  # before the first steps are known: kernels are compiled, caches filled
SLOW_SECONDS = 300.0  # for work that is slow by nature, such as a checkpoint to a network disk


@dataclass
class Note:
    """What one rank tells of itself. `place` is how far it has come, to be compared with others; `moves` grows with all
    it does, and `pulse` as long as its process runs at all."""

    place: int = 0
    moves: int = 0
    pulse: int = 0
    doing: str = "starting"
    slow: bool = False
    host: str = ""
    pid: int = 0
    moved: float = field(default_factory=time.monotonic)  # when `moves` last grew, by the reader's clock
    pulsed: float = field(default_factory=time.monotonic)


class Watch:
    """Context manager around a rank's training and scoring; `beat` is called as it goes on.

    `seconds`: how long a standstill may last, at least 5 times the longest step seen so far; 0 switches the watch off.
    """

    def __init__(self, folder: Path, rank: int, world_size: int, seconds: float) -> None:
        self.folder, self.rank, self.world_size, self.seconds = folder / ".watch", rank, world_size, seconds
        # Notes of an earlier launch may lie in the folder: each launch has its own port, each restart its number.
        launch = [os.environ.get(name, "") for name in ("MASTER_ADDR", "MASTER_PORT", "TORCHELASTIC_RESTART_COUNT")]
        self._launch = ":".join(launch)
        self._mine = Note(host=socket.gethostname(), pid=os.getpid())
        self._peers: dict[int, Note] = {}
        self._longest = 0.0
        self._end, self._writing = threading.Event(), threading.Lock()
        self._thread = threading.Thread(target=self._run, name="watch", daemon=True)

    def __enter__(self) -> Watch:
        if self.world_size > 1:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._write()
            self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: Any) -> None:
        if self.world_size == 1:
            return
        try:
            lost = self._peer_behind(error)
        finally:
            self._end.set()
            self._thread.join()
            self._path(self.rank).unlink(missing_ok=True)
            with contextlib.suppress(OSError):  # the last to leave finds it empty
                self.folder.rmdir()
        if lost:
            if threading.current_thread() is threading.main_thread():
                signal.signal(signal.SIGTERM, signal.SIG_IGN)  # it ends by itself, and has something to say before
            raise PeerLost(lost) from error

    def beat(self, doing: str, slow: bool = False) -> None:
        """All ranks say this at the same places: this one goes on, and does this next; `slow` for what may rightly take long."""
        self.tick()
        changed, mine = slow != self._mine.slow, self._mine
        mine.place, mine.doing, mine.slow = mine.place + 1, doing, slow
        if changed and self.world_size > 1:  # at once: nobody is to wait long for a rank whose last note says that it is slow
            with contextlib.suppress(OSError):
                self._write()

    def tick(self) -> None:
        """This rank moves, within what it was doing."""
        mine, now = self._mine, time.monotonic()
        # What exceeds all patience was no step: the process itself was suspended, or its machine.
        if mine.place > 2 and not mine.slow and now - mine.moved < self._patience():
            self._longest = max(self._longest, now - mine.moved)
        mine.moves, mine.moved = mine.moves + 1, now

    # -- the thread -----------------------------------------------------------------------------------------------

    def _run(self) -> None:
        looked = time.monotonic()
        while not self._end.wait(PULSE_SECONDS):
            now = time.monotonic()
            if now - looked > 5 * PULSE_SECONDS:  # we were suspended, and the others perhaps with us: all begin afresh
                for note in (self._mine, *self._peers.values()):
                    note.moved = note.pulsed = now
            looked = now
            with contextlib.suppress(OSError):  # a full disk must not end the watch
                self._mine.pulse += 1
                self._write()
                self._read()
            stuck = self._stuck()
            if stuck:
                self._give_up(stuck)

    def _path(self, rank: int) -> Path:
        return self.folder / f"rank-{rank}.json"

    def _write(self) -> None:
        mine = self._mine
        note = {"launch": self._launch, "place": mine.place, "moves": mine.moves, "pulse": mine.pulse, "doing": mine.doing,
                "slow": mine.slow, "host": mine.host, "pid": mine.pid}  # fmt: skip
        with self._writing:
            temporary = self._path(self.rank).with_suffix(".tmp")
            temporary.write_text(json.dumps(note), encoding="utf-8")
            temporary.replace(self._path(self.rank))

    def _read(self) -> None:
        now = time.monotonic()
        for rank in range(self.world_size):
            if rank == self.rank:
                continue
            try:
                note = json.loads(self._path(rank).read_text(encoding="utf-8"))
            except (OSError, ValueError):
                continue  # not there yet, or its run's folder is not shared with this machine
            if note.pop("launch", None) != self._launch:
                continue
            before = self._peers.get(rank)
            moved = before.moved if before and before.moves == note["moves"] else now
            pulsed = before.pulsed if before and before.pulse == note["pulse"] else now
            self._peers[rank] = Note(**note, moved=moved, pulsed=pulsed)

    def _patience(self) -> float:
        if any(note.slow for note in (self._mine, *self._peers.values())):
            return SLOW_SECONDS
        return max(self.seconds, START_SECONDS if self._mine.place < 4 else 5 * self._longest)

    def _stuck(self) -> dict[int, Note]:
        """The ranks all others wait for, when nobody has moved for longer than is right."""
        notes = {self.rank: self._mine, **self._peers}
        now, patience = time.monotonic(), self._patience()
        if not self.seconds or not self._peers or now - max(note.moved for note in notes.values()) < patience:
            return {}
        silent = {rank: note for rank, note in self._peers.items() if now - note.pulsed > max(patience / 2, 5 * PULSE_SECONDS)}
        least = min(note.place for note in notes.values())
        return silent or {rank: note for rank, note in notes.items() if note.place == least}

    def _give_up(self, stuck: dict[int, Note]) -> None:
        healthy = [rank for rank in [self.rank, *self._peers] if rank not in stuck] or [0]
        if self.rank == min(healthy):
            still = time.monotonic() - max(note.moved for note in [self._mine, *self._peers.values()])
            who = "; ".join(f"rank {rank} on {note.host}, process {note.pid}, at: {note.doing}" for rank, note in sorted(stuck.items()))
            which = "All ranks wait for one that hangs" if len(stuck) <= self.world_size // 2 else "The ranks wait for each other"
            print(
                f"\nerror: no progress for {still:.0f} s. {which} ({who}). The same command goes on from the newest complete checkpoint; "
                "if the step is rightly this slow, raise --hang_seconds.",
                file=sys.stderr, flush=True,
            )  # fmt: skip
        else:
            time.sleep(1)  # let that one speak: the launcher ends all others when the first has ended
        # The main thread sits in a collective that no exception can reach.
        os._exit(EXIT_HUNG)

    # -- after an error -------------------------------------------------------------------------------------------

    def _peer_behind(self, error: BaseException | None) -> str | None:
        """Which peer's end is the reason for `error`. Raises Stopped where a SIGTERM came meanwhile and none is."""
        if isinstance(error, Stopped):  # a launcher ends all ranks when one has died
            return self._lost_peer(0)
        if not isinstance(error, Exception) or not _connection_failed(error):
            return None
        try:
            return self._lost_peer(5)
        except Stopped:  # a connection breaks before its process has quite ended: the launcher may have been faster
            if lost := self._lost_peer(0):
                return lost
            raise

    def _lost_peer(self, seconds: float) -> str | None:
        """Which peer has gone, when a connection to one broke; waits a while for its end to show.

        A peer that left in order has taken its note along, and has itself said why.
        """
        deadline = time.monotonic() + seconds
        while True:
            for rank, note in sorted(self._peers.items()):
                gone = not _alive(note.pid) if note.host == self._mine.host else time.monotonic() - note.pulsed > 3 * PULSE_SECONDS
                if gone and self._path(rank).exists():
                    return f"Rank {rank} on {note.host} (process {note.pid}) has ended in mid-run, at: {note.doing}"
            if time.monotonic() >= deadline:
                return None
            time.sleep(0.2)


def _connection_failed(error: Exception) -> bool:
    return type(error).__name__.startswith("Dist") or any(
        word in str(error) for word in ("by peer", "Connection", "NCCL", "timed out", "Timed out")
    )


def _alive(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
