"""Serve a release from a Docker Space: an address that answers curl.

    python -m pipeline.deploy.space --space your-name/news-api --model your-name/ag-news --revision v1
    python -m pipeline.deploy.space --space your-name/news-api --model your-name/secret-news --secret HF_TOKEN=READ_TOKEN

or `make deploy-space SPACE= MODEL= REVISION=`. Puts the service and its Dockerfile into the Space, with the release's commit as a
variable, waits until it runs, asks it a text and prints the line that others can type. The same command again updates the Space.
A private model is pulled when the Space starts, with the secret HF_TOKEN: give it a token that may only read.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import re
import sys
import time
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from string import Template
from typing import Any, NoReturn

from huggingface_hub import HfApi, ModelInfo, SpaceRuntime, get_session, get_token
from huggingface_hub._space_api import INTERMEDIATE_SPACE_STAGES
from huggingface_hub.errors import HfHubHTTPError
from tqdm import tqdm

from pipeline.assets import ROOT
from pipeline.deploy.upload import FREE_WAYS, upload
from pipeline.errors import UserError, run_entry
from pipeline.hub_access import advice, check_write_access, limit_waiting

SERVE = ROOT / "serve"
# What the service reads of a release; the image has no torch, so the ONNX graph is its only engine's.
NEEDED = ("config.json", "tokenizer.json", "tokenizer_config.json", "golden.json", "onnx/model.onnx")
QUESTION = '{"text": "Oil prices rise as OPEC cuts output"}'
COST = "A Docker Space needs a paid plan (PRO, for an organisation Team or Enterprise); its CPU Basic hardware then costs nothing more."
NOTICE_SECONDS = 30  # the Hub takes a moment to see a new commit, and tells until then of the one before, or of none
POLL_SECONDS = 2


@dataclass(frozen=True)
class Deployed:
    """A Space that has answered; `curl` is the line that asks it."""

    space: str
    commit: str
    model: str
    revision: str  # the model's commit
    url: str
    curl: str
    answer: dict[str, Any] | None  # None where it asks for a key that is not known here


def deploy(
    space: str,
    model: str,
    revision: str = "main",
    *,
    private: bool = False,
    secrets: Mapping[str, str] | None = None,
    minutes: float = 20,
    api: HfApi | None = None,
) -> Deployed:
    """Deploys `model` at the commit that `revision` is now, and returns when the Space has answered with it.

    Args:
        secrets: environment of the Space that nobody can read back: HF_TOKEN for a private model, DISTRINEWS_API_KEYS, ...
        minutes: longest that the Space may take from the upload to its first answer.

    Raises:
        UserError: what `upload` refuses; no such release, or none that can be served without torch; a private one and no token for
            it; a Space that does not come up.
    """
    api, secrets = api or HfApi(), secrets or {}
    limit_waiting()
    with advice(api, f"the model {model}", "Nothing was deployed."):
        release = api.model_info(model, revision=revision)
        _check_release(release, revision)
        _check_token(api, release, secrets)
    names = set(secrets)
    with advice(api, f"the Space {space}", "Nothing was deployed."):
        check_write_access(space, api)
        if api.repo_exists(space, repo_type="space"):  # what it is and has already counts for its callers as well
            private = private or bool(api.space_info(space).private)
            names |= api.get_space_secrets(space).keys()
    url = f"https://{re.sub(r'[^a-z0-9]+', '-', space.lower()).strip('-')}.hf.space"  # before there is one that tells its own
    variables = {"DISTRINEWS_MODEL": release.id, "DISTRINEWS_REVISION": str(release.sha)}
    files = compose(space, release, curl_line(url, private, names), api.endpoint)
    commit = upload(space, "docker", files, private=private, variables=variables, secrets=secrets, api=api)
    print(f"uploaded    {space}, commit {commit}; now it is built and started", flush=True)
    deadline = time.monotonic() + 60 * minutes
    with advice(api, f"the Space {space}", f"The upload is done (commit {commit}); run the same command again to look after it."):
        wait_until_running(api, space, commit, deadline)
        url = api.space_info(space).host or url
        answer = _ask(url, str(release.sha), private, secrets, deadline)
    return Deployed(space, commit, release.id, str(release.sha), url, curl_line(url, private, names), answer)


def _check_release(release: ModelInfo, revision: str) -> None:
    there = {file.rfilename for file in release.siblings or ()}
    if missing := [name for name in NEEDED if name not in there]:
        why = " (the image has no torch, so it serves the ONNX graph only)" if missing == ["onnx/model.onnx"] else ""
        raise UserError(
            f"{release.id} at {revision} has no {', '.join(missing)}{why}: publish the release again with `make push`, or give another "
            "--revision."
        )


def _check_token(api: HfApi, release: ModelInfo, secrets: Mapping[str, str]) -> None:
    """Raises UserError where the Space could not read the model; warns of a token that may do more than it should."""
    token = secrets.get("HF_TOKEN")
    if token is None:
        if release.private or release.gated:
            raise UserError(
                f"{release.id} is {'private' if release.private else 'gated'}, and the Space needs a token to read it: make one that may "
                "only read, put it into the environment as READ_TOKEN, and add --secret HF_TOKEN=READ_TOKEN."
            )
        return
    theirs = HfApi(endpoint=api.endpoint, token=token)
    try:
        theirs.auth_check(release.id)  # the files of a gated model are not for everybody who sees it
        role = theirs.whoami().get("auth", {}).get("accessToken", {}).get("role")
    except HfHubHTTPError as error:
        raise UserError(
            f"The token given as the secret HF_TOKEN may not read {release.id} ({error.response.status_code}): give one that may."
        ) from error
    if role == "write":
        print("warning: the Space's HF_TOKEN may write to everything that is yours; one that may only read is enough.", file=sys.stderr)


def compose(space: str, release: ModelInfo, curl: str, endpoint: str) -> dict[str, bytes | Path]:
    """The files of the Space: path in it -> content, or a file here."""
    parts = [*SERVE.glob("*.py"), SERVE / "requirements.txt", *(path for path in (SERVE / "static").rglob("*") if path.is_file())]
    # Only what anybody may read can be fetched at build, and only there is no token needed.
    preload = "" if release.private or release.gated else f"preload_from_hub:\n- {release.id} {','.join(NEEDED)} {release.sha}\n"
    readme = Template((SERVE / "space" / "README.md").read_text(encoding="utf-8")).substitute(
        title=space.split("/")[1], model=release.id, commit=release.sha, endpoint=endpoint, curl=curl, preload=preload
    )
    return {
        "README.md": readme.encode(),
        "Dockerfile": SERVE / "space" / "Dockerfile",
        **{path.relative_to(ROOT).as_posix(): path for path in sorted(parts)},
    }


def curl_line(url: str, private: bool, secrets: Container[str]) -> str:
    """What others type, by the names of the Space's secrets; tokens and keys stand in it as variables of their shell."""
    headers = ["-H 'Content-Type: application/json'"]
    headers += ['-H "Authorization: Bearer $HF_TOKEN"'] if private else []
    headers += ['-H "X-API-Key: $API_KEY"'] if "DISTRINEWS_API_KEYS" in secrets else []
    return f"curl -s {url}/predict {' '.join(headers)} -d '{QUESTION}'"


