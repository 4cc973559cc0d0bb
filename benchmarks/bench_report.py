"""The pages that say how fast this is, made from benchmarks/results/*.json and from nothing else.

    make bench-report                  # single_gpu.md, ddp_2gpu.md, README.md here, their pictures, and the README's table of results

`results/bench.json` is of the machine that measured last with `make bench`; a file `bench-<label>.json` of another one adds
a column. What nobody has measured says so, with the command that would.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Callable, Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

from benchmarks.bench_page import DOUBLE, NOT, RATIOS, SINGLE, about, details, how_to_measure, plot, side_by_side
from benchmarks.common import RESULTS, ROOT, machine, named, ratio
from benchmarks.gpu_step import section as gpu_section
from benchmarks.serving import page as serving
from benchmarks.serving.servers import SERVERS
from benchmarks.serving.targets import PEERS, best
from pipeline.errors import UserError, run_entry

README = ROOT / "README.md"
BEGIN, END = "<!-- results -->", "<!-- /results -->"
COMMAND = "make bench && make explain && make bench-report"
# Sections that other programs write: results file -> module with `section(results)` and `plot(results, path)`, command.
SECTIONS = {"explain": ("benchmarks.explain.page", "make explain"), "scaling": ("benchmarks.scaling_page", "make scaling")}


def main(argv: list[str]) -> int:
    argparse.ArgumentParser(
        prog="python -m benchmarks.bench_report",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    ).parse_args(argv)
    found = load(RESULTS)
    folder = ROOT / "benchmarks"
    for name, text in pages(found).items():
        (folder / name).write_text(text, encoding="utf-8")
    pictures(found, folder)
    if "bench_serve" in found:
        (folder / "bench_serve.md").write_text(serving.page(found["bench_serve"]), encoding="utf-8")
    README.write_text(with_results(README.read_text(encoding="utf-8"), found), encoding="utf-8")
    print(f"written: {', '.join(pages(found))} in {folder}, and the results in {README.name}")
    return 0


def load(folder: Path) -> dict[str, dict[str, Any]]:
    """All results by name of file. Raises UserError where `make bench` has never been run."""
    found = {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("*.json"))}
    if "bench" not in found:
        raise UserError(f"{folder} has no bench.json. Measure first: make bench.")
    return found


def machines(found: Mapping[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """`bench.json` under the label "", then the others under theirs."""
    return labelled(found, "bench")


def labelled(found: Mapping[str, dict[str, Any]], kind: str) -> dict[str, dict[str, Any]]:
    """The results of one kind by machine: `kind.json` under "", `kind-label.json` under its label."""
    parts = {name: name.partition("-") for name in found}
    return {label: found[name] for name, (stem, _, label) in parts.items() if stem == kind}


def pages(found: Mapping[str, dict[str, Any]]) -> dict[str, str]:
    """Name of file under benchmarks/ -> its text."""
    return {"single_gpu.md": single_gpu(found), "ddp_2gpu.md": ddp_2gpu(found), "README.md": index(found)}


def single_gpu(found: Mapping[str, dict[str, Any]]) -> str:
    known = machines(found)
    lines = ["# One process, on one GPU or one CPU", ""]
    lines += [
        "Written by `make bench-report` from [results](results); medians of rounds taken in turns, the lowest and highest in brackets.",
        "",
    ]
    lines += [*side_by_side(known, SINGLE, ("defaults_against_plain", "trainer_against_raw_1")), "", *how_to_measure(known), ""]
    for label, results in known.items():
        lines += [f"## {machine(results)}", "", f"![samples a second and share of the peak]({named('single_gpu', label)}.png)", ""]
        lines += [*about(results), "", *details(results, SINGLE), ""]
    lines += [
        "A run writes the same figures under `speed` in its `run.json`. FLOP/s: 6 x matrix parameters x tokens + 12 x layers x width x squared lengths "
        "(Chowdhery et al. 2022, PaLM, appendix B), embedding tables left out, once for the tokens of the texts and once for all that were "
        "computed; the peak is a large matrix product in the same type. Padding: share of the computed tokens that are none. A step's time is "
        "that between the ends of steps (a GPU is not waited for at each, so there only their sum is exact). The accuracy is that of so few steps at learning rate 2e-4, in the plain loop of fewer still: to compare entries, not to admire.",
        "",
    ]
    lines += [line for results in labelled(found, "gpu_step").values() for line in (*gpu_section(results), "")] or gpu_section(None)
    return text(lines)


def ddp_2gpu(found: Mapping[str, dict[str, Any]]) -> str:
    known = machines(found)
    ratios = [name for name in RATIOS if name not in ("defaults_against_plain", "trainer_against_raw_1")]
    lines = ["# Two processes, on two GPUs or on two cores", ""]
    lines += [
        "Written by `make bench-report` from [results](results); in the first tables medians of rounds taken in turns, the lowest and highest in brackets.",
        "",
    ]
    lines += [*side_by_side(known, DOUBLE, ratios), "", *how_to_measure(known), ""]
    for label, results in known.items():
        lines += [f"## {machine(results)}", "", f"![samples a second and share of the peak]({named('ddp_2gpu', label)}.png)", ""]
        lines += [*about(results), "", *details(results, DOUBLE), ""]
        for processes, same in results["same_weights"].items():
            words = f"{processes} process{'es' * (processes != '1')}"
            lines += [
                f"Trainer and raw script, {words}: {'the same weights, bit for bit, in every round.' if same else 'not the same bits.'}"
            ]
        lines += [""]
    for name, (module, command) in SECTIONS.items():
        of_machines = labelled(found, name)
        for label, results in of_machines.items():
            lines += [import_module(module).section(results, label).strip(), ""]
        lines += [*how_to_measure(of_machines, "explain"), ""] if name == "explain" else []
        if not of_machines:
            lines += [f"## {name.capitalize()}", "", f"{NOT.capitalize()}: `{command}`.", ""]
    return text(lines)


def pictures(found: Mapping[str, dict[str, Any]], folder: Path) -> None:
    for label, results in machines(found).items():
        plot(results, SINGLE, folder / f"{named('single_gpu', label)}.png")
        plot(results, DOUBLE, folder / f"{named('ddp_2gpu', label)}.png")
    if "bench_serve" in found:
        serving.plot(found["bench_serve"], folder / serving.PICTURE)
    for name, (module, _) in SECTIONS.items():
        for label, results in labelled(found, name).items():
            import_module(module).plot(results, folder / f"{named(name, label)}.png")


def index(found: Mapping[str, dict[str, Any]]) -> str:
    lines = ["# What was measured", ""]
    lines += [
        "Every page here is made from the JSON beside it in [results](results), every JSON by the command in its row; none is written by hand.",
        "",
    ]
    lines += ["| page | what came out | measured | command |", "|---|---|---|---|"]
    for name, (page, title, command, headline) in HEADLINES.items():
        of_machines = labelled(found, name)
        for label, results in of_machines.items():
            when, where = stamp(results)
            link = f"[{title}]({page})" + f" ({label})" * bool(label)
            lines.append(f"| {link} | {headline(results)} | {when}, {where} | `{command}` |")
        if not of_machines:
            lines.append(f"| {title} | {NOT} | | `{command}` |")
    rest = [name for name in found if name.partition("-")[0] not in HEADLINES]
    for name in rest:
        when, where = stamp(found[name])
        lines.append(f"| [{name}](results/{name}.json) | | {when}, {where} | `{found[name]['provenance']['command']}` |")
    lines += ["", f"All of training's speed again: `{COMMAND}`."]
    return text(lines)


def stamp(results: Mapping[str, Any]) -> tuple[str, str]:
    """Date and hardware; of a benchmark in parts, its last part's."""
    part = results if "date" in results else max(results["parts"].values(), key=lambda part: part["date"])
    where = part["provenance"]["hardware"]
    gpus = f"{len(where['gpus'])}x {where['gpus'][0]}, " if where["gpus"] else ""
    return part["date"][:10], f"{gpus}{where['cores']} cores of {where['cpu']}".replace("(R)", "")


