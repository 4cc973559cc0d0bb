"""Where the name of a model or a dataset leads: a folder here, or a commit on the Hub.

Imports no torch: a wrong name is told before seconds go into imports.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from huggingface_hub import HfApi, constants, errors, snapshot_download

from pipeline.errors import UserError


def find_commit(kind: Literal["model", "dataset"], name: str, revision: str | None) -> str | None:
    """The commit that `revision` of the Hub repository stands for now; None where the Hub is away, or not to be asked.

    Asked before anything is downloaded: the answers are precise, and a Hub that is not there costs no minute of
    retries. Raises UserError for a repository or revision that is not there.
    """
    if constants.HF_HUB_OFFLINE:
        return None
    api = HfApi()
    try:
        return (api.model_info if kind == "model" else api.dataset_info)(name, revision=revision, timeout=20).sha
    except errors.GatedRepoError:
        raise  # it is there: errors.explain says how to get access
    except errors.RevisionNotFoundError as error:
        raise UserError(
            f"The {kind} {name} has no revision '{revision}' at {constants.ENDPOINT}. Give one of its branches, tags or commits as "
            f"{kind}_revision, or leave it out for main."
        ) from error
    except (errors.RepositoryNotFoundError, errors.HFValidationError) as error:
        raise UserError(
            f"No such repository. No {kind} '{name}' on the Hub at {constants.ENDPOINT} that your token may see, and no such file or folder "
            f"here. Check the spelling (owner/name); for a private {kind} `hf auth login` or set HF_TOKEN; for a file or folder check the path."
        ) from error
    except Exception as error:
        if _unreachable(error):
            return None
        raise


def _unreachable(error: Exception) -> bool:
    """Whether the network, not the Hub, said no. The client's HTTP library has changed its name before: go by the module."""
    if isinstance(error, errors.HfHubHTTPError):
        return False
    return isinstance(error, ConnectionError | TimeoutError) or type(error).__module__.startswith("http")


@dataclass(frozen=True)
class Source:
    """Where a model lies on this machine."""

    folder: Path
    commit: str | None  # of the Hub repository; None for a folder of the user's own
    warning: str | None = None


def find_model(name: str, revision: str | None = None) -> Source:
    """The model's folder, pulled from the Hub into its cache where `name` is a Hub id.

    Everything is fetched here, of one commit, so that one rank can do it for all. Weights as safetensors only: a pickle
    from the network could run code. Raises UserError for a model that is not there or has no such weights.
    """
    if Path(name).expanduser().is_dir():
        return _with_weights(Source(Path(name).expanduser(), None), name)
    if name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise UserError(f"model is '{name}', which is no folder here. Give an existing folder or a Hub id (owner/name).")
    away = find_commit("model", name, revision) is None
    # Only the top level: many repositories hold the same weights for other frameworks in folders.
    wanted: Any = {"allow_patterns": ["*.json", "*.txt", "*.model", "*.safetensors"], "ignore_patterns": "*/*"}
    # By its name and not by its commit: the cache then knows what the name stood for when the Hub is away.
    folder = Path(snapshot_download(name, revision=revision, local_files_only=away, **wanted))
    warning = None
    if away and not constants.HF_HUB_OFFLINE:
        warning = f"The Hub at {constants.ENDPOINT} cannot be reached: {name} is read from the cache, at commit {folder.name}."
    return _with_weights(Source(folder, folder.name, warning), name)


def _with_weights(source: Source, name: str) -> Source:
    if not (source.folder / "config.json").is_file():
        raise UserError(
            f"model '{name}' has no config.json: it is no transformers model. Choose another, for example distilbert/distilbert-base-uncased."
        )
    if not any(source.folder.glob("*.safetensors")):
        raise UserError(
            f"model '{name}' has no *.safetensors, the only weights that are loaded (a pickle could run code). Choose a model or a "
            "--model_revision that has them; the Hub's conversion bot puts them at revision refs/pr/1 of many repositories."
        )
    return source
