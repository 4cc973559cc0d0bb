"""What was compiled is compiled once, and a file that is damaged, missing or cannot be written changes no answer."""

from __future__ import annotations

import dataclasses
import os
import time
from pathlib import Path

import numpy as np
import pytest
from serving import make_release

from serve import compiled as module
from serve.compiled import compiled, identity
from serve.engine import open_engine
from serve.release import pull
from serve.settings import Settings


class Maker:
    """Counts how often it is asked."""

    def __init__(self, content: bytes = b"compiled " * 1000) -> None:
        self.content, self.calls = content, 0

    def __call__(self) -> memoryview:
        self.calls += 1
        return memoryview(self.content)


def test_what_was_made_once_is_read_from_then_on(tmp_path: Path) -> None:
    maker = Maker()
    for _ in range(3):
        assert compiled(tmp_path / "new", ["a model"], maker).tobytes() == maker.content
    assert maker.calls == 1
    assert compiled(tmp_path / "new", ["another"], other := Maker(b"x")).tobytes() == b"x" and other.calls == 1


@pytest.mark.parametrize("damage", [lambda data: data[:-1], lambda data: b"?" + data[1:], lambda _: b"", lambda data: data[:10]])
def test_a_damaged_file_is_made_again(tmp_path: Path, damage: object) -> None:
    maker = Maker()
    compiled(tmp_path, ["a model"], maker)
    (file,) = tmp_path.iterdir()
    file.write_bytes(damage(file.read_bytes()))  # type: ignore[operator]
    assert compiled(tmp_path, ["a model"], maker).tobytes() == maker.content and maker.calls == 2
    assert compiled(tmp_path, ["a model"], maker).tobytes() == maker.content and maker.calls == 2


def test_where_nothing_can_be_written_it_is_made_every_time(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way of a folder")
    maker = Maker()
    for times in (1, 2):
        assert compiled(tmp_path / "file" / "compiled", ["a model"], maker).tobytes() == maker.content and maker.calls == times


def test_those_not_used_for_longest_go(tmp_path: Path) -> None:
    for number in range(module.KEPT):
        compiled(tmp_path, [number], Maker())
        for age, path in enumerate(sorted(tmp_path.iterdir(), key=lambda path: -path.stat().st_mtime)):
            os.utime(path, (1e9 - age, 1e9 - age))
    compiled(tmp_path, [0], Maker())  # used again
    compiled(tmp_path, ["one more"], Maker())
    assert len(list(tmp_path.iterdir())) == module.KEPT
    compiled(tmp_path, [0], kept := Maker())
    compiled(tmp_path, [1], gone := Maker())
    assert (kept.calls, gone.calls) == (0, 1)


def test_half_files_of_those_that_were_killed_go(tmp_path: Path) -> None:
    for name, age in (("old.tmp", module.ABANDONED_SECONDS + 60), ("new.tmp", 0)):
        (tmp_path / name).write_text("half")
        os.utime(tmp_path / name, (time.time() - age, time.time() - age))
    compiled(tmp_path, ["a model"], Maker())
    assert {path.name for path in tmp_path.glob("*.tmp")} == {"new.tmp"}


def test_a_file_is_used_where_it_cannot_be_touched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a folder of another user, or of an image: what fails there is setting the time."""
    compiled(tmp_path, ["a model"], Maker())

    def forbidden(*_: object) -> None:
        raise PermissionError

    monkeypatch.setattr(os, "utime", forbidden)
    assert compiled(tmp_path, ["a model"], again := Maker()).tobytes() == again.content and again.calls == 0


def test_another_file_under_the_same_name_is_another(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("1")
    before = identity(tmp_path / "a")
    (tmp_path / "link").symlink_to(tmp_path / "a")
    assert identity(tmp_path / "link") == before
    about = (tmp_path / "a").stat()
    (tmp_path / "a").write_text("2")  # as large, and as old
    os.utime(tmp_path / "a", ns=(about.st_atime_ns, about.st_mtime_ns))
    assert identity(tmp_path / "a") != before


def test_an_engine_opened_from_the_file_answers_as_the_one_that_left_it(encoder_dir: Path, tmp_path: Path) -> None:
    pytest.importorskip("openvino")
    release_dir = make_release(encoder_dir)
    settings = Settings(model=str(release_dir), engine="openvino-fp32", state_dir=str(tmp_path))
    release = pull(str(release_dir))
    texts = [[5, 6, 7], [8, 9], [5] * 20]
    first = open_engine("openvino-fp32", release, settings)
    (tmp_path / "file").write_text("in the way of a folder")
    unkept = open_engine("openvino-fp32", release, dataclasses.replace(settings, state_dir=str(tmp_path / "file")))
    assert np.array_equal(first.logits(texts), unkept.logits(texts))
    (file,) = (tmp_path / "compiled").iterdir()
    written = file.stat().st_ino
    second = open_engine("openvino-fp32", release, settings)
    file.unlink()  # what is in use can be removed
    assert np.array_equal(first.logits(texts), second.logits(texts))
    third = open_engine("openvino-fp32", release, settings)
    assert next((tmp_path / "compiled").iterdir()).stat().st_ino != written
    assert np.array_equal(first.logits(texts), third.logits(texts))
