"""Settings of the service, from the environment (DISTRINEWS_MODEL, DISTRINEWS_PORT, ...) or flags; flags win.

python -m serve --model user/repo --revision v1
python -m serve --help
"""

from __future__ import annotations

import argparse
import dataclasses
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NoReturn

from serve.errors import UserError

PREFIX = "DISTRINEWS_"


def _option(default: Any, help: str, choices: tuple[str, ...] | None = None) -> Any:
    return field(default=default, metadata={"help": help, "choices": choices})


@dataclass(frozen=True)
class Settings:
    """Everything that decides how a release is served."""

    model: str = _option("", "Hub id (owner/name) or folder of the release to serve.")
    revision: str = _option("", "Tag, branch or commit on the Hub; empty: main.")
    host: str = _option("127.0.0.1", "Address to listen on; 0.0.0.0 lets other machines in.")
    port: int = _option(8000, "Port to listen on; 0 takes a free one and prints it.")
    device: str = _option("auto", "auto: CUDA where there is a GPU and torch, else the CPU.", ("auto", "cpu", "cuda"))
    engine: str = _option(
        "auto", "auto: torch on a GPU, ONNX Runtime on a CPU, torch where the release has no ONNX.", ("auto", "onnxruntime", "torch")
    )
    threads: int = _option(0, "Threads of the engine on the CPU; 0: the cores this process may use.")
    batch_tokens: int = _option(0, "Most tokens, padding included, in one batch; 0: what suits the engine.")
    queue_tokens: int = _option(65536, "Most tokens accepted and not yet answered; beyond it callers get 429.")
    deadline_seconds: float = _option(10.0, "Longest a request may take; beyond it callers get 503.")
    stall_seconds: float = _option(30.0, "A batch that takes longer turns /ready red until it ends.")
    max_texts: int = _option(256, "Most texts in one /predict/batch request.")
    max_body_bytes: int = _option(1 << 20, "Largest request body in bytes; beyond it callers get 413.")
    min_agreement: float = _option(0.99, "Proof: least share of golden examples that must get the same label, 0-1.")
    max_probability_change: float = _option(0.03, "Proof: most that any golden probability may be off by, 0-1.")

    def __post_init__(self) -> None:
        if not self.model:
            raise UserError(
                "no model was given: allowed is a Hub id or a release folder. Add --model owner/name (and --revision v1), "
                f"or set {PREFIX}MODEL."
            )
        for name, low, high in (
            ("port", 0, 65535),
            ("threads", 0, 1024),
            ("batch_tokens", 0, 1 << 24),
            ("queue_tokens", 1, 1 << 30),
            ("deadline_seconds", 0.01, 3600),
            ("stall_seconds", 0.01, 3600),
            ("max_texts", 1, 100_000),
            ("max_body_bytes", 64, 1 << 30),
            ("min_agreement", 0, 1),
            ("max_probability_change", 0, 1),
        ):
            value = getattr(self, name)
            if not low <= value <= high:
                raise UserError(f"--{name} is {value}: allowed is {low} to {high}.")
        if self.engine == "onnxruntime" and self.device == "cuda":
            raise UserError("--engine onnxruntime runs on the CPU here and --device is cuda: leave one out, or give --engine torch.")


FIELDS = dataclasses.fields(Settings)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}. All options: python -m serve --help")


def _parser() -> argparse.ArgumentParser:
    # The dataclass holds the defaults; the parser keeps only what was really given.
    parser = _Parser(
        prog="python -m serve",
        description="Serve one release of a text classifier from the Hugging Face Hub, or from a folder, over HTTP.",
        epilog=f"Every option can also be set as {PREFIX}<OPTION>, for example {PREFIX}PORT=7860.",
        allow_abbrev=False,
        argument_default=argparse.SUPPRESS,
    )
    for option in FIELDS:
        shown = f" (default: {option.default})" if option.default != "" else ""
        parser.add_argument(
            f"--{option.name}", type=type(option.default), choices=option.metadata["choices"], help=option.metadata["help"] + shown
        )
    return parser


def parse(argv: Sequence[str], environment: Mapping[str, str] = os.environ) -> Settings:
    """Flags and environment to checked settings. Raises UserError. An empty variable or flag counts as not given."""
    parser = _parser()
    given: dict[str, Any] = {}
    for option in FIELDS:
        variable = PREFIX + option.name.upper()
        if value := environment.get(variable):
            try:
                given |= vars(parser.parse_args([f"--{option.name}={value}"]))
            except UserError as error:
                raise UserError(f"environment variable {variable}: {error}") from error
    given |= {name: value for name, value in vars(parser.parse_args(argv)).items() if value != ""}
    return Settings(**given)
