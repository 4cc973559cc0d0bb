"""The local Hub as a process and on disk: it starts, ends and refuses as a command should, loses no push, and keeps git."""

from __future__ import annotations

import os
import re
import shutil
import signal
import socket
import stat
import subprocess
import sys
import time
import uuid
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from hub_helpers import commit_body, inline, raw
from huggingface_hub import CommitOperationAdd, HfApi
from huggingface_hub.errors import HfHubHTTPError

from pipeline.errors import run_entry
from pipeline.local_hub.__main__ import main, parse
from pipeline.local_hub.process import HubProcess

pytestmark = pytest.mark.timeout(90)
ROOT = Path(__file__).resolve().parent.parent
COMMAND = [sys.executable, "-m", "pipeline.local_hub"]


@pytest.fixture
def api(local_hub: Any) -> HfApi:
    return HfApi(endpoint=local_hub.url, token=local_hub.token)


@pytest.fixture
def model(api: HfApi) -> str:
    repo_id = f"local/server-{uuid.uuid4().hex[:8]}"
    api.create_repo(repo_id)
    return repo_id


def test_concurrent_pushers_lose_nothing(api: HfApi, model: str) -> None:
    def push(worker: int) -> list[str]:
        own = HfApi(endpoint=api.endpoint, token=api.token)
        made = []
        for step in range(4):
            files = [CommitOperationAdd(f"{worker}/{step}.txt", b"t"), CommitOperationAdd(f"{worker}/{step}.bin", os.urandom(50_000))]
            made.append(own.create_commit(model, files, commit_message=f"{worker} {step}").oid)
        return made

    with ThreadPoolExecutor(6) as pool:
        commits = [oid for made in pool.map(push, range(6)) for oid in made]
    history = [commit.commit_id for commit in api.list_repo_commits(model)]
    assert len(set(commits)) == 24 and set(commits) < set(history) and len(history) == 25
    assert len(api.list_repo_files(model)) == 48 + 1


def test_a_stale_parent_is_refused(api: HfApi, model: str) -> None:
    first = api.upload_file(path_or_fileobj=b"1", path_in_repo="n.txt", repo_id=model).oid

    def push(worker: int) -> int:
        try:
            api.upload_file(path_or_fileobj=b"%d" % worker, path_in_repo=f"{worker}.txt", repo_id=model, parent_commit=first)
        except HfHubHTTPError as error:
            return int(error.response.status_code)
        return 200

    with ThreadPoolExecutor(5) as pool:
        assert sorted(pool.map(push, range(5))) == [200, 412, 412, 412, 412]
    assert len(api.list_repo_commits(model)) == 3


def test_a_commit_sent_again_is_the_same_commit(local_hub: Any, api: HfApi, model: str) -> None:
    """As a client does whose connection broke before the answer came."""
    answers = [
        raw(local_hub, "POST", f"/api/models/{model}/commit/main", local_hub.token, commit_body(inline("a", b"1"))) for _ in range(2)
    ]
    assert answers[0].json() == answers[1].json() and len(api.list_repo_commits(model)) == 2


def test_on_disk_it_is_a_git_repository(local_hub: Any, api: HfApi, model: str, tmp_path: Path) -> None:
    git = shutil.which("git")
    if git is None:
        pytest.skip("no git here")

    def run(*words: str) -> str:
        return subprocess.run([git, *words], capture_output=True, text=True, check=True, timeout=30).stdout

    api.upload_file(path_or_fileobj=b"text\n", path_in_repo="a/b.txt", repo_id=model, commit_message="Ünï", commit_description="why")
    weights = os.urandom(10_000)
    api.upload_file(path_or_fileobj=weights, path_in_repo="w.safetensors", repo_id=model)
    api.create_tag(model, tag="v1", tag_message="first")
    api.create_branch(model, branch="dev/x")
    path = str(local_hub.root / "models" / model / "repo.git")
    assert "error" not in run("-C", path, "fsck", "--strict", "--full")
    assert run("-C", path, "log", "--format=%s|%an").splitlines() == [
        "Upload w.safetensors with huggingface_hub|local", "Ünï|local", "initial commit|local",
    ]  # fmt: skip
    assert set(run("-C", path, "for-each-ref", "--format=%(refname)").split()) == {"refs/heads/main", "refs/heads/dev/x", "refs/tags/v1"}
    run("-c", "filter.lfs.smudge=", "-c", "filter.lfs.required=false", "clone", "-q", path, str(tmp_path / "clone"))
    assert (tmp_path / "clone" / "a" / "b.txt").read_text() == "text\n"
    oid = re.search("sha256:([0-9a-f]{64})", (tmp_path / "clone" / "w.safetensors").read_text())
    assert oid and (Path(path) / "lfs" / "objects" / oid[1][:2] / oid[1][2:4] / oid[1]).read_bytes() == weights


