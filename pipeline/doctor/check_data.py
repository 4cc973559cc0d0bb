"""The texts: to be had, without repeats, the same on all ranks, and each dealt to exactly one rank."""

from __future__ import annotations

import re
from dataclasses import replace

import numpy as np

from pipeline.data import load_texts
from pipeline.doctor.findings import Finding, Level, judge
from pipeline.doctor.frame import Context
from pipeline.run import prepare

MOST_LEAKED = 1.0  # percent of the test rows; beyond it the test score is no longer worth reporting

# A word of the warning that pipeline.data gives -> what it is about, and what to do.
KNOWN = {
    "duplicate rows": ("duplicates", "Remove the repeated rows, or keep them knowingly: each counts as often as it stands there."),
    "with different labels": ("contradictions", "Decide on one label for each of these texts."),
    "also stand in train": ("test in train", "Remove those rows from train or from test."),
}


def texts(context: Context) -> list[Finding]:
    """Load, split and tokenise as the run would: the first rank of each machine, then the others from its cache."""
    # The right to publish is a check of its own, and what is wrong with the data is told even without a model.
    config, first = replace(context.config, push_to_hub=False), context.topology.local_rank == 0
    loaded, prepared = None, None
    for turn in (True, False):
        if first == turn and context.model_found and context.plan:
            prepared = prepare(config, context.topology, context.plan)
            loaded = prepared.texts
        elif first == turn:
            loaded = load_texts(config)
        context.ranks.gather(None)
    assert loaded is not None, "one of the two turns was this rank's"
    findings = warnings(loaded.warnings)
    rows = loaded.provenance["rows"]
    found = f"{config.dataset} at {loaded.provenance['revision'][:19]}: {rows['train']:,} rows to train on, {rows['test']:,} to test"
    if prepared is None:
        return [Finding("dataset", found, "to be had"), *findings]
    # The content's hash: made of rows, tokenizer and max_length by pipeline.data.
    contents = context.ranks.gather([split._fingerprint for split in (prepared.train, prepared.validation, prepared.test)])
    same = all(content == contents[0] for content in contents)
    context.prepared, context.lengths = prepared, np.asarray(prepared.train["length"][:], dtype=np.int64)
    advice = "Give every machine the same files, or pin --dataset_revision and --model_revision to a commit."
    return [judge("dataset", found if same else "ranks loaded different rows", "to be had, the same on all ranks", same, advice), *findings]


def warnings(lines: list[str]) -> list[Finding]:
    """The data's own warnings as findings; what was looked for and not met is said too."""
    findings, met = [], set()
    for line in lines:
        what, advice = next((known for words, known in KNOWN.items() if words in line), ("dataset", "Look at it: python -m pipeline.data."))
        met.add(what)
        level: Level = "warn"
        expected = "none"
        if what == "test in train":
            share = re.search(r"\(([\d.]+)%\)", line)
            level = "FAIL" if share and float(share.group(1)) > MOST_LEAKED else "warn"
            expected = f"none; up to {MOST_LEAKED:.0f}% is a warning"
        findings.append(Finding(what, line, expected, level, advice))
    clean = [Finding(what, "none", "none") for what, _ in KNOWN.values() if what not in met]
    return clean + findings


def coverage(context: Context) -> list[Finding]:
    """Every row of an epoch on exactly one rank, once; in another order in the next epoch."""
    plan, place = context.plan, context.topology
    rows = len(context.prepared.train)
    sampler = context.sampler(place.rank, place.world_size, plan.accumulation)
    epochs = []
    for epoch in (0, 1):
        sampler.set_epoch(epoch)
        epochs.append(context.ranks.gather(np.asarray(list(sampler), dtype=np.int64)))
    of_ranks = epochs[0]
    seen = np.bincount(np.concatenate([mine.ravel() for mine in of_ranks]), minlength=rows)
    repeated, absent, most = int((seen > 1).sum()), int((seen == 0).sum()), rows % plan.global_rows
    found = f"{int((seen == 1).sum()):,} of {rows:,} rows on one rank, {repeated:,} on several, {absent:,} sit this epoch out"
    expected = f"0 on several, at most {most:,} out (less than a global batch)"
    advice = "The sampler does not deal each row once: gradients would weigh rows wrongly. Put pipeline/sampler.py back as it was."
    equal = len({mine.shape for mine in of_ranks}) == 1
    findings = [judge("epoch's rows", found, expected, repeated == 0 and absent <= most, advice)]
    if not equal:
        shapes = ", ".join(f"rank {rank} {mine.shape[0]} micro-batches" for rank, mine in enumerate(of_ranks))
        findings.append(Finding("ranks' shares", shapes, "the same number", "FAIL", "Ranks would wait for each other for ever. " + advice))
    elif rows > 2 and all(np.array_equal(a, b) for a, b in zip(*epochs, strict=True)):
        advice = "set_epoch has no effect: every epoch would repeat the first one's order."
        findings.append(Finding("next epoch", "the same order", "another order", "FAIL", advice))
    return findings
