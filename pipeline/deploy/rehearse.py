"""Run a Docker Space on this machine without a container engine, as the Hub would: with a local Hub, before paying for one.

    python -m pipeline.deploy.rehearse --space your-name/news-api                       on http://127.0.0.1:7860
    python -m pipeline.deploy.rehearse --space your-name/news-api --secret HF_TOKEN=READ_TOKEN
    python -m pipeline.deploy.rehearse --space your-name/news-api --results rehearsal.json        what was measured, as JSON too

Waits for the Space, pulls it into an empty folder, carries out its Dockerfile (see dockerfile.py), starts its command with the
Space's variables, and tells how large what was installed is and how much memory it takes. A local Hub is told what runs where, so
that `make deploy-space` goes to its end there. A new commit, or a restart asked for, starts over. Until Ctrl-C or SIGTERM.
Nothing shields this machine from the Space: rehearse your own only.
"""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NoReturn

import psutil
from huggingface_hub import HfApi, SpaceInfo, get_session, hf_hub_download, metadata_load, snapshot_download
from huggingface_hub.errors import RepositoryNotFoundError
from huggingface_hub.utils import build_hf_headers

from pipeline.checkpoint import write_json
from pipeline.deploy.dockerfile import Image, steps
from pipeline.deploy.space import read_secrets
from pipeline.errors import UserError, run_entry
from pipeline.hub_access import limit_waiting
from pipeline.record import surroundings

HUGGING_FACE = "https://huggingface.co"
TELL_SECONDS = 2  # a local Hub takes the runner for gone after ten
MIB = 1 << 20
# What the platform itself gives a container: which Hub it belongs to.
PLATFORM = ("HF_ENDPOINT", "HF_HUB_DISABLE_XET", "HF_HUB_DISABLE_TELEMETRY", "HF_HUB_DISABLE_UPDATE_CHECK")


class Teller(threading.Thread):
    """Tells a local Hub, again and again, what became of the Space. `restarts` counts those that were asked for."""

    def __init__(self, space: str, api: HfApi) -> None:
        super().__init__(daemon=True)
        self.space, self.api, self.restarts = space, api, 0
        self._said: dict[str, str | None] | None = None
        self._news = threading.Event()

    def tell(self, stage: str, sha: str | None, host: str | None = None, error: str | None = None) -> None:
        self._said = {"stage": stage, "sha": sha, "host": host, "error": error}
        self._news.set()

    def run(self) -> None:
        while self.api.endpoint != HUGGING_FACE:  # it runs its Spaces itself
            self._news.wait(TELL_SECONDS)
            self._news.clear()
            if self._said:
                with suppress(Exception):  # the Hub is away: told again with the next
                    url = f"{self.api.endpoint}/api/spaces/{self.space}/runner"
                    answer = get_session().post(url, json=self._said, headers=build_hf_headers(token=self.api.token))
                    self.restarts = answer.json()["restarts"]


def find(space: str, api: HfApi) -> SpaceInfo:
    """The Space, as soon as it is there with a Dockerfile. Raises UserError for one that is no Docker Space."""
    told = False
    while True:
        with suppress(RepositoryNotFoundError):
            info = api.space_info(space)
            if info.sdk != "docker":
                raise UserError(f"{space} is a {info.sdk} Space: only Docker Spaces have steps that can be rehearsed.")
            if any(file.rfilename == "Dockerfile" for file in info.siblings or ()):
                return info
        if not told:
            print(f"waiting     for {space} at {api.endpoint}: make deploy-space SPACE={space} MODEL=... REVISION=...", flush=True)
            told = True
        time.sleep(0.5)


def build(info: SpaceInfo, folder: Path, api: HfApi) -> tuple[Image, dict[str, Any]]:
    """The Space's commit pulled below `folder`, its Dockerfile carried out there, and how much that installed.

    Raises UserError for a step that fails.
    """
    context, root = folder / "space", folder / "root"
    before = _base(context)
    shutil.rmtree(context, ignore_errors=True)
    snapshot_download(info.id, repo_type="space", revision=info.sha, local_dir=context, token=api.token)
    shutil.rmtree(context / ".cache")  # the client's notes on the download
    root.mkdir(exist_ok=True)
    image = Image(root, context)
    image.clear(keep_libraries=_base(context) == before)
    for instruction, argument in steps((context / "Dockerfile").read_text(encoding="utf-8")):
        began = time.monotonic()
        image.carry_out(instruction, argument)
        print(f"step        {instruction} {argument[:90]}  ({time.monotonic() - began:.1f} s)", flush=True)
    # The Hub preloads what anybody may read, without a token, into the default place below HOME; what it leaves is root's.
    for entry in (metadata_load(context / "README.md") or {}).get("preload_from_hub", []):
        repo, names, commit = entry.split()
        for name in names.split(","):
            hf_hub_download(repo, name, revision=commit, cache_dir=image.place("/home/user/.cache/huggingface/hub"), token=False)
        print(f"preloaded   {repo} at {commit}", flush=True)
    image.close()
    size, packages = image.installed()
    print(f"installed   {size / MIB:.0f} MiB in {packages} packages", flush=True)
    return image, {"installed_mib": size / MIB, "packages": packages}


def _base(context: Path) -> list[bytes]:
    """What decides which libraries are installed; an engine would take them from its cache where it is the same."""
    return [path.read_bytes() for path in (context / "Dockerfile", *sorted(context.rglob("requirements*.txt"))) if path.is_file()]


