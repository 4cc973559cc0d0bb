"""What the run learns from and where it goes: the Hub, the model, the texts, and how these are dealt to the ranks."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
from huggingface_hub import constants
from huggingface_hub.utils import get_session

from pipeline.data import TextData, load_texts
from pipeline.doctor.frame import Context, Finding, judge
from pipeline.hub import check_before_training
from pipeline.run import identity, prepare
from pipeline.sources import find_model

MOST_LEAKED = 0.01  # of the test rows; beyond it the test score is no longer worth reporting
MEND = "Check the network, HF_ENDPOINT and HF_HUB_OFFLINE; or a local Hub (`make hub`), or folders instead of Hub ids."


def hub(context: Context) -> list[Finding]:
    """Rank 0 asks the Hub, without writing: is it there, and may the token write to `hub_repo`? Raises UserError where it may not."""
    if context.topology.rank != 0:
        return []
    config, found, good = context.config, "not needed: model and data are here, nothing is published", True
    publishes = config.push_to_hub or config.hub_checkpoints
    right = "not asked" if publishes else "not needed: push_to_hub and hub_checkpoints are off"
    if publishes or not all(Path(name).expanduser().exists() for name in (config.model, config.dataset)):
        try:
            status = get_session().get(f"{constants.ENDPOINT}/api/models", params={"limit": 1}, timeout=10).status_code
            found, good = f"{constants.ENDPOINT} answers {status}", status < 500
        except Exception as error:  # whatever the client's HTTP library raises: the network, a name, a certificate
            found, good = f"{constants.ENDPOINT}: {type(error).__name__}", False
    # For reading the cache may do; the next lines tell.
    findings = [judge("Hub", found, "an answer within 10 s", good, MEND, "FAIL" if publishes else "warn")]
    if publishes and good:
        # As a first run: with checkpoints to go on from, a Hub that cannot be asked would only be a warning.
        check_before_training(replace(config, push_to_hub=True, output_dir=None))
        right = f"the token may write to {config.hub_repo}; nothing was written"
    return [*findings, Finding("right to write", right, "to be had when publishing", "ok" if good or not publishes else "skip")]


def model(context: Context) -> list[Finding]:
    """Rank 0 fetches the model into the cache. Raises UserError where it is not to be had."""
    if context.topology.rank != 0:
        return []
    source = find_model(context.config.model, context.config.model_revision)
    found = source.warning or f"{context.config.model}, {f'commit {source.commit[:12]}' if source.commit else 'a folder'}"
    advice = "The run would use what lies in the cache. " + MEND
    return [judge("model", found, "config.json and safetensors", not source.warning, advice, "warn")]


def texts(context: Context) -> list[Finding]:
    """Load, split and tokenise as the run would: the first rank of each machine, then the others from its cache."""
    # The right to publish is a check of its own, and what is wrong with the texts is told even without a model.
    config, whole = replace(context.config, push_to_hub=False, hub_checkpoints=False), {"batch", "model"} <= context.done
    loaded = None
    for turn in (True, False):
        if turn == (context.topology.local_rank == 0):
            context.prepared = prepare(config, context.topology, context.plan) if whole else None
            loaded = context.prepared.texts if whole else load_texts(config)
        context.gather(None)
    assert loaded is not None, "one of the two turns was this rank's"
    rows, different = loaded.provenance["rows"], []
    if whole:
        context.lengths = np.asarray(context.prepared.train["length"][:], dtype=np.int64)
        contents = context.gather(identity(context.prepared))
        different = [name for name in contents[0] if any(of_rank[name] != contents[0][name] for of_rank in contents)]
    found = f"{config.dataset} at {loaded.provenance['revision'][:19]}: {rows['train']:,} rows to train on, {rows['test']:,} to test"
    found = f"ranks loaded another {' and '.join(different)}" if different else found
    advice = "Give every machine the same files, or pin --dataset_revision and --model_revision to a commit."
    return [judge("dataset", found, "to be had, the same on all ranks", not different, advice), *repeats(loaded)]


def repeats(loaded: TextData) -> list[Finding]:
    """Texts that stand in the data more than once, as pipeline.data counted them."""
    n, share = loaded.repeats, loaded.repeats["leaked"] / len(loaded.test)
    see, leaked = "`python -m pipeline.data CONFIG` shows one. ", f"{n['leaked']:,} test rows ({share:.1%})"
    twice = f"{n['duplicates']:,} rows of train, {n['contradictions']:,} texts with several labels"
    advice = see + "Remove them, or keep them knowingly (each counts as often as it stands there), and give each text one label."
    return [
        judge("duplicates", twice, "none", not (n["duplicates"] or n["contradictions"]), advice, "warn"),
        judge("test in train", leaked, f"none; up to {MOST_LEAKED:.0%} is a warning", not n["leaked"],
              see + "Remove them from train or from test.", "FAIL" if share > MOST_LEAKED else "warn"),
    ]  # fmt: skip


def coverage(context: Context) -> list[Finding]:
    """Every row of an epoch on exactly one rank, once; in another order in the next epoch."""
    rows, sampler = len(context.lengths), context.sampler(context.plan, context.topology.rank)
    epochs = []  # of each of two: every rank's micro-batches, (micro-batches, rows)
    for epoch in (0, 1):
        sampler.set_epoch(epoch)
        epochs.append(context.gather(np.asarray(list(sampler))))
    seen = np.bincount(np.concatenate([mine.ravel() for mine in epochs[0]]), minlength=rows)
    repeated, absent, most = int((seen > 1).sum()), int((seen == 0).sum()), rows % context.plan.global_rows
    shares = sorted({len(mine) for mine in epochs[0]})
    same = rows > 2 and all(np.array_equal(*mine) for mine in zip(*epochs, strict=True))
    found = (
        f"{int((seen == 1).sum()):,} of {rows:,} on one rank, {repeated:,} on several, {absent:,} sit it out; "
        f"{' or '.join(map(str, shares))} micro-batches a rank; next epoch in {'the same' if same else 'another'} order"
    )
    expected = f"0 on several, at most {most:,} out (less than a global batch)"
    advice = "Gradients would weigh rows wrongly, ranks wait for ever, or epochs repeat: put pipeline/sampler.py back as it was."
    return [judge("epoch's rows", found, expected, repeated == 0 and absent <= most and len(shares) == 1 and not same, advice)]
