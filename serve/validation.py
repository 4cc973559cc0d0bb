"""What pydantic finds wrong with a request, as one sentence: what was given, what is allowed. It never quotes a text."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, NamedTuple

_KINDS = {dict: "an object", list: "a list", str: "a string", bool: "true or false", int: "a number", float: "a number", type(None): "null"}


class Complaint(NamedTuple):
    status: int
    code: str
    message: str
    field: str | None = None


def explain(error: Mapping[str, Any], example: Mapping[str, Any]) -> Complaint:
    """`error` is one of `RequestValidationError.errors()`, `example` a body that is allowed."""
    kind, given = error["type"], _KINDS.get(type(error.get("input")), "something else")
    allowed = f"allowed is JSON like {json.dumps(example)}"
    where = error["loc"][1:]  # after "body"
    if kind == "json_invalid":
        return Complaint(400, "not_json", f"The body is not JSON ({error['ctx']['error']} at character {where[0]}); {allowed}.")
    if not where:
        if kind == "missing":
            return Complaint(422, "body_missing", f"The body is empty; {allowed}.")
        if isinstance(error["input"], bytes):
            return Complaint(415, "content_type", "The content type is not JSON; send the header Content-Type: application/json.")
        return Complaint(422, "body_type", f"The body is {given}; {allowed}.")
    field = str(where[0]) + "".join(f"[{part}]" for part in where[1:])
    if kind == "missing":
        return Complaint(422, f"{field}_missing", f"`{field}` is missing; {allowed}.", field)
    if kind == "extra_forbidden":
        # The name is the caller's and may be anything, of any length.
        return Complaint(422, "unknown_field", f"The body has a field that is not known; {allowed}.", field[:40])
    if kind == "string_type":
        return Complaint(422, "not_a_string", f"`{field}` is {given}; allowed is a string.", field)
    if kind == "list_type":
        return Complaint(422, "not_a_list", f"`{field}` is {given}; allowed is a list of strings.", field)
    if kind == "too_short":
        return Complaint(422, "empty_list", f"`{field}` is empty; allowed is a list of one text or more.", field)
    if kind == "value_error":
        return Complaint(422, "text_unreadable", f"`{field}` {error['ctx']['error']}.", field)
    return Complaint(422, "invalid", f"`{field}` is not valid: {error['msg']}.", field)
