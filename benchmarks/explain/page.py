"""The account of the speed-up as a sentence, tables and a picture, made from benchmarks/results/explain.json alone."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.common import caption, named, provenance_lines
from benchmarks.explain.parts import OWN, PARTS

WORTH_SAYING = 0.005
ADDS_UP_WITHIN, PREDICTS_WITHIN = 0.03, 0.05  # of a step; of the speed-up
TITLES = {
    "data": "data", "to_device": "to the device", "forward": "forward", "backward": "backward", "optimizer": "clipping and optimizer",
    "contention": "contention", "straggler": "waiting for the slower rank", "communication": "all-reduce not hidden, bucket copies", "rest": "everything else",
}  # fmt: skip
LOST = {
    "contention": "the ranks slowing each other down", "communication": "all-reduce not hidden under backward",
    "straggler": "waiting for the slower rank", "optimizer": "the optimizer, which each rank runs in full",
    "small_batch": "a smaller batch a rank, which computes less per second", "rest": "everything else",
}  # fmt: skip
COLOURS = {
    "data": "#8c8c8c", "to_device": "#bfbfbf", "forward": "#4c78a8", "backward": "#2f5581", "optimizer": "#72b7b2",
    "contention": "#e45756", "straggler": "#eeca3b", "communication": "#f58518", "rest": "#d9d9d9",
}  # fmt: skip


def label(about: Mapping[str, Any]) -> str:
    """`2 processes x 1 thread`, or how many GPUs."""
    n, threads = about["processes"], about["threads"]
    if about["device"] == "cuda":
        return f"{n} GPU{'s' * (n > 1)}"
    return f"{n} process{'es' * (n > 1)} x {threads} thread{'s' * (threads > 1)}"


def sentence(results: Mapping[str, Any]) -> str:
    """What one can say when asked why two are not twice as fast as one."""
    ranks = results["accounts"]["many"]["about"]["processes"]
    lost = sorted(results["losses"].items(), key=lambda item: -item[1])
    said = [f"{share:.0%} {LOST[name]}" for name, share in lost if share >= WORTH_SAYING]
    won = [f"{-share:.0%} {LOST[name]}" for name, share in reversed(lost) if share <= -WORTH_SAYING]
    back = f"; the other way, {', '.join(won)}" if won else ""
    return f"{results['speedup']['measured']['median']:.2f}x of {ranks}: {', '.join(said) or 'nothing is lost'}{back}."


def section(results: Mapping[str, Any], machine: str = "") -> str:
    """The section of a page, in Markdown, from its heading on; `machine` is the label of another than the first."""
    accounts, ranks = results["accounts"], results["accounts"]["many"]["about"]["processes"]
    many, batch = accounts["many"], accounts["many"]["about"]["batch"]
    parts_sum, speedup = sum(many[part] for part in PARTS) / many["step"], results["speedup"]
    measured, held = speedup["measured"], results["held"]
    stamps = "" if many["about"]["device"] == "cpu" else " with stamps that wait for the GPU's queue (`make bench` has it without)"
    idle = next(row["measured"] for row in results["remedies"] if row["remedy"] == "static graph")
    lines = [
        f"## Where the missing speed-up went{f', on {machine}' * bool(machine)}",
        "",
        f"{provenance_lines(results)} {results['model']} on {results['dataset']}, {batch['global']} rows a step ({batch['per_device']} a rank), "
        f"{many['about']['precision']}, backend {many['about']['backend']}; {results['rounds']} rounds in turns over the same "
        f"{results['steps']} steps.",
        "",
        f"> {results['sentence']}",
        "",
        f"Shares are of the step of {label(many['about'])}, against {label(accounts['one']['about'])}: each rank has the same "
        f"{'threads' if many['about']['device'] == 'cpu' else 'device'} in both, as with one GPU and several. Measured by the training script's own "
        f"loop{stamps}: {measured['median']:.2f}x (rounds: {measured['lowest']:.2f} to {measured['highest']:.2f}); from the parts: {speedup['predicted']:.2f}x. "
        f"The parts add up to {parts_sum:.1%} of the step that loop takes. Accepted: within {ADDS_UP_WITHIN:.0%} of a step, and a speed-up from "
        f"the parts within {PREDICTS_WITHIN} of the measured one{'' if held else '; NOT held: the loop does something that no stamp covers'}. "
        "The parts of a step are stamped in that very step; all-reduce, waiting and contention are told apart by differences between turns, "
        f"which are less certain: the static graph below changes nothing here, and came out at {idle['median']:+.1%} "
        f"({idle['lowest']:+.1%} to {idle['highest']:+.1%}).",
    ]
    if all_cores := results["speedup_all_cores"]:
        lines += [
            "",
            f"Another question is whether {ranks} processes pay at all where one can use all cores: against "
            f"{label(accounts['all cores']['about'])} the speed-up is {all_cores['measured']['median']:.2f}x "
            f"(rounds: {all_cores['measured']['lowest']:.2f} to {all_cores['measured']['highest']:.2f}).",
        ]
    lines += [
        "",
        f"![Parts of a step]({named('explain', machine)}.png)",
        "",
        *_parts_table(results),
        "",
        *_lost_table(results),
        "",
        *_remedies(results),
    ]
    return "\n".join(lines) + "\n"


def _parts_table(results: Mapping[str, Any]) -> list[str]:
    accounts = results["accounts"]
    lines = ["| ms of a step, mean over ranks | " + " | ".join(label(a["about"]) for a in accounts.values()) + " |"]
    lines += ["|---|" + "---|" * len(accounts)]
    for part in (*PARTS, "rest", "step"):
        # One process with all cores is not taken apart further.
        cells = [
            "" if name == "all cores" and part not in (*OWN, "rest", "step") else f"{a[part] * 1e3:.1f}" for name, a in accounts.items()
        ]
        lines += [f"| {TITLES.get(part, 'the step, by the training script itself')} | {' | '.join(cells)} |"]
    return lines


def _lost_table(results: Mapping[str, Any]) -> list[str]:
    ranks = results["accounts"]["many"]["about"]["processes"]
    efficiency = results["speedup"]["measured"]["median"] / ranks
    lines = ["| lost | share of the step | without it alone |", "|---|---|---|"]
    for name, share in sorted(results["losses"].items(), key=lambda item: -item[1]):
        lines += [f"| {LOST[name]} | {share:.1%} | {ranks * efficiency / (1 - share):.2f}x |"]
    return [*lines, f"| left: the efficiency | {efficiency:.1%} | {ranks * efficiency:.2f}x |"]


def _remedies(results: Mapping[str, Any]) -> list[str]:
    best = max(results["remedies"], key=lambda row: row["measured"]["median"])
    helps = best["measured"]["median"] > 0 and best["measured"]["lowest"] > 0
    expected = max(results["remedies"], key=lambda row: row["predicted"])
    verdict = f"Most was expected of {expected['remedy']}: {expected['predicted']:+.1%}. "
    verdict += (
        f"What helps most is {best['remedy']}: {best['measured']['median']:+.1%}." if helps else "None of these helps beyond doubt here."
    )
    lines = [
        f"What would help: rows per second against the defaults, predicted from the parts before, and measured in the same rounds. {verdict} "
        "(Accumulation doubles the rows of an optimizer step, which changes what is learnt; the others do not, but for fp16's rounding.)",
        "",
        "| change | options | predicted | measured | lowest and highest round | prediction within 3 points |",
        "|---|---|---|---|---|---|",
    ]
    for row in results["remedies"]:
        options = ", ".join(
            f"`--{k} {str(v).lower()}`" if k != "accumulation" else f"{v} backwards a step" for k, v in row["options"].items()
        )
        measured = row["measured"]
        lines += [
            f"| {row['remedy']} | {options} | {row['predicted']:+.1%} | {measured['median']:+.1%} | {measured['lowest']:+.1%} to "
            f"{measured['highest']:+.1%} | {'yes' if row['right'] else 'no'} |"
        ]
    return lines


def plot(results: Mapping[str, Any], path: Path) -> None:
    """Stacked bars of the parts, a launch each, and the remedies' predicted and measured gains."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.ticker import PercentFormatter

    accounts = results["accounts"]
    figure, (bars, gains) = pyplot.subplots(2, 1, figsize=(10, 7.2), layout="constrained", height_ratios=[1.15, 1])
    for y, account in enumerate(accounts.values()):
        right = left = 0.0
        for part in (*PARTS, "rest"):
            width = account[part] * 1e3
            # What is negative (a difference of two measurements can be) is drawn to the left of zero.
            start = right if width >= 0 else (left := left + width)
            bars.barh(y, abs(width), left=start, color=COLOURS[part], edgecolor="white", linewidth=0.8, height=0.62)
            if width > 0.07 * max(a["step"] for a in accounts.values()) * 1e3:
                dark = part in ("forward", "backward", "contention")
                bars.text(right + width / 2, y, f"{width:.0f}", ha="center", va="center", fontsize=9, color="white" if dark else "black")
            right += max(0.0, width)
        bars.text(right, y, f"  {account['step'] * 1e3:.0f} ms", va="center", fontweight="bold")
    ranks = accounts["many"]["about"]["processes"]
    ideal, place = accounts["one"]["step"] * 1e3 / ranks, list(accounts).index("many")
    bars.plot([ideal, ideal], [place - 0.42, place + 0.42], color="black", linestyle=(0, (4, 2)), linewidth=1.6)
    bars.annotate(
        f"{ranks}x would be here: {ideal:.0f} ms", (ideal, place - 0.42), xytext=(0, 3), textcoords="offset points", ha="center", fontsize=9
    )
    bars.set_yticks(range(len(accounts)), [label(account["about"]) for account in accounts.values()])
    bars.set_ylim(len(accounts) - 0.5, -0.6)
    bars.use_sticky_edges = False
    bars.margins(x=0.07)
    bars.axvline(0, color="black", linewidth=0.8)
    bars.set_xlabel(f"milliseconds of a step of {accounts['many']['about']['batch']['global']} rows, mean over ranks")
    bars.set_title(f"{results['speedup']['measured']['median']:.2f}x of {ranks}", loc="left", fontweight="bold")
    handles = [pyplot.Rectangle((0, 0), 1, 1, color=COLOURS[part]) for part in (*PARTS, "rest")]
    bars.legend(
        handles,
        [TITLES[part] for part in (*PARTS, "rest")],
        ncols=5,
        loc="upper center",
        bbox_to_anchor=(0.5, -0.2),
        frameon=False,
        fontsize=8.5,
    )

    rows = results["remedies"]
    for y, row in enumerate(rows):
        measured = row["measured"]
        gains.plot([measured["lowest"], measured["highest"]], [y, y], color="#2f5581", linewidth=5, alpha=0.3, solid_capstyle="round")
        gains.plot(
            measured["median"],
            y,
            "o",
            color="#2f5581",
            markersize=9,
            label="measured: median, lowest and highest round" if y == 0 else None,
        )
        gains.plot(row["predicted"], y, "D", markerfacecolor="none", markeredgecolor="#f58518", markeredgewidth=2, markersize=9,
                   label="predicted from the parts" if y == 0 else None)  # fmt: skip
    gains.axvline(0, color="black", linewidth=0.8)
    gains.set_yticks(range(len(rows)), [row["remedy"] for row in rows])
    gains.set_ylim(len(rows) - 0.5, -0.5)
    gains.xaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    gains.set_xlabel("change of rows per second")
    gains.set_title("What would help", loc="left", fontweight="bold")
    gains.legend(loc="upper center", bbox_to_anchor=(0.5, -0.2), ncols=2, frameon=False, fontsize=8.5)
    for panel in (bars, gains):
        panel.spines[["top", "right"]].set_visible(False)
        panel.grid(axis="x", alpha=0.25)
        panel.set_axisbelow(True)
    caption(figure, results)
    # No time of making in the file: the same results give the same picture.
    figure.savefig(path, dpi=120, metadata={"Software": None})
    pyplot.close(figure)
