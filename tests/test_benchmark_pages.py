"""The pages under benchmarks/ are those that their programs make of the measured JSON, and say of every bound whether it was held."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from launching import ROOT
from PIL import Image

from benchmarks import bench_report, crash_test, scaling_page
from benchmarks.common import RESULTS, digest, named
from benchmarks.explain import page as explain_page
from benchmarks.explain.__main__ import TIMELINE, holds
from benchmarks.serving import page as serving_page
from benchmarks.shards import PICTURE as SHARDS

PICTURES = [*sorted((ROOT / "benchmarks").glob("*.png")), SHARDS, TIMELINE]


def results(name: str) -> dict[str, Any]:
    return json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))


def test_the_page_is_that_of_the_results() -> None:
    assert crash_test.PAGE.read_text(encoding="utf-8") == crash_test.page(results("crash_test"))


@pytest.mark.parametrize("name", ["single_gpu.md", "ddp_2gpu.md", "README.md"])
def test_the_report_is_that_of_the_results(name: str) -> None:
    assert (ROOT / "benchmarks" / name).read_text(encoding="utf-8") == bench_report.pages(bench_report.load(RESULTS))[name]


def test_the_readme_holds_the_measured_results() -> None:
    readme = bench_report.README.read_text(encoding="utf-8")
    assert bench_report.BEGIN in readme and bench_report.with_results(readme, bench_report.load(RESULTS)) == readme


def test_every_picture_of_the_report_is_there() -> None:
    found = bench_report.load(RESULTS)
    for name, text in bench_report.pages(found).items():
        for picture in (part.split(")")[0] for part in text.split("](")[1:] if ".png)" in part):
            assert (ROOT / "benchmarks" / picture).is_file(), f"{name} shows {picture}"


@pytest.mark.parametrize("picture", PICTURES, ids=lambda path: path.stem)
def test_a_picture_is_that_of_the_results(picture: Path) -> None:
    kind, _, label = picture.stem.partition("-")
    source = named("bench" if kind in ("single_gpu", "ddp_2gpu") else kind, label)
    with Image.open(picture) as image:
        assert image.info.get("Description") == digest(results(source)), f"{picture.name} was not drawn from {source}.json as it is"


def test_the_sentences_are_those_of_the_results() -> None:
    found = bench_report.load(RESULTS)
    for kind, module in (("explain", explain_page), ("scaling", scaling_page)):
        for label, one in bench_report.labelled(found, kind).items():
            assert one["sentence"] == module.sentence(one), named(kind, label)


def test_what_was_measured_says_whether_it_holds() -> None:
    crash = results("crash_test")
    assert crash["passed"] and crash["kills"] >= 25 and crash["inside_a_write"] >= 3
    for name, row in results("bench")["ratios"].items():
        within = row["bound"] is None or (row["median"] <= row["bound"] if name == "checkpoint_share" else row["median"] >= row["bound"])
        assert row["held"] == within, (name, row)  # a slow hour of a machine is told, not hidden
    for label, explained in bench_report.labelled(bench_report.load(RESULTS), "explain").items():
        assert explained["held"] == holds(explained)
        assert ("NOT held" in explain_page.section(explained, label)) != explained["held"]


def test_the_page_of_serving_is_that_of_the_results() -> None:
    assert (ROOT / "benchmarks" / "bench_serve.md").read_text(encoding="utf-8") == serving_page.page(results("bench_serve"))
