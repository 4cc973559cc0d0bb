"""What the local Hub must refuse: escapes, strangers, bad tokens, other people's files, and bodies that make no sense."""

from __future__ import annotations

import hashlib
import os
import socket
import time
import uuid
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
from hub_helpers import commit_body, inline, raw
from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError, RepositoryNotFoundError
from starlette.testclient import TestClient

pytestmark = pytest.mark.timeout(60)


@pytest.fixture(scope="module")
def stranger(local_hub: Any) -> str:
    """A write token of another user."""
    return str(local_hub.add_user("alice"))


@pytest.fixture(scope="module")
def reader(local_hub: Any) -> str:
    """A token of the owner that may only read."""
    return str(local_hub.add_user(local_hub.user, role="read"))


@pytest.fixture
def api(local_hub: Any) -> HfApi:
    return HfApi(endpoint=local_hub.url, token=local_hub.token)


@pytest.fixture
def public(api: HfApi) -> str:
    repo_id = f"local/public-{uuid.uuid4().hex[:8]}"
    api.create_repo(repo_id)
    return repo_id


@pytest.fixture
def private(api: HfApi) -> str:
    repo_id = f"local/private-{uuid.uuid4().hex[:8]}"
    api.create_repo(repo_id, private=True)
    api.upload_file(path_or_fileobj=b"nobody's business", path_in_repo="secret.txt", repo_id=repo_id)
    return repo_id


def status(error: pytest.ExceptionInfo[HfHubHTTPError]) -> int:
    return int(error.value.response.status_code)


BAD_PATHS = [
    *("", "/", "/etc/passwd", "../x", "a/../../x", "a/..", "./a", "a/.", "a//b", "a/", ".git", ".git/config", "a/.GIT/hooks/x"),
    *(".git./x", "git~1/x", ".git::$INDEX_ALLOCATION/x", "a\x00b", "a\nb", "a\\..\\b", "x" * 1001, "\ud800"),
]


def test_paths_that_escape(local_hub: Any, api: HfApi, public: str) -> None:
    head = api.model_info(public).sha
    for path in BAD_PATHS:
        for operation in (inline(path, b"x"), ("deletedFile", {"path": path})):
            answer = raw(local_hub, "POST", f"/api/models/{public}/commit/main", local_hub.token, commit_body(operation))
            assert answer.status == 400, (path, answer)
        files = {"files": [{"path": path, "sample": "", "size": 1}]}
        assert raw(local_hub, "POST", f"/api/models/{public}/preupload/main", local_hub.token, files).status == 400, path
    both = commit_body(inline("a", b"file"), inline("a/b", b"and directory"))
    assert raw(local_hub, "POST", f"/api/models/{public}/commit/main", local_hub.token, both).status == 400
    assert api.model_info(public).sha == head


def test_addresses_that_escape(local_hub: Any, api: HfApi, public: str) -> None:
    up = "..%2F..%2F..%2F..%2F..%2Faccounts.json"
    for path in (
        f"/{public}/resolve/main/{up}", f"/{public}/resolve/main/../../../../../accounts.json", f"/{public}/resolve/{up}/x",
        f"/{public}/resolve/main/%2E%2E/meta.json", f"/local/..%2F{public.split('/')[1]}/resolve/main/.gitattributes",
        f"/api/models/local/{up}", "/api/models/local/..", "/api/models/../../accounts.json", "/api/models/%2E%2E/accounts.json",
        f"/api/models/{public}/tree/main/{up}", f"/api/models/{public}/tree/{up}", f"/api/models/{public}/commits/{up}",
        "//accounts.json", "/%00", f"/{public}/resolve/main/%00", f"/{public}/resolve/%00/x", f"/{public}/resolve/main/%ff%fe",
        f"/api/models/{public}%00/refs", f"/{public}/resolve/main/" + "a/" * 2000, f"/{public}/resolve/main/a%0d%0aX-Evil:1",
    ):  # fmt: skip
        answer = raw(local_hub, "GET", path, local_hub.token)
        assert answer.status == 404 and local_hub.token.encode() not in answer.body, (path, answer)
        assert "X-Evil" not in answer.headers
    for name in ("..", ".", ".git", "a/b", "a.git", "-a", "a--b", "a..b", "x" * 97, "", "a\x00", "a\n", "größe", "..%2fa"):
        created = raw(local_hub, "POST", "/api/repos/create", local_hub.token, {"name": name})
        moved = raw(local_hub, "POST", "/api/repos/move", local_hub.token, {"fromRepo": public, "toRepo": f"local/{name}"})
        assert (created.status, moved.status) == (400, 400), name
    for name in ("../../x", "a..b", "a.lock", ".a", "a b", "a~1", "a:b", "a\x00", "HEAD^", "@{", "a" * 40, "a//b", "a/"):
        body = {"tag": name}
        assert raw(local_hub, "POST", f"/api/models/{public}/tag/main", local_hub.token, body).status == 400, name
    assert api.list_repo_refs(public).tags == []


