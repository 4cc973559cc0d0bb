"""From raw time stamps to the account of a step: its parts, the lost speed-up, and what remedies should bring and brought.

Of the rounds, each step counts as it was in the one in which it took the median time; then the mean over steps and ranks.
A disturbance of one turn drops out, and what is left are seconds of a rank's average step, which add up.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from benchmarks.common import ratio
from benchmarks.explain.measure import LINK_BYTES, REMEDIES
from benchmarks.scaling import exposed, fit_link, hidden_share

COMPUTING = ("forward", "backward")
OWN = ("data", "to_device", *COMPUTING, "optimizer")
PARTS = (*OWN, "contention", "straggler", "communication")
RIGHT_WITHIN = 0.03  # a remedy's predicted gain is called right when it is that close to the measured one

Rounds = Sequence[Sequence[Sequence[Mapping[str, float]]]]  # of ranks, of steps: seconds by part


def seconds(rounds: Rounds, *parts: str) -> np.ndarray:
    """The sum of these parts, `(rounds, ranks, steps)`."""
    return np.array([[[sum(step.get(part, 0.0) for part in parts) for step in rank] for rank in ranks] for ranks in rounds])


def typical(figures: np.ndarray) -> float:
    """`(rounds, ranks, steps)` to seconds of the average step of the average rank, without the rounds' disturbances."""
    return float(np.median(figures, axis=0).mean())


