"""The Hub as the service uses it: which commit a revision is, which files it has, and the few that may be fetched.

    listing = list_files("user/repo", "main")       # one API request: the commit, and every file's size
    folder = download(listing, ["config.json"])     # the commit's folder in the Hub's cache

What is wrong is a UserError in one line, `Unavailable` where it may pass by itself. Only JSON, ONNX and safetensors
files are ever fetched; no pickle, no code from the repository.
"""

from __future__ import annotations

import errno
import hashlib
import math
import os
import re
import sys
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from serve.errors import UserError

SMALL_FILES = ("config.json", "tokenizer.json", "tokenizer_config.json", "golden.json")
SMALL_BYTES = 64 << 20  # each
WEIGHTS = re.compile(r"onnx/model\.onnx|model(-\d+-of-\d+)?\.safetensors|model\.safetensors\.index\.json")
BLOB = re.compile(r"[0-9a-f]{40}|[0-9a-f]{64}")
SECONDS = 10  # for the Hub's answer to a question; downloads have the Hub client's own limits


class Unavailable(UserError):
    """The Hub, the network or the disk: trying again later makes sense, after `retry_after` seconds where the Hub asks for it."""

    def __init__(self, message: str, retry_after: float = 0.0) -> None:
        super().__init__(message)
        self.retry_after = retry_after


@dataclass(frozen=True)
class Listing:
    """The files of one commit, with their sizes in bytes."""

    repo: str
    commit: str
    files: dict[str, int] = field(repr=False)


def endpoint() -> str:
    """As messages name it: without the user and password that an address may hold."""
    return re.sub(r"^(\w+://)?[^/]*@", r"\1", os.environ.get("HF_ENDPOINT") or "https://huggingface.co")


def head(repo: str, revision: str) -> str:
    """The commit that `revision` is now: one resolver request, of which the Hub allows thousands in five minutes."""
    from huggingface_hub import HfApi, hf_hub_url
    from huggingface_hub.errors import RemoteEntryNotFoundError

    try:
        found = HfApi().get_hf_file_metadata(url=hf_hub_url(repo, "config.json", revision=revision), timeout=SECONDS)
    except RemoteEntryNotFoundError as error:  # a commit nevertheless; what it lacks is said when it is fetched
        return error.response.headers.get("X-Repo-Commit") or list_files(repo, revision).commit
    except Exception as error:
        raise explained(error, repo, revision) from error
    if not found.commit_hash:
        raise Unavailable(f"the Hub at {endpoint()} did not say which commit {repo} at {revision} is: try again later.")
    return found.commit_hash


def list_files(repo: str, revision: str) -> Listing:
    from huggingface_hub import HfApi

    try:
        found = HfApi().model_info(repo, revision=revision, files_metadata=True, timeout=SECONDS)
    except Exception as error:
        raise explained(error, repo, revision) from error
    if not found.sha:
        raise Unavailable(f"the Hub at {endpoint()} did not say which commit {repo} at {revision} is: try again later.")
    # A file without a size is not served: it could be of any.
    return Listing(repo, found.sha, {one.rfilename: math.inf if one.size is None else one.size for one in found.siblings or ()})  # type: ignore[misc]


def download(listing: Listing, names: Iterable[str], max_model_bytes: int) -> Path:
    """Brings the files `names`; returns the commit's folder in the cache. Files that are there already cost no request.

    Raises UserError for files that may not be fetched, or are too large, before anything is fetched.
    """
    from huggingface_hub import hf_hub_download
    from huggingface_hub.utils.tqdm import disable_progress_bars

    names = list(names)
    for name in names:
        if name not in SMALL_FILES and not WEIGHTS.fullmatch(name):
            raise UserError(f"{name} of {listing.repo} is none of the files that are fetched for serving.")
        if name in SMALL_FILES and listing.files[name] > SMALL_BYTES:
            raise UserError(f"{name} of {listing.repo} has {listing.files[name]} bytes: allowed are at most {SMALL_BYTES}.")
    weights = sum(listing.files[name] for name in names if name not in SMALL_FILES)
    if weights > max_model_bytes:
        raise UserError(
            f"the weights of {listing.repo} at {listing.commit} have {weights} bytes: allowed are at most {max_model_bytes}; "
            "serve a smaller model, or raise --max_model_bytes."
        )
    if not sys.stderr.isatty():
        disable_progress_bars()
    folder = Path()
    try:
        for name in names:
            path = Path(hf_hub_download(listing.repo, name, revision=listing.commit))
            folder = path.parents[name.count("/")]
    except Exception as error:
        raise explained(error, listing.repo, listing.commit, fetching=True) from error
    return folder


