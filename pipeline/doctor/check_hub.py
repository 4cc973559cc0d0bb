"""What the run needs from the Hub, asked for without writing anything: is it there, the model, the right to publish."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path

from huggingface_hub import constants
from huggingface_hub.utils import get_session

from pipeline.doctor.findings import Finding, judge
from pipeline.doctor.frame import Context
from pipeline.hub import check_before_training
from pipeline.sources import find_model

MEND = "Check the network and HF_ENDPOINT; or a local Hub (`make hub`), or folders instead of Hub ids."


def _publishes(context: Context) -> bool:
    return context.config.push_to_hub or context.config.hub_checkpoints


def _local(name: str) -> bool:
    return Path(name).expanduser().exists()


def reachable(context: Context) -> list[Finding]:
    """One small question to the Hub by rank 0, where anything of the run comes from there or goes there."""
    if context.topology.rank != 0:
        return []
    config, publishes = context.config, _publishes(context)
    expected = "an answer within 10 s"
    if _local(config.model) and _local(config.dataset) and not publishes:
        return [Finding("Hub", "not needed: model and data are here, nothing is published", expected)]
    if constants.HF_HUB_OFFLINE:
        advice = "Unset HF_HUB_OFFLINE, or leave out --push_to_hub and --hub_checkpoints."
        return [
            judge("Hub", "not asked: HF_HUB_OFFLINE is set", "nothing to publish" if not publishes else expected, not publishes, advice)
        ]
    began = time.monotonic()
    try:
        status = get_session().get(f"{constants.ENDPOINT}/api/models", params={"limit": 1}, timeout=10).status_code
    except Exception as error:  # whatever the client's HTTP library raises: the network, a name, a certificate
        # The cache may do for reading; the next lines tell. For publishing nothing else will.
        found = f"{constants.ENDPOINT}: {type(error).__name__}"
        return [Finding("Hub", found, expected, "FAIL" if publishes else "warn", MEND)]
    found = f"{constants.ENDPOINT} answers {status} in {time.monotonic() - began:.1f} s"
    return [judge("Hub", found, expected, status < 500, "The Hub has trouble of its own: try later.", "FAIL" if publishes else "warn")]


def write_access(context: Context) -> list[Finding]:
    """May the token write to `hub_repo`? Raises UserError with the reason."""
    if context.topology.rank != 0:
        return []
    if not _publishes(context):
        return [Finding("right to write", "not needed: push_to_hub and hub_checkpoints are off", "to be had when publishing")]
    check_before_training(replace(context.config, push_to_hub=True))
    return [Finding("right to write", f"the token may write to {context.config.hub_repo}", "to be had (nothing was written)")]


def model(context: Context) -> list[Finding]:
    """Rank 0 fetches the model into the cache. Raises UserError where it is not to be had."""
    found: list[Finding] = []
    if context.topology.rank == 0:
        source = find_model(context.config.model, context.config.model_revision)
        place = f"commit {source.commit[:12]}" if source.commit else "a folder"
        advice = "The run would use what lies in the cache. " + MEND
        found = [judge("model", source.warning or f"{context.config.model}, {place}", "config.json and safetensors", not source.warning, advice, "warn")]  # fmt: skip
    context.ranks.gather(None)
    context.model_found = True
    return found