def middle(rounds: Rounds) -> Rounds:
    """One round made of all: each step from the round in which it took the median time (the lower of two), mean over ranks."""
    parts = ("step",) if "step" in rounds[0][0][0] else (*OWN, "wait")
    chosen = np.argsort(seconds(rounds, *parts).mean(axis=1), axis=0)[(len(rounds) - 1) // 2]  # (steps,)
    return [[[rounds[chosen[s]][rank][s] for s in range(len(chosen))] for rank in range(len(rounds[0]))]]


def account(turns: Mapping[str, Any], name: str) -> dict[str, float]:
    """The parts of a step of one launch, in seconds of the average rank: they add up to the measured `step`.

    - data, to_device, forward, backward, optimizer (clipping included): a rank's own, while no other one computes;
    - contention: how much longer the same takes while all ranks compute at once: forward and backward as they are while
      nothing is exchanged (no_sync), the others as they are in training;
    - straggler: how long a rank waits for the slowest one, at a barrier at the place where the last all-reduce would begin.
      What is above the shortest wait of that step counts: that of the last to come, which is the barrier's own time. Ranks
      that differ by d have it twice, as a wait of the fast one and as longer work of the slow one; the mean over ranks
      counts each with its half, which is what a perfect balance would gain;
    - communication: how much longer forward and backward take when gradients are all-reduced as training does it, less
      the straggler's wait. So it is what backward does not hide, DDP's copies into its buckets included (at one process
      these are all of it). A difference and no stamps around the all-reduce itself: what runs under backward and slows it
      down, for it needs the same cores, is not hidden either;
    - rest: what the training script's clock holds beyond the stamps: from a step's end to its next batch, with its recorder,
      its watch and its word on stopping, at which ranks that differ in the optimizer wait for each other.

    Where a launch was not measured quiet or alone, those parts are within its own.
    """
    entry, quiet, alone = (middle(turns[key]) if (key := f"{name}/{way}") in turns else None for way in ("entry", "quiet", "alone"))
    assert entry is not None
    quiet = quiet or entry
    together = {part: typical(seconds(quiet if part in COMPUTING else entry, part)) for part in OWN}
    parts = {part: typical(seconds(alone, part)) for part in OWN} if alone else dict(together)
    parts["contention"] = sum(together.values()) - sum(parts.values())
    wait = seconds(quiet, "wait")
    parts["straggler"] = typical(wait - wait.min(axis=1, keepdims=True))
    talking = sum(typical(seconds(entry, part)) for part in COMPUTING)
    parts["communication"] = talking - sum(together[part] for part in COMPUTING) - parts["straggler"]
    step = typical(seconds(entry, "step"))
    return parts | {"rest": step - sum(parts.values()), "step": step}


def losses(one: Mapping[str, float], many: Mapping[str, float], ranks: int) -> dict[str, float]:
    """What keeps `ranks` processes from being that many times faster, as shares of their step; they add up to 1 - efficiency."""

    def beyond_share(*parts: str) -> float:
        return sum(many[part] - one[part] / ranks for part in parts)

    lost = {
        "communication": beyond_share("communication"), "contention": many["contention"], "straggler": many["straggler"],
        "optimizer": beyond_share("optimizer"), "small_batch": beyond_share("data", "to_device", "forward", "backward"),
        "rest": beyond_share("rest"),
    }  # fmt: skip
    return {name: value / many["step"] for name, value in lost.items()}


def speedup(turns: Mapping[str, Any], base: str, accounts: Mapping[str, Mapping[str, float]]) -> dict[str, Any]:
    """Of `many` over `base`: by the clock of the training script's own loops, and predicted from the parts."""
    totals = {name: seconds(turns[f"{name}/entry"], "step").mean(axis=1).sum(axis=1).tolist() for name in (base, "many")}
    measured = ratio(totals[base], totals["many"]) | {"median": accounts[base]["step"] / accounts["many"]["step"]}
    return {"measured": measured, "predicted": sum(accounts[base][p] for p in PARTS) / sum(accounts["many"][p] for p in PARTS)}


def remedies(raw: Mapping[str, Any], one: Mapping[str, float], many: Mapping[str, float], ranks: int) -> list[dict[str, Any]]:
    """For each: the gain in rows per second predicted from the parts, the measured one, and whether they agree.

    Of several buckets the last, full only when backward ends, is never hidden; of the others the share that explains what
    was measured with the default ones. The fp16 hook halves the bytes, over the link as timed in fp16. Accumulation pays for one all-reduce and one optimizer step
    where there were two. A static graph saves a search that is switched off anyway.
    """
    turns, buckets = raw["turns"], raw["buckets"]
    link, halves = (fit_link(LINK_BYTES, link_seconds(turns, dtype), ranks) for dtype in ("float32", "float16"))
    hidden = hidden_share(link, buckets["25"], ranks, many["communication"] - one["communication"])  # the copies into buckets stay
    now = exposed(link, buckets["25"], ranks, hidden)  # by the same model, so that no change is predicted to change nothing
    base = seconds(turns["many/entry"], "step")
    step = typical(base)
    saved = {
        "larger buckets": now - exposed(link, buckets[str(REMEDIES["larger buckets"]["bucket_mb"])], ranks, hidden),
        "smaller buckets": now - exposed(link, buckets[str(REMEDIES["smaller buckets"]["bucket_mb"])], ranks, hidden),
        "fp16 hook": now - exposed(halves, [size // 2 for size in buckets["25"]], ranks, hidden),
        "accumulation": (many["communication"] + typical(seconds(turns["many/entry"], "optimizer"))) / 2,
        "static graph": 0.0,
    }
    rows = []
    for name, seconds_saved in saved.items():
        changed = seconds(turns[f"many/{name}"], "step")
        totals = [figures.mean(axis=1).sum(axis=1).tolist() for figures in (base, changed)]
        per_step = typical(changed) * changed.shape[2] / base.shape[2]
        gain = {key: value - 1 for key, value in ratio(*totals).items()} | {"median": step / per_step - 1}
        predicted = step / (step - seconds_saved) - 1
        right = bool(abs(predicted - gain["median"]) <= RIGHT_WITHIN)
        rows.append({"remedy": name, "options": REMEDIES[name], "predicted": predicted, "measured": gain, "right": right})
    return rows


def link_seconds(turns: Mapping[str, Any], dtype: str) -> list[float]:
    """Median over rounds of the slower rank's time for an all-reduce of each of `LINK_BYTES`."""
    return np.median(np.array(turns[f"many/link {dtype}"]).max(axis=1), axis=0).tolist()


def explain(raw: Mapping[str, Any]) -> dict[str, Any]:
    """All that the page and the scaling model need, from `measure`'s raw figures."""
    turns, about = raw["turns"], raw["about"]
    accounts = {name: account(turns, name) for name in about}
    one, many, ranks = accounts["one"], accounts["many"], about["many"]["processes"]
    link = {"bytes": LINK_BYTES} | {dtype: link_seconds(turns, dtype) for dtype in ("float32", "float16")}
    entries = seconds(turns["many/entry"], "step")
    return {
        "accounts": {name: {"about": about[name], **accounts[name]} for name in about},
        "speedup": speedup(turns, "one", accounts),
        "speedup_all_cores": speedup(turns, "all cores", accounts) if "all cores" in about else None,
        "losses": losses(one, many, ranks),
        "remedies": remedies(raw, one, many, ranks),
        "link": link,
        "buckets": raw["buckets"],
        "rounds": entries.shape[0],
        "steps": entries.shape[2],
    }
