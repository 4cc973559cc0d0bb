"""Large files: the git-lfs batch call, and uploads to signed addresses, checked against their sha256 while they stream in.

An object belongs to the repository it was uploaded to. Knowing another repository's sha256 gives nothing: `batch` asks
for the bytes, and a commit refuses a pointer to an object that its own repository lacks.
"""

from __future__ import annotations

import hashlib
import hmac
import re
import secrets
import shutil
import time
import uuid
from pathlib import Path
from typing import IO, Any
from urllib.parse import urlencode

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from pipeline.local_hub.errors import HubError, bad_request, repo_not_found
from pipeline.local_hub.store import Store
from pipeline.local_hub.web import ROUTES, Call, in_thread, receive, route

SHA256 = re.compile("[0-9a-f]{64}")


class Signer:
    """Signs upload addresses: the client sends no token there. The key lives as long as the process."""

    def __init__(self, seconds: float = 3600) -> None:
        self.seconds = seconds
        self._key = secrets.token_bytes(32)

    def _signature(self, what: str, expires: str) -> str:
        return hmac.new(self._key, f"{what} {expires}".encode(), hashlib.sha256).hexdigest()

    def sign(self, what: str) -> dict[str, str]:
        expires = str(int(time.time() + self.seconds))
        return {"expires": expires, "signature": self._signature(what, expires)}

    def check(self, what: str, expires: str, signature: str) -> None:
        """Raises HubError 403 unless `sign(what)` gave this and its time has not run out."""
        if not hmac.compare_digest(self._signature(what, expires).encode(), signature.encode()):
            raise HubError(403, "This upload address was not signed by this Hub: ask for a new one.")
        if int(expires) < time.time():
            raise HubError(403, "This upload address has expired: start the upload again.")


class _Hashing:
    """A file that also hashes what is written to it."""

    def __init__(self, file: IO[bytes]) -> None:
        self.file, self.sha256 = file, hashlib.sha256()

    def write(self, data: bytes) -> int:
        self.sha256.update(data)
        return self.file.write(data)


@route("POST", *(f"{prefix}/{{ns}}/{{name}}.git/info/lfs/objects/batch" for prefix in ("", "/{kind:kind}")))
def batch(call: Call) -> JSONResponse:
    body, repo = call.json(), call.writable(call.repo)
    if body.get("operation") != "upload":
        raise bad_request("The local Hub offers the operation upload here; files are downloaded from resolve/.")
    signer: Signer = call.request.app.state.signer
    free = shutil.disk_usage(call.store.root).free
    objects: list[dict[str, Any]] = []
    with repo.git() as git:
        for given in call.listed(body, "objects"):
            oid, size = given.get("oid"), given.get("size")
            if not isinstance(oid, str) or not SHA256.fullmatch(oid) or not isinstance(size, int) or size < 0:
                raise bad_request("Every object has an oid, 64 hexadecimal digits, and a size in bytes.")
            answer: dict[str, Any] = {"oid": oid, "size": size}
            if size > free:
                answer["error"] = {"code": 507, "message": f"The Hub's disk has {free} bytes free; the file has {size}."}
            elif not git.lfs_path(oid).is_file():
                where = f"/lfs/{repo.kind}/{repo.id}/{oid}/{size}"
                answer["actions"] = {"upload": {"href": f"{call.base}{where}?{urlencode(signer.sign(where))}"}}
            objects.append(answer)
    return JSONResponse({"transfer": "basic", "objects": objects}, media_type="application/vnd.git-lfs+json")


async def upload(request: Request) -> Response:
    """Receive one object. It appears under its sha256 when every byte has arrived and matched, or not at all."""
    store: Store = request.app.state.store
    request.app.state.signer.check(
        request.scope["path"], request.query_params.get("expires", ""), request.query_params.get("signature", "")
    )
    kind, namespace, name, oid, size = (request.path_params[part] for part in ("kind", "ns", "name", "oid", "size"))
    part = store.temp / uuid.uuid4().hex
    try:
        with part.open("wb") as file:
            hashing = _Hashing(file)
            received = await receive(request, hashing, int(size))
        if received != int(size) or hashing.sha256.hexdigest() != oid:
            raise bad_request(f"The {received} bytes received are not the {size} bytes with sha256 {oid}.")
        await in_thread(_keep, store, kind, namespace, name, oid, part)
    finally:
        part.unlink(missing_ok=True)
    return Response()


def _keep(store: Store, kind: str, namespace: str, name: str, oid: str, part: Path) -> None:
    repo = store.find(kind, namespace, name)
    if repo is None:
        raise repo_not_found(f"{namespace}/{name}", anonymous=False)
    with repo.git() as git:
        target = git.lfs_path(oid)
    # One level at a time from what exists: a repository deleted meanwhile must not come back as an empty folder.
    for folder in (target.parent.parent, target.parent):
        folder.mkdir(exist_ok=True)
    part.replace(target)


ROUTES.append(Route("/lfs/{kind:kind}/{ns}/{name}/{oid}/{size}", upload, methods=["PUT"]))