def environment(info: SpaceInfo, port: int, secrets: Mapping[str, str], api: HfApi) -> dict[str, str]:
    """What the Hub gives a Space's container; on this machine's loopback, as `docker run -p 127.0.0.1:PORT:7860` would have it."""
    missing = set(api.get_space_secrets(info.id)) - set(secrets)
    if missing:  # nobody can read them back from the Hub
        print(f"note        the Space has secrets that are not given here: --secret {' '.join(sorted(missing))}", flush=True)
    return {
        **{name: os.environ[name] for name in PLATFORM if name in os.environ},
        "SPACE_ID": info.id,
        **{name: variable.value for name, variable in api.get_space_variables(info.id).items()},
        **secrets,
        "DISTRINEWS_HOST": "127.0.0.1",
        "DISTRINEWS_PORT": str(port),
    }


def run(info: SpaceInfo, image: Image, port: int, given: Mapping[str, str], teller: Teller, log: Path, measured: dict[str, Any]) -> None:
    """The Space's command, until it ends, the Space changes or a restart is asked for; its start and memory go to `measured`.

    Raises UserError where it ends by itself.
    """
    host, began, peak, open_since, restarts = f"http://127.0.0.1:{port}", time.monotonic(), 0, 0.0, teller.restarts
    with log.open("wb") as sink:
        try:
            process = image.start(given, sink)
        except OSError as error:
            raise UserError(f"The command {' '.join(image.command)} of {info.id} cannot be started: {error}") from error
        try:
            looked = time.monotonic()
            while process.poll() is None:
                peak = max(peak, memory(process.pid))
                if not open_since and answers(port):
                    open_since = time.monotonic() - began
                    print(f"running     {host} after {open_since:.1f} s, as user {psutil.Process(process.pid).uids().real}", flush=True)
                    teller.tell("RUNNING", info.sha, host)
                if time.monotonic() - looked > TELL_SECONDS:
                    looked = time.monotonic()
                    with suppress(Exception):  # a Hub that is away changes nothing about what runs
                        if teller.restarts != restarts or teller.api.space_info(info.id).sha != info.sha:
                            return
                time.sleep(0.05)
        finally:
            process.terminate()
            try:
                process.wait(15)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
            print(f"memory      {peak / MIB:.0f} MiB at its peak, all processes together", flush=True)
            measured |= {"open_seconds": open_since, "peak_mib": peak / MIB}
    last = log.read_text(encoding="utf-8", errors="replace").strip().splitlines() or ["no output"]
    raise UserError(f"The command of {info.id} ended with code {process.returncode}: {last[-1]}")


def memory(pid: int) -> int:
    """Resident bytes of a process and all below it."""
    total = 0
    with suppress(psutil.NoSuchProcess):
        for process in (top := psutil.Process(pid), *top.children(recursive=True)):
            with suppress(psutil.NoSuchProcess):
                total += process.memory_info().rss
    return total


def answers(port: int) -> bool:
    with suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
        return True
    return False


def rehearse(space: str, port: int, secrets: Mapping[str, str], api: HfApi, results: Path | None) -> NoReturn:
    """Runs the Space's commits, one after the other, for ever. One that fails is told, and waited out, as on the Hub.

    What was measured of the last one, sizes in MiB and seconds, is written to `results` when it ends.

    Raises UserError where the port is taken, or the Space is none that can be rehearsed.
    """
    limit_waiting()
    if answers(port):
        raise UserError(f"Something listens on port {port} already: end it, or give another --port.")
    # Not in a folder of ours alone: the Space's user has to get there.
    folder = Path(tempfile.mkdtemp(prefix="rehearsal-"))
    folder.chmod(0o755)
    try:
        info, teller = find(space, api), Teller(space, api)
        teller.start()
        while True:
            print(f"space       {info.id}, commit {info.sha}", flush=True)
            stage = "BUILD_ERROR"
            try:
                teller.tell("BUILDING", info.sha)
                about = {"date": datetime.now(UTC).isoformat(timespec="seconds"), "provenance": surroundings()}
                image, measured = build(info, folder, api)
                stage = "RUNTIME_ERROR"
                teller.tell("APP_STARTING", info.sha)
                try:
                    run(info, image, port, environment(info, port, secrets, api), teller, folder / "container.log", measured)
                finally:
                    if results:
                        write_json(results, {"format": 1, **about, **measured})
            except UserError as error:
                print(f"{stage.lower().replace('_', ' '):12}{error}", file=sys.stderr, flush=True)
                teller.tell(stage, info.sha, error=str(error))
                restarts = teller.restarts
                while teller.restarts == restarts and find(space, api).sha == info.sha:
                    time.sleep(TELL_SECONDS)
            info = find(space, api)
    finally:
        Image(folder / "root", folder).clear()
        shutil.rmtree(folder)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(
            f"{message}. Usage: python -m pipeline.deploy.rehearse --space owner/name [--port 7860] [--secret NAME ...] [--results FILE]"
        )


def main(argv: Sequence[str]) -> None:
    parser = _Parser(prog="python -m pipeline.deploy.rehearse", description="Run a Docker Space here, step by step.", allow_abbrev=False)
    parser.add_argument("--space", required=True, help="owner/name of the Space; waited for if it is not there yet.")
    parser.add_argument("--port", type=int, default=7860, help="Port on loopback where it answers (7860, as on the Hub).")
    parser.add_argument(
        "--secret", nargs="+", action="extend", default=[], metavar="NAME[=VARIABLE]", help="Its secrets, from variables here."
    )
    parser.add_argument("--results", type=Path, help="Write what was measured (size, start, memory) into this JSON file.")
    arguments = parser.parse_args(argv)

    def end(*_: object) -> NoReturn:
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, end)
    with suppress(KeyboardInterrupt):  # the way to end it
        rehearse(arguments.space, arguments.port, read_secrets(arguments.secret), HfApi(), arguments.results)


if __name__ == "__main__":
    sys.exit(run_entry(main))