def _bench(results: Mapping[str, Any]) -> str:
    ratios = results["ratios"]
    said = [("defaults_against_plain", "{:.2f}x a padded fp32 loop"), ("trainer_against_raw", "Trainer {:.2f}x the raw script on two processes"),
            ("two_against_one_thread", "2 processes of a thread {:.2f}x one"), ("two_against_one", "2 processes {:.2f}x one on the same cores")]  # fmt: skip
    if results["device"] == "cuda":
        said[-1] = ("two_against_one", "2 GPUs {:.2f}x one")
    return "; ".join(words.format(ratios[name]["median"]) for name, words in said if name in ratios)


def _parity(results: Mapping[str, Any]) -> str:
    held = sum(pair["holds"] for pair in results["pairs"])
    fp64 = max(pair["apart"]["weights"] for pair in results["pairs"] if pair["b"]["precision"] == "fp64")
    return f"{held} of {len(results['pairs'])} pairs of runs agree within their bound; in fp64 no weight differs by more than {fp64:.0e}"


def _crash(results: Mapping[str, Any]) -> str:
    return f"{results['without_consequence']} of {results['kills']} kills left no trace, {results['inside_a_write']} of them inside a write"


def _serve(results: Mapping[str, Any]) -> str:
    cells = results["parts"]["table"]["cells"]
    rates = {name: row["32"]["throughput"] for name, row in cells.items()}
    peer = best(results, PEERS, 32) or "naive"
    over, naive = (ratio(rates["ours"], rates[name])["median"] for name in (peer, "naive"))
    return (
        f"{statistics.median(rates['ours']):.0f} answers a second at 32 connections: {over:.2f}x the best peer ({SERVERS[peer].title}), "
        f"{naive:.1f}x a naive server"
    )


def _soak(results: Mapping[str, Any]) -> str:
    rows = results["rows"]
    return f"{sum(row['held'] for row in rows)} of {len(rows)} events held, {sum(row['answers'] for row in rows)} answers"