def test_only_its_own_namespaces(local_hub: Any, api: HfApi, public: str, stranger: str) -> None:
    alice = HfApi(endpoint=local_hub.url, token=stranger)
    alice.create_repo("alice/own", exist_ok=True)
    for attempt in (
        lambda: alice.create_repo("local/mine"),
        lambda: alice.create_repo("fancyzhx/mine"),
        lambda: alice.create_repo("nobody/mine"),
        lambda: alice.upload_file(path_or_fileobj=b"x", path_in_repo="x", repo_id=public),
        lambda: alice.create_branch(public, branch="x"),
        lambda: alice.create_tag(public, tag="x"),
        lambda: alice.super_squash_history(public),
        lambda: alice.update_repo_settings(public, private=True),
        lambda: alice.delete_repo(public),
        lambda: alice.move_repo(public, "alice/taken"),
        lambda: alice.move_repo("alice/own", "local/given"),
        lambda: alice.auth_check(public, write=True),
    ):
        with pytest.raises(HfHubHTTPError) as raised:
            attempt()
        assert status(raised) == 403
    batch = raw(local_hub, "POST", f"/{public}.git/info/lfs/objects/batch", stranger, {"operation": "upload", "objects": []})
    assert batch.status == 403
    assert api.repo_exists(public) and alice.repo_exists(public) and not api.model_info(public).private
    api.create_repo("fancyzhx/ours", exist_ok=True)  # an organisation of the owner


def test_a_read_token_reads(local_hub: Any, public: str, private: str, reader: str, tmp_path: Path) -> None:
    api = HfApi(endpoint=local_hub.url, token=reader)
    assert Path(api.hf_hub_download(private, "secret.txt", cache_dir=tmp_path)).read_text() == "nobody's business"
    for attempt in (
        lambda: api.create_repo("local/by-reader"),
        lambda: api.upload_file(path_or_fileobj=b"x", path_in_repo="x", repo_id=public),
        lambda: api.create_tag(public, tag="x"),
        lambda: api.delete_repo(public),
    ):
        with pytest.raises(HfHubHTTPError) as raised:
            attempt()
        assert status(raised) == 403


def test_bad_tokens_and_none(local_hub: Any, public: str, private: str) -> None:
    for token in ("hf_wrong", local_hub.token[:-1], local_hub.token + "0", local_hub.token.upper(), "größe"):
        for method, path in (("GET", f"/api/models/{public}"), ("GET", "/api/whoami-v2"), ("POST", "/api/repos/create")):
            answer = raw(local_hub, method, path, headers={"Authorization": f"Bearer {token}".encode().decode("latin-1")})
            assert answer.status == 401 and answer.headers["X-Error-Message"], token
    nobody = HfApi(endpoint=local_hub.url, token=False)
    assert nobody.model_info(public).id == public
    with pytest.raises(HfHubHTTPError) as raised:
        nobody.upload_file(path_or_fileobj=b"x", path_in_repo="x", repo_id=public)
    assert status(raised) == 401
    assert raw(local_hub, "GET", "/api/whoami-v2").status == 401


def test_private_is_as_if_it_were_not(local_hub: Any, private: str, stranger: str, tmp_path: Path) -> None:
    for token, code in ((stranger, 404), (None, 401)):
        api = HfApi(endpoint=local_hub.url, token=token or False)
        with pytest.raises(RepositoryNotFoundError):
            api.hf_hub_download(private, "secret.txt", cache_dir=tmp_path)
        assert private not in [info.id for info in api.list_models()]
        for repo_id in (private, private.upper(), "local/never-was"):
            api_path = f"/api/models/{repo_id}"
            for method, path in (
                *[("GET", f"{api_path}{rest}") for rest in ("", "/tree/main", "/refs", "/commits/main", "/auth-check", "/revision/main")],
                ("HEAD", f"/{repo_id}/resolve/main/secret.txt"),
                ("GET", f"/{repo_id}/resolve/main/secret.txt"),
                ("POST", f"{api_path}/paths-info/main"),
                ("POST", f"{api_path}/commit/main"),
                ("POST", f"/{repo_id}.git/info/lfs/objects/batch"),
            ):
                answer = raw(local_hub, method, path, token, {} if method == "POST" else None)
                assert (answer.status, answer.headers["X-Error-Code"]) == (code, "RepoNotFound"), (method, path)


