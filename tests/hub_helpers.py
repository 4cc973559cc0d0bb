"""Requests to the local Hub byte for byte as given: what the clients would refuse to send is sent too."""

from __future__ import annotations

import base64
import http.client
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit


@dataclass
class Answer:
    status: int
    headers: http.client.HTTPMessage
    body: bytes

    def json(self) -> Any:
        return json.loads(self.body)


def raw(hub: Any, method: str, path: str, token: str | None = None, body: Any = None, headers: Mapping[str, str] | None = None) -> Answer:
    """One request; `body` is bytes or what JSON can hold. `path` goes out unchanged (no normalising of `..`)."""
    sent = dict(headers or {})
    if token is not None:
        sent["Authorization"] = f"Bearer {token}"
    data = body if isinstance(body, bytes | None) else json.dumps(body).encode()
    connection = http.client.HTTPConnection(str(urlsplit(hub.url).netloc), timeout=20)
    try:
        connection.request(method, path, body=data, headers=sent)
        response = connection.getresponse()
        return Answer(response.status, response.headers, response.read())
    finally:
        connection.close()


def commit_body(*operations: tuple[str, dict[str, Any]], parent: str | None = None) -> bytes:
    """The lines of a commit request."""
    header: dict[str, Any] = {"summary": "by hand", "description": ""} | ({"parentCommit": parent} if parent else {})
    lines = [("header", header), *operations]
    return b"\n".join(json.dumps({"key": key, "value": value}).encode() for key, value in lines)


def inline(path: str, content: bytes) -> tuple[str, dict[str, Any]]:
    """The operation that writes a small file."""
    return "file", {"path": path, "content": base64.b64encode(content).decode(), "encoding": "base64"}
