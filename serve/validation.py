"""From a request's bytes to its checked body, or one sentence: what was given, what is allowed. It never quotes a text."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, TypeVar

from pydantic import ValidationError

from serve.errors import Refusal
from serve.schemas import Body, Parameters

AnyBody = TypeVar("AnyBody", bound=Body)

_JSON = re.compile(rb"application/([^\s/;+]+\+)*json")  # in lower case, without parameters
_KINDS = {dict: "an object", list: "a list", str: "a string", bool: "true or false", int: "a number", float: "a number", type(None): "null"}
# What the parser's own words leave in the dark.
_NOT_JSON = {
    "hex escape": "half a character, a lone surrogate such as \\ud800, or another broken \\u escape",
    "invalid unicode": "bytes that are not UTF-8",
}


def check_content(headers: Mapping[bytes, bytes]) -> None:
    """Raises Refusal (415) unless the body is plain JSON in UTF-8."""
    if headers.get(b"content-encoding", b"identity").lower() != b"identity":
        raise Refusal(415, "content_encoding", "The body is compressed; allowed is plain JSON, without the header Content-Encoding.")
    given = headers.get(b"content-type", b"")
    if given == b"application/json":
        return
    # Not with Python's own parsers: they fail on some headers, and look for a module for every charset they do not know.
    kind, *parameters = given.lower().split(b";")
    if not _JSON.fullmatch(kind.strip()):
        raise Refusal(415, "content_type", "The content type is not JSON; send the header Content-Type: application/json.")
    for parameter in parameters:
        name, _, value = parameter.partition(b"=")
        if name.partition(b"*")[0].strip() == b"charset" and value.strip(b' \t"') not in (b"utf-8", b"utf8"):
            raise Refusal(415, "charset", "The content type names another charset than the one that is allowed, utf-8.")


def read(kind: type[AnyBody], body: bytes) -> AnyBody:
    """The checked body. Raises Refusal, 400 for what is not JSON and 422 for JSON of another shape."""
    if not body:
        raise Refusal(422, "body_missing", f"The body is empty; allowed is JSON like {kind.allowed}.")
    try:
        return kind.model_validate_json(body)
    except ValidationError as error:
        raise _refusal(error.errors(include_url=False)[0], kind.allowed) from None  # the error quotes the text


def _refusal(error: Mapping[str, Any], example: str) -> Refusal:
    kind, where, given = error["type"], error["loc"], _KINDS.get(type(error["input"]), "something else")
    allowed = f"allowed is JSON like {example}"
    if kind == "json_invalid":
        reason = error["ctx"]["error"]
        for words, meaning in _NOT_JSON.items():
            if words in reason:
                reason = f"{meaning}, at {reason.partition(' at ')[2]}"
        return Refusal(400, "not_json", f"The body is not JSON ({reason}); {allowed}.")
    if not where:
        return Refusal(422, "body_type", f"The body is {given}; {allowed}.")
    field = str(where[0]) + "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in where[1:])
    if kind == "missing":
        return Refusal(422, f"{field}_missing", f"`{field}` is missing; {allowed}.", field=field)
    if kind == "extra_forbidden":
        # The name is the caller's and may be anything, of any length.
        if len(where) > 1:
            allowed = f"allowed are {', '.join(Parameters.model_fields)}"
        return Refusal(422, "unknown_field", f"The body has a field that is not known; {allowed}.", field=field[:60])
    code, wanted = {
        "string_type": ("not_a_string", "a string"),
        "list_type": ("not_a_list", "a string or a list of strings" if field == "inputs" else "a list of strings"),
        "model_type": ("not_an_object", "an object"),
        "bool_type": ("not_a_boolean", "true or false"),
        "int_type": ("not_a_whole_number", "a whole number of 1 or more"),
        "literal_error": ("unknown_value", str(error.get("ctx", {}).get("expected"))),
    }.get(kind, ("", ""))
    if code:
        given = "another value" if kind == "literal_error" else given
        return Refusal(422, code, f"`{field}` is {given}; allowed is {wanted}.", field=field)
    if kind == "greater_than_equal":
        return Refusal(422, "too_small", f"`{field}` is less than 1; allowed is a whole number of 1 or more.", field=field)
    if kind == "too_short":
        return Refusal(422, "empty_list", f"`{field}` is empty; allowed is a list of one text or more.", field=field)
    if kind in ("value_error", "string_too_short"):
        reason = error["ctx"]["error"] if kind == "value_error" else "is blank; allowed is any text with at least one character to read"
        return Refusal(422, "text_unreadable", f"`{field}` {reason}.", field=field)
    return Refusal(422, "invalid", f"`{field}` is not valid: {error['msg']}.", field=field)
