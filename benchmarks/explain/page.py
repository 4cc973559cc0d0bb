"""The account of the speed-up as a sentence, tables and a picture, made from benchmarks/results/explain.json alone."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.common import caption, named, provenance_lines, save
from benchmarks.explain.parts import LIKELY_WITHIN, PARTS, RIGHT_WITHIN

WORTH_SAYING = 0.005
ADDS_UP_WITHIN = 0.03  # of a step
TITLES = {
    "data": "data", "to_device": "to the device", "forward": "forward", "backward": "backward", "optimizer": "clipping and optimizer",
    "contention": "contention", "overlap": "hidden all-reduces' price", "straggler": "waiting for the slower rank", "communication": "all-reduce not hidden, bucket copies", "rest": "everything else",
}  # fmt: skip
LOST = {
    "contention": "the ranks slowing each other down", "overlap": "backward slowed by the all-reduces that run under it",
    "communication": "all-reduce not hidden under backward",
    "copies": "DDP's own work after backward, which each rank does in full",
    "straggler": "waiting for the slower rank", "optimizer": "the optimizer, which each rank runs in full",
    "small_batch": "a smaller batch a rank, which computes less per second", "rest": "everything else",
}  # fmt: skip
COLOURS = {
    "data": "#8c8c8c", "to_device": "#bfbfbf", "forward": "#4c78a8", "backward": "#2f5581", "optimizer": "#72b7b2",
    "contention": "#e45756", "overlap": "#b279a2", "straggler": "#eeca3b", "communication": "#f58518", "rest": "#d9d9d9",
}  # fmt: skip


def label(about: Mapping[str, Any]) -> str:
    """`2 processes x 1 thread`, or how many GPUs."""
    n, threads = about["processes"], about["threads"]
    if about["device"] == "cuda":
        return f"{n} GPU{'s' * (n > 1)}"
    return f"{n} process{'es' * (n > 1)} x {threads} thread{'s' * (threads > 1)}"


def sentence(results: Mapping[str, Any]) -> str:
    """What one can say when asked why two are not twice as fast as one: what is surely lost or won, the rest in one."""
    ranks = results["accounts"]["many"]["about"]["processes"]
    lost = sorted(results["losses"].items(), key=lambda item: -item[1]["median"])
    said = [f"{row['median']:.0%} {LOST[name]}" for name, row in lost if row["median"] >= WORTH_SAYING and row["lowest"] > 0]
    won = [f"{-row['median']:.0%} {LOST[name]}" for name, row in reversed(lost) if row["median"] <= -WORTH_SAYING and row["highest"] < 0]
    unsure = sum(row["median"] for _, row in lost if not (row["lowest"] > 0 or row["highest"] < 0))
    said += [f"{unsure:.0%} too uncertain to name"] if unsure >= WORTH_SAYING else []
    back = f"; the other way, {', '.join(won)}" if won else ""
    return f"{results['speedup']['measured']['median']:.2f}x of {ranks}: {', '.join(said) or 'nothing is lost'}{back}."


def shares_told(results: Mapping[str, Any]) -> list[float]:
    """To what share of their step the parts of one process add up, and those of several."""
    accounts = (results["accounts"]["one"], results["accounts"]["many"])
    return [sum(account[part] for part in PARTS) / account["step"] for account in accounts]


def added_up(results: Mapping[str, Any]) -> bool:
    return all(abs(share - 1) <= ADDS_UP_WITHIN for share in shares_told(results))


def section(results: Mapping[str, Any], machine: str = "") -> str:
    """The section of a page, in Markdown, from its heading on; `machine` is the label of another than the first."""
    accounts, ranks = results["accounts"], results["accounts"]["many"]["about"]["processes"]
    many, batch = accounts["many"], accounts["many"]["about"]["batch"]
    (of_one, of_many), speedup = shares_told(results), results["speedup"]
    measured, off = speedup["measured"], speedup["off"]
    agree = {
        "right": f"they agree within {RIGHT_WITHIN}",
        "likely": f"they likely agree within {RIGHT_WITHIN}",
        "wrong": f"they do NOT agree within {RIGHT_WITHIN}; NOT held",
        "open": f"the rounds differ by too much, or are too few, to say whether they agree within {RIGHT_WITHIN}",
    }[speedup["verdict"]]
    lines = [
        f"## Where the missing speed-up went{f', on {machine}' * bool(machine)}",
        "",
        f"{provenance_lines(results)} {results['model']} on {results['dataset']}, {batch['global']} rows a step ({batch['per_device']} a rank), "
        f"{many['about']['precision']}, backend {many['about']['backend']}; {results['rounds']} rounds in turns over the same "
        f"{results['steps']} steps; in brackets, the 90% interval over the rounds (bootstrap).",
        "",
        f"> {results['sentence']}",
        "",
        f"Shares are of the step of {label(many['about'])}, against {label(accounts['one']['about'])}: each rank has the same "
        f"{'threads' if many['about']['device'] == 'cpu' else 'device'} in both, as with one GPU and several. The training script's own steps, by its own clock: "
        f"{_interval(measured, '.2f', 'x')}. The steps between them, with time stamps around their parts: {speedup['stamped']:.2f}x, and "
        f"{speedup['predicted']:.2f}x from the parts, off what the script measures by {_interval(off, '+.3f')}: {agree}. The parts add up to "
        f"{of_one:.1%} of the step of one and {of_many:.1%} of that of {ranks} (accepted: within {ADDS_UP_WITHIN:.0%}){'' if added_up(results) else '; NOT held'}. That says that stamps miss and cost "
        "next to nothing. The waiting and the all-reduces are stamped in the steps themselves, and so is the sum of a rank's own parts, contention and the price of hiding; other turns divide that sum: a rank alone, and ranks "
        "beside each other with nothing exchanged. Whether they are told apart rightly shows in what they predict of the changes below.",
    ]
    if all_cores := results["speedup_all_cores"]:
        lines += [
            "",
            f"Another question is whether {ranks} processes pay at all where one can use all cores: against "
            f"{label(accounts['all cores']['about'])} the speed-up is {_interval(all_cores, '.2f', 'x')}.",
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


def _interval(figure: Mapping[str, float], form: str, unit: str = "") -> str:
    """`1.53x (1.48 to 1.60)`"""
    return f"{figure['median']:{form}}{unit} ({figure['lowest']:{form}} to {figure['highest']:{form}})"


def _parts_table(results: Mapping[str, Any]) -> list[str]:
    accounts = results["accounts"]
    lines = ["| ms of a step, mean over ranks | " + " | ".join(label(a["about"]) for a in accounts.values()) + " |"]
    lines += ["|---|" + "---|" * len(accounts)]
    for part in (*PARTS, "rest", "step"):
        cells = [f"{a[part] * 1e3:.1f}" for a in accounts.values()]
        lines += [f"| {TITLES.get(part, 'the step, by the training script itself')} | {' | '.join(cells)} |"]
    return lines


def _lost_table(results: Mapping[str, Any]) -> list[str]:
    ranks, efficiency = results["accounts"]["many"]["about"]["processes"], 1 - sum(row["median"] for row in results["losses"].values())
    lines = ["| lost | share of the step | without it alone |", "|---|---|---|"]
    for name, row in sorted(results["losses"].items(), key=lambda item: -item[1]["median"]):
        lines += [f"| {LOST[name]} | {_interval(row, '.1%')} | {ranks * efficiency / (1 - row['median']):.2f}x |"]
    return [*lines, f"| left: the efficiency of these steps | {efficiency:.1%} | {ranks * efficiency:.2f}x |"]


def _remedies(results: Mapping[str, Any]) -> list[str]:
    best = max(results["remedies"], key=lambda row: row["measured"]["median"])
    expected = max(results["remedies"], key=lambda row: row["predicted"])
    helped = best["measured"]["lowest"] > 0
    verdict = (
        f"What helps most is {best['remedy']}: {best['measured']['median']:+.1%}." if helped else "None of these helps beyond doubt here."
    )
    lines = [
        "What would help: rows per second against the defaults, predicted from the parts before, and measured in the same rounds. "
        f"Most was expected of {expected['remedy']}: {expected['predicted']:+.1%}. {verdict} "
        "(Accumulation doubles the rows of an optimizer step, which changes what is learnt; the others do not, but for fp16's rounding. "
        f"That hook's casts alone take {results['passes']['casts'] * 1e3:.0f} ms of a step here.) "
        f"A prediction is right where the 90% interval of its error lies within {RIGHT_WITHIN * 100:.0f} points, likely right where only its middle does and it is at most {LIKELY_WITHIN * 100:.0f} points wide. "
        "Of small changes that says only that they are small; static graph, which should change nothing, shows the error of the method.",
        "",
        f"| change | options | predicted | measured | right within {RIGHT_WITHIN * 100:.0f} points |",
        "|---|---|---|---|---|",
    ]
    for row in results["remedies"]:
        options = ", ".join(
            f"`--{k} {str(v).lower()}`" if k != "accumulation" else f"{v} backwards a step" for k, v in row["options"].items()
        )
        measured = row["measured"]
        said = {"right": "yes", "likely": "likely", "wrong": "no", "open": "cannot be told here"}[row["verdict"]]
        lines += [f"| {row['remedy']} | {options} | {row['predicted']:+.1%} | {_interval(measured, '+.1%')} | {said} |"]
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
                dark = part in ("forward", "backward", "contention", "overlap")
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
    speedup = results["speedup"]
    bars.set_title(
        f"{speedup['measured']['median']:.2f}x of {ranks} ({speedup['stamped']:.2f}x in the steps drawn)", loc="left", fontweight="bold"
    )
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
            label="measured, with its 90% interval" if y == 0 else None,
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
    save(figure, path, results, dpi=120)
    pyplot.close(figure)