def test_knowing_a_hash_gives_nothing(local_hub: Any, api: HfApi, private: str, stranger: str) -> None:
    secret = os.urandom(5000)
    oid = hashlib.sha256(secret).hexdigest()
    api.upload_file(path_or_fileobj=secret, path_in_repo="weights.bin", repo_id=private)
    thief = f"alice/thief-{uuid.uuid4().hex[:8]}"
    HfApi(endpoint=local_hub.url, token=stranger).create_repo(thief)

    ask = {"operation": "upload", "objects": [{"oid": oid, "size": len(secret)}]}
    batch = raw(local_hub, "POST", f"/{thief}.git/info/lfs/objects/batch", stranger, ask).json()
    assert "upload" in batch["objects"][0]["actions"]  # the bytes are wanted: "already there" would tell that somebody has it
    own = raw(local_hub, "POST", f"/{private}.git/info/lfs/objects/batch", local_hub.token, ask).json()
    assert "actions" not in own["objects"][0]
    attach = commit_body(("lfsFile", {"path": "mine.bin", "algo": "sha256", "oid": oid, "size": len(secret)}))
    assert raw(local_hub, "POST", f"/api/models/{thief}/commit/main", stranger, attach).status == 400
    pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{oid}\nsize {len(secret)}\n".encode()
    assert raw(local_hub, "POST", f"/api/models/{thief}/commit/main", stranger, commit_body(inline("mine.bin", pointer))).status == 200
    assert raw(local_hub, "GET", f"/{thief}/resolve/main/mine.bin", stranger).body == pointer  # text like any other


def upload_address(hub: Any, repo_id: str, content: bytes) -> str:
    ask = {"operation": "upload", "objects": [{"oid": hashlib.sha256(content).hexdigest(), "size": len(content)}]}
    answer = raw(hub, "POST", f"/{repo_id}.git/info/lfs/objects/batch", hub.token, ask).json()
    return str(answer["objects"][0]["actions"]["upload"]["href"]).removeprefix(hub.url)


def test_upload_addresses_are_bound(local_hub: Any, api: HfApi, public: str) -> None:
    other = public + "-2"
    api.create_repo(other)
    content = os.urandom(200_000)
    path = upload_address(local_hub, public, content)
    later = path.replace("expires=", "expires=9")
    longer = path.replace(f"/{len(content)}?", f"/{len(content)}0?")
    other_oid = path.replace(hashlib.sha256(content).hexdigest(), "0" * 64)
    for changed in (path.replace(public, other), later, longer, other_oid, path[:-1], path.split("?")[0], path.replace("expires=", "x=")):
        assert raw(local_hub, "PUT", changed, body=content).status == 403, changed
    assert raw(local_hub, "PUT", path, body=content[:-1] + b"!").status == 400  # another sha256
    assert raw(local_hub, "PUT", path, body=content[:-1]).status == 400
    assert raw(local_hub, "PUT", path, body=content + b"!").status == 413
    with socket.create_connection(("127.0.0.1", urlsplit(local_hub.url).port or 0)) as cut:
        head = f"PUT {path} HTTP/1.1\r\nHost: x\r\nContent-Length: {len(content)}\r\n\r\n"
        cut.sendall(head.encode() + content[:100_000])
    deadline = time.monotonic() + 10
    while any((local_hub.root / "temp").iterdir()) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any((local_hub.root / "temp").iterdir())
    assert [p for p in (local_hub.root / "models" / public / "repo.git" / "lfs").rglob("*") if p.is_file()] == []
    assert raw(local_hub, "PUT", path, body=content).status == 200
    lfs = commit_body(("lfsFile", {"path": "w.bin", "algo": "sha256", "oid": hashlib.sha256(content).hexdigest(), "size": len(content)}))
    assert raw(local_hub, "POST", f"/api/models/{public}/commit/main", local_hub.token, lfs).status == 200
    assert raw(local_hub, "GET", f"/{public}/resolve/main/w.bin").body == content


def test_upload_addresses_expire(tmp_path: Path) -> None:
    from pipeline.local_hub.accounts import Accounts
    from pipeline.local_hub.app import create_app

    token = Accounts(tmp_path).add("local")
    with TestClient(create_app(tmp_path, upload_seconds=-1), headers={"Authorization": f"Bearer {token}"}) as client:
        assert client.post("/api/repos/create", json={"name": "m"}).status_code == 200
        ask = {"operation": "upload", "objects": [{"oid": hashlib.sha256(b"x").hexdigest(), "size": 1}]}
        href = client.post("/local/m.git/info/lfs/objects/batch", json=ask).json()["objects"][0]["actions"]["upload"]["href"]
        answer = client.put(href, content=b"x")
        assert (answer.status_code, "expired" in answer.json()["error"]) == (403, True)


