"""The page and the picture of the serving benchmark, made from its results alone."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.common import caption, provenance_lines, save
from benchmarks.serving.servers import SERVERS
from benchmarks.serving.targets import Target, growth, targets

PICTURE = "bench_serve.png"
INTRODUCTION = """\
All servers run on one machine and answer `POST /predict {"text": ...}` from one release, each with all cores; texts are
AG News test rows, thousands of different ones, and no answer is kept. Servers are measured in turns, one at a time, with the others
held still; figures are medians of the rounds, with the lowest and highest in brackets. Peers: batches of at most 16, waiting
at most 5 ms, padded to the longest text, torch, one worker. The load generator shares the machine; what it takes is in the table.

Two servers are not among them. The hobby original this project began as: what it did, one text a call, is the FastAPI server here in
a mended form, which neither blocks its event loop nor pads every text to 128 tokens. infinity: 0.0.78 asks for numpy below 2 and uvicorn
below 0.33, so it cannot be installed beside the versions that all others run on."""


def page(results: Mapping[str, Any]) -> str:
    """The page of a result, in Markdown."""
    makers = {"table": _table, "start": _start, "neighbour": _neighbour, "overload": _overload, "endurance": _endurance}
    lines = ["# Serving: this service beside others", "", INTRODUCTION, "", *_targets(targets(results)), ""]
    for name, maker in makers.items():
        if name in results["parts"]:
            part = results["parts"][name]
            lines += [*maker(part), "", _where(part), ""]
    return "\n".join(lines).rstrip("\n") + "\n"


def _where(part: Mapping[str, Any]) -> str:
    peers = ", ".join(f"{name} {version}" for name, version in part["peers"].items())
    engines = "; ".join(f"{SERVERS[name].title}: {about['engine']} {about['precision']}" for name, about in part["engines"].items())
    left_out = "".join(f" Left out: {SERVERS[name].title} ({reason})." for name, reason in part["left_out"].items())
    return (
        f"{provenance_lines(part)} Load average before: {part['load_before']:.1f}. Model: {part['model']}{_encoder(part)}, {part['texts']:,} texts of "
        f"{part['dataset']}.{f' Engines: {engines}.' if engines else ''}{f' Peers: {peers}.' if peers else ''}{left_out}"
    )


def _encoder(part: Mapping[str, Any]) -> str:
    trained = part.get("trained_from")
    return f" ({trained['model']}, trained on {trained['dataset']})" if trained else ""


def _rows(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    return [f"| {' | '.join(head)} |", "|---" * len(head) + "|", *(f"| {' | '.join(row)} |" for row in rows)]


def _figure(value: float | None, unit: str = "") -> str:
    if value is None:
        return "-"
    if unit == "share":
        return f"{value:.1%}"
    number = f"{value:.2f}" if abs(value) < 10 and unit != "" else f"{value:.0f}"
    return f"{number}{'' if unit in ('', 'x') else ' '}{unit}"


def _bound(target: Target) -> str:
    if target.bound is None:
        return f"not bounded: {target.reason}"
    bound = f"{target.bound:.0%}" if target.unit == "share" else f"{target.bound:.3g}{'' if target.unit == 'x' else ' '}{target.unit}"
    return f"{target.sense} {bound}".rstrip()


def _median(values: Sequence[float | None], digits: int = 0, spread: bool = True) -> str:
    known = [value for value in values if value is not None]
    if not known:
        return "-"
    middle, low, high = (f"{value:.{digits}f}" for value in (statistics.median(known), min(known), max(known)))
    return f"{middle} ({low}-{high})" if spread and len(known) > 1 else middle


def _targets(found: Sequence[Target]) -> list[str]:
    words = {True: "yes", False: "no"}
    rows = []
    for target in found:
        spread = "" if target.lowest is None else f"{_figure(target.lowest, target.unit)} to {_figure(target.highest, target.unit)}"
        unjudged = "-" if target.bound is None else "not judged: no AMX here"
        held = "not measured" if target.figure is None else unjudged if target.held is None else words[target.held]
        rows.append([target.title, _figure(target.figure, target.unit), spread, _bound(target), held])
    return _rows(["", "figure", "lowest and highest round", "bound", "held"], rows)


def _errors(rounds: Sequence[Mapping[str, int]]) -> str:
    kinds = sorted({kind for one in rounds for kind in one})
    return ", ".join(f"{sum(one.get(kind, 0) for one in rounds)} x {kind}" for kind in kinds) or "0"


def _table(part: Mapping[str, Any]) -> Iterator[str]:
    yield from (f"![Throughput and p99 against concurrency]({PICTURE})", "", "## Throughput, answers per second", "")
    steps = [str(connections) for connections in part["concurrency"]]
    cells = part["cells"]
    head = ["closed loop, connections", *steps]
    yield from _rows(head, [[SERVERS[name].title, *(_median(row[c]["throughput"]) for c in steps)] for name, row in cells.items()])
    yield from ("", "## Latency, p50 / p99 in ms", "")
    latency = [[SERVERS[name].title, *(f"{_median(row[c]['p50_ms'], 1, False)} / {_median(row[c]['p99_ms'], 1, False)}" for c in steps)]
               for name, row in cells.items()]  # fmt: skip
    yield from _rows(head, latency)
    yield from ("", "## Errors, right labels, and the generator's own cost", "")
    rows = []
    for name, row in cells.items():
        every = [row[c] for c in steps]
        right = [value for one in every for value in one["right"] if value is not None]
        rows.append([
            SERVERS[name].title,
            _errors([errors for one in every for errors in one["errors"]]),
            f"{statistics.mean(right):.1%}" if right else "-",
            f"{statistics.median([value for one in every for value in one['generator_us']]):.0f}",
            f"{max(value for one in every for value in one['generator_cores']):.1%}",
        ])  # fmt: skip
    yield from _rows(
        ["all concurrencies", "errors", "answers with the row's label", "generator, µs a request", "at most, of one core"], rows
    )


def _start(part: Mapping[str, Any]) -> Iterator[str]:
    yield from ("## Start and memory", "")
    yield (
        "Seconds from the process's start to its first answer, files cached. Memory from start to the end of loads at 32 and 128: peak of "
        "resident memory (RSS), summed over its processes; at the end also what is theirs alone (USS). The very first start, in which this "
        "service also tries its engines in processes of their own while it answers, is weighed apart and without load."
    )
    yield ""
    rows = []
    for name, row in part["servers"].items():
        weights = [f"{row[key]:.0f}" for key in ("peak_rss_mib", "uss_mib", "processes", "first_peak_rss_mib")]
        rows.append([SERVERS[name].title, _median(row["first_answer_s"], 2), *weights])
    yield from _rows(["", "first answer, s", "peak RSS, MiB", "USS, MiB", "processes", "peak RSS of the very first start, MiB"], rows)


def _neighbour(part: Mapping[str, Any]) -> Iterator[str]:
    yield from ("## Beside a busy neighbour", "", f"A process that spins on one core, not pinned; {part['concurrency']} connections.", "")
    rows = [
        [SERVERS[name].title, *(_median(row[how][key]) for key in ("throughput", "p99_ms") for how in ("alone", "disturbed"))]
        for name, row in part["cells"].items()
    ]
    yield from _rows(["", "answers/s alone", "answers/s disturbed", "p99 ms alone", "p99 ms disturbed"], rows)


def _overload(part: Mapping[str, Any]) -> Iterator[str]:
    yield from ("## Overload", "")
    yield (
        f"Open loop, Poisson arrivals, {part['seconds']:g} s after half as long of the same load. Capacity: {part['capacity']:.0f} answers per "
        "second in a closed loop of 128 connections. Latencies count from the arrival."
    )
    yield ""
    rows = [
        [f"{times} x capacity", _median(row["throughput"]), _median(row["p50_ms"]), _median(row["p99_ms"]),
         _median([100 * value for value in row["refused_share"]], 1) + " %", _errors(row["errors"]), _median(row["rss_mib"])]
        for times, row in part["cells"].items()
    ]  # fmt: skip
    yield from _rows(["arrivals", "accepted/s", "p50 ms", "p99 ms", "refused with 429", "errors, 429 among them", "RSS, MiB"], rows)


def _endurance(part: Mapping[str, Any]) -> Iterator[str]:
    samples, result = part["samples"], part["result"]
    yield from ("## Endurance", "")
    after = dict(zip(samples["requests"], samples["rss_mib"], strict=True))
    marks = [count for count in (1000, 10_000, 50_000, 100_000, 150_000, 200_000) if count in after]
    yield (
        f"{part['requests']:,} requests over {part['concurrency']} connections in {result['seconds']:.0f} s, errors: "
        f"{_errors([result['errors']])}; p99 {_figure(result['p99_ms'], 'ms')}. Growth of resident memory after the first "
        f"{part['settled_after']:,}: {_figure(growth(part), 'share')}."
    )
    yield ""
    yield from _rows(["requests", *(f"{count:,}" for count in marks)], [["RSS, MiB", *(f"{after[count]:.0f}" for count in marks)]])


def plot(results: Mapping[str, Any], path: Path) -> None:
    """Throughput and p99 against concurrency, one line a server; nothing where the table was not measured."""
    if "table" not in results["parts"]:
        return
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.ticker import ScalarFormatter

    part = results["parts"]["table"]
    figure, panels = pyplot.subplots(1, 2, figsize=(12, 4.8), layout="constrained")
    for i, (name, row) in enumerate(part["cells"].items()):
        # Ours thick, peers thin; bf16 peers dashed.
        style = {"linewidth": 1.4 if SERVERS[name].is_peer else 2.6, "linestyle": "--" if SERVERS[name].dtype == "bfloat16" else "-",
                 "marker": "o", "markersize": 4, "color": f"C{i}", "label": SERVERS[name].title}  # fmt: skip
        for panel, key in zip(panels, ("throughput", "p99_ms"), strict=True):
            known = {c: [v for v in row[str(c)][key] if v is not None] for c in part["concurrency"]}
            steps = [c for c, values in known.items() if values]
            panel.plot(steps, [statistics.median(known[c]) for c in steps], **style)
            panel.fill_between(steps, [min(known[c]) for c in steps], [max(known[c]) for c in steps], color=style["color"], alpha=0.12)
    for panel, title in zip(panels, ("answers per second", "p99, ms"), strict=True):
        panel.set(title=title, xlabel="connections (closed loop)", xscale="log")
        panel.set_xticks(part["concurrency"])
        panel.xaxis.set_major_formatter(ScalarFormatter())
        panel.minorticks_off()
        panel.grid(alpha=0.3)
    panels[0].set_ylim(bottom=0)
    panels[1].set_yscale("log")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=4, frameon=False)
    caption(figure, part)
    save(figure, path, results, dpi=120)
    pyplot.close(figure)
