"""The configuration of a run: one frozen dataclass of scalars, read from YAML and the command line by one parser.

    python -m pipeline.train configs/ag_news.yaml --learning_rate 3e-5 --epochs 1
    python -m pipeline.train --help

The YAML file is turned into arguments that come *before* those of the command line, so one parser
(`HfArgumentParser`) and one set of rules serve both, and the command line wins.
"""

from __future__ import annotations

import dataclasses
import math
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NoReturn

import yaml

from pipeline.errors import UserError, nearest, run_entry


def _option(default: Any, help: str) -> Any:
    return field(default=default, metadata={"help": help})


@dataclass(frozen=True)
class TrainConfig:
    """Everything that decides a run. The same file serves 1 process and 64: sizes are global, not per device."""

    # What is learnt from what
    model: str = _option("distilbert/distilbert-base-uncased", "Hub id or folder of the model to start from.")
    model_revision: str | None = _option(None, "Branch, tag or commit of the model repository; none: main.")
    dataset: str = _option("fancyzhx/ag_news", "Hub id, a folder, or one file (.csv .tsv .json .jsonl .parquet) of labelled texts.")
    dataset_revision: str | None = _option(None, "Branch, tag or commit of the dataset repository; none: main.")
    dataset_config: str | None = _option(None, "Name of the dataset's configuration (subset), where it has several.")
    train_split: str = _option("train", "Name of the split to train on.")
    test_split: str = _option("test", "Name of the split scored once at the end.")
    test_file: str | None = _option(None, "File with the test rows, where `dataset` is a single file.")
    test_share: float = _option(0.1, "Share of train held out as test where the data has no test split, 0-1.")
    validation_share: float = _option(0.05, "Share of train (stratified, seeded) for early stopping and the best checkpoint, 0-0.5.")
    text_column: str = _option("text", "Column with the text.")
    label_column: str = _option("label", "Column with the label: a word or a whole number per row.")
    max_train_samples: int | None = _option(None, "Use only this many training rows (stratified); none: all.")

    # How it is learnt
    max_length: int = _option(128, "Longest text in tokens; what is longer is cut.")
    epochs: float = _option(3.0, "Passes over the training rows.")
    max_steps: int = _option(-1, "Stop after this many optimizer steps, over all epochs; -1: by `epochs`.")
    global_batch_size: int = _option(32, "Rows per optimizer step over ALL processes and accumulation steps.")
    max_per_device_batch_size: int = _option(64, "Most rows one device holds at once; accumulation follows from it and the world size.")
    learning_rate: float = _option(2e-5, "Peak learning rate of AdamW.")
    weight_decay: float = _option(0.01, "AdamW weight decay (none on biases and LayerNorm).")
    warmup_share: float = _option(0.1, "Share of all steps over which the learning rate rises from 0, 0-1.")
    schedule: Literal["linear", "cosine", "constant"] = _option("linear", "Learning rate after the warm-up.")
    max_grad_norm: float = _option(1.0, "Clip the global gradient norm to this; 0: do not clip.")
    class_weights: Literal["none", "balanced"] = _option(
        "none", "balanced: weigh each row's loss by the inverse frequency of its label in train."
    )
    dropout: float | None = _option(None, "Override every dropout probability of the model, 0-1; none: the model's own.")
    length_grouping: bool = _option(True, "Put texts of similar length in one batch: less padding, balanced ranks.")
    early_stopping_patience: int = _option(0, "Stop after this many evaluations without a better one; 0: never.")
    best_metric: Literal["macro_f1", "accuracy", "nll"] = _option(
        "macro_f1", "Validation figure that chooses the best checkpoint (nll: lower is better)."
    )
    evals_per_epoch: int = _option(1, "Validations, each with a checkpoint, per epoch.")
    seed: int = _option(42, "Seed of split, order, initial head and dropout.")

    # Where it runs
    device: Literal["auto", "cpu", "cuda"] = _option("auto", "auto: CUDA where there is a GPU, else the CPU.")
    precision: Literal["auto", "fp32", "bf16", "fp16", "fp64"] = _option(
        "auto", "auto: bf16 where the hardware computes in it, else fp16 on a GPU, else fp32. fp64: for proofs, slow."
    )
    cpu_threads: int = _option(0, "Threads per process on the CPU; 0: allowed cores divided by local processes.")
    dataloader_workers: int = _option(0, "Processes per rank that collate batches; 0: in the training process.")
    comm_hook: Literal["none", "fp16"] = _option("none", "fp16: all-reduce gradients as fp16, half the bytes, rounded; none: as they are.")
    bucket_mb: int = _option(25, "Gradients are all-reduced in buckets of this many MiB; 25 is torch's default (its first bucket 1).")
    static_graph: bool = _option(False, "Promise DDP that every step uses the same parameters, as often; a step that does not is an error.")

    hang_seconds: int = _option(25, "A rank without progress for this long (and 5 times the longest step) ends the run; 0: never.")

    # What is kept and told
    output_dir: str | None = _option(None, "Folder of the run; none: outputs/<name of the configuration file>.")
    resume: str = _option("auto", "auto: go on from the newest complete checkpoint; none: start anew; or a folder.")
    checkpoint_steps: int = _option(500, "Optimizer steps between checkpoints, beside those at validations; 0: only those.")
    save_total_limit: int = _option(2, "Complete checkpoints kept beside the best one, at least 1.")
    logging_steps: int = _option(10, "Optimizer steps between logged training losses.")
    tracker: Literal["none", "tensorboard"] = _option("none", "Also log for TensorBoard under <output_dir>/runs.")
    trace: bool = _option(False, "Write what each step saw and did to <output_dir>/trace, for comparing runs (slow).")
    onnx: bool = _option(True, "Put onnx/model.onnx into the release, for the service and browsers (some ten seconds).")
    push_to_hub: bool = _option(False, "After training publish the release to `hub_repo`, tag it and prove it.")
    hub_repo: str | None = _option(None, "owner/name of the model repository to publish to.")
    hub_tag: str | None = _option(None, "Tag of the release; none: v1, or the next free v2, v3, ...")
    hub_checkpoints: bool = _option(False, "Push each checkpoint to a branch of `hub_repo` in the background; resume from there.")
    hub_private: bool = _option(False, "Create the model repository as private.")

    def __post_init__(self) -> None:
        for name in FIELDS:
            if isinstance(value := getattr(self, name), float) and not math.isfinite(value):
                raise UserError(f"{name} is {value}: allowed is a finite number.")
        for name, low, high in (
            ("test_share", 0, 1),
            ("validation_share", 0, 0.5),
            ("warmup_share", 0, 1),
            ("dropout", 0, 1),
        ):
            value = getattr(self, name)
            if value is not None and not low <= value < high:
                raise UserError(f"{name} is {value}: allowed is {low} up to, but not including, {high}.")
        for name in ("max_length", "epochs", "global_batch_size", "max_per_device_batch_size", "learning_rate",
                     "evals_per_epoch", "save_total_limit", "logging_steps", "bucket_mb"):  # fmt: skip
            if getattr(self, name) <= 0:
                raise UserError(f"{name} is {getattr(self, name)}: allowed is anything above 0.")
        for name in ("weight_decay", "max_grad_norm", "early_stopping_patience", "cpu_threads", "dataloader_workers", "seed",
                     "hang_seconds", "checkpoint_steps"):  # fmt: skip
            if getattr(self, name) < 0:
                raise UserError(f"{name} is {getattr(self, name)}: allowed is 0 or more.")
        if self.max_length < 4:
            raise UserError(f"max_length is {self.max_length}: allowed is 4 or more (a text needs its two special tokens).")
        if self.max_steps == 0 or self.max_steps < -1:
            raise UserError(f"max_steps is {self.max_steps}: allowed is -1 (train for `epochs`) or 1 and more.")
        if self.max_train_samples is not None and self.max_train_samples <= 0:
            raise UserError(f"max_train_samples is {self.max_train_samples}: allowed is anything above 0, or none for all rows.")
        if self.push_to_hub and not self.hub_repo:
            raise UserError("push_to_hub is set but hub_repo is not: add --hub_repo owner/name.")
        if self.hub_checkpoints and not self.hub_repo:
            raise UserError("hub_checkpoints is set but hub_repo is not: add --hub_repo owner/name.")
        if self.hub_repo and self.hub_repo.count("/") != 1:
            raise UserError(f"hub_repo is '{self.hub_repo}': allowed is owner/name, for example your-name/ag-news.")

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