def test_a_large_refused_upload_shows_the_reason(local_hub: Any, public: str) -> None:
    content = bytes(30_000_000)  # far more than socket buffers hold: closing early would look like a broken network
    answer = raw(local_hub, "PUT", upload_address(local_hub, public, content)[:-1], body=content)
    assert (answer.status, "not signed" in answer.json()["error"]) == (403, True)


def test_what_is_not_offered_says_so(local_hub: Any, api: HfApi, public: str) -> None:
    with pytest.raises(HfHubHTTPError, match="pull requests"):
        api.upload_file(path_or_fileobj=b"x", path_in_repo="x", repo_id=public, create_pr=True)
    with pytest.raises(HfHubHTTPError, match="gated"):
        api.update_repo_settings(public, gated="auto")
    with pytest.raises(HfHubHTTPError, match="main cannot be deleted"):
        api.delete_branch(public, branch="main")
    assert raw(local_hub, "GET", f"/api/models/{public}/discussions", local_hub.token).status == 404
    assert raw(local_hub, "PUT", "/api/whoami-v2", local_hub.token).status == 405


WRONG: list[Any] = [3, "x", [3], {"a": 1}, [{}]]
FIELDS = ("name", "organization", "type", "files", "objects", "tag", "key")
BODIES: list[Any] = [
    *(b"", b"{", b"[]", b'"x"', b"\xff", b"[" * 100_000, b'{"a": ' + b"9" * 5000 + b"}"),
    b'{"name": "\\ud800", "organization": "\\ud800"}',  # half a surrogate pair
    *({field: wrong} for field in FIELDS for wrong in WRONG),
    {"operation": "upload", "objects": [{"oid": "x", "size": 1}, {"oid": "0" * 64, "size": -1}]},
    *(b'{"key": "header"}', b'{"key": "header", "value": 3}', b'{"key": "file", "value": {"path": "x"}}', b'{"key": 1, "value": {}}'),
    *(commit_body((key, {})) for key in ("file", "lfsFile", "deletedFile", "deletedFolder", "copy")),
    *(commit_body((key, {"path": path})) for key in ("file", "lfsFile", "deletedFile", "deletedFolder", "copy") for path in (3, "x")),
    commit_body(("file", {"path": "x", "content": "%%%", "encoding": "base64"})),
    *(commit_body(parent=parent) for parent in ("main", "0" * 40)),
]


def test_a_card_that_would_expand_is_refused(local_hub: Any, public: str) -> None:
    bomb = "---\na0: &a0 [x]\n" + "".join(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]\n" for n in range(1, 12)) + "---\n"
    answer = raw(local_hub, "POST", "/api/validate-yaml", body={"content": bomb})
    assert (answer.status, "aliases" in answer.json()["errors"][0]["message"]) == (400, True)
    push = commit_body(inline("README.md", bomb.encode()))  # by a client that does not ask first
    assert raw(local_hub, "POST", f"/api/models/{public}/commit/main", local_hub.token, push).status == 200
    assert raw(local_hub, "GET", f"/api/models/{public}").json()["cardData"] == {}


def test_no_body_breaks_the_server(local_hub: Any, public: str) -> None:
    for path in (
        "POST /api/repos/create", "DELETE /api/repos/delete", "POST /api/repos/move", f"PUT /api/models/{public}/settings",
        f"POST /api/models/{public}/preupload/main", f"POST /api/models/{public}/commit/main", f"POST /api/models/{public}/tag/main",
        f"POST /{public}.git/info/lfs/objects/batch", "POST /api/validate-yaml", f"POST /api/models/{public}/paths-info/main",
        f"POST /api/models/{public}/super-squash/none", f"POST /api/models/{public}/branch/b%20d",
    ):  # fmt: skip
        for body in BODIES:
            method, address = path.split(" ")
            answer = raw(local_hub, method, address, local_hub.token, body)
            assert answer.status < 500 and isinstance(answer.json(), dict | list), (path, body, answer)
    for query in ("cursor=x", "cursor=-1", "limit=0", "cursor=" + "9" * 5000, "limit=" + "9" * 30):
        assert raw(local_hub, "GET", f"/api/models/{public}/tree/main?{query}").status in (200, 400)
    anonymous = raw(local_hub, "POST", "/api/validate-yaml", body={"content": "x" * 2_000_000})
    assert anonymous.status == 413
    assert b"Traceback" not in local_hub.log.read_bytes()
