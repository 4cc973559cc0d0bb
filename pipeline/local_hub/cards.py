"""The head of a card: the YAML before a README, and what huggingface.co documents as required of it.

The specification is modelcard.md of github.com/huggingface/hub-docs. Of licences and languages only the form is looked at: which
ids exist is huggingface.co's own list, which grows.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Annotated, Any

import yaml
from pydantic import AfterValidator, BaseModel, BeforeValidator, Field, ValidationError

FRONT_MATTER = re.compile(r"\A\ufeff?---[ \t]*\r?\n(.*?)\r?\n---[ \t]*(?:\r?\n|\Z)", re.DOTALL)


class _PlainLoader(yaml.SafeLoader):
    """No aliases: a few lines of them can expand to gigabytes."""

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError("aliases are not allowed in a card")
        return super().compose_node(parent, index)


def card_data(text: str) -> dict[str, Any]:
    """The YAML at the head of a README as JSON can hold it; empty without one. Raises ValueError when it is not valid."""
    found = FRONT_MATTER.match(text)
    if not found:
        return {}
    try:
        data = yaml.load(found[1], Loader=_PlainLoader)
        return dict(json.loads(json.dumps(data or {}, default=str)))
    except (yaml.YAMLError, TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"Invalid YAML in the card: {error}") from error


def _licence(given: str) -> str:
    if not re.fullmatch(r"[a-z0-9][a-z0-9.+-]*", given):
        raise ValueError(f"{given[:40]!r} is no id of a licence, such as apache-2.0, unknown or other")
    return given


def _language(given: str) -> str:
    if not re.fullmatch(r"[a-z]{2,3}|code|multilingual", given):
        raise ValueError(f"{given[:40]!r} is no ISO 639 code of two or three letters, nor code or multilingual")
    return given


def _listed(given: Any) -> Any:
    return given if isinstance(given, list) else [] if given is None else [given]


Text = Annotated[str, Field(min_length=1)]


class _Task(BaseModel):
    type: Text


class _Dataset(BaseModel):
    type: Text
    name: Text


class _Metric(BaseModel):
    type: Text
    value: Annotated[float, Field(strict=True, allow_inf_nan=False)] | Text


class _Result(BaseModel):
    task: _Task
    dataset: _Dataset
    metrics: list[_Metric]


class _Model(BaseModel):
    name: Text
    results: list[_Result]


class _Head(BaseModel):
    index: list[_Model] = Field([], alias="model-index")
    license: Annotated[list[Annotated[str, AfterValidator(_licence)]], BeforeValidator(_listed)] = []
    language: Annotated[list[Annotated[str, AfterValidator(_language)]], BeforeValidator(_listed)] = []


def problems(card: Mapping[str, Any], most: int = 20) -> list[str]:
    """What is missing or malformed in the head of a card, a line each, for example `model-index.0.name: Field required`."""
    try:
        _Head.model_validate(card)
    except ValidationError as error:
        found = error.errors(include_url=False, include_context=False, include_input=False)
        return [f"{'.'.join(map(str, one['loc']))}: {one['msg'].removeprefix('Value error, ')}" for one in found[:most]]
    return []
