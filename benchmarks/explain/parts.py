"""From raw time stamps to the account of a step: its parts, the lost speed-up, and what remedies should bring and brought.

Seconds of a step are means over rounds and ranks, then over steps, so that they add up; those of a link and of passes over all
gradients, which are short, medians. In each turn the stamps sleep in every other step, in the next turn of that kind in the others: steps with stamps
and without are neighbours, and a machine that is slow for some seconds is slow for both. How far the figures can be trusted is
told by the bootstrap: all of it again from rounds drawn with replacement, DRAWS times; between the 5th and the 95th percentile lie
90% (B. Efron and R. Tibshirani, An Introduction to the Bootstrap, 1993, chapter 13). Of the rounds that stamp the even steps one
less is drawn than there are, and so of those that stamp the odd ones: with as many, the spread of few comes out too small
(P. J. McCarthy and C. B. Snowden, The Bootstrap and Finite Population Sampling, 1985).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from benchmarks.explain.measure import LINK_BYTES, REMEDIES
from benchmarks.scaling import Link, exposed, fit_link, hidden_share

OWN = ("data", "to_device", "forward", "backward", "optimizer")
PARTS = (*OWN, "contention", "overlap", "straggler", "communication")
RIGHT_WITHIN = 0.05  # a predicted speed-up, or a remedy's gain, is called right when it is that close to the measured one
LIKELY_WITHIN = 0.2  # the whole width of an interval that still tells something
DRAWS, SEED = 200, 0
ENOUGH = 6  # rounds, to judge a prediction by how they differ

Rounds = Sequence[Sequence[Sequence[Mapping[str, float]]]]  # of ranks, of steps: seconds by part
Turns = Mapping[str, Any]  # `launch/way`: Rounds


def seconds(rounds: Rounds, part: str, stamped: bool = True) -> np.ndarray:
    """Of the steps with stamps, or those without (of which only `step` is known): `(rounds, ranks, steps)`, elsewhere NaN."""
    return np.array(
        [[[step.get(part, 0.0) if ("backward" in step) == stamped else np.nan for step in rank] for rank in ranks] for ranks in rounds]
    )


def each_step(figures: np.ndarray) -> np.ndarray:
    """Means over rounds and ranks, `(steps,)`; NaN for a step of which nothing is known."""
    known = ~np.isnan(figures)
    count = known.sum(axis=(0, 1))
    return np.where(known, figures, 0.0).sum(axis=(0, 1)) / np.where(count, count, np.nan)


def average(figures: np.ndarray) -> float:
    """Over rounds and ranks, then over those steps that are known."""
    return float(np.nanmean(each_step(figures)))


def account(turns: Turns, name: str) -> dict[str, float]:
    """The parts of a step of one launch, in seconds of the average rank: they add up to the measured `step`. Beside them `plain`,
    the measured step without stamps.

    Straggler and communication are stamped in the steps themselves, and so is the sum of a rank's own parts, contention and overlap,
    which turns with nothing exchanged divide:

    - straggler: from a rank's last gradient to that of the slowest rank, before which no average can be complete (the clock is
      the machine's). Ranks that differ by d have it twice, as a wait of the fast one and as longer work of the slow one; the
      mean over ranks counts each with its half, which is what a perfect balance would gain;
    - communication: from the slowest rank's last gradient to the end of backward: what of the all-reduces backward does not hide,
      with DDP's last work on its buckets, which at one process is all there is;
    - contention: how much longer a rank's own data, forward and optimizer take than alone, the others asleep, and backward beside the
      other ranks with nothing exchanged: they share cores, memory and power;
    - overlap: how much longer again backward takes in training, where all-reduces run under it and need cores (on a GPU,
      multiprocessors) and memory as well;
    - data, to_device, forward, backward (to its last gradient), optimizer (with clipping): a rank's own, as if it were alone;
    - rest: what the training script's clock holds beyond the stamps: from a step's end to its next batch, with its recorder,
      its watch and its word on stopping, at which ranks that differ in the optimizer wait for each other.
    """
    rounds = turns[f"{name}/entry"]
    mean = {part: average(seconds(rounds, part)) for part in (*OWN, "reduce", "step")}
    slower, overlap = dict.fromkeys(OWN, 0.0), 0.0
    if f"{name}/alone" in turns:
        # By step, of those alone that had stamps in some round.
        slower = {
            part: float(np.nanmean(each_step(seconds(rounds, part)) - each_step(seconds(turns[f"{name}/alone"], part)))) for part in OWN
        }
        together = each_step(seconds(turns[f"{name}/together"], "backward"))
        overlap = float(np.nanmean(each_step(seconds(rounds, "backward")) - together))
    ready = seconds(rounds, "ready")
    straggler = average(ready.max(axis=1, keepdims=True) - ready)
    parts = {part: mean[part] - slower[part] for part in OWN}
    parts |= {"contention": sum(slower.values()) - overlap, "overlap": overlap}
    parts |= {"straggler": straggler, "communication": mean["reduce"] - straggler}
    parts |= {"rest": mean["step"] - sum(parts.values()), "step": mean["step"]}
    return parts | {"plain": average(seconds(rounds, "step", stamped=False))}


def losses(one: Mapping[str, float], many: Mapping[str, float], ranks: int) -> dict[str, float]:
    """What keeps `ranks` processes from being that many times faster, as shares of their step; they add up to 1 - efficiency."""

    def beyond_share(*parts: str) -> float:
        return sum(many[part] - one[part] / ranks for part in parts)

    lost = {
        "communication": many["communication"] - one["communication"], "copies": one["communication"] * (1 - 1 / ranks),
        "contention": many["contention"], "overlap": many["overlap"], "straggler": many["straggler"], "optimizer": beyond_share("optimizer"),
        "small_batch": beyond_share("data", "to_device", "forward", "backward"), "rest": beyond_share("rest"),
    }  # fmt: skip
    return {name: value / many["step"] for name, value in lost.items()}


def speedups(turns: Turns) -> dict[str, float]:
    """Of several processes, by the script's own clock in steps without stamps, `over one`, and `over all cores` where one process
    with all of them was measured; of the steps with stamps, `stamped`, and `predicted` from their parts: by how much that is `off`."""
    accounts = {name: account(turns, name) for name in ("one", "many", "all cores") if f"{name}/entry" in turns}
    one, many = accounts["one"], accounts["many"]
    found = {f"over {name}": a["plain"] / many["plain"] for name, a in accounts.items() if name != "many"}
    found |= {"stamped": one["step"] / many["step"], "predicted": sum(one[part] for part in PARTS) / sum(many[part] for part in PARTS)}
    return found | {"off": found["predicted"] - found["over one"]}


def predictions(
    turns: Turns, buckets: Mapping[str, Sequence[int]], one: Mapping[str, float], many: Mapping[str, float], ranks: int
) -> dict[str, float]:
    """By remedy: the gain in rows per second to be expected from the parts and from timed all-reduces.

    Of several buckets the last, full only when backward ends, is never hidden; of the others the share that explains what was
    measured with the default ones; and what is hidden costs backward what it was measured to cost with them, a second. The fp16
    hook halves the bytes, over the link as timed in fp16, and pays for its casts, none of them hidden: cores that compute have
    no time for them beside it. Accumulation pays for one all-reduce and one optimizer step where there were two, and for a sum of
    gradients. A static graph saves a search that is switched off anyway.
    """
    link, halves = (fit_link(LINK_BYTES, link_seconds(turns, dtype), ranks) for dtype in ("float32", "float16"))
    hidden = hidden_share(link, buckets["25"], ranks, many["communication"] - one["communication"])  # DDP's own work stays

    def after_and_under(link: Link, sizes: Sequence[int]) -> tuple[float, float]:
        """Seconds of all-reduces after backward and under it."""
        after = exposed(link, sizes, ranks, hidden)
        return after, max(0.0, sum(link.all_reduce(size, ranks) for size in sizes) - after)

    now, under = after_and_under(link, buckets["25"])  # by the same model, so that no change is predicted to change nothing
    price = many["overlap"] / under if under else 0.0  # seconds of backward for a second of all-reduces under it

    def saved_by(link: Link, sizes: Sequence[int]) -> float:
        after, beneath = after_and_under(link, sizes)
        return now - after + price * (under - beneath)

    saved = {name: saved_by(link, buckets[str(changes["bucket_mb"])]) for name, changes in REMEDIES.items() if "bucket_mb" in changes}
    saved["fp16 hook"] = saved_by(halves, [size // 2 for size in buckets["25"]]) - pass_seconds(turns, "casts")
    optimizer = average(seconds(turns["many/entry"], "optimizer"))
    saved["accumulation"] = (many["communication"] + many["overlap"] + optimizer - pass_seconds(turns, "sum")) / 2
    saved["static graph"] = 0.0
    return {name: many["step"] / (many["step"] - saved[name]) - 1 for name in REMEDIES}


def gains(turns: Turns) -> dict[str, float]:
    """By remedy: the measured gain in rows per second over the default, of the same rows."""
    base = turns["many/entry"]

    def row_seconds(rounds: Rounds) -> float:
        return float(np.mean([[sum(step["step"] for step in rank) for rank in ranks] for ranks in rounds]))

    return {name: row_seconds(base) / row_seconds(turns[f"many/{name}"]) - 1 for name in REMEDIES}


def spread(turns: Turns, figure: Callable[[Turns], Mapping[str, float]]) -> dict[str, dict[str, float]]:
    """By name the figure from all rounds, called `median` as in other results, and its 90% interval by the bootstrap over rounds,
    `lowest` to `highest`; of one round the figure alone."""
    every, draw = range(len(turns["many/entry"])), np.random.default_rng(SEED)
    kinds = [kind for kind in (every[::2], every[1::2]) if kind]  # a single round has no odd steps stamped
    picks = [[i for kind in kinds for i in draw.choice(kind, max(1, len(kind) - 1))] for _ in range(DRAWS)]
    drawn = [figure({key: [rounds[i] for i in pick] for key, rounds in turns.items()}) for pick in picks]
    low, high = ({name: float(np.percentile([d[name] for d in drawn], q)) for name in drawn[0]} for q in (5, 95))
    return {name: {"median": value, "lowest": low[name], "highest": high[name]} for name, value in figure(turns).items()}


def verdict(off: Mapping[str, float], rounds: int) -> str:
    """What was predicted is by so much off what was measured: `right` or `wrong` where the whole 90% interval says so, `likely`
    right where only its middle does and it is not too wide, else `open`, for then the rounds differ by too much, or are too few
    to tell by how much they do."""
    if rounds < ENOUGH:
        return "open"
    if max(abs(off["lowest"]), abs(off["highest"])) <= RIGHT_WITHIN:
        return "right"
    if off["lowest"] > RIGHT_WITHIN or off["highest"] < -RIGHT_WITHIN:
        return "wrong"
    return "likely" if abs(off["median"]) <= RIGHT_WITHIN and off["highest"] - off["lowest"] <= LIKELY_WITHIN else "open"


def link_seconds(turns: Turns, dtype: str) -> list[float]:
    """Median over rounds of the slower rank's time for an all-reduce of each of `LINK_BYTES`."""
    return np.median(np.array(turns[f"many/link {dtype}"]).max(axis=1), axis=0).tolist()