FIELDS: dict[str, dataclasses.Field[Any]] = {f.name: f for f in dataclasses.fields(TrainConfig)}


def yaml_arguments(path: Path) -> list[str]:
    """The file's `key: value` pairs as `--key value` arguments.

    Raises UserError for a missing file, YAML that does not parse, an unknown key (with the nearest field) or a value
    that is not a scalar.
    """
    if not path.is_file():
        raise UserError(f"No configuration file {path}. Give one, for example configs/ag_news.yaml, or options alone (--help lists them).")
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not valid YAML: {error}") from error
    if values is None:
        return []
    if not isinstance(values, dict):
        raise UserError(f"{path} holds a {type(values).__name__}; allowed is lines of `key: value`.")
    arguments: list[str] = []
    for key, value in values.items():
        if key not in FIELDS:
            raise UserError(f"{path}: unknown key '{key}'.{nearest(key, FIELDS)} All keys: --help.")
        if isinstance(value, list | dict):
            raise UserError(f"{path}: {key} is a {type(value).__name__}; allowed is a single value.")
        if value is None:
            if FIELDS[key].default is not None:
                raise UserError(f"{path}: {key} has no value. Give one, or leave the line out for {FIELDS[key].default}.")
            continue
        # `--key=value` in one word, so that a value that starts with a dash is still a value.
        arguments.append(f"--{key}={str(value).lower() if isinstance(value, bool) else value}")
    return arguments


