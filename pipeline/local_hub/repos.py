"""Identity and whole repositories: whoami, create, delete, move, settings, information and lists."""

from __future__ import annotations

import time
from typing import Any

from starlette.responses import JSONResponse, Response

from pipeline.local_hub.cards import card_data, problems
from pipeline.local_hub.errors import HubError, bad_request, repo_not_found
from pipeline.local_hub.git import GitRepo
from pipeline.local_hub.spaces import runner, runtime, set_item
from pipeline.local_hub.store import KINDS, Repository, timestamp
from pipeline.local_hub.web import Call, route


@route("GET", "/")
def root(call: Call) -> Response:
    return Response(f"A local Hub. Set HF_ENDPOINT={call.base} and HF_HUB_DISABLE_XET=1 to use it.\n", media_type="text/plain")


@route("GET", "/api/whoami-v2")
def whoami(call: Call) -> dict[str, Any]:
    user = call.caller.user
    if user is None:
        raise HubError(401, "Invalid username or password.")
    token = {"displayName": call.caller.token_name, "role": call.caller.role}
    orgs = [{"type": "org", "id": name, "name": name, "fullname": name} for name in call.caller.organizations]
    names = {"id": user, "name": user, "fullname": user, "email": f"{user}@localhost"}
    return {"type": "user", **names, "orgs": orgs, "auth": {"type": "access_token", "accessToken": token}}


@route("POST", "/api/validate-yaml")
def validate_yaml(call: Call) -> JSONResponse:
    try:
        data = card_data(str(call.json().get("content") or ""))
    except ValueError as error:
        return JSONResponse({"errors": [{"message": str(error)}], "warnings": []}, 400)
    if found := problems(data):
        return JSONResponse({"errors": [{"message": line} for line in found], "warnings": []}, 400)
    warnings = [] if data else [{"message": "empty or missing yaml metadata in repo card"}]
    return JSONResponse({"errors": [], "warnings": warnings})


def _named(call: Call, body: dict[str, Any]) -> tuple[str, str, str]:
    """kind, namespace and name of a body that names a repository; the namespace defaults to the caller's own."""
    kind, name, namespace = KINDS.get(str(body.get("type") or "model")), body.get("name"), body.get("organization") or call.caller.user
    if kind is None:
        raise bad_request(f"type is '{body.get('type')}': allowed are {', '.join(KINDS)}.")
    if not isinstance(name, str) or not isinstance(namespace, str | None):
        raise bad_request("name and organization are texts.")
    return kind, namespace or "", name


def _visibility(body: dict[str, Any]) -> bool | None:
    """Private or not; None when the body does not say."""
    given = body.get("visibility")
    if given not in (None, "public", "private"):
        raise bad_request(f"visibility is '{given}': allowed are public and private.")
    return given == "private" if given else body.get("private")


@route("POST", "/api/repos/create")
def create(call: Call) -> JSONResponse:
    body = call.json()
    kind, namespace, name = _named(call, body)
    call.caller.require_write(namespace)
    meta: dict[str, Any] = {"private": bool(_visibility(body)), "created": time.time()}
    if kind == "spaces":
        if body.get("sdk") not in ("gradio", "streamlit", "docker", "static"):
            raise bad_request(f"sdk is '{body.get('sdk')}': allowed are gradio, streamlit, docker and static.")
        meta |= {"sdk": body["sdk"], "hardware": body.get("hardware") or "cpu-basic", "variables": {}, "secrets": {}}
        for group in ("variables", "secrets"):
            for item in call.listed(body, group):
                set_item(meta[group], item)
    try:
        repo = call.store.create(kind, namespace, name, str(call.caller.user), meta)
    except HubError as error:
        if error.status == 409:  # the client's exist_ok reads the address from this answer
            taken = call.store.find(kind, *str(error.body["id"]).split("/"))
            error.body["url"] = call.base + (taken.web_path if taken else "")
        raise
    return JSONResponse({"url": call.base + repo.web_path, "name": repo.id, "id": repo.id})


@route("DELETE", "/api/repos/delete")
def delete(call: Call) -> dict[str, Any]:
    call.store.delete(call.writable(call.repository(*_named(call, call.json()))))
    return {}


@route("POST", "/api/repos/move")
def move(call: Call) -> dict[str, Any]:
    body = call.json()
    source, target = str(body.get("fromRepo")).split("/"), str(body.get("toRepo")).split("/")
    if len(source) != 2 or len(target) != 2:
        raise bad_request("fromRepo and toRepo are OWNER/NAME.")
    kind = _named(call, {**body, "name": ""})[0]
    repo = call.writable(call.repository(kind, *source))
    call.caller.require_write(target[0])
    call.store.move(repo, *target)
    return {}


