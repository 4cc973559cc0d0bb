"""Starting and stopping the service: settings, where the release comes from, one line when it cannot be had, the end."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from serving import ROOT, Serve, make_release, make_text, variant

from serve.errors import UserError
from serve.settings import FIELDS, Settings, parse


@pytest.fixture(scope="module")
def release_dir(encoder_dir: Path) -> Path:
    return make_release(encoder_dir)


# ---- settings


def test_flags_win_over_the_environment_and_empty_ones_count_as_not_given() -> None:
    environment = {"DISTRINEWS_MODEL": "a/b", "DISTRINEWS_PORT": "7860", "DISTRINEWS_REVISION": "", "DISTRINEWS_MIN_AGREEMENT": "0.5"}
    assert parse([], environment) == Settings("a/b", port=7860, min_agreement=0.5)
    assert parse(["--model", "c/d", "--revision", "", "--port=0"], environment) == Settings("c/d", port=0, min_agreement=0.5)
    assert parse(["--model", "c/d", "--revision", "v1"], {}) == Settings("c/d", revision="v1")
    assert Settings("a/b").host == "127.0.0.1"


@pytest.mark.parametrize(
    ("arguments", "environment", "said"),
    [
        ([], {}, "no model was given"),
        (["--model", ""], {}, "no model was given"),
        (["--model", "a/b", "--port", "70000"], {}, "--port is 70000: allowed is 0 to 65535"),
        (["--model", "a/b", "--port", "many"], {}, "argument --port: invalid int value: 'many'. All options: python -m serve --help"),
        (["--model", "a/b", "--engine", "fast"], {}, "'auto', 'openvino-bf16', 'openvino-fp32', 'onnxruntime', 'torch-bf16', 'torch-fp32'"),
        (["--modle", "a/b"], {}, "unrecognized arguments: --modle"),
        (["--mod", "a/b"], {}, "unrecognized arguments: --mod"),
        (["--model", "a/b"], {"DISTRINEWS_PORT": "many"}, "environment variable DISTRINEWS_PORT: "),
        (["--model", "a/b", "--device", "cuda", "--engine", "onnxruntime"], {}, "leave one out"),
        (["--model", "a/b", "--min_agreement", "99"], {}, "--min_agreement is 99.0: allowed is 0 to 1"),
    ],
)
def test_wrong_settings_are_said(arguments: list[str], environment: dict[str, str], said: str) -> None:
    with pytest.raises(UserError, match=re.escape(said)):
        parse(arguments, environment)


def test_help_teaches_every_option() -> None:
    done = run_serve("--help")
    assert done.returncode == 0
    for field in FIELDS:
        assert (f"DISTRINEWS_{field.name.upper()}:" if "secret" in field.metadata else f"--{field.name} ") in done.stdout
    assert "DISTRINEWS_PORT" in done.stdout


# ---- what cannot be served: exit code 2, one line


def run_serve(*arguments: str | Path, **environment: str) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    command = [sys.executable, "-m", "serve", *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=60)


def assert_one_line(done: subprocess.CompletedProcess[str], said: str) -> None:
    assert done.returncode == 2, (done.stdout, done.stderr)
    last = done.stderr.splitlines()[-1]
    assert last.startswith("error: ") and said in last, done.stderr
    assert "Traceback" not in done.stderr, done.stderr  # before it the Hub's client may have told that it tries again


def test_a_bad_release_ends_the_process(release_dir: Path, tmp_path: Path) -> None:
    folder = variant(release_dir, tmp_path / "bad", onnx="not a graph", model="no weights")
    assert_one_line(run_serve("--model", folder, "--port", "0"), "did not prove itself")


def test_a_taken_port_and_a_foreign_address(release_dir: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert_one_line(run_serve("--model", release_dir, "--port", str(port)), f"cannot listen on 127.0.0.1:{port}")
    assert_one_line(run_serve("--model", release_dir, "--host", "192.0.2.1", "--port", "0"), "cannot listen on 192.0.2.1:0")


def test_no_network(tmp_path: Path) -> None:
    done = run_serve("--model", "user/repo", "--port", "0", HF_ENDPOINT="http://127.0.0.1:9", HF_HOME=str(tmp_path))
    assert_one_line(
        done, "the Hub at http://127.0.0.1:9 cannot be reached: check the network and HF_ENDPOINT; and user/repo at main is not"
    )


# ---- the Hub


@pytest.fixture(scope="module")
def repo(release_dir: Path, local_hub: Any) -> tuple[str, str]:
    """`(name, commit)` of the release on the local Hub, tagged v1; after the tag main became something else."""
    from huggingface_hub import HfApi

    api, name = HfApi(endpoint=local_hub.url, token=local_hub.token), f"{local_hub.user}/tiny-serve"
    api.create_repo(name)
    commit = api.upload_folder(repo_id=name, folder_path=release_dir, commit_message="release").oid
    api.create_tag(name, tag="v1")
    api.upload_file(repo_id=name, path_or_fileobj=b"{", path_in_repo="golden.json")
    api.upload_file(repo_id=name, path_or_fileobj=b"never fetched", path_in_repo="pytorch_model.bin")
    return name, commit


def test_serves_a_tag_of_the_hub_and_again_from_the_cache_without_it(repo: tuple[str, str], local_hub: Any, tmp_path: Path) -> None:
    name, commit = repo
    arguments = ("--model", name, "--revision", "v1", "--device", "cpu", "--engine", "onnxruntime")
    with Serve(*arguments, env={**local_hub.env, "HF_HOME": str(tmp_path)}) as serve:
        answer = serve.client.post("/predict", json={"text": "Oil prices rise"})
        assert answer.status_code == 200
        assert (answer.json()["model"], answer.json()["revision"], answer.headers["X-Model-Revision"]) == (name, commit, commit)
        info = serve.client.get("/info").json()
        assert (info["revision"], info["commit"]) == ("v1", commit)
    snapshots = list((tmp_path / "hub" / f"models--{name.replace('/', '--')}" / "snapshots").iterdir())
    assert [folder.name for folder in snapshots] == [commit]
    files = sorted(str(path.relative_to(snapshots[0])) for path in snapshots[0].rglob("*") if path.is_file())
    assert files == ["config.json", "golden.json", "onnx/model.onnx", "tokenizer.json", "tokenizer_config.json"]  # and no more
    with Serve(*arguments, env={"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HOME": str(tmp_path)}) as serve:
        assert serve.client.post("/predict", json={"text": "Oil prices rise"}).json() == answer.json()
        assert "cannot be reached" in serve.client.get("/info").json()["updates"]["fallback"]


@pytest.mark.parametrize(
    ("model", "revision", "said"),
    [
        ("tiny-serve", "v9", "has no revision 'v9'"),
        ("nothing-here", "", "no repository local/nothing-here"),
        ("tiny-serve", "main", "golden.json of the release cannot be read"),
    ],
)
def test_what_the_hub_does_not_have(repo: tuple[str, str], local_hub: Any, tmp_path: Path, model: str, revision: str, said: str) -> None:
    arguments = ("--model", f"{local_hub.user}/{model}", "--revision", revision, "--port", "0")
    assert_one_line(run_serve(*arguments, **local_hub.env, HF_HOME=str(tmp_path)), said)


def test_a_connection_that_breaks(repo: tuple[str, str], local_hub: Any, tmp_path: Path) -> None:
    def pump(source: socket.socket, sink: socket.socket, limit: int) -> None:
        with contextlib.suppress(OSError), source, sink:
            while limit > 0 and (data := source.recv(16384)):
                sink.sendall(data)
                limit -= len(data)
            sink.shutdown(socket.SHUT_RDWR)

    def relay() -> None:  # passes everything on, but of an answer only the beginning
        with contextlib.suppress(OSError):
            while True:
                caller, _ = listener.accept()
                hub = socket.create_connection(("127.0.0.1", int(local_hub.url.rsplit(":", 1)[1])))
                threading.Thread(target=pump, args=(caller, hub, 1 << 30), daemon=True).start()
                threading.Thread(target=pump, args=(hub, caller, 100_000), daemon=True).start()

    with socket.create_server(("127.0.0.1", 0)) as listener:
        threading.Thread(target=relay, daemon=True).start()
        endpoint = f"http://127.0.0.1:{listener.getsockname()[1]}"
        done = run_serve(
            "--model", repo[0], "--revision", "v1", "--port", "0", **{**local_hub.env, "HF_ENDPOINT": endpoint, "HF_HOME": str(tmp_path)}
        )
        listener.shutdown(socket.SHUT_RDWR)  # wakes the relay
    assert_one_line(done, f"the connection to the Hub at {endpoint} broke while {repo[0]} was fetched")


# ---- without torch


def test_serves_without_torch_and_transformers(release_dir: Path, tmp_path: Path) -> None:
    # None in sys.modules is how Python itself marks a module that must not be imported.
    program = (
        "import sys; sys.modules.update(dict.fromkeys(['torch', 'transformers', 'pipeline']));"
        "from serve.__main__ import main; sys.exit(main())"
    )
    with Serve("--model", release_dir, program=("-c", program)) as serve:
        assert serve.client.get("/info").json()["engine"] in ("onnxruntime", "openvino-fp32", "openvino-bf16")
        assert serve.client.post("/predict", json={"text": "Oil prices rise"}).status_code == 200
    folder = variant(release_dir, tmp_path / "r", onnx=None)
    done = subprocess.run(
        [sys.executable, "-c", program, "--model", folder, "--port", "0"], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert_one_line(done, "torch or transformers is not installed here")


def test_the_requirements_are_the_versions_tested_here_and_hold_no_torch() -> None:
    import importlib.metadata

    lines = [line for line in (ROOT / "serve" / "requirements.txt").read_text().splitlines() if line and not line.startswith("#")]
    pins = dict(line.partition(";")[0].strip().split("==") for line in lines)
    assert pins == {name: importlib.metadata.version(name) for name in pins}
    assert "torch" not in pins and "onnxruntime" in pins


# ---- the end


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_lets_requests_in_flight_finish_and_leaves_nothing(release_dir: Path, number: signal.Signals) -> None:
    with Serve("--model", release_dir, "--max_texts", "1500", "--deadline_seconds", "60") as serve:
        answers: list[Any] = []
        texts = [make_text(40, seed) for seed in range(1500)]
        request = threading.Thread(target=lambda: answers.append(serve.client.post("/predict/batch", json={"texts": texts})))
        request.start()
        end = time.monotonic() + 20
        while serve.metric("distrinews_queue_tokens") == 0:
            assert time.monotonic() < end and not answers, "the request was never in flight"
            time.sleep(0.01)
        serve.process.send_signal(number)
        assert serve.process.wait(15) == 0
        request.join(15)
        assert answers[0].status_code == 200 and len(answers[0].json()["predictions"]) == 1500
        assert "Traceback" not in serve.log()
        with pytest.raises(OSError):
            socket.create_connection(("127.0.0.1", int(serve.url.rsplit(":", 1)[1])), timeout=2)


def test_a_signal_ends_a_service_that_is_still_loading(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:  # a Hub that takes the call and never answers
        env = {**os.environ, "HF_ENDPOINT": f"http://127.0.0.1:{silent.getsockname()[1]}", "HF_HOME": str(tmp_path)}
        command = [sys.executable, "-m", "serve", "--model", "user/repo", "--port", "0"]
        process = subprocess.Popen(command, cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        try:
            assert process.stdout and process.stdout.readline().startswith("listening on ")
            silent.settimeout(20)
            connection, _ = silent.accept()
            process.send_signal(signal.SIGTERM)
            assert process.wait(5) == 0
            connection.close()
        finally:
            process.kill()
            process.communicate(timeout=10)


def test_a_signal_at_any_moment_of_a_real_load_ends_the_process_in_order(release_dir: Path, tmp_path: Path) -> None:
    """Python's own end would abort with threads in the middle of a library's call. Loading begins before it listens."""
    for moment in (-0.8, -0.6, -0.4, 0.0, 0.1, 0.2, 0.4, 0.6):
        command = [sys.executable, "-m", "serve", "--model", str(release_dir), "--state_dir", str(tmp_path), "--port", "0"]
        process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        try:
            if moment >= 0:
                assert process.stdout and process.stdout.readline().startswith("listening on ")
            time.sleep(abs(moment))
            process.send_signal(signal.SIGTERM)
            _, errors = process.communicate(timeout=10)
            early = -signal.SIGTERM if moment < 0 else 0  # before our own handler stands, the signal's default ends it
            assert process.returncode in (0, early) and not errors.count("Traceback"), (moment, errors)
        finally:
            process.kill()
            process.communicate(timeout=10)


def test_a_defect_ends_the_process_in_order(release_dir: Path, tmp_path: Path) -> None:
    """The HTTP side cannot be imported, while the model loads in another thread."""
    program = "import sys; sys.modules['serve.app'] = None; from serve.__main__ import main; sys.exit(main())"
    command = [sys.executable, "-c", program, "--model", str(release_dir), "--state_dir", str(tmp_path), "--port", "0"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 1 and "the service has a defect and ends: ModuleNotFoundError" in done.stderr, done.stderr
    assert "Traceback" not in done.stderr
