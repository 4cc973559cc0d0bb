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
from typing import Any, Literal

from huggingface_hub import EvalResult, HfApi, ModelCard, ModelCardData, constants
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

TEMPLATE = Path(__file__).with_name("card_template.md")
PLACEHOLDER = "OWNER/NAME"  # stands for the repository until a release is published

# Known of the mission's own sources; others are asked for on their own pages.
LICENCES = {
    "distilbert/distilbert-base-uncased": "apache-2.0",
    "distilbert-base-uncased": "apache-2.0",
    "fancyzhx/ag_news": "unknown: none is stated there; the AG corpus was given for research and other non-commercial use",
}
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


def licence(kind: Literal["model", "dataset"], name: str | None) -> str | None:
    """The licence that a repository's own page states; None where it states none, is not on the Hub, or the Hub is away."""
    repo = hub_id(name)
    if repo is None or repo in LICENCES:
        return LICENCES.get(str(repo))
    try:
        info = (HfApi().model_info if kind == "model" else HfApi().dataset_info)(repo, timeout=10)
    except Exception:  # whatever is wrong with the Hub: a release is not lost for want of this
        return None
    stated = info.card_data.get("license") if info.card_data else None
    return ", ".join(map(str, stated)) if isinstance(stated, list) else stated


def figures(test: Mapping[str, Any]) -> dict[str, tuple[str, float, dict[str, str] | None]]:
    """What a card claims of `test` (from `compute_metrics`): name in the model-index -> metric type, value, arguments."""
    found: dict[str, tuple[str, float, dict[str, str] | None]] = {
        "Accuracy": ("accuracy", test["accuracy"], None),
        "Macro F1": ("f1", test["macro_f1"], {"average": "macro"}),
        "Negative log-likelihood (nats)": ("nll", test["nll"], None),
        "Expected calibration error (15 bins)": ("expected_calibration_error", test["ece"], None),
    }
    return found | {f"F1 of {name}": ("f1", row["f1"], {"class": name}) for name, row in test["per_class"].items()}


def result_rows(test: Mapping[str, Any]) -> list[str]:
    """The rows of the card's two tables of results: all figures first, then one row a class."""
    rows = [[f"{test[name]:.4f}" for name in ("accuracy", "macro_f1", "nll", "ece")]]
    for name, row in test["per_class"].items():
        rows.append([_cell(name), *(f"{row[kind]:.4f}" for kind in ("precision", "recall", "f1")), str(row["support"])])
    return [f"| {' | '.join(row)} |" for row in rows]


def _cell(text: Any) -> str:
    return str(text).replace("|", "\\|").replace("\n", " ")


def model_card(
    record: Mapping[str, Any],
    repo: str | None,
    *,
    example: str | None = None,
    onnx: bool = True,
    pictures: bool = True,
    licences: tuple[str | None, str | None] = (None, None),
) -> str:
    """The README.md of a release.

    Args:
        record: the run record.
        repo: owner/name it is published as; None leaves `OWNER/NAME` in its place.
        example: a text to show the use with.
        onnx: whether the release holds onnx/model.onnx.
        pictures: whether the release holds the pictures of `card_images`.
        licences: of the base model and of the data, as their pages state them (see `licence`).

    Raises ValueError where huggingface_hub's parser would not read the result back.
    """
    base, dataset = record["config"]["model"], record["data"]["dataset"]
    base_id, dataset_id = hub_id(base), hub_id(dataset)
    language = record["data"].get("language") or LANGUAGES.get(str(dataset_id))
    record = without_local_paths(record)
    repo, example, code = repo or PLACEHOLDER, example or "Put a text of your own here.", record.get("code") or {}
    data = ModelCardData(
        language=language,
        license=licences[0] if re.fullmatch(r"[a-z0-9.+-]+", licences[0] or "") else None,  # the Hub refuses what is no licence's id
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
        checkout=f"a checkout of [the training code]({code['origin']})" if code.get("origin") else "a checkout of the training code",
        test_rows=f"Split `{record['config']['test_split']}` of `{dataset_id or _short(dataset)}`"
        + (f" at revision `{record['data']['revision']}`." if record["data"].get("revision") else "."),
        result_rows=result_rows(record["test"]),
        facts=_facts(record),
        processes=_processes(record["topology"]),
        limits=[*_limits(record, language), _licences(base_id or _short(base), dataset_id or _short(dataset), licences)],
        percent=lambda share: f"{share:.1%}",
        cell=_cell,
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
    return [
        EvalResult(metric_type=kind, metric_name=name, metric_value=round(float(value), 6), metric_args=arguments, **where)
        for name, (kind, value, arguments) in figures(test).items()
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
        *_energy(record.get("energy_joules")),
        ("Precision", f"{record['topology']['precision']} in training, fp32 weights"),
        ("Versions", ", ".join(f"{name} {version}" for name, version in record["versions"].items() if version)),
        ("Code", commit + (" with uncommitted changes" if code.get("dirty") else "")),
        ("Finished", record["finished"]),
    ]


def _energy(joules: Mapping[str, float] | None) -> list[tuple[str, str]]:
    """A row where the machine counts it; joules by `cpu` and `gpu`."""
    names = {"gpu": "the GPUs (NVML)", "cpu": "the CPU packages (RAPL)"}
    hours = {name: joules[kind] / 3600 for kind, name in names.items() if joules and kind in joules}
    drawn = ", ".join(f"{value:,.0f} Wh by {name}" if value >= 100 else f"{value:.3g} Wh by {name}" for name, value in hours.items())
    return [("Energy", f"{drawn}: all they drew during training, other programs' share included")] if drawn else []


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
    return limits


def _licences(base: str, dataset: str, licences: tuple[str | None, str | None]) -> str:
    stated = [f"{name}: {text or 'not known here, see where it comes from'}" for name, text in zip((base, dataset), licences, strict=True)]
    return f"Licences of what it is made of, which apply to it as well. Base model {stated[0]}. Data {stated[1]}."
