"""The soak: the service holds through its short run, and the soak would see it if it did not."""

from __future__ import annotations

import asyncio
import itertools
import json
import socket
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from launching import ROOT
from serving import make_release

from benchmarks.soak.__main__ import PAGE, page, soak, table
from benchmarks.soak.events import BROKEN, complaints
from benchmarks.soak.load import AT_ONCE_SECONDS, Connection, Load, Lost, Tally, Truth
from benchmarks.soak.releases import BAD, SEPARATION, Releases
from benchmarks.soak.world import Line

LABELS = ("a", "b")
FIRST, SECOND = np.array([[0.9, 0.1], [0.7, 0.3]]), np.array([[0.2, 0.8], [0.4, 0.6]])  # (texts, classes) of two commits


@pytest.mark.timeout(300)
def test_the_short_soak_holds(encoder_dir: Path, tmp_path: Path) -> None:
    said: list[str] = []
    results = asyncio.run(soak(make_release(encoder_dir), tmp_path, False, said.append))
    assert results["held"] and not results["unknown_commits"], "\n".join(said)
    assert [row["held"] for row in results["rows"]] == [True] * 10
    assert results["pushed"] == {"good": 6, "bad": len(BAD)}  # with the one that it begins with
    assert all(row["answers"] for row in results["rows"])
    # Only an end of the process, or the text that the engine fails on, may cost a caller anything.
    touched = {row["event"].split()[0] for row in results["rows"] if row["turned_away"] or set(row["refused"]) - {"overloaded"}}
    assert touched <= {"SIGTERM", "SIGKILL", "engine"}
    assert len(table(results)) == 12


def test_the_page_is_that_of_the_results() -> None:
    path = ROOT / "benchmarks" / "results" / "soak.json"
    if not path.exists():  # the long soak was not run yet, so no page either
        assert not PAGE.exists()
        return
    results = json.loads(path.read_text(encoding="utf-8"))
    assert results["full"] and results["held"] and PAGE.read_text(encoding="utf-8") == page(results)


def test_any_answer_tells_the_commits_apart(encoder_dir: Path, tmp_path: Path) -> None:
    releases = Releases(make_release(encoder_dir), tmp_path)
    truths = [releases.good()[1] for _ in range(6)]
    for one, other in itertools.combinations(truths, 2):
        assert (np.abs(one - other).max(axis=1) >= 0.99 * SEPARATION).all()


# ---- what the callers see: a real server whose answers are as wrong as they are told to be


def served(rows: list[list[float]], commit: str, header: str = "") -> bytes:
    content = [{"probabilities": dict(zip(LABELS, row, strict=True))} for row in rows]
    answer = {"predictions": content} if len(rows) > 1 else content[0]
    return reply(200, answer | {"revision": commit}, header or commit)


def reply(status: int, answer: Any, commit: str = "first") -> bytes:
    body = json.dumps(answer).encode()
    return f"HTTP/1.1 {status} x\r\nX-Model-Revision: {commit}\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body


async def loaded(answer: Callable[[int, list[int]], Awaitable[bytes]], until: int = 60) -> Tally:
    """What four callers count of `until` requests to a server that sends `answer(number of the request, rows it asks for)`."""
    asked = 0

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal asked
        try:
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                length = next(int(line.split(b":")[1]) for line in head.split(b"\r\n") if line.startswith(b"Content-Length"))
                body = json.loads(await reader.readexactly(length))
                rows = [int(text) for text in body.get("texts") or [body["text"]]]
                asked += 1
                if not (sent := await answer(asked, rows)):
                    break
                writer.write(sent)
        except EOFError:
            pass
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    truth = Truth(0.01)
    load = Load(server.sockets[0].getsockname()[:2], ["0", "1"], truth, connections=4, pause=0.001)
    load.learn("first", FIRST)
    load.learn("second", SECOND)
    load.learn("bad", None)
    async with asyncio.timeout(20):
        while asked < until:
            await asyncio.sleep(0.001)
        await load.stop()
    server.close()
    return load.tally