def wait_until_running(api: HfApi, space: str, commit: str, deadline: float) -> None:
    """Returns once `commit` of the Space runs. `deadline` is monotonic, in seconds.

    Raises UserError where it fails, is run by nobody, or takes longer.
    """
    noticed_by, begun, restarted = time.monotonic() + NOTICE_SECONDS, False, False
    with tqdm(bar_format="{desc} {elapsed}", leave=False, disable=None) as bar:
        while time.monotonic() < deadline:
            with contextlib.suppress(TimeoutError):  # it is being built or started
                api.wait_for_space(space, timeout=POLL_SECONDS, poll_interval=POLL_SECONDS)
            runtime = api.get_space_runtime(space)
            bar.set_description_str(f"{space}: {runtime.stage}")
            runs = runtime.raw.get("sha")  # not every Hub says
            ours = runs in (None, commit)  # the commit before runs on while this one is built, and starts anew for a variable
            begun = begun or runs == commit or runtime.stage in INTERMEDIATE_SPACE_STAGES
            late = time.monotonic() > noticed_by and ours
            if runtime.stage == "RUNNING" and ours and (begun or late):
                return
            if runtime.stage not in ("RUNNING", *INTERMEDIATE_SPACE_STAGES) and (begun or late):
                if runtime.stage.endswith("_ERROR") or restarted:
                    raise UserError(_trouble(api, space, runtime))
                api.restart_space(space)  # paused, or asleep, and the commit changed nothing
                noticed_by, begun, restarted = time.monotonic() + NOTICE_SECONDS, False, True
            time.sleep(POLL_SECONDS)
    raise UserError(f"{space} takes longer than --minutes: look at its logs, {api.endpoint}/spaces/{space}?logs=container.")


