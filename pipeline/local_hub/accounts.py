"""Who may do what. Users, their organisations and tokens live in ROOT/accounts.json, mode 0600:

    {"local": {"organizations": ["fancyzhx"], "tokens": [{"token": "hf_...", "role": "write", "name": "first"}]}}

A token reads what its user may see and, with role write, writes into the user's own namespace and organisations. The
file is read again when it changes, so a user added while the Hub runs can log in at once.
"""

from __future__ import annotations

import hmac
import json
import os
import re
import secrets
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.errors import UserError
from pipeline.local_hub.errors import HubError
from pipeline.local_hub.store import NAME

OWNER = "local"
ROLES = ("read", "write")
RESERVED = {"api", "lfs", "models", "datasets", "spaces"}  # first words of our own routes


@dataclass(frozen=True)
class Caller:
    """Who asks: a user with one of their tokens, or nobody (`user` is None)."""

    user: str | None = None
    role: str = "read"
    token_name: str = ""
    organizations: tuple[str, ...] = ()

    def member_of(self, namespace: str) -> bool:
        return self.user is not None and namespace in (self.user, *self.organizations)

    def require_write(self, namespace: str) -> None:
        """Raises HubError 401 for nobody, 403 for a read token or somebody else's namespace."""
        if self.user is None:
            raise HubError(401, "This needs a token: log in with `hf auth login` or set HF_TOKEN.")
        if self.role != "write":
            raise HubError(403, "This token may only read: use one with the role write.")
        if not self.member_of(namespace):
            raise HubError(403, f"You don't have the rights to write under the namespace '{namespace}'.")


class Accounts:
    """The accounts file of one Hub root."""

    def __init__(self, root: Path) -> None:
        self.path = root / "accounts.json"
        self._lock = threading.Lock()
        self._read_at = -1
        self._users: dict[str, Any] = {}

    def users(self) -> dict[str, Any]:
        with self._lock:
            changed = self.path.stat().st_mtime_ns if self.path.exists() else 0
            if changed != self._read_at:
                self._users = json.loads(self.path.read_text()) if changed else {}
                self._read_at = changed
            return self._users

    def authenticate(self, header: str | None) -> Caller:
        """The caller of an `Authorization` header; nobody when it is absent. Raises HubError 401 for a bad one."""
        if not header:
            return Caller()
        given = header.removeprefix("Bearer ").strip().encode("latin-1", "replace")
        found = Caller()
        for user, account in self.users().items():
            for token in account["tokens"]:
                # No early way out: the time taken must not tell how much of a guess was right.
                if hmac.compare_digest(token["token"].encode(), given):
                    found = Caller(user, token["role"], token["name"], tuple(account["organizations"]))
        if found.user is None:
            raise HubError(401, "Invalid credentials in Authorization header")
        return found

    def add(self, user: str, role: str = "write", token: str | None = None, organizations: tuple[str, ...] = ()) -> str:
        """Make sure of the user, the organisations and one token of that role; returns the token.

        Without `token` an existing one of the role is kept. Raises UserError for a name or role that is not allowed.
        """
        for name in (user, *organizations):
            if not NAME.fullmatch(name) or name.lower() in RESERVED:
                raise UserError(f"'{name}' cannot be a namespace: allowed are letters, digits, '-', '_' and '.'; not {sorted(RESERVED)}.")
        if token is not None and not re.fullmatch("[!-~]{8,200}", token):
            raise UserError("A token has 8 to 200 printable ASCII characters and no spaces; this one does not.")
        if role not in ROLES:
            raise UserError(f"role is '{role}': allowed are {' and '.join(ROLES)}.")
        users = json.loads(json.dumps(self.users()))
        for other, account in users.items():
            theirs = {other, *(account["organizations"] if user not in users else ())}
            if other != user and (taken := theirs & {user, *organizations}):
                raise UserError(f"'{taken.pop()}' is already a namespace of the user '{other}': choose another name.")
        account = users.setdefault(user, {"organizations": [], "tokens": []})
        account["organizations"] = sorted({*account["organizations"], *organizations})
        kept = [entry for entry in account["tokens"] if entry["role"] == role and token in (None, entry["token"])]
        if not kept:
            kept = [{"token": token or f"hf_{secrets.token_hex(17)}", "role": role, "name": f"{user}-{role}"}]
            account["tokens"] += kept
        self._save(users)
        return str(kept[0]["token"])

    def revoke(self, token: str) -> None:
        """The token is good for nothing from now on; `add` with it makes it good again."""
        users = json.loads(json.dumps(self.users()))
        for account in users.values():
            account["tokens"] = [entry for entry in account["tokens"] if entry["token"] != token]
        self._save(users)

    def _save(self, users: dict[str, Any]) -> None:
        fresh = self.path.with_suffix(".new")
        # 0600 from the first byte on, and renamed in: nobody reads half a file or somebody else's token.
        with os.fdopen(os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as file:
            json.dump(users, file, indent=1)
        fresh.replace(self.path)