def make_parser(prog: str) -> Any:
    """The one parser. Importing transformers takes a second, so it happens here and not at module import."""
    from transformers import HfArgumentParser

    class Parser(HfArgumentParser):
        def error(self, message: str) -> NoReturn:
            raise UserError(f"{message}. All options: {prog} --help")

    usage = f"{prog} [CONFIG.yaml] [--option value ...]"
    return Parser(
        TrainConfig,  # type: ignore[arg-type]
        prog=prog,
        usage=usage,
        allow_abbrev=False,
        description="CONFIG.yaml holds the same options as keys. --debug shows the traceback of a mistake too.",
    )


def parse(argv: list[str], prog: str = "python -m pipeline.train", suffix: str = "") -> TrainConfig:
    """`[CONFIG.yaml] [--field value ...]` to a checked configuration. Raises UserError.

    `suffix` is added to the default output folder: two entries with one configuration file must not share a folder.
    """
    argv = list(argv)
    path = Path(argv.pop(0)) if argv and not argv[0].startswith("-") else None
    parser = make_parser(prog)
    from_file = yaml_arguments(path) if path else []
    try:
        config = _parse(parser, from_file + argv, prog)
    except UserError as error:
        if from_file and _complaint(parser, from_file, prog) == str(error):  # the file alone is enough to be wrong: name it
            raise UserError(f"{path}: {error}") from error
        raise
    if config.output_dir is None:
        stem = path.stem if path else "run"
        config = dataclasses.replace(config, output_dir=f"outputs/{stem}{suffix}")
    return config


def _complaint(parser: Any, arguments: list[str], prog: str) -> str | None:
    try:
        _parse(parser, arguments, prog)
    except UserError as error:
        return str(error)
    return None


def _parse(parser: Any, arguments: list[str], prog: str) -> TrainConfig:
    config, unknown = parser.parse_args_into_dataclasses(args=arguments, look_for_args_file=False, return_remaining_strings=True)
    if unknown:
        option = unknown[0]
        if not option.startswith("--"):
            raise UserError(f"'{option}' belongs to no option. The configuration file comes first: {prog} CONFIG.yaml --option value")
        raise UserError(
            f"unknown option '{option}'.{nearest(option.split('=')[0], [f'--{name}' for name in FIELDS])} All options: {prog} --help"
        )
    return config


if __name__ == "__main__":
    sys.exit(run_entry(lambda argv: print(parse(argv, "python -m pipeline.config"))))
