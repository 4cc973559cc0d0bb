"""How a refusal looks to the Hub's clients: they read the header, not the status, to tell a missing repository from a
missing revision or file, and a HEAD has no body at all. So every message goes into both."""

from __future__ import annotations

import re

from starlette.responses import JSONResponse


class HubError(Exception):
    """A refusal. `code` is what the client maps to its exception class: RepoNotFound, RevisionNotFound, EntryNotFound.

    Statuses 408, 429 and 5xx are retried by the client for half a minute: use them only for what can pass.
    """

    def __init__(self, status: int, message: str, code: str | None = None, **headers: str) -> None:
        super().__init__(message)
        self.status, self.message, self.code = status, message, code
        self.headers = {name.replace("_", "-"): value for name, value in headers.items()}
        self.body: dict[str, object] = {"error": message}

    def response(self) -> JSONResponse:
        headers = {"X-Error-Message": re.sub(r"[^ -~]", "?", self.message), **self.headers}
        if self.code:
            headers["X-Error-Code"] = self.code
        return JSONResponse(self.body, self.status, headers)


def bad_request(message: str) -> HubError:
    return HubError(400, message)


def repo_not_found(repo_id: str, anonymous: bool) -> HubError:
    """The same answer whether it does not exist or the caller may not see it: existence is private too."""
    return HubError(401 if anonymous else 404, f"Repository not found: {repo_id}", "RepoNotFound")


def revision_not_found(revision: str) -> HubError:
    return HubError(404, f"Invalid rev id: {revision}", "RevisionNotFound")


def entry_not_found(path: str, commit: str) -> HubError:
    # X-Repo-Commit lets the client remember in its cache that this commit has no such file.
    return HubError(404, f"Entry not found: {path}", "EntryNotFound", X_Repo_Commit=commit)
