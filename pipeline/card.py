"""The model card: what a stranger needs to use, trust or redo a release. Every figure comes from the run's record.

`model_card` fills `card_template.md`; its YAML head is made and parsed by huggingface_hub's own card classes, so the Hub
reads the results as `model-index`. `card_images` (in card_images.py) draws the two pictures it shows.
"""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData, constants
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

TEMPLATE = Path(__file__).with_name("card_template.md")
PLACEHOLDER = "OWNER/NAME"  # stands for the repository until a release is published

# Known of the mission's own sources; of others the card claims nothing.
LICENSES = {"distilbert/distilbert-base-uncased": "apache-2.0", "distilbert-base-uncased": "apache-2.0"}
LANGUAGES = {"fancyzhx/ag_news": "en"}

_ABSOLUTE_PATH = re.compile(r"""(?<![\w:/.~-])/(?:[^\s/'"=,;:]+/)+([^\s/'"=,;:]*)""")


def without_local_paths(value: Any) -> Any:
    """The same JSON value, its strings freed of where things lie on the author's machine: the home folder becomes `~`,
    any other absolute path `.../<its last part>`."""
    if isinstance(value, Mapping):
        return {key: without_local_paths(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [without_local_paths(item) for item in value]
    if not isinstance(value, str):
        return value
    home = str(Path.home())
    if len(home) > 1:
        value = re.sub(rf"(?<![\w.-]){re.escape(home)}(?=/|$|[\s'\"])", "~", value)
    return _ABSOLUTE_PATH.sub(r".../\1", value)


def hub_id(name: str | None) -> str | None:
    """`name` if it can be the id of a repository on the Hub; None for a local file or folder, which means nothing there."""
    if not name or Path(name).expanduser().exists():
        return None
    try:
        validate_repo_id(name)
    except HFValidationError:
        return None
    return name


def model_card(record: Mapping[str, Any], repo: str | None, *, example: str | None = None, onnx: bool = True, pictures: bool = True) -> str:
    """The README.md of a release.

    Args:
        record: the run record.
        repo: owner/name it is published as; None leaves `OWNER/NAME` in its place.
        example: a text to show the use with.
        onnx: whether the release holds onnx/model.onnx.
        pictures: whether the release holds the pictures of `card_images`.

    Raises ValueError where huggingface_hub's parser would not read the result back.
    """
    base, dataset = record["config"]["model"], record["data"]["dataset"]
    base_id, dataset_id = hub_id(base), hub_id(dataset)
    language = record["data"].get("language") or LANGUAGES.get(str(dataset_id))
    record = without_local_paths(record)
    repo, example = repo or PLACEHOLDER, example or "Put a text of your own here."
    data = ModelCardData(
        language=language,
        license=LICENSES.get(str(base_id)),
        library_name="transformers",
        pipeline_tag="text-classification",
        base_model=base_id,
        datasets=[dataset_id] if dataset_id else None,
        metrics=["accuracy", "f1"],
        tags=["distrinews", "calibrated", *(["onnx", "transformers.js"] if onnx else [])],
        widget=[{"text": example}],
        model_name=repo.split("/")[-1] if repo != PLACEHOLDER else repo,
        eval_results=_eval_results(record, dataset_id),
    )
    card = ModelCard.from_template(
        data,
        template_str=TEMPLATE.read_text(encoding="utf-8"),
        title=f"{_short(dataset)} classifier",
        base=_link(base_id, "") or f"`{base_id or _short(base)}`",
        dataset=_link(dataset_id, "datasets/") or f"`{dataset_id or _short(dataset)}`",
        labels=_listed(record["data"]["label_names"]),
        classes=len(record["data"]["label_names"]),
        record=record,
        test=record["test"],
        repo=repo,
        onnx=onnx,
        pictures=pictures,
        python_text=json.dumps(example, ensure_ascii=False),
        shell_body=shlex.quote(json.dumps({"text": example}, ensure_ascii=False)),
        test_rows=f"Split `{record['config']['test_split']}` of `{dataset_id or _short(dataset)}`"
        + (f" at revision `{record['data']['revision']}`." if record["data"].get("revision") else "."),
        facts=_facts(record),
        processes=_processes(record["topology"]),
        limits=_limits(record, language),
        percent=lambda share: f"{share:.1%}",
        cell=lambda text: str(text).replace("|", "\\|").replace("\n", " "),
    )
    return str(card)


def _listed(names: list[str], most: int = 30) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def _short(name: str) -> str:
    """`fancyzhx/ag_news`, `/data/news.csv` -> `ag_news`, `news`."""
    return Path(name.rstrip("/")).stem or name


def _link(repo_id: str | None, kind: str) -> str | None:
    if repo_id is None or constants.ENDPOINT != "https://huggingface.co":  # of another Hub nobody knows the address tomorrow
        return None
    return f"[{repo_id}](https://huggingface.co/{kind}{repo_id})"


def _eval_results(record: Mapping[str, Any], dataset_id: str | None) -> list[EvalResult]:
    config, test = record["config"], record["test"]
    name = dataset_id or _short(record["data"]["dataset"])
    where = {
        "task_type": "text-classification",
        "task_name": "Text Classification",
        "dataset_name": name,
        "dataset_type": re.sub(r"[^\w./-]+", "-", name),
        "dataset_config": config.get("dataset_config"),
        "dataset_split": config["test_split"],
        "dataset_revision": record["data"].get("revision"),
    }
    figures = (
        ("accuracy", "Accuracy", "accuracy", None),
        ("f1", "Macro F1", "macro_f1", {"average": "macro"}),
        ("nll", "Negative log-likelihood (nats)", "nll", None),
        ("expected_calibration_error", "Expected calibration error (15 bins)", "ece", None),
    )
    return [
        EvalResult(metric_type=kind, metric_name=title, metric_value=round(float(test[key]), 6), metric_args=arguments, **where)
        for kind, title, key, arguments in figures
    ]


def _processes(topology: Mapping[str, Any]) -> str:
    n = topology["world_size"]
    together = f", {topology['backend']}" if n > 1 else ""
    return f"{_count(n, 'process')} ({topology['device']}{together}, {topology['precision']})"


def _count(n: int, what: str) -> str:
    return f"{n} {what}{'' if n == 1 else 'es'}"


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s" if minutes else f"{seconds:.1f} s"


def _facts(record: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The rows of the training table."""
    config, batch, hardware, rows = record["config"], record["batch"], record["hardware"], record["data"]["rows"]
    optimizer = (
        f"AdamW, peak learning rate {config['learning_rate']:g} ({config['schedule']} after {config['warmup_share']:.0%} warm-up), "
        f"weight decay {config['weight_decay']:g}, "
        + (f"gradient norm clipped to {config['max_grad_norm']:g}" if config["max_grad_norm"] else "no clipping")
    )
    processes = _count(batch["world_size"], "process")
    length = f"{record['steps']:,} steps"
    if evaluations := record.get("epochs"):
        length += f" ({evaluations[-1]['epoch']:g} epochs)"
    if best := record.get("best"):
        length += f"; the weights are those of step {best['step']:,}, the best by validation {best['metric']}"
    weighing = "" if config["class_weights"] == "none" else f", rows weighed by class ({config['class_weights']})"
    machine = [*(hardware.get("gpus") or []), hardware["cpu"], f"{hardware['cores']} cores"]
    if hardware.get("memory_gib"):
        machine.append(f"{hardware['memory_gib']} GiB memory")
    code = record.get("code") or {}
    commit = f"commit `{code['commit']}`" if code.get("commit") else "commit unknown"
    return [
        ("Rows", f"{rows['train']:,} training, {rows['validation']:,} validation (held out of train), {rows['test']:,} test"),
        ("Longest text", f"{config['max_length']} tokens"),
        ("Optimizer", optimizer),
        ("Batch", f"{batch['global']} rows a step = {processes} x {batch['per_device']} rows x {batch['accumulation']} accumulated"),
        ("Length", length),
        ("Loss", f"cross-entropy{weighing}"),
        ("Seed", str(config["seed"])),
        ("Duration", f"{_duration(record['train_seconds'])}, {record['samples_per_second']:,.0f} training rows a second"),
        ("Hardware", ", ".join(machine)),
        ("Precision", f"{record['topology']['precision']} in training, fp32 weights"),
        ("Versions", ", ".join(f"{name} {version}" for name, version in record["versions"].items() if version)),
        ("Code", commit + (" with uncommitted changes" if code.get("dirty") else "")),
        ("Finished", record["finished"]),
    ]


def _limits(record: Mapping[str, Any], language: str | None) -> list[str]:
    test, labels = record["test"], record["data"]["label_names"]
    limits = [
        f"Every text gets one of the {len(labels)} labels, also one that belongs to none of them.",
        f"What comes after the first {record['config']['max_length']} tokens of a text is not read.",
        "It knows texts like those it learnt from; on other sources, years or languages expect less than the figures above."
        + (" It was trained on English." if language == "en" else ""),
    ]
    name, worst = min(test["per_class"].items(), key=lambda item: item[1]["f1"])
    limits.append(f"It is weakest on {name} (F1 {worst['f1']:.4f}).")
    mistakes = [(n, labels[i], labels[j]) for i, row in enumerate(test["confusion_matrix"]) for j, n in enumerate(row) if i != j and n > 0]
    if mistakes:
        n, true, taken = max(mistakes)
        limits[-1] += f" Its most frequent mistake is to take {true} for {taken}: {n} of {test['per_class'][true]['support']} test texts."
    limits += [f"About the data: {warning}" for warning in record["data"].get("warnings", [])]
    limits.append("The licences of the base model and of the data apply to what is made of them: see their pages.")
    return limits
