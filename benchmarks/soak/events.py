"""What is done to the service, one thing after another, and what has to come of it.

Each event is a method of `Events` that returns what happened, in a few words, or raises NotHeld. Whatever it does, the
load goes on, and `run` holds every event against it: no answer of another commit, no request lost, and 503 only where
an engine is broken or a process ends.
"""

from __future__ import annotations

import asyncio
import shutil
import signal
import subprocess
import time
from collections.abc import Awaitable, Callable, Collection
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi
from tokenizers import Tokenizer

from benchmarks.soak.load import POISON, Load, Lost, Tally
from benchmarks.soak.releases import Probabilities, Releases
from benchmarks.soak.world import ADMIN_KEY, Line, NotHeld, ServiceProcess, until
from pipeline.local_hub.faults import Fault
from pipeline.local_hub.process import HubProcess

STALL_SECONDS = 2.0  # of the service: a batch that takes longer turns /ready red
DRAIN_SECONDS = 10.0  # within which it has to end after SIGTERM
SMALL_DISK_MIB = 24
FROZEN_SECONDS = 6.0  # longer than servers commonly keep an idle connection, shorter than a request may take
BROKEN, RESTARTED = frozenset({"engine_down", "too_slow"}), frozenset({"loading"})  # refusals that go with it
LOOKS_SECONDS = 1.0  # several looks of the service at the Hub


@dataclass(frozen=True)
class Row:
    """An event and what became of it; `held` None: it was not run, and `happened` says why."""

    event: str
    happened: str
    held: bool | None
    seconds: float
    answers: int
    slowest_ms: float
    refused: dict[str, int]
    turned_away: int


class NotRun(Exception):
    """The event cannot be had on this machine; its text says why."""


def complaints(tally: Tally, excuse: Callable[[Lost], bool], expected: Collection[str]) -> list[str]:
    """What of it must not be: anything wrong, requests lost but those excused, refusals but for a full queue and those expected."""
    found = [f"{len(tally.wrong)} wrong: {tally.wrong[0]}"] if tally.wrong else []
    if lost := [one for one in tally.lost if not excuse(one)]:
        found.append(f"{len(lost)} lost: {lost[0].what} after {lost[0].ended - lost[0].sent:.2f} s")
    if refused := {code: count for code, count in tally.refused.items() if code not in {"overloaded", *expected}}:
        found.append(f"refused without need: {refused}")
    if not tally.answers:
        found.append("not one answer")
    return found