def cached(repo: str, revision: str) -> Path | None:
    """The folder in the Hub's cache of what `revision` (a commit, or a name as it was last seen) is; asks nobody."""
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        found = try_to_load_from_cache(repo, "config.json", revision=revision)
    except HFValidationError:
        return None
    return Path(found).parent if isinstance(found, str) else None


def remove_damaged(folder: Path) -> list[str]:
    """Removes files of a commit's folder in the cache that are not what the Hub sent, as after a power cut; their names.

    The cache names a file's content by the Hub's ETag: its sha256, or for small files git's sha1. Other servers send
    other ETags, which say nothing about the content. Raises Unavailable where a file cannot be read or removed.
    """
    damaged = []
    for path in [folder / name for name in SMALL_FILES] + [*folder.glob("onnx/model.onnx"), *folder.glob("model*.safetensors*")]:
        content = path.resolve()
        if content.parent.name != "blobs" or not BLOB.fullmatch(content.name) or not content.is_file():
            continue
        try:
            digest = hashlib.sha256() if len(content.name) == 64 else hashlib.sha1(b"blob %d\0" % content.stat().st_size)
            with content.open("rb") as file:
                while data := file.read(1 << 20):
                    digest.update(data)
            if digest.hexdigest() != content.name:
                content.unlink()
                path.unlink()
                damaged.append(path.name)
        except OSError as error:
            raise Unavailable(
                f"{path.name} of {folder.name} may be damaged in the cache, and cannot be read or removed ({error.strerror}): "
                "remove it, or set HF_HOME to a folder that can be written."
            ) from error
    return damaged


def explained(error: Exception, repo: str, revision: str, fetching: bool = False) -> Exception:
    """`error` of the Hub's client as a UserError or Unavailable; as it is where it is a defect of ours."""
    from huggingface_hub import errors as hub

    at = f"the Hub at {endpoint()}"
    # Who was just given the list of files and is not given the files: the commit is not to blame, and is not refused for it.
    denied = Unavailable if fetching else UserError
    if isinstance(error, hub.HFValidationError):
        return UserError(f"'{repo}' is neither a folder here nor a Hub id: give owner/name, or the path of a release folder.")
    if isinstance(error, hub.RevisionNotFoundError):
        return UserError(
            f"{repo} at {endpoint()} has no revision '{revision}': give one of its tags, branches or commits, or none for main."
        )
    if isinstance(error, hub.EntryNotFoundError) and not isinstance(error, hub.LocalEntryNotFoundError):
        return UserError(f"{repo} at {revision} is no release that can be served, it has no config.json: publish the release again.")
    if isinstance(error, hub.GatedRepoError):
        return denied(f"access to {repo} is gated: ask for it on the repository's page, then set HF_TOKEN.")
    if isinstance(error, hub.RepositoryNotFoundError):
        return denied(
            f"no repository {repo} at {endpoint()}, or it is private: check the spelling (owner/name), "
            "or set HF_TOKEN to a token that may read it."
        )
    if isinstance(error, hub.OfflineModeIsEnabled):
        return Unavailable("the Hub is not asked, because HF_HUB_OFFLINE is set")
    if isinstance(error, hub.HfHubHTTPError) and error.response is not None:
        status = error.response.status_code
        if status in (408, 429) or status >= 500:
            return Unavailable(f"{at} answered {status} for {repo}: try again later.", _seconds(error.response.headers.get("Retry-After")))
        return denied(f"{at} answered {status} for {repo}: check HF_TOKEN, or try again later.")
    is_network = isinstance(error, ConnectionError | TimeoutError) or type(error).__module__.split(".")[0] in (
        "httpx",
        "httpx2",
        "httpcore2",
    )
    if fetching and (is_network or isinstance(error, hub.LocalEntryNotFoundError)):
        return Unavailable(f"the connection to {at} broke while {repo} was fetched: try again, what has arrived is kept.")
    if is_network or isinstance(error, hub.LocalEntryNotFoundError):
        return Unavailable(f"{at} cannot be reached: check the network and HF_ENDPOINT.")
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return Unavailable(f"the disk is full while {repo} was fetched: free some space, or set HF_HOME to a folder with more.")
    if isinstance(error, OSError) and error.errno is not None:
        return Unavailable(f"{repo} could not be stored ({error.strerror}): set HF_HOME to a folder that can be written.")
    if isinstance(error, OSError):  # the client's check of sizes
        return Unavailable(f"{repo} did not arrive whole: try again.")
    if isinstance(error, ValueError | LookupError | TypeError):  # a page of HTML, or JSON of another shape
        return Unavailable(f"what answers at {endpoint()} does not answer as the Hub does: check the network, a proxy, and HF_ENDPOINT.")
    return error


def _seconds(retry_after: str | None) -> float:
    """Of the header; 0 where it is absent or a date."""
    return float(retry_after) if retry_after and retry_after.isdigit() else 0.0
