"""What releases and checkpoints on the Hub have in common: the right to write, refusals in plain words, limits to waiting."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, get_token, set_client_factory
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from huggingface_hub.utils import validate_repo_id
from huggingface_hub.utils._http import default_client_factory
from huggingface_hub.utils.sha import git_hash, sha_fileobj

from pipeline.errors import UserError, explain

STALLED_SECONDS = 60  # without a byte going out or coming in; a commit of large files takes the Hub some seconds


def limit_waiting(seconds: float = STALLED_SECONDS) -> None:
    """Give up on a Hub that accepts a connection and then says nothing. For this process's Hub clients, from now on.

    huggingface_hub sets no limit of its own on most requests, so a stalled one would wait for ever. A slow one is no
    stalled one: only the time in which nothing moves counts.
    """

    def limit(request: Any) -> None:
        given = request.extensions.get("timeout", {})
        request.extensions["timeout"] = {kind: given.get(kind) or seconds for kind in ("connect", "read", "write", "pool")}

    def client() -> Any:
        made = default_client_factory()
        # A hook and no default: many of the client's own calls pass "no limit" explicitly.
        made.event_hooks = {**made.event_hooks, "request": [*made.event_hooks["request"], limit]}
        return made

    set_client_factory(client)


def check_write_access(repo: str, api: HfApi) -> None:
    """Raises UserError unless `repo` is a legal name in a namespace that the token may write to."""
    try:
        validate_repo_id(repo)
    except HFValidationError as error:
        raise UserError(f"'{repo}' cannot be a repository: {str(error).splitlines()[0]} Allowed is owner/name.") from error
    owner, slash, _ = repo.partition("/")
    if not slash:
        raise UserError(f"'{repo}' names no owner: allowed is owner/name, for example your-name/{repo}.")
    if not (api.token or get_token()):
        raise UserError(f"Publishing to {repo} needs a token: run `hf auth login`, or set HF_TOKEN to a token with the right to write.")
    try:
        me = api.whoami()
    except HfHubHTTPError as error:
        if error.response.status_code != 401:
            raise
        raise UserError(
            f"The Hub at {api.endpoint} does not know this token. HF_TOKEN goes before a stored login: set it to a valid one, or "
            "unset it and run `hf auth login`."
        ) from error
    token = me.get("auth", {}).get("accessToken", {})
    if token.get("role") == "read":
        raise UserError(
            f"The token '{token.get('displayName', '')}' of {me['name']} may only read. Make one with the right to write under "
            "Settings > Access Tokens, then `hf auth login` or set HF_TOKEN."
        )
    organisations = {entry["name"]: entry.get("roleInOrg") for entry in me.get("orgs", [])}
    allowed = [me["name"], *(name for name, role in organisations.items() if role != "read")]
    if owner not in allowed:
        raise UserError(f"You are {me['name']} and may not write to '{owner}'. Allowed are {', '.join(f'{name}/...' for name in allowed)}.")
    scoped = token.get("fineGrained", {}).get("scoped")
    if token.get("role") == "fineGrained" and scoped is not None:
        rights = {right for scope in scoped if scope["entity"].get("name") in (owner, repo) for right in scope["permissions"]}
        if "repo.write" not in rights:
            raise UserError(
                f"The fine-grained token '{token.get('displayName', '')}' may not write to {repo}: give it write access to {owner}."
            )


def require_private(repo: str, api: HfApi) -> None:
    """Raises UserError where the repository is public: what was asked for as private must not go there."""
    if not api.model_info(repo).private:
        raise UserError(
            f"{repo} exists already and is public; it was asked for as private. Make it so first (`hf repos settings {repo} "
            "--private`), leave --private out, or choose another name."
        )


def same_content(entry: Any, content: Path | bytes, sha256: str | None = None) -> bool:
    """Whether a file of a repository (a RepoFile, or None where there is none) has this content, compared by hash.

    `sha256` saves reading a large file where its hash is known.
    """
    if entry is None:
        return False
    if entry.lfs is None:
        return git_hash(content if isinstance(content, bytes) else content.read_bytes()) == entry.blob_id
    if sha256 is None:
        assert isinstance(content, Path), "content held in memory is no large file"
        with content.open("rb") as file:
            sha256 = sha_fileobj(file).hex()
    return sha256 == entry.lfs.sha256


@contextlib.contextmanager
def advice(api: HfApi, repo: str, afterwards: str) -> Iterator[None]:
    """The Hub's refusals as one line that a person can act on; `afterwards` says how to go on."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        line = advice_line(error, api, repo)
        if line is None:
            raise
        raise UserError(f"{line} {afterwards}") from error


def advice_line(error: Exception, api: HfApi, repo: str) -> str | None:
    """The one line for what the Hub or the way to it did, or None where it is a defect of ours. Signed addresses are cut short."""
    line = _advice_line(error, api, repo)
    return re.sub(r"(https?://[^\s?]+)\?\S+", r"\1", line) if line else None


def _advice_line(error: Exception, api: HfApi, repo: str) -> str | None:
    response = getattr(error, "response", None)
    status = getattr(response, "status_code", None)
    said = getattr(error, "server_message", None) or ""
    if status == 412:
        return f"Somebody else committed to {repo} meanwhile, so nothing was put over theirs."
    if status in (402, 413, 507) or (status == 403 and re.search(r"quota|storage|limit|exceed|upgrade", said, re.IGNORECASE)):
        return f"The Hub has no room for {repo} ({status}: {said or 'quota'}). Delete old repositories or get more storage."
    if status == 409:
        return f"The Hub at {api.endpoint} refused {repo} for a clash ({said or 'conflict'}): run it again, or choose another name."
    # The client lets its HTTP library's own errors through, and Xet's, which are Python's.
    if "HF_HUB_DISABLE_XET" not in str(error) and {kind.__name__ for kind in type(error).__mro__} & {
        "TransportError",
        "ConnectionError",
        "TimeoutError",
    }:
        return f"The Hub at {api.endpoint} cannot be reached ({str(error) or type(error).__name__}). Check the network and HF_ENDPOINT."
    if line := explain(error):
        return line
    if isinstance(error, ValueError) and "README.md" in str(error):
        return f"The Hub refuses the model card: {' '.join(str(error).split())}. Correct README.md in the release folder."
    return None