@route("PUT", "/api/{kind:kind}/{ns}/{name}/settings")
def settings(call: Call) -> dict[str, Any]:
    body, repo = call.json(), call.writable(call.repo)
    if body.get("gated"):
        raise bad_request("The local Hub does not offer gated repositories: make it private instead.")
    private = _visibility(body)
    with repo.lock:
        if private is not None:
            repo.save_meta({**repo.meta(), "private": bool(private)})
    return {}


@route("GET", "/api/{kind:kind}/{ns}/{name}/auth-check")
def auth_check(call: Call) -> dict[str, Any]:
    assert call.repo
    return {}


@route("GET", "/api/{kind:kind}/{ns}/{name}/auth-check/write")
def auth_check_write(call: Call) -> dict[str, Any]:
    call.writable(call.repo)
    return {}


@route("GET", "/api/{kind:kind}/{ns}/{name}", "/api/{kind:kind}/{ns}/{name}/revision/{rev}")
def information(call: Call) -> dict[str, Any]:
    repo = call.repo
    with repo.git() as git:
        commit = git.resolve(call.path("rev") or "main")
        info = describe(repo, git, commit)
        info["siblings"] = []
        for entry in git.files(commit).values():
            sibling: dict[str, Any] = {"rfilename": entry.path}
            if call.flag("blobs"):
                blob, pointer = git.content(entry)
                sibling |= {"size": pointer.size if pointer else len(blob), "blobId": entry.oid}
                if pointer:
                    sibling["lfs"] = {"sha256": pointer.oid, "size": pointer.size, "pointerSize": len(blob)}
            info["siblings"].append(sibling)
        return info


def describe(repo: Repository, git: GitRepo, commit: str) -> dict[str, Any]:
    """What the Hub tells of a repository at a commit, without its files."""
    meta, readme = repo.meta(), git.find(commit, "README.md")
    try:
        card = card_data(git.read(readme).decode("utf-8", "replace")) if readme else {}
    except ValueError:
        card = {}
    tags = [tag for tag in card.get("tags") or [] if isinstance(tag, str)]
    info = {
        "_id": repo.id, "id": repo.id, "author": repo.namespace, "sha": commit, "private": meta["private"],
        "gated": False, "disabled": False, "downloads": 0, "likes": 0, "tags": tags, "cardData": card,
        "createdAt": timestamp(meta["created"]), "lastModified": timestamp(git.get_commit(commit).commit_time),
    }  # fmt: skip
    if repo.kind == "models":
        info |= {"modelId": repo.id} | {key: card[key] for key in ("pipeline_tag", "library_name") if isinstance(card.get(key), str)}
    if repo.kind == "spaces":
        info |= {"sdk": meta["sdk"], "runtime": runtime(repo)}
        info |= {"host": by.host} if (by := runner(repo)) and by.host else {}
    return info


@route("GET", "/api/{kind:kind}")
def list_repositories(call: Call) -> JSONResponse:
    kind, author, search = call.path("kind"), call.query("author").lower(), call.query("search").lower()
    visible = (
        repo
        for repo in call.store.all(kind)
        if (not author or repo.namespace.lower() == author)
        and search in repo.id.lower()
        and (call.caller.member_of(repo.namespace) or not repo.meta()["private"])
    )
    page, headers = call.page(visible, f"/api/{kind}")
    found = []
    for repo in page:
        with repo.git() as git:
            found.append(describe(repo, git, git.resolve("main")))
    return JSONResponse(found, headers=headers)


@route("GET", "/api/{kind:kind}/{name}", "/api/{kind:kind}/{name}/revision/{rev}", "/{name}/resolve/{rev}/{path:path}")
def without_namespace(call: Call) -> None:
    """Ids of one word (bert-base-uncased) exist on the big Hub only."""
    raise repo_not_found(call.path("name"), anonymous=call.caller.user is None)


@route("GET", "/api/settings/repositories", "/api/organizations/{ns}/settings/repositories")
def storage(call: Call) -> JSONResponse:
    """The caller's own repositories, or an organisation's, with the bytes each takes here."""
    namespace = call.path("ns") or call.caller.user or ""
    call.caller.require_write(namespace)
    items: list[dict[str, Any]] = []
    for word, kind in KINDS.items():
        for repo in (repo for repo in call.store.all(kind) if repo.namespace == namespace):
            with repo.git() as git:
                updated = timestamp(git.get_commit(git.resolve("main")).commit_time)
            size = sum(file.stat().st_size for file in repo.path.rglob("*") if file.is_file())
            visibility = "private" if repo.meta()["private"] else "public"
            items.append({"id": repo.id, "type": word, "updatedAt": updated, "visibility": visibility, "storage": size})
    return JSONResponse(items)
