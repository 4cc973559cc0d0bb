"""A space's variables, secrets and runtime. Spaces are kept here, not run: what a deployment sets is recorded, and the
runtime says STOPPED."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from pipeline.local_hub.errors import bad_request
from pipeline.local_hub.store import Repository, timestamp
from pipeline.local_hub.web import Call, route

ITEMS = ("/api/spaces/{ns}/{name}/variables", "/api/spaces/{ns}/{name}/secrets")


def runtime(meta: dict[str, Any]) -> dict[str, Any]:
    return {"stage": "STOPPED", "hardware": {"current": None, "requested": meta["hardware"]}, "gcTimeout": None, "storage": None}


@route("GET", "/api/spaces/{ns}/{name}/runtime")
def space_runtime(call: Call) -> dict[str, Any]:
    return runtime(_space(call).meta())


def _space(call: Call) -> Repository:
    return call.repository("spaces", call.path("ns"), call.path("name"))


def _group(call: Call) -> str:
    return str(call.request.scope["path"]).rsplit("/", 1)[1]


def set_item(items: dict[str, Any], given: dict[str, Any]) -> None:
    """Set the {key, value, description} of a request."""
    if not all(isinstance(given.get(part), str) for part in ("key", "value")):
        raise bad_request("A variable or secret has the texts key and value.")
    items[given["key"]] = {"value": given["value"], "description": given.get("description"), "updatedAt": timestamp(time.time())}


def _readable(items: dict[str, Any], group: str) -> dict[str, Any]:
    """Secrets go in and do not come out."""
    return {key: {k: v for k, v in item.items() if group == "variables" or k != "value"} for key, item in items.items()}


@route("GET", *ITEMS)
def space_items(call: Call) -> dict[str, Any]:
    group = _group(call)
    return _readable(call.writable(_space(call)).meta()[group], group)


@route("POST", *ITEMS)
def set_space_item(call: Call) -> dict[str, Any]:
    return _change_items(call, lambda items, body: set_item(items, body))


@route("DELETE", *ITEMS)
def delete_space_item(call: Call) -> dict[str, Any]:
    return _change_items(call, lambda items, body: items.pop(str(body.get("key")), None))


def _change_items(call: Call, change: Callable[[dict[str, Any], dict[str, Any]], object]) -> dict[str, Any]:
    group, body, repo = _group(call), call.json(), call.writable(_space(call))
    with repo.lock:
        meta = repo.meta()
        change(meta[group], body)
        repo.save_meta(meta)
    return _readable(meta[group], group)
