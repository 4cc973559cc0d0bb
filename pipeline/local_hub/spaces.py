"""A space's variables, secrets and runtime. Spaces are kept here, not run. Whoever runs one (`pipeline.deploy.rehearse` does) says so
again and again, and the runtime tells what it was told last; where nobody has spoken for LEASE_SECONDS, STOPPED."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.local_hub.errors import bad_request
from pipeline.local_hub.store import Repository, timestamp
from pipeline.local_hub.web import Call, route

LEASE_SECONDS = 10
STAGES = ("BUILDING", "APP_STARTING", "RUNNING", "BUILD_ERROR", "RUNTIME_ERROR")
ITEMS = ("/api/spaces/{ns}/{name}/variables", "/api/spaces/{ns}/{name}/secrets")


@dataclass(frozen=True)
class Runner:
    """What somebody who runs a space has said of it. `told` is monotonic, in seconds."""

    told: float
    stage: str
    sha: str
    host: str | None
    error: str | None


_runners: dict[Path, Runner] = {}  # by the space's folder
_restarts: dict[Path, int] = {}  # asked for since this Hub was started


def runner(repo: Repository) -> Runner | None:
    found = _runners.get(repo.path)
    return found if found and time.monotonic() - found.told < LEASE_SECONDS else None


def runtime(repo: Repository) -> dict[str, Any]:
    meta, by = repo.meta(), runner(repo)
    found = {"stage": "STOPPED", "hardware": {"current": None, "requested": meta["hardware"]}, "gcTimeout": None, "storage": None}
    if by:
        found |= {"stage": by.stage, "sha": by.sha, "hardware": {"current": meta["hardware"], "requested": meta["hardware"]}}
        found |= {"errorMessage": by.error} if by.error else {}
    return found


@route("GET", "/api/spaces/{ns}/{name}/runtime")
def space_runtime(call: Call) -> dict[str, Any]:
    return runtime(_space(call))


@route("POST", "/api/spaces/{ns}/{name}/restart")
def restart(call: Call) -> dict[str, Any]:
    """Who runs the space learns of it with its next word."""
    repo = call.writable(_space(call))
    _restarts[repo.path] = _restarts.get(repo.path, 0) + 1
    return runtime(repo)


@route("POST", "/api/spaces/{ns}/{name}/runner")
def run_by(call: Call) -> dict[str, Any]:
    """This Hub's own: {stage, sha, host?, error?} from whoever runs the space, at least every LEASE_SECONDS; answers {restarts}."""
    repo, body = call.writable(_space(call)), call.json()
    if body.get("stage") not in STAGES or not all(isinstance(body.get(key), str | None) for key in ("sha", "host", "error")):
        raise bad_request(f"stage is one of {', '.join(STAGES)}; sha, host and error are texts.")
    _runners[repo.path] = Runner(time.monotonic(), body["stage"], body.get("sha") or "", body.get("host"), body.get("error"))
    return {"restarts": _restarts.get(repo.path, 0)}


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
