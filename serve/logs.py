"""The log: one line an event, as text or as JSON, on standard error, with the id of the request it is about.

Never in it: a text, a header, a query, a stack trace. An error is named by its type and the place in the code, since
its message and its trace may quote what a caller sent.
"""

from __future__ import annotations

import contextvars
import json
import logging
import time
import traceback
from pathlib import Path

request_id: contextvars.ContextVar[str] = contextvars.ContextVar("request_id", default="")

_HERE = Path(__file__).parent
_FIELDS = ("route", "status", "milliseconds")


class _Formatter(logging.Formatter):
    converter = staticmethod(time.gmtime)
    default_time_format, default_msec_format = "%Y-%m-%dT%H:%M:%S", "%s.%03dZ"

    def message(self, record: logging.LogRecord) -> str:
        message = " ".join(record.getMessage().split())
        return f"{message}: {_place(record.exc_info[1])}" if record.exc_info and record.exc_info[1] else message


class TextFormatter(_Formatter):
    def format(self, record: logging.LogRecord) -> str:
        about = f" [{identity}]" if (identity := request_id.get()) else ""
        return f"{self.formatTime(record)} {record.levelname} {record.name}: {self.message(record)}{about}"


class JsonFormatter(_Formatter):
    def format(self, record: logging.LogRecord) -> str:
        line = {"time": self.formatTime(record), "level": record.levelname, "logger": record.name, "message": self.message(record)}
        if identity := request_id.get():
            line["request_id"] = identity
        return json.dumps(line | {name: getattr(record, name) for name in _FIELDS if hasattr(record, name)}, ensure_ascii=False)


def _place(error: BaseException) -> str:
    """The error's type and where it came up: the last lines of our own code it passed, and the last of all."""
    frames = traceback.extract_tb(error.__traceback__)
    ours = [frame for frame in frames if _HERE in Path(frame.filename).parents]
    passed = dict.fromkeys(f"{Path(one.filename).name}:{one.lineno} in {one.name}" for one in [*ours[-2:], *frames[-1:]])
    return f"{type(error).__name__} at {', '.join(passed)}"


def set_up(log_format: str) -> None:
    """Sends every log of this process through one handler; the libraries' say only what is wrong."""
    handler = logging.StreamHandler()
    handler.setFormatter(JsonFormatter() if log_format == "json" else TextFormatter())
    logging.basicConfig(level=logging.WARNING, handlers=[handler], force=True)
    logging.captureWarnings(True)
    logging.raiseExceptions = False  # a line that cannot be written is dropped; logging would print its arguments
    logging.getLogger("serve").setLevel(logging.INFO)
    hub = logging.getLogger("huggingface_hub")  # has a handler of its own, and keeps what it says from the root
    hub.handlers, hub.propagate = [], True