def pass_seconds(turns: Turns, name: str) -> float:
    """Median over rounds of what the slower rank takes for that pass over all gradients of a step."""
    return float(np.median([max(rank[name] for rank in ranks) for ranks in turns["many/passes"]]))


def explain(raw: Mapping[str, Any]) -> dict[str, Any]:
    """All that the page and the scaling model need, from `measure`'s raw figures."""
    turns, about = raw["turns"], raw["about"]
    ranks = about["many"]["processes"]

    def expected(turns: Turns) -> dict[str, float]:
        return predictions(turns, raw["buckets"], account(turns, "one"), account(turns, "many"), ranks)

    def off(turns: Turns) -> dict[str, float]:
        measured = gains(turns)
        return {name: predicted - measured[name] for name, predicted in expected(turns).items()}

    predicted, found, error, speed = expected(turns), spread(turns, gains), spread(turns, off), spread(turns, speedups)
    entries = turns["many/entry"]
    rounds = len(entries)
    return {
        "accounts": {name: {"about": about[name], **account(turns, name)} for name in about},
        "speedup": {"measured": speed["over one"], "off": speed["off"], "verdict": verdict(speed["off"], rounds)}
        | {name: speed[name]["median"] for name in ("stamped", "predicted")},
        "speedup_all_cores": speed.get("over all cores"),
        "losses": spread(turns, lambda t: losses(account(t, "one"), account(t, "many"), ranks)),
        "remedies": [{"remedy": name, "options": REMEDIES[name], "predicted": predicted[name], "measured": found[name],
                      "off": error[name], "verdict": verdict(error[name], rounds)} for name in REMEDIES],
        "link": {"bytes": LINK_BYTES} | {dtype: link_seconds(turns, dtype) for dtype in ("float32", "float16")},
        "passes": {name: pass_seconds(turns, name) for name in ("casts", "sum")},
        "buckets": raw["buckets"],
        "rounds": rounds,
        "steps": len(entries[0][0]),
    }  # fmt: skip
