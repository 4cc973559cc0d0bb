"""Settings of the service, from the environment (DISTRINEWS_MODEL, DISTRINEWS_PORT, ...) or flags; flags win.

python -m serve --model user/repo --revision v1
python -m serve --help
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NoReturn

from serve.errors import UserError

PREFIX = "DISTRINEWS_"
ENGINES = ("auto", "openvino-bf16", "openvino-fp32", "onnxruntime", "torch-bf16", "torch-fp32")


def _option(default: Any, help: str, choices: tuple[str, ...] | None = None) -> Any:
    return field(default=default, metadata={"help": help, "choices": choices})


def _secret(help: str) -> Any:
    """From the environment only, for a flag stands in every list of processes; shown nowhere."""
    return field(default="", repr=False, metadata={"help": help, "secret": True})


@dataclass(frozen=True)
class Settings:
    """Everything that decides how a release is served."""

    model: str = _option("", "Hub id (owner/name) or folder of the release to serve.")
    revision: str = _option("", "Tag, branch or commit on the Hub; empty: main.")
    host: str = _option("127.0.0.1", "Address to listen on; 0.0.0.0 lets other machines in.")
    port: int = _option(8000, "Port to listen on; 0 takes a free one and prints it.")
    device: str = _option("auto", "auto: CUDA where there is a GPU and torch, else the CPU.", ("auto", "cpu", "cuda"))
    engine: str = _option("auto", "auto: torch on a GPU; on a CPU the fastest that proves itself, as measured here.", ENGINES)
    threads: int = _option(0, "Threads of the engine on the CPU; 0: the cores this process may use.")
    batch_tokens: int = _option(0, "Most tokens, padding included, in one batch; 0: what suits the engine.")
    queue_tokens: int = _option(0, "Tokens waiting beyond which callers get 429; 0: half a second's work, as the engine needs.")
    deadline_seconds: float = _option(10.0, "Longest a request may take; beyond it callers get 503.")
    stall_seconds: float = _option(
        30.0, "A batch that takes longer turns /ready red; after 3 times that the engine is replaced, or else the process ended."
    )
    max_texts: int = _option(256, "Most texts in one /predict/batch request.")
    max_body_bytes: int = _option(1 << 20, "Largest request body in bytes; beyond it callers get 413.")
    state_dir: str = _option(
        "",
        "Folder for what is remembered between starts (proofs, timings, up to 4 compiled models), on a disk of this machine; empty: distrinews in HF_HOME.",
    )
    watch_seconds: float = _option(60.0, "Seconds between looks at the Hub for a newer commit of the revision; 0: never.")
    max_model_bytes: int = _option(4 << 30, "Largest weights that are downloaded, in bytes; a release with larger ones is refused.")
    cors_origins: str = _option("", "Origins whose pages may call this, https://a.example,https://b.example or *; empty: none but its own.")
    access_log: str = _option("errors", "Answers that get a line in the log; errors: those of 500 and above.", ("none", "errors", "all"))
    log_format: str = _option("text", "How the log is written; json: one object a line.", ("text", "json"))
    api_keys: str = _secret("Keys, k1,k2, one of which predictions must send as X-API-Key; empty: anyone may predict.")
    admin_key: str = _secret("Key that operators must send as X-API-Key to roll back; empty: nobody can.")
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
            ("queue_tokens", 0, 1 << 30),
            ("deadline_seconds", 0.01, 3600),
            ("stall_seconds", 0.01, 3600),
            ("max_texts", 1, 100_000),
            ("max_body_bytes", 64, 1 << 30),
            ("watch_seconds", 0, 86400),
            ("max_model_bytes", 1, 1 << 40),
            ("min_agreement", 0, 1),
            ("max_probability_change", 0, 1),
        ):
            value = getattr(self, name)
            if not low <= value <= high:
                raise UserError(f"--{name} is {value}: allowed is {low} to {high}.")
        for origin in self.origins():
            if origin != "*" and not re.fullmatch(r"https?://[^/\s?#]+", origin):
                raise UserError(f"--cors_origins holds {origin!r}: allowed are origins like https://a.example, separated by commas, or *.")
        for name in ("api_keys", "admin_key"):  # the key itself is not quoted
            for key in getattr(self, name).split(","):
                if getattr(self, name) and not re.fullmatch(r"[!-~]+", key.strip()):
                    raise UserError(
                        f"{PREFIX}{name.upper()} holds an empty key or one with a space or a letter beyond ASCII, which no HTTP header "
                        "carries safely: allowed are letters, digits and signs."
                    )
        if self.device == "cuda" and not self.engine.startswith(("auto", "torch")):
            raise UserError(f"--engine {self.engine} runs on the CPU and --device is cuda: leave one out, or give --engine torch-bf16.")

    def origins(self) -> list[str]:
        return [origin.strip() for origin in self.cors_origins.split(",") if origin.strip()]

    def keys(self) -> list[bytes]:
        return [key.strip().encode() for key in self.api_keys.split(",") if key.strip()]


FIELDS = dataclasses.fields(Settings)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}. All options: python -m serve --help")


def _parser() -> argparse.ArgumentParser:
    # The dataclass holds the defaults; the parser keeps only what was really given.
    parser = _Parser(
        prog="python -m serve",
        description="Serve one release of a text classifier from the Hugging Face Hub, or from a folder, over HTTP.",
        epilog=f"Every option can also be set as {PREFIX}<OPTION>, for example {PREFIX}PORT=7860. From the environment only: "
        + " ".join(f"{PREFIX}{option.name.upper()}: {option.metadata['help']}" for option in FIELDS if "secret" in option.metadata),
        allow_abbrev=False,
        argument_default=argparse.SUPPRESS,
    )
    for option in FIELDS:
        if "secret" in option.metadata:
            continue
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
        if not (value := environment.get(variable)):
            continue
        if "secret" in option.metadata:
            given[option.name] = value
        else:
            try:
                given |= vars(parser.parse_args([f"--{option.name}={value}"]))
            except UserError as error:
                raise UserError(f"environment variable {variable}: {error}") from error
    given |= {name: value for name, value in vars(parser.parse_args(argv)).items() if value != ""}
    return Settings(**given)