class Events:
    """`current` is the commit that has to serve; `truth` of every commit lies with the load."""

    def __init__(self, hub: HubProcess, line: Line, service: ServiceProcess, releases: Releases, repo: str) -> None:
        self.hub, self.line, self.service, self.releases, self.repo = hub, line, service, releases, repo
        self.api = HfApi(endpoint=hub.url, token=hub.token)
        self.rows: list[Row] = []
        self.pushed = {"good": 0, "bad": 0}
        self.current = ""
        self.before = ""  # what served before it
        self.truths: dict[str, Probabilities] = {}
        self.load: Load
        self.other: ServiceProcess | None = None  # that stands in for `service` while an event lasts
        self.excuse: Callable[[Lost], bool] = lambda _: False
        self.expected: frozenset[str] = frozenset()  # refusals, by code, that go with the event

    # ---- the frame of every event

    async def run(self, name: str, event: Callable[[], Awaitable[str]], say: Callable[[str], None]) -> None:
        self.excuse, self.expected = lambda _: False, frozenset()
        began, held = time.monotonic(), True
        try:
            happened = await event()
        except NotRun as reason:
            self.rows.append(Row(name, f"not run: {reason}", None, 0.0, 0, 0.0, {}, 0))
            say(f"{name}: not run: {reason}")
            return
        except (NotHeld, OSError, EOFError) as error:
            held, happened = False, " ".join(f"{error or type(error).__name__}".split())
        seconds = time.monotonic() - began
        self.service.weigh()
        if problem := await self._mend():
            held, happened = False, f"{happened}; {problem}"
        tally = self.load.take()
        if found := complaints(tally, self.excuse, self.expected):
            held, happened = False, "; ".join([happened, *found])
        excused = sum(self.excuse(one) for one in tally.lost)
        row = Row(name, happened, held, round(seconds, 2), tally.answers, round(1000 * tally.slowest, 1), dict(tally.refused), excused)
        self.rows.append(row)
        say(
            f"{'held' if held else 'NOT HELD'}  {name}: {happened} ({seconds:.1f} s, {tally.answers} answers, slowest {row.slowest_ms:.0f} ms)"
        )

    async def _mend(self) -> str | None:
        """All faults off; the service serves `current` again, in a new process if need be. What had to be done for it, or None."""
        self.hub.heal()
        await self.line.heal()
        self.load.poison = False
        for flag in self.service.flags.iterdir():
            flag.unlink()
        if self.other:
            self.other.kill()
            self.other = None
        assert self.service.process
        try:
            if self.service.process.poll() is None:
                await until(self.service.is_ready, "the service is ready again", 20)
                return None
        except NotHeld:
            self.service.kill()
        code = self.service.process.returncode
        try:
            await self.service.start()
        except NotHeld as error:
            raise RuntimeError(f"The service cannot be started again: {error}") from error
        return f"the service had to be started again (code {code})"

    # ---- pushing

    async def push(self, folder: Path, truth: Probabilities | None) -> str:
        """A commit of `folder`'s files; it is judged by `truth` from now on."""
        done = await asyncio.to_thread(self.api.upload_folder, repo_id=self.repo, folder_path=folder)
        self.learn(done.oid, truth)
        return str(done.oid)

    def learn(self, commit: str, truth: Probabilities | None) -> None:
        self.pushed["bad" if truth is None else "good"] += 1
        if truth is not None:
            self.truths[commit] = truth
        self.load.learn(commit, truth)

    async def taken(self, commit: str) -> float:
        """Waits until `commit` serves and answers; returns seconds."""
        seconds = await until(lambda: self.service.serves(commit), f"{commit[:8]} serves")
        self.before, self.current = self.current, commit
        async with asyncio.timeout(30):
            await self.load.answered(commit)
        return seconds

    async def stays(self, seconds: float = LOOKS_SECONDS) -> None:
        """Raises NotHeld where anything but `current` serves, or nothing does, for so long."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            if not await self.service.serves(self.current) or not await self.service.is_ready():
                raise NotHeld("the old commit does not serve on")
            await asyncio.sleep(0.1)

    # ---- commits

    async def swap(self) -> str:
        seconds = await self.taken(await self.push(*self.releases.good()))
        return f"serves {seconds:.1f} s after the push"

    async def refusal(self, kind: str) -> str:
        commit = await self.push(self.releases.bad(kind), None)
        seconds = await until(lambda: self.service.refuses(commit), f"{commit[:8]} is refused")
        await self.stays()
        reason = next(one["reason"] for one in (await self.service.info())["updates"]["refused"] if one["commit"] == commit)
        return f"refused after {seconds:.1f} s ({' '.join(reason.split('golden examples: ')[-1].split())[:100]}...), the old one serves on"

    async def only_readme(self) -> str:
        seen = len(self.service.said())
        content = b"# Tiny\n\nOnly this page has changed.\n"
        done = await asyncio.to_thread(self.api.upload_file, path_or_fileobj=content, path_in_repo="README.md", repo_id=self.repo)
        self.learn(done.oid, self.truths[self.current])
        seconds = await self.taken(done.oid)
        if "without loading" not in self.service.said()[seen:]:
            raise NotHeld("a commit with another README alone was loaded anew")
        return f"answers carry the new commit after {seconds:.1f} s, nothing was loaded"

    async def roll_back(self) -> str:
        left, back = self.current, self.before
        status, answer = await self.service.ask("POST", "/rollback", **{"X-API-Key": ADMIN_KEY})
        if status != 200 or answer["revision"] != back:
            raise NotHeld(f"/rollback answered {status} {answer}, expected {back}")
        await self.taken(back)
        await self.stays(2 * LOOKS_SECONDS)
        if not await self.service.refuses(left):
            raise NotHeld("what was rolled back is not among the refused")
        return f"one call, and {back[:8]} answers; {left[:8]} is not taken again"

    # ---- the engine

    def flag(self, name: str, content: str = "") -> Path:
        """A fault of the engine, on until the file is gone; whole from the moment it is there."""
        path = self.service.flags / name
        path.with_name("new").write_text(content)
        return path.with_name("new").rename(path)

    async def one_text_fails(self) -> str:
        token = Tokenizer.from_file(str(self.releases.base / "tokenizer.json")).token_to_id(POISON)
        self.flag("poison", str(token))
        self.expected = frozenset({"text_fails"})
        self.load.poison = True
        await until(lambda: self.load.tally.refused["text_fails"] >= 20, "20 requests with the text that fails")
        self.load.poison = False
        await asyncio.sleep(0.5)  # what is under way still meets the fault
        return f"{self.load.tally.refused['text_fails']} requests with it got 422, nobody else anything but an answer"

    async def engine_dies(self) -> str:
        self.expected = BROKEN
        seen = len(self.service.said())
        began = time.monotonic()
        self.flag("break-one")
        await until(lambda: "is loaded anew" in self.service.said()[seen:], "the engine is loaded anew")
        await until(self.service.is_ready, "/ready is green again")
        seconds = time.monotonic() - began
        await self.load.answered(self.current)
        return f"loaded anew, answers again after {seconds:.1f} s; {self.load.tally.refused['engine_down']} requests were told 503"

    async def _exits_70(self, flag: str) -> str:
        self.expected = BROKEN | RESTARTED
        self.excuse = lambda one: one.turned_away  # from the end of the one process to the start of the next
        self.flag(flag)
        code, seconds = await self.service.exit()
        for left in self.service.flags.iterdir():
            left.unlink()
        if code != 70:
            raise NotHeld(f"exit code {code}, expected 70")
        again = await self.service.start()
        await self.load.answered(self.current)
        return f"exit code 70 after {seconds:.1f} s, {self.current[:8]} serves {again:.1f} s after the restart"

    async def engine_dies_for_good(self) -> str:
        return await self._exits_70("break")

    async def engine_hangs_again(self) -> str:
        return await self._exits_70("hang-one")

    async def _turns_red(self) -> float:
        async def is_red() -> bool:
            return self.service.lives() and (await self.service.ask("GET", "/ready"))[0] == 503

        return await until(is_red, "/ready is red")

    async def engine_hangs_a_while(self) -> str:
        self.expected = BROKEN
        stuck = self.flag("hang")
        red = await self._turns_red()
        stuck.unlink()
        green = await until(self.service.is_ready, "/ready is green again")
        await self.load.answered(self.current)
        return f"/ready red after {red:.1f} s, green {green:.1f} s after the engine came back"

    async def engine_hangs(self) -> str:
        self.expected = BROKEN
        self.flag("hang-one")
        red = await self._turns_red()
        green = await until(self.service.is_ready, "/ready is green again")
        await self.load.answered(self.current)
        return f"/ready red after {red:.1f} s, another engine answers {green:.1f} s later"

    # ---- the Hub

    async def _hub_fails(self, what: str, expected: str) -> str:
        """With the fault already on: a push, the service noticing, the old one serving on; healed, the new one taking over."""
        commit = await self.push(*self.releases.good())

        async def noticed() -> bool:
            return expected in (await self.service.hub_trouble() or "")

        seconds = await until(noticed, f"/info says that the Hub {what}")
        await self.stays()
        self.hub.heal()
        await self.line.heal()
        after = await self.taken(commit)
        return f"/info says so after {seconds:.1f} s, the old one serves on; the new one {after:.1f} s after it was well"

    async def hub_refuses(self, status: int) -> str:
        self.hub.fault(Fault("status", method="GET|HEAD", path="/resolve/|/revision/", status=status, retry_after=1))
        return await self._hub_fails(f"answers {status}", str(status))

    async def hub_cut(self) -> str:
        self.line.cut_after = 300_000
        found = await self._hub_fails("breaks off", "broke")
        return f"{self.line.cuts} connections cut after 0.3 MB; {found}"

    async def hub_stalls(self) -> str:
        self.line.bytes_per_second = 0
        return await self._hub_fails("does not answer", "cannot be reached")

    async def hub_gone(self) -> str:
        await self.line.down()
        return await self._hub_fails("is gone", "cannot be reached")

    async def hub_slow(self) -> str:
        self.line.bytes_per_second = 400_000
        seconds = await self.taken(await self.push(*self.releases.good()))
        return f"0.4 MB/s at most: the new one serves {seconds:.1f} s after the push, the old one until then"

    # ---- the process

    async def sigterm(self, full_hands: bool) -> str:
        """With `full_hands` every caller waits for an answer when the signal comes, and the engine takes another second."""
        stuck = None
        if full_hands:
            stuck = self.flag("hang")
            await until(lambda: self.load.waiting == self.load.connections, "every caller waits")
        self.expected = RESTARTED
        sent, waiting = time.monotonic(), self.load.waiting
        self.excuse = lambda one: one.sent >= sent  # who comes later may find nobody
        ending = asyncio.create_task(self.service.end(signal.SIGTERM))
        if stuck:
            await asyncio.sleep(1)
            stuck.unlink()
        code, seconds = await ending
        if code != 0 or seconds > DRAIN_SECONDS:
            raise NotHeld(f"exit code {code} after {seconds:.1f} s, expected 0 within {DRAIN_SECONDS:.0f} s")
        again = await self.service.start()
        if not await self.service.serves(self.current):
            raise NotHeld(f"{self.current[:8]} does not serve after the restart")
        await self.load.answered(self.current)
        return f"{waiting} were waiting, exit code 0 after {seconds:.1f} s; started again, {self.current[:8]} serves after {again:.1f} s"

    async def sigkill(self) -> str:
        """In the middle of taking a new commit; at the restart there is no Hub."""
        seen = len(self.service.said())
        commit = await self.push(*self.releases.good())
        await until(lambda: commit in self.service.said()[seen:], f"{commit[:8]} is fetched")
        await self.line.down()
        self.expected = RESTARTED
        killed = time.monotonic()
        self.excuse = lambda one: one.ended >= killed
        await self.service.end(signal.SIGKILL)
        again = await self.service.start()
        if not await self.service.serves(self.current):
            raise NotHeld(f"{(await self.service.info())['commit']} serves, expected the last proven, {self.current}")
        fallback = (await self.service.info())["updates"]["fallback"]
        if not fallback:
            raise NotHeld("/info does not say why an older commit serves")
        await self.load.answered(self.current)
        await self.line.heal()
        after = await self.taken(commit)
        return (
            f"started again without a Hub, {self.before[:8]} serves after {again:.1f} s; the new one {after:.1f} s after the Hub was back"
        )

    async def freeze(self) -> str:
        """As on a host that is paused or swaps. Deadlines pass meanwhile; requests that were sent must not be lost."""
        # A batch that it falls into looks stalled until it ends.
        self.expected = frozenset({"engine_down"})
        assert self.service.process
        self.service.process.send_signal(signal.SIGSTOP)
        try:
            await asyncio.sleep(FROZEN_SECONDS)
        finally:
            self.service.process.send_signal(signal.SIGCONT)
        waiting = self.load.waiting
        if waiting < self.load.connections:
            raise NotHeld(f"only {waiting} callers waited: it did not stand still")
        await self.load.answered(self.current, 2 * self.load.connections)
        return f"for {FROZEN_SECONDS:g} s; {waiting} were waiting, and nobody's request was lost"

    async def disk_full(self, make: Callable[[str], ServiceProcess]) -> str:
        """With a process of its own, whose cache lies on a small disk: a file system in memory that only it sees."""
        if not shutil.which("unshare"):
            raise NotRun("there is no `unshare` here to give it a small disk")
        tried = await asyncio.to_thread(
            subprocess.run, ["unshare", "-rm", "mount", "-t", "tmpfs", "tmpfs", "/mnt"], capture_output=True, text=True
        )
        if tried.returncode:
            raise NotRun(f"no file system can be mounted here ({' '.join(tried.stderr.split())[:80]})")
        self.expected = RESTARTED  # while one process ends and the next starts
        self.excuse = lambda one: one.turned_away
        await self.service.end()
        self.other = own = make("small-disk")
        own.port = self.service.port
        mount = f'mount -t tmpfs -o size={SMALL_DISK_MIB}m tmpfs "$HF_HOME" && exec "$@"'
        await own.start(["unshare", "-rm", "sh", "-c", mount, "sh"])
        assert own.process
        regular, self.service = self.service, own
        try:
            inside = Path(f"/proc/{own.process.pid}/root{own.home}/filler")
            await asyncio.to_thread(_fill, inside)
            commit = await self.push(*self.releases.good())

            async def noticed() -> bool:
                return "disk is full" in (await own.hub_trouble() or "")

            seconds = await until(noticed, "/info says that the disk is full")
            await self.stays()
            inside.unlink()
            after = await self.taken(commit)
            await own.end()
        finally:
            self.service = regular
        self.other = None
        await regular.start()
        return f"/info says so after {seconds:.1f} s, the old one serves on; the new one {after:.1f} s after there was room"

    def summary(self) -> dict[str, Any]:
        return {
            "rows": [asdict(row) for row in self.rows],
            "pushed": self.pushed,
            "held": all(row.held is not False for row in self.rows),
            "memory_mib": [[round(weight, 1) for weight in process] for process in self.service.memory],
        }


def _fill(path: Path) -> None:
    """Takes all the room there is."""
    with path.open("wb", buffering=0) as file:
        try:
            while True:
                file.write(bytes(1 << 16))
        except OSError:
            return