PLANTED = 5
WRONG: list[tuple[str, Callable[[list[int]], bytes], str]] = [
    ("another commit's", lambda rows: served(SECOND[rows].tolist(), "first"), "is that of second"),
    ("another text's", lambda rows: served(FIRST[[1 - row for row in rows]].tolist(), "first"), "is off by"),
    ("of a bad commit", lambda rows: served(FIRST[rows].tolist(), "bad"), "which is bad"),
    ("another in the header", lambda rows: served(FIRST[rows].tolist(), "first", "second"), "header names another"),
    ("too many answers", lambda rows: served(FIRST[[*rows, 0]].tolist(), "first"), "answers to"),
]  # fmt: skip


@pytest.mark.parametrize("case", WRONG, ids=lambda case: case[0])
def test_a_planted_wrong_answer_is_counted(case: tuple[str, Callable[[list[int]], bytes], str]) -> None:
    _, planted, said = case

    async def answer(number: int, rows: list[int]) -> bytes:
        return planted(rows) if number == PLANTED else served(FIRST[rows].tolist(), "first")

    tally = asyncio.run(loaded(answer))
    assert len(tally.wrong) == 1 and said in tally.wrong[0]
    assert not tally.lost and tally.answers > PLANTED
    assert complaints(tally, lambda _: False, ()) == [f"1 wrong: {tally.wrong[0]}"]


@pytest.mark.parametrize(
    ("planted", "said"),
    [
        (b"", "IncompleteReadError"),
        (reply(500, {"code": "defect"}), "500 defect"),
        (reply(503, {"code": "no_idea"}), "503 no_idea"),
        (reply(503, "gateway"), "none of the service's"),
    ],
)
def test_a_planted_loss_is_counted(planted: bytes, said: str) -> None:
    async def answer(number: int, rows: list[int]) -> bytes:
        return planted if number == PLANTED else served(FIRST[rows].tolist(), "first")

    tally = asyncio.run(loaded(answer))
    assert len(tally.lost) == 1 and said in tally.lost[0].what and not tally.wrong
    assert complaints(tally, lambda _: False, ())[0].startswith("1 lost")
    assert complaints(tally, lambda one: one.turned_away, ()) == []  # excused where that goes with the event


def test_refusals_are_expected_or_not() -> None:
    async def answer(number: int, rows: list[int]) -> bytes:
        return reply(503, {"code": "engine_down"}) if number == PLANTED else served(FIRST[rows].tolist(), "first")

    tally = asyncio.run(loaded(answer))
    assert tally.refused == {"engine_down": 1}
    assert complaints(tally, lambda _: False, ()) == ["refused without need: {'engine_down': 1}"]
    assert complaints(tally, lambda _: False, BROKEN) == []
    assert complaints(Tally(), lambda _: False, ()) == ["not one answer"]


def test_answers_of_a_commit_that_becomes_known_later_are_judged_then() -> None:
    truth = Truth(0.01)
    assert truth.judge("new", [0], FIRST[:1]) is None and truth.judge("new", [1], SECOND[1:]) is None
    assert truth.unknown() == ["new"]
    assert len(truth.learn("new", FIRST)) == 1 and truth.unknown() == []


def test_a_request_that_waited_was_not_turned_away() -> None:
    assert Lost(0.0, 0.1, "", connected=True).turned_away and Lost(0.0, 9.0, "", connected=False).turned_away
    assert not Lost(0.0, AT_ONCE_SECONDS + 0.1, "", connected=True).turned_away


def test_the_line_to_the_hub_breaks_as_it_is_told() -> None:
    async def far(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while await reader.readuntil(b"\r\n\r\n"):
            writer.write(reply(200, "x" * 50_000))

    async def ask(line: Line) -> int:
        connection = Connection(("127.0.0.1", line.port))
        try:
            async with asyncio.timeout(5):
                return len((await connection.ask("GET", "/"))[2])
        finally:
            connection.close()

    async def all_of_it() -> None:
        server = await asyncio.start_server(far, "127.0.0.1", 0)
        line = Line(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}")
        await line.up()
        assert await ask(line) == 50_002
        line.cut_after = 20_000
        with pytest.raises((EOFError, ConnectionError)):
            await ask(line)
        assert line.cuts == 1
        await line.heal()
        line.bytes_per_second = 100_000
        began = asyncio.get_running_loop().time()
        assert await ask(line) == 50_002 and asyncio.get_running_loop().time() - began > 0.4
        await line.down()
        with pytest.raises(ConnectionError), socket.create_connection(("127.0.0.1", line.port), 5):
            pass
        await line.heal()
        assert await ask(line) == 50_002
        await line.down()
        server.close()

    asyncio.run(all_of_it())