def _shards(results: Mapping[str, Any]) -> str:
    seen = "each row once an epoch, on one rank" if results["once"] else "a row was seen TWICE in an epoch"
    return f"{seen}, in {len(results['steps'])} steps"


def _timeline(results: Mapping[str, Any]) -> str:
    spans = results["ranks"][0]
    talks = sorted(begin for part, begin, *_ in spans if part == "all-reduce")
    begin, end = next((begin, end) for part, begin, end, *_ in spans if part == "backward")
    return f"the first of {len(talks)} all-reduces begins {(talks[0] - begin) / (end - begin):.0%} into backward"


def _sharding(results: Mapping[str, Any]) -> str:
    shares = [results["fsdp"][what] / results["ddp"][what] for what in ("parameters", "optimizer")]
    return f"of what DDP keeps, a rank of two keeps {shares[0]:.0%} of the parameters and {shares[1]:.0%} of Adam's state"


def _rehearsal(results: Mapping[str, Any]) -> str:
    return f"{results['installed_mib']:.0f} MiB installed, open after {results['open_seconds']:.1f} s, {results['peak_mib']:.0f} MiB at its peak"


def _page_start(results: Mapping[str, Any]) -> str:
    return f"first answer {results['first_seconds']['median']:.1f} s after opening the page with files at hand, a further one {results['further_seconds']['median']:.2f} s"


def _lab(results: Mapping[str, Any]) -> str:
    return f"{len(results['experiments'])} experiments, each run broken and cured"


def _own(key: str) -> Callable[[Mapping[str, Any]], str]:
    """A headline that the program itself has put into its results."""
    return lambda results: str(results.get(key, ""))


def _gpu(results: Mapping[str, Any]) -> str:
    best = max(results["sweep"], key=lambda row: row["samples_per_second"])
    return f"{best['samples_per_second']:.0f} samples/s at {best['rows']} rows, {best['share_of_peak']:.0%} of the matrix-multiply peak"


# Results -> page, title, command, headline.
HEADLINES: dict[str, tuple[str, str, str, Callable[[Mapping[str, Any]], str]]] = {
    "bench": ("ddp_2gpu.md", "Training: one against two, raw against Trainer", "make bench", _bench),
    "explain": ("ddp_2gpu.md", "Where the missing speed-up went", "make explain", _own("sentence")),
    "scaling": ("ddp_2gpu.md", "Two to 64 ranks, predicted", "make scaling", _own("sentence")),
    "gpu_step": ("single_gpu.md", "A training step on a GPU", "python -m benchmarks.gpu_step", _gpu),
    "timeline": (
        "../docs/images/timeline.png",
        "One step of two ranks, drawn",
        "python -m benchmarks.explain --timeline",
        _timeline,
    ),
    "shards": ("../docs/images/shards.png", "Which rank saw which row, drawn", "python -m benchmarks.shards", _shards),
    "sharding": (
        "../docs/machines.md#when-ddp-no-longer-fits-fsdp",
        "What a rank keeps with FSDP",
        "python -m benchmarks.sharding",
        _sharding,
    ),
    "rehearsal": (
        "../docs/deploy.md#rehearsed-without-a-container-engine",
        "The Docker Space's own steps, carried out here",
        "python -m pipeline.deploy.rehearse --results",
        _rehearsal,
    ),
    "page_start": (
        "../docs/deploy.md#a-free-space-the-model-in-the-visitors-browser",
        "The page in the visitor's browser",
        "python -m benchmarks.page_start --model FOLDER",
        _page_start,
    ),
    "parity": ("parity.md", "The same result, whoever computes it", "make parity", _parity),
    "crash_test": ("crash_test.md", "Killed and started again", "make crash-test", _crash),
    "bench_serve": ("bench_serve.md", "Serving beside other servers", "make bench-serve", _serve),
    "soak": ("soak.md", "The service while everything happens to it", "make soak SOAK=full", _soak),
    "lab": ("../docs/lab.md", "Distributed training broken on purpose", "python -m pipeline.lab --all --page", _lab),
}


def with_results(readme: str, found: Mapping[str, dict[str, Any]]) -> str:
    """The README with its table of results anew, between the two markers; as it is where it has none."""
    if BEGIN not in readme:
        return readme
    known = machines(found)
    ratios = ("defaults_against_plain", "trainer_against_raw", "two_against_one_thread", "two_against_one")
    names = (*SINGLE, *(name for name in DOUBLE if "2 processes" in name))
    table = [*side_by_side(known, names, ratios), "", f"In the table, medians of rounds in turns, lowest and highest in brackets. Made by `{COMMAND}`: "
             "[one process](benchmarks/single_gpu.md), [two](benchmarks/ddp_2gpu.md), [all that was measured](benchmarks/README.md).", *how_to_measure(known)]  # fmt: skip
    before, rest = readme.split(BEGIN, 1)
    return before + BEGIN + "\n" + text(table) + END + rest.split(END, 1)[1]


def text(lines: list[str]) -> str:
    return "\n".join(lines).rstrip() + "\n"


if __name__ == "__main__":
    sys.exit(run_entry(main))
