"""A Space created or updated in one commit: what Docker and static Spaces have in common.

commit = upload("user/news-api", "docker", {"README.md": b"---...", "Dockerfile": Path("serve/space/Dockerfile")}, variables={"A": "1"})

The files of an upload are listed in the Space itself, so that the next one removes those that are no longer wanted; all else
that a Space holds is its owner's and stays.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, SpaceInfo
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, RepositoryNotFoundError

from pipeline.errors import UserError
from pipeline.hub_access import advice, check_write_access, limit_waiting

OURS = ".distrinews.json"  # {"files": [names]} of the last upload
FREE_WAYS = (
    "Free ways: `make deploy-page`, a static Space whose visitors' browsers run the model; the same image on any machine with Docker "
    "(configs/deploy/compose.yaml); `make serve` here."
)


def upload(
    space: str,
    sdk: Literal["docker", "static"],
    files: Mapping[str, bytes | Path],
    *,
    private: bool = False,
    variables: Mapping[str, str] | None = None,
    secrets: Mapping[str, str] | None = None,
    api: HfApi | None = None,
) -> str:
    """Puts `files` (path in the Space -> content, or a file here) into the Space `space`, made if need be; returns its commit.

    Variables and secrets are set first, so that what the commit starts finds them. One commit, which fails rather than overwrites
    when somebody else commits meanwhile; none where nothing has changed. A static Space's page cannot read either of them.

    Args:
        space: owner/name.
        private: make a new Space private; refused for one that is public.
        api: client of another Hub or with another token than the environment's.

    Raises:
        UserError: no or insufficient token, somebody else's namespace, an account that may not have Docker Spaces, a Space of
            another sdk under that name, network.
    """
    api = api or HfApi()
    limit_waiting()
    with advice(api, f"the Space {space}", "What is there already stays; run the same command again then."):
        check_write_access(space, api)
        info = _make(api, space, sdk, private)
        if variables:
            there = api.get_space_variables(space)
            for name, value in variables.items():
                if name not in there or there[name].value != value:  # each change restarts a running Space
                    api.add_space_variable(space, name, value)
        for name, value in (secrets or {}).items():  # they cannot be read back and compared
            api.add_space_secret(space, name, value)
        return _commit(api, info, files)


def _make(api: HfApi, space: str, sdk: str, private: bool) -> SpaceInfo:
    """The Space, created where there is none. Raises UserError where it cannot be had as asked for."""
    try:
        info = api.space_info(space)
    except RepositoryNotFoundError:
        try:
            api.create_repo(space, repo_type="space", space_sdk=sdk, private=private or None)
        except HfHubHTTPError as error:
            status, said = error.response.status_code, error.server_message or ""
            if sdk == "docker" and (status == 402 or (status == 403 and re.search(r"\bpro\b|subscri|paid|plan\b", said, re.IGNORECASE))):
                raise UserError(
                    f"The Hub does not let this account create the Docker Space {space} ({status}: {said or 'payment required'}): it takes "
                    f"a paid plan (PRO, for an organisation Team or Enterprise). {FREE_WAYS}"
                ) from error
            raise
        info = api.space_info(space)
    if info.sdk != sdk:
        raise UserError(f"{space} exists already as a {info.sdk} Space, and this one is {sdk}: give another name to --space, or delete it.")
    if private and not info.private:
        raise UserError(
            f"{space} exists already and is public; it was asked for as private. Make it so first (`hf repos settings {space} "
            "--repo-type space --private`), leave --private out, or choose another name."
        )
    return info


def _commit(api: HfApi, info: SpaceInfo, files: Mapping[str, bytes | Path]) -> str:
    listed = json.dumps({"files": sorted(files)}, indent=1).encode()
    earlier = [name for name in _listed(api, info) if name not in files]
    stale = [entry.path for entry in api.get_paths_info(info.id, earlier, repo_type="space", revision=info.sha)] if earlier else []
    operations = [CommitOperationDelete(name) for name in stale] + [
        CommitOperationAdd(name, content) for name, content in {**files, OURS: listed}.items()
    ]
    # The client leaves out what is there already, and makes no commit when nothing is left.
    return api.create_commit(
        info.id, operations=operations, commit_message="Deploy with DistriNews", repo_type="space", parent_commit=info.sha
    ).oid


def _listed(api: HfApi, info: SpaceInfo) -> list[str]:
    """The files of the last upload; none where there was none, or its list is no longer as we wrote it."""
    try:
        found = json.loads(Path(api.hf_hub_download(info.id, OURS, repo_type="space", revision=info.sha)).read_text(encoding="utf-8"))
        return [name for name in found["files"] if isinstance(name, str)]
    except (EntryNotFoundError, ValueError, TypeError, KeyError):
        return []