def _trouble(api: HfApi, space: str, runtime: SpaceRuntime) -> str:
    said = f" ({' '.join(str(runtime.raw['errorMessage']).split())})" if runtime.raw.get("errorMessage") else ""
    if runtime.stage.endswith("_ERROR"):
        which = "build" if runtime.stage == "BUILD_ERROR" else "container"
        return f"{space} does not come up: {runtime.stage}{said}. Its logs: {api.endpoint}/spaces/{space}?logs={which}."
    return (
        f"{space} is {runtime.stage}{said}: nothing runs it. On the Hub look at {api.endpoint}/spaces/{space}/settings; a local Hub keeps "
        f"Spaces and leaves running them to `python -m pipeline.deploy.rehearse --space {space}`."
    )


def _ask(url: str, revision: str, private: bool, secrets: Mapping[str, str], deadline: float) -> dict[str, Any] | None:
    """The answer to QUESTION by the model's commit `revision`; waits for it to be loaded and proven.

    None where it has that commit ready, but answers only with a key that was given to an earlier deployment.
    """
    headers = {"Content-Type": "application/json"}
    if private:
        headers["Authorization"] = f"Bearer {get_token()}"
    if keys := secrets.get("DISTRINEWS_API_KEYS"):
        headers["X-API-Key"] = keys.split(",")[0].strip()
    while True:
        said: Any = None
        try:
            response = get_session().post(f"{url}/predict", content=QUESTION, headers=headers)
            said = f"{response.status_code} {response.text[:200]}"
            if response.status_code == 200 and response.json().get("revision") == revision:
                return dict(response.json())
            locked = response.status_code == 401 and response.json().get("code") == "api_key_missing"
            if locked and get_session().get(f"{url}/info", headers=headers).json().get("commit") == revision:
                return None
        except Exception as error:
            said = error
        if time.monotonic() > deadline:
            raise UserError(f"{url} runs, but does not answer with commit {revision} of the model ({said}): look at {url}/info.")
        time.sleep(POLL_SECONDS)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}. Usage: make deploy-space SPACE=your-name/news-api MODEL=your-name/ag-news REVISION=v1; all: --help")


def read_secrets(given: Sequence[str]) -> dict[str, str]:
    """`NAME` or `NAME=VARIABLE`, each the value of that variable here. Raises UserError; values are never shown."""
    found = {}
    for entry in given:
        name, _, variable = entry.partition("=")
        if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name):
            raise UserError(f"--secret {name!r}: allowed is NAME, or NAME=VARIABLE where the value is in another variable here.")
        if not os.environ.get(variable or name):
            raise UserError(f"--secret {name}: {variable or name} is not set here. Export its value under that name, then run this again.")
        found[name] = os.environ[variable or name]
    return found


def main(argv: Sequence[str]) -> None:
    parser = _Parser(prog="python -m pipeline.deploy.space", description=f"Serve a release from a Docker Space. {COST}", allow_abbrev=False)
    parser.add_argument("--space", required=True, help="owner/name of the Space; made if it does not exist.")
    parser.add_argument("--model", required=True, help="owner/name of the release on the Hub.")
    parser.add_argument("--revision", default="main", help="Its tag, branch or commit; the Space keeps to the commit that this is now.")
    parser.add_argument("--private", action="store_true", help="Make the Space private: callers need a token that may read it.")
    parser.add_argument(
        "--secret", nargs="+", action="extend", default=[], metavar="NAME[=VARIABLE]", help="Secrets of the Space, from variables here."
    )
    parser.add_argument("--minutes", type=float, default=20, help="Longest that it may take to build, start and answer (20).")
    arguments = parser.parse_args(argv)
    for option in ("space", "model"):
        if not re.fullmatch(r"[^/\s]+/[^/\s]+", getattr(arguments, option)):
            raise UserError(f"--{option} is '{getattr(arguments, option)}': allowed is owner/name, as on the Hub.")
    secrets = read_secrets(arguments.secret)
    print(f"{COST} {FREE_WAYS}", flush=True)
    deployed = deploy(
        arguments.space, arguments.model, arguments.revision, private=arguments.private, secrets=secrets, minutes=arguments.minutes
    )
    said = "/info; texts only with one of its keys, which were set before and are not known here"
    if deployed.answer:
        said = f"{deployed.answer['label']}, {deployed.answer['confidence']:.1%} sure"
    print(
        f"space       {deployed.space}, commit {deployed.commit}\nmodel       {deployed.model}, commit {deployed.revision}\n"
        f"answered    {said}\nfor the README:\n{deployed.curl}",
        flush=True,
    )


if __name__ == "__main__":
    sys.exit(run_entry(main))