def test_start_stop_and_start_again(tmp_path: Path) -> None:
    root = tmp_path / "hub"
    with HubProcess(root) as hub:
        first_token, pid = hub.token, hub.pid
        HfApi(endpoint=hub.url, token=hub.token).create_repo("local/kept")
        assert stat.S_IMODE((root / "accounts.json").stat().st_mode) == 0o600
        assert stat.S_IMODE(root.stat().st_mode) == 0o700

        second = subprocess.run([*COMMAND, "--root", str(root), "--port", "0"], cwd=ROOT, capture_output=True, text=True, timeout=30)
        assert second.returncode == 2 and second.stderr.count("\n") == 1 and "already serves" in second.stderr
        added = subprocess.run([*COMMAND, "--root", str(root), "--add-user", "bob"], cwd=ROOT, capture_output=True, text=True, timeout=30)
        assert HfApi(endpoint=hub.url, token=added.stdout.strip()).whoami()["name"] == "bob"
        (root / "models" / "local" / "kept" / "repo.git" / "refs" / "heads" / "main.lock").touch()  # as a killed server leaves it
    assert pid is not None and not alive(pid)

    # In the foreground, as a person runs it: the printed block works in a shell as it stands, and Ctrl-C ends it.
    process = subprocess.Popen(
        [*COMMAND, "--root", str(root), "--port", "0"], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    try:
        assert process.stdout
        block = ""
        while "Try:" not in block:
            line = process.stdout.readline()
            assert line, block
            block += line
        exports = "\n".join(line for line in block.splitlines() if line.startswith("export "))
        assert first_token in exports and str(root / "accounts.json") in block
        code = "from huggingface_hub import HfApi; HfApi().upload_file(path_or_fileobj=b'x', path_in_repo='x', repo_id='local/kept'); "
        code += "print(HfApi().whoami()['name'], HfApi().file_exists('local/kept', 'x'))"
        shell = subprocess.run(["bash", "-c", f'{exports}\n{sys.executable} -c "{code}"'], capture_output=True, text=True, timeout=30)
        assert shell.stdout.split() == ["local", "True"], shell.stderr
        process.send_signal(signal.SIGINT)
        rest, _ = process.communicate(timeout=15)
        assert (process.returncode, rest) == (0, "")
    finally:
        process.kill()
        process.wait()


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return Path(f"/proc/{pid}/stat").read_text().split(") ")[1][0] != "Z" if Path("/proc").is_dir() else True


def test_it_does_not_outlive_a_killed_parent(tmp_path: Path) -> None:
    code = "import os, sys; from pathlib import Path; from pipeline.local_hub.process import HubProcess\n"
    code += "hub = HubProcess(Path(sys.argv[1])).start(); print(hub.pid, flush=True); os.kill(os.getpid(), 9)"
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], cwd=ROOT, capture_output=True, text=True, timeout=60)
    pid = int(done.stdout)
    deadline = time.monotonic() + 10
    while alive(pid) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not alive(pid)


MISTAKES = [
    (["--port", "BUSY"], "is in use"),
    (["--port", "70000"], "0 to 65535"),
    (["--host", "203.0.113.1"], "--host takes an address of this machine"),
    (["--root", "FILE"], "is a file"),
    (["--add-user", "../x"], "cannot be a namespace"),
    (["--add-user", "api"], "cannot be a namespace"),
    (["--add-user", "carol", "--role", "admin"], "invalid choice"),
    (["--token", "short"], "8 to 200 printable"),
    (["--prot", "1"], "unrecognized arguments"),
]


@pytest.mark.parametrize(("options", "says"), MISTAKES)
def test_mistakes_end_in_one_line(options: list[str], says: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("")
    with socket.create_server(("127.0.0.1", 0)) as busy:
        known = {"BUSY": str(busy.getsockname()[1]), "FILE": str(tmp_path / "file")}
        words = [
            "--port",
            "0",
            *([] if "--root" in options else ["--root", str(tmp_path / "hub")]),
            *(known.get(word, word) for word in options),
        ]
        assert run_entry(lambda _: main(parse(words))) == 2
    printed = capsys.readouterr()
    assert (printed.out, printed.err.count("\n")) == ("", 1) and says in printed.err and printed.err.startswith("error: ")


def test_a_mistake_is_the_exit_code_of_the_command(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as busy:
        command = [*COMMAND, "--root", str(tmp_path), "--port", str(busy.getsockname()[1])]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=30)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1), done.stderr
