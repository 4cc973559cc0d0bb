"""The Hub as the safety net: what is pushed comes back byte for byte, and whatever the Hub does, a run does not notice."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hub_helpers import raw
from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError
from safetensors.numpy import save_file

from pipeline import checkpoint, hub_access
from pipeline.backup import Backup, branch_of, find, pull, push, restore
from pipeline.config import TrainConfig
from pipeline.errors import UserError
from pipeline.hub import check_before_training, publish
from pipeline.local_hub.faults import Fault
from pipeline.local_hub.process import HubProcess

pytestmark = pytest.mark.timeout(180)
ROOT = Path(__file__).resolve().parent.parent
IDENTITY = {"model": "sha256 of its weights", "data": "sha256 of its rows"}
BLINK = 1.0  # seconds that a call which does not wait may take on a busy machine


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[HubProcess]:
    with HubProcess(tmp_path_factory.mktemp("faulty"), faults=True) as hub:
        yield hub


@pytest.fixture
def hub(server: HubProcess, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubProcess]:
    """The Hub, in good health again after the test; its address and token are in the environment of child processes."""
    for name, value in server.env.items():
        monkeypatch.setenv(name, value)
    yield server
    server.heal()


@pytest.fixture
def api(hub: HubProcess) -> HfApi:
    return HfApi(endpoint=hub.url, token=hub.token)


@pytest.fixture
def repo() -> str:
    return f"local/net-{uuid.uuid4().hex[:8]}"


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return tmp_path / "outputs" / "ag_news"


def make(run: Path, step: int, best: int | None = None, **changes: Any) -> Path:
    """A complete checkpoint, small but of real files."""
    config = TrainConfig(output_dir=str(run), **changes)
    folder = checkpoint.checkpoint_folder(run, step)
    checkpoint.begin(folder)
    for name in ("model", "optimizer", "rank-0", "rank-1"):
        save_file({"x": np.random.default_rng([step, len(name)]).random(5000)}, folder / f"{name}.safetensors")
    (folder / "schedule.json").write_text(json.dumps({"step": step}))
    recorder = {"step": step, "best": {"step": best, "macro_f1": 0.9} if best else None}
    checkpoint.commit(folder, config, "raw", world_size=2, identity=IDENTITY, recorder=recorder)
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def on_branch(api: HfApi, repo: str, branch: str = "checkpoints-ag_news") -> set[str]:
    """The folders at the head of a branch, with whatever else lies there."""
    return {path.split("/")[0] for path in api.list_repo_files(repo, revision=branch)} - {".gitattributes"}


def head(api: HfApi, repo: str, branch: str = "checkpoints-ag_news") -> str:
    return {ref.name: ref.target_commit for ref in api.list_repo_refs(repo).branches}[branch]


def history(api: HfApi, repo: str, branch: str = "checkpoints-ag_news") -> list[str]:
    return [commit.title for commit in api.list_repo_commits(repo, revision=branch)]


def command(line: str) -> subprocess.CompletedProcess[str]:
    """A command that the program told the user to type."""
    words = shlex.split(line)
    assert words[0] == "python"
    return subprocess.run([sys.executable, *words[1:]], cwd=ROOT, capture_output=True, text=True, timeout=60)


# -- push and pull ----------------------------------------------------------------------------------------------------


def test_newest_and_best_go_there_and_come_back_byte_for_byte(api: HfApi, repo: str, run: Path, tmp_path: Path) -> None:
    api.create_repo(repo)
    api.upload_file(path_or_fileobj=b"released", path_in_repo="model.safetensors", repo_id=repo)
    main = head(api, repo, "main")
    for step, best in ((50, None), (100, 50), (150, 100), (200, 100)):
        make(run, step, best)
        assert push(run, repo, api=api) == step
        assert on_branch(api, repo) == {f"checkpoint-{step}", *([f"checkpoint-{best}"] if best else [])}
        assert len(history(api, repo)) == 1, "old states are forgotten"
    assert head(api, repo, "main") == main and api.list_repo_files(repo) == [".gitattributes", "model.safetensors"]
    assert not list(run.glob(".*")), "nothing of the push is left"

    fresh = tmp_path / "elsewhere" / "ag_news"
    remote = find(fresh, repo, api)
    assert remote and (remote.step, remote.branch, remote.commit) == (200, "checkpoints-ag_news", head(api, repo))
    assert pull(remote, fresh, api) == fresh / "checkpoint-200"
    assert sorted(path.name for path in fresh.iterdir()) == ["checkpoint-100", "checkpoint-200"]
    for name in ("checkpoint-100", "checkpoint-200"):
        assert contents(fresh / name) == contents(run / name) and checkpoint.defect(fresh / name) is None


def test_the_same_again_makes_no_commit_and_a_later_manifest_one(api: HfApi, repo: str, run: Path) -> None:
    folder = make(run, 50)
    push(run, repo, api=api)
    before = head(api, repo)
    push(run, repo, api=api)
    assert head(api, repo) == before
    checkpoint.amend(folder, {"step": 50, "best": {"step": 50}})  # its validation came after it
    push(run, repo, api=api)
    assert head(api, repo) != before and history(api, repo) == ["Newest and best checkpoint"]
    there = raw_json(api, repo, "checkpoint-50/manifest.json")
    assert there["recorder"]["best"] == {"step": 50}


def raw_json(api: HfApi, repo: str, path: str) -> dict[str, Any]:
    entry = api.hf_hub_download(repo, path, revision="checkpoints-ag_news", force_download=True)
    return json.loads(Path(entry).read_text())


def test_another_line_of_training_is_kept(api: HfApi, repo: str, run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make(run, 100)
    push(run, repo, api=api)
    shutil.rmtree(run)
    make(run, 20)  # started anew: an older step
    push(run, repo, api=api)
    assert on_branch(api, repo) == {"checkpoint-20"} and on_branch(api, repo, "checkpoints-ag_news.1") == {"checkpoint-100"}
    assert "kept on branch checkpoints-ag_news.1" in capsys.readouterr().out
    shutil.rmtree(run)
    make(run, 300, learning_rate=0.1)  # newer, but it learns something else
    push(run, repo, api=api)
    assert on_branch(api, repo) == {"checkpoint-300"} and on_branch(api, repo, "checkpoints-ag_news.2") == {"checkpoint-20"}
    assert on_branch(api, repo, "checkpoints-ag_news.1") == {"checkpoint-100"}


def test_the_head_is_kept_once_however_often_the_push_is_tried(hub: HubProcess, api: HfApi, repo: str, run: Path) -> None:
    make(run, 100)
    push(run, repo, api=api)
    shutil.rmtree(run)
    make(run, 20)
    for _ in range(2):
        hub.fault(Fault("refuse", path="/commit/"))
        with pytest.raises(UserError, match="cannot be reached"):
            push(run, repo, api=api)
    hub.heal()
    push(run, repo, api=api)
    assert {ref.name for ref in api.list_repo_refs(repo).branches} == {"main", "checkpoints-ag_news", "checkpoints-ag_news.1"}


def test_an_answer_that_is_lost_is_no_second_commit(hub: HubProcess, api: HfApi, repo: str, run: Path) -> None:
    make(run, 50)
    push(run, repo, api=api)
    make(run, 100)
    hub.fault(Fault("lost", path="/commit/"))
    with pytest.raises(UserError, match="cannot be reached"):
        push(run, repo, api=api)
    hub.heal()
    assert history(api, repo)[0] == "checkpoint-100", "it was carried out"
    before = len(history(api, repo))
    hub.fault(Fault("refuse", path="super-squash"))
    push(run, repo, api=api)  # finds it there; and that old states stay for now is no failure
    assert len(history(api, repo)) == before
    hub.heal()
    push(run, repo, api=api)
    assert len(history(api, repo)) == 1 and on_branch(api, repo) == {"checkpoint-100"}


def test_damage_goes_neither_there_nor_back(hub: HubProcess, api: HfApi, repo: str, run: Path, tmp_path: Path) -> None:
    make(run, 50)
    push(run, repo, api=api)
    before = head(api, repo)
    damaged = make(run, 100, best=50) / "model.safetensors"
    whole = damaged.read_bytes()
    damaged.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(UserError, match=r"checkpoint-100/model\.safetensors has changed since it was written"):
        push(run, repo, api=api)
    assert head(api, repo) == before
    damaged.write_bytes(whole)
    push(run, repo, api=api)

    # Somebody changes the newest one on the Hub: the best one, an older state, is what is left to go on from.
    said: list[str] = []
    fresh = tmp_path / "elsewhere" / "ag_news"
    upload = {"path_in_repo": "checkpoint-100/optimizer.safetensors", "repo_id": repo, "revision": "checkpoints-ag_news"}
    api.upload_file(path_or_fileobj=whole, **upload)
    remote = find(fresh, repo, api)
    assert remote and pull(remote, fresh, api, said.append) == fresh / "checkpoint-50"
    assert len(said) == 1 and "checkpoint-100" in said[0] and "optimizer.safetensors has changed" in said[0]
    assert [path.name for path in fresh.iterdir()] == ["checkpoint-50"]

    # A file that no manifest names, or one that is no safetensors, is not taken either.
    for name, kept in (("extra.safetensors", False), ("optimizer.pkl", True)):
        push_anew(run, repo, api)
        api.upload_file(path_or_fileobj=b"x", path_in_repo=f"checkpoint-100/{name}", repo_id=repo, revision="checkpoints-ag_news")
        shutil.rmtree(fresh)
        remote = find(fresh, repo, api)
        assert remote and pull(remote, fresh, api, said.append).name == ("checkpoint-100" if kept else "checkpoint-50")
        assert not list(fresh.rglob(name))
    assert "does not name extra.safetensors" in said[-1]


def push_anew(run: Path, repo: str, api: HfApi) -> None:
    """Whatever was done to the branch: it holds what the run holds."""
    push(run, repo, api=api)
    assert {path for path in api.list_repo_files(repo, revision="checkpoints-ag_news") if "/" in path} == {
        f"{folder.name}/{path.name}" for folder in checkpoint.whole(run) for path in folder.iterdir()
    }


def test_rotation_during_a_push_takes_nothing_away(hub: HubProcess, api: HfApi, repo: str, run: Path, tmp_path: Path) -> None:
    folder = make(run, 50)
    before = contents(folder)
    hub.fault(Fault("stall", path="preupload"))
    with subprocess.Popen([sys.executable, "-m", "pipeline.backup", "push", "--run", str(run), "--repo", repo], cwd=ROOT) as child:
        wait_for(lambda: any("preupload" in hit for hit in hub.hits()[-1:]))
        checkpoint.rotate(run, 1)
        make(run, 100)
        checkpoint.rotate(run, 1)
        assert not folder.exists()
        second = command(f"python -m pipeline.backup push --run {run} --repo {repo}")
        assert second.returncode == 2 and "Another push of" in second.stderr and second.stderr.count("\n") == 1
        hub.heal()
        assert child.wait(30) == 0
    remote = find(run, repo, api)
    assert remote and remote.step == 50 and contents(pull(remote, tmp_path / "there", api)) == before


def test_a_killed_push_leaves_nothing_behind_for_long(hub: HubProcess, api: HfApi, repo: str, run: Path) -> None:
    make(run, 50)
    hub.fault(Fault("stall", path="/lfs/"))
    with subprocess.Popen([sys.executable, "-m", "pipeline.backup", "push", "--run", str(run), "--repo", repo], cwd=ROOT) as child:
        wait_for(lambda: list(run.glob(".push-*")) and any("/lfs/" in hit for hit in hub.hits()[-1:]))
        child.kill()
    hub.heal()
    assert list(run.glob(".push-*")) and on_branch(api, repo) == set(), "no half checkpoint is ever on the branch"
    push(run, repo, api=api)
    assert not list(run.glob(".push-*")) and on_branch(api, repo) == {"checkpoint-50"}


def wait_for(condition: Any, seconds: float = 30) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.02)


def test_private_stays_private(api: HfApi, repo: str, run: Path) -> None:
    make(run, 50)
    push(run, repo, private=True, api=api)
    assert api.model_info(repo).private
    api.create_repo(f"{repo}-open")
    with pytest.raises(UserError, match="exists already and is public"):
        push(run, f"{repo}-open", private=True, api=api)
    assert [ref.name for ref in api.list_repo_refs(f"{repo}-open").branches] == ["main"]


def test_commands_and_their_mistakes(hub: HubProcess, repo: str, run: Path, tmp_path: Path) -> None:
    fresh = tmp_path / "elsewhere" / "ag_news"
    make(run, 50)
    nothing = command(f"python -m pipeline.backup pull --run {fresh} --repo {repo}")
    assert nothing.returncode == 2 and f"{repo} holds no checkpoints on a branch checkpoints-ag_news" in nothing.stderr
    pushed = command(f"python -m pipeline.backup push --run {run} --repo {repo}")
    assert pushed.returncode == 0 and pushed.stdout == f"checkpoint-50 is on the Hub: {hub.url}/{repo}/tree/checkpoints-ag_news\n"
    pulled = command(f"python -m pipeline.backup pull --run {fresh} --repo {repo}")
    assert pulled.returncode == 0 and f"{fresh}/checkpoint-50 is here" in pulled.stdout
    for line, says in (
        (f"push --run {fresh}/none --repo {repo}", "No run at"),
        (f"push --run {tmp_path} --repo {repo}", "holds no complete checkpoint to push"),
        (f"push --run {run} --repo somebody/else", "may not write to 'somebody'"),
        (f"push --run {run} --repo word", "names no owner"),
        (f"push --run {run}", "required: --repo. Usage: python -m pipeline.backup push|pull"),
    ):
        done = command(f"python -m pipeline.backup {line}")
        assert (done.returncode, done.stdout) == (2, "") and says in done.stderr and done.stderr.count("\n") == 1, done.stderr


def test_branch_names() -> None:
    assert branch_of("outputs/ag_news/") == "checkpoints-ag_news"
    assert branch_of("/x/my run: v1.2.lock") == "checkpoints-my-run-v1-2-lock"
    assert branch_of("/") == "checkpoints-run"


def test_a_push_starts_without_torch() -> None:
    code = "import pipeline.backup.__main__, sys; print([m for m in ('torch', 'transformers', 'datasets') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.stdout == "[]\n", done.stderr


# -- in the background ------------------------------------------------------------------------------------------------


class Training:
    """Stands for the training loop: polls at every step, and measures how long the longest call took."""

    def __init__(self, run: Path, repo: str, **options: Any) -> None:
        self.said: list[str] = []
        self.backup = Backup(run, repo, say=self.said.append, **options)
        self.run, self.longest = run, 0.0

    def call(self, function: Any) -> None:
        started = time.perf_counter()
        function()
        self.longest = max(self.longest, time.perf_counter() - started)

    def save(self, step: int, best: int | None = None) -> None:
        make(self.run, step, best)
        self.call(self.backup.committed)

    def until(self, condition: Any, seconds: float = 60) -> None:
        def polled() -> bool:
            self.call(self.backup.poll)
            return bool(condition())

        wait_for(polled, seconds)

    def close(self, patience: float = 30) -> str:
        started = time.perf_counter()
        line = self.backup.close(patience)
        assert time.perf_counter() - started < patience + 5 + BLINK
        assert self.longest < BLINK and not children()
        assert self.said[-1:] == ([line] if line else []), "what it returns it has said"
        return line


def children() -> list[str]:
    import psutil

    alive = [child for child in psutil.Process().children() if child.status() != psutil.STATUS_ZOMBIE]
    return [" ".join(child.cmdline()) for child in alive if "pipeline.backup" in child.cmdline()]


def test_checkpoints_follow_each_other_in_the_background(api: HfApi, hub: HubProcess, repo: str, run: Path) -> None:
    training = Training(run, repo)
    training.save(50)
    assert len(children()) == 1
    training.save(100, best=50)  # while the first is on its way: it follows when that has ended
    training.save(150, best=50)
    assert len(children()) == 1
    assert training.close() == f"checkpoints {repo}, branch checkpoints-ag_news: checkpoint-150"
    assert on_branch(api, repo) == {"checkpoint-50", "checkpoint-150"} and len(history(api, repo)) == 1
    assert training.said == [f"checkpoints {repo}, branch checkpoints-ag_news: checkpoint-150"]
    log = (run / "backup.log").read_text()
    assert hub.token not in log and "signature" not in log and log.count(" is on the Hub: ") == 2

    # A later session finds that all is there.
    before, again = head(api, repo), Training(run, repo)
    assert again.close().endswith("checkpoint-150") and head(api, repo) == before
    assert Training(run.parent / "new", repo).close() == ""


FAULTS = {
    "refuse": (Fault("refuse"), "cannot be reached"),
    "cut mid-upload": (Fault("cut", method="PUT"), None),
    "429": (Fault("status", status=429, retry_after=1), "asks for a pause"),
    "500": (Fault("status", status=500), "has trouble of its own (500)"),
    "503": (Fault("status", status=503), "has trouble of its own (503)"),
    "stall": (Fault("stall"), None),
    "stall mid-upload": (Fault("stall", path="/lfs/"), None),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_run_does_not_notice_what_the_hub_does(name: str, hub: HubProcess, api: HfApi, repo: str, run: Path) -> None:
    fault, says = FAULTS[name]
    hits = len(hub.hits())
    hub.fault(fault)
    training = Training(run, repo, retry_seconds=(0.2, 0.5))
    training.save(50)
    training.until(lambda: len(hub.hits()) > hits + (2 if says else 0))  # tried again where it failed, else it hangs there
    training.save(100, best=50)
    line = training.close(1.5)
    assert line.startswith("warning: checkpoint-100 is not on the Hub: ") and (says or "did not end within 1.5 s") in line
    told = [said for said in training.said if said != line]
    assert len(told) == (1 if says else 0), "one warning for one kind of trouble, however often it was tried"
    assert all(said.count("\n") == 0 and "Training goes on" in said for said in told)
    hub.heal()
    wait_for(lambda: not list(hub.root.glob("temp/*")))  # what was cut or stalled has let go

    # Nothing half is visible, and the command that was named puts it right; once more changes nothing.
    assert not api.repo_exists(repo) or api.list_repo_files(repo) == [".gitattributes"]
    done = command(line.split("`")[1])
    assert done.returncode == 0, done.stderr
    assert on_branch(api, repo) == {"checkpoint-50", "checkpoint-100"} and len(history(api, repo)) == 1
    before = head(api, repo)
    push(run, repo, api=api)
    assert head(api, repo) == before


def test_trouble_that_passes_is_told_once_and_made_up_for(hub: HubProcess, api: HfApi, repo: str, run: Path) -> None:
    training = Training(run, repo, retry_seconds=(0.2, 0.4))
    hub.revoke()
    try:
        training.save(50)
        training.until(lambda: len(training.said) == 1)
        tried = (run / "backup.log").read_text().count("checkpoint-50\n")
        training.until(lambda: (run / "backup.log").read_text().count("checkpoint-50\n") > tried + 1)
    finally:
        hub.restore()
    assert len(training.said) == 1 and "does not know this token" in training.said[0] and hub.token not in training.said[0]
    training.until(lambda: "is on the Hub" in (run / "backup.log").read_text())  # without another checkpoint
    assert training.close().endswith(": checkpoint-50") and on_branch(api, repo) == {"checkpoint-50"}


def test_a_hub_that_vanishes_in_mid_upload_and_comes_back(hub: HubProcess, api: HfApi, repo: str, run: Path) -> None:
    training = Training(run, repo, retry_seconds=(0.2, 0.4))
    hub.fault(Fault("stall", path="/lfs/"))
    hits = len(hub.hits())
    training.save(50)
    training.until(lambda: len(hub.hits()) > hits)
    hub.vanish()
    try:
        line = training.close(2)
    finally:
        hub.heal()
        hub.start()
    assert "checkpoint-50 is not on the Hub" in line
    assert on_branch(api, repo) == set()
    again = Training(run, repo)  # the run goes on later, and with it what was left
    assert again.close().endswith(": checkpoint-50") and on_branch(api, repo) == {"checkpoint-50"}


def test_a_push_that_stands_still_is_ended(hub: HubProcess, repo: str, run: Path) -> None:
    training = Training(run, repo, retry_seconds=(60, 60), stalled_seconds=1)
    hub.fault(Fault("stall"))
    training.save(50)
    training.until(lambda: training.said, 20)
    assert "stood still for 1 s" in training.said[0] and not children()
    assert "stood still" in training.close(0)


def test_a_client_that_hears_nothing_gives_up_by_itself(
    hub: HubProcess, api: HfApi, repo: str, run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipeline.backup.to_hub.limit_waiting", lambda: hub_access.limit_waiting(0.5))
    make(run, 50)
    hub.fault(Fault("stall"))
    started = time.monotonic()
    with pytest.raises(UserError, match=r"cannot be reached \(.*timed out"):
        push(run, repo, api=api)
    assert time.monotonic() - started < 5


def test_no_push_outlives_a_killed_run(hub: HubProcess, repo: str, run: Path) -> None:
    make(run, 50)
    hub.fault(Fault("stall"))
    hits = len(hub.hits())
    code = "import sys, time; from pipeline.backup import Backup; b = Backup(sys.argv[1], sys.argv[2]); b.poll()\n"
    code += "print(b._child.pid, flush=True); time.sleep(60)"
    with subprocess.Popen([sys.executable, "-c", code, str(run), repo], cwd=ROOT, stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout
        pid = int(parent.stdout.readline())
        wait_for(lambda: len(hub.hits()) > hits)
        assert os.getpriority(os.PRIO_PROCESS, pid) >= 10 and os.getsid(pid) == pid, "it gives way, and Ctrl-C does not reach it"
        parent.send_signal(signal.SIGKILL)
    wait_for(lambda: not Path(f"/proc/{pid}").exists() or "\nState:\tZ" in Path(f"/proc/{pid}/status").read_text(), 10)


def test_no_log_no_push_no_harm(hub: HubProcess, repo: str, run: Path) -> None:
    make(run, 50)
    (run / "backup.log").mkdir()  # as good as a full disk
    training = Training(run, repo)
    training.save(100)
    assert len(training.said) == 1 and "IsADirectoryError" in training.said[0]
    assert "checkpoint-100 is not on the Hub" in training.close(1)


# -- a run that starts ------------------------------------------------------------------------------------------------


def test_restore_takes_the_newer_of_here_and_there(
    hub: HubProcess, repo: str, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    api = HfApi(endpoint=hub.url, token=hub.token)
    monkeypatch.setattr("pipeline.backup.from_hub.find", lambda run, repo: find(run, repo, api))
    monkeypatch.setattr("pipeline.backup.from_hub.HfApi", lambda: api)
    said: list[str] = []
    fresh = tmp_path / "elsewhere" / "ag_news"
    config = TrainConfig(output_dir=str(fresh), hub_checkpoints=True, hub_repo=repo)
    restore(config, said.append)
    assert not said and not fresh.exists(), "nothing there: a start from the beginning"
    make(run, 100)
    push(run, repo, api=api)
    make(fresh, 50)
    restore(replace(config, resume="none"), said.append)
    restore(replace(config, hub_checkpoints=False), said.append)
    assert not said and len(checkpoint.whole(fresh)) == 1
    restore(config, said.append)
    assert said == [f"pulled      checkpoint-100 from {repo}, branch checkpoints-ag_news"]
    assert contents(fresh / "checkpoint-100") == contents(run / "checkpoint-100")
    make(fresh, 150)
    restore(config, said.append)
    assert len(said) == 1, "what is here is newer"

    # A damaged copy here is replaced by the whole one there.
    shutil.rmtree(fresh / "checkpoint-150")
    (fresh / "checkpoint-100" / "model.safetensors").write_bytes(b"?")
    restore(config, said.append)
    assert checkpoint.defect(fresh / "checkpoint-100") is None

    # The Hub cannot be asked: a run with a checkpoint goes on from it, one without does not start over.
    for fault in (Fault("refuse"), Fault("status", status=503)):
        hub.fault(fault)
        restore(config, said.append)
        assert said[-1].startswith("warning: The Hub at") and said[-1].endswith(f"The run goes on from {fresh / 'checkpoint-100'}.")
        with pytest.raises(UserError, match=r"not known: run the same command again later, or with --resume none"):
            restore(replace(config, output_dir=str(tmp_path / "third" / "ag_news")), said.append)
    assert not (tmp_path / "third").exists()
    hub.heal()

    # Nothing on the Hub can be used: said, with the way out; and no matter for a run with a checkpoint of its own.
    upload = {"path_in_repo": "checkpoint-100/optimizer.safetensors", "repo_id": repo, "revision": "checkpoints-ag_news"}
    api.upload_file(path_or_fileobj=b"x", **upload)
    third = tmp_path / "third" / "ag_news"
    with pytest.raises(UserError, match=r"are damaged; none can be used\. Start anew with --resume none"):
        restore(replace(config, output_dir=str(third)), said.append)
    make(third, 10)
    restore(replace(config, output_dir=str(third)), said.append)
    assert said[-1].startswith("warning: ") and said[-1].endswith(f"The run goes on from {third / 'checkpoint-10'}.")


def test_the_hub_is_asked_before_a_training(hub: HubProcess, api: HfApi, run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = TrainConfig(output_dir=str(run), hub_checkpoints=True, hub_repo="local/x")
    check_before_training(config, api)
    with pytest.raises(UserError, match="may not write to 'somebody'"):
        check_before_training(replace(config, hub_repo="somebody/x"), api)
    with pytest.raises(UserError, match="does not know this token"):
        check_before_training(config, HfApi(endpoint=hub.url, token="hf_wrong"))
    hub.fault(Fault("status", status=503))
    releasing = replace(config, push_to_hub=True)
    with pytest.raises(UserError, match=r"to go on from is not known.*--resume none"):
        check_before_training(config, api)
    check_before_training(replace(config, resume="none"), api)
    assert capsys.readouterr().out.startswith("warning: The Hub at")
    with pytest.raises(UserError, match="Train without --push_to_hub"):
        check_before_training(releasing, api)
    make(run, 50)  # there is something to go on from: a Hub that is ill for a moment must not keep it from going on
    check_before_training(releasing, api)
    assert "Training goes on" in capsys.readouterr().out
    hub.heal()
    check_before_training(config, HfApi(endpoint=hub.url, token="hf_revoked"))
    assert "does not know this token" in capsys.readouterr().out


def test_a_run_begun_anew_is_not_replaced_by_the_one_it_left(hub: HubProcess, api: HfApi, run: Path) -> None:
    """The earlier run is further on the Hub; the new one, whose push has not arrived yet, goes on from its own checkpoint."""
    config = TrainConfig(output_dir=str(run), hub_checkpoints=True, hub_repo=f"local/anew-{uuid.uuid4().hex[:8]}")
    make(run, 90)
    push(run, config.hub_repo or "", api=api)
    shutil.rmtree(run / "checkpoint-90")
    own = make(run, 10)
    checkpoint.amend(own, {"step": 10, "best": None, "run_id": "another"})
    restore(config)
    assert [p.name for p in checkpoint.whole(run)] == ["checkpoint-10"]


# -- main -------------------------------------------------------------------------------------------------------------


def test_no_half_release_is_ever_on_main(hub: HubProcess, api: HfApi, repo: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A release over an earlier one, with the Hub gone from the first request on, from the second, ... to the last."""
    files = {
        "README.md": "---\nlicense: mit\n---\n# Card",
        "config.json": "{}",
        "golden.json": "{}",
        "run.json": "{}",
        "tokenizer.json": "{}",
    }
    monkeypatch.setattr("pipeline.hub.prove", lambda repo, commit, api: f"proof of {commit}")  # proofs have tests of their own

    def release(content: bytes) -> Path:
        folder = tmp_path / content.decode() / "release"
        folder.mkdir(parents=True)
        for name, text in files.items():
            (folder / name).write_text(text + " " * len(content))
        (folder / "model.safetensors").write_bytes(content * 1000)
        return folder

    def weights() -> bytes:
        return raw(hub, "GET", f"/{repo}/resolve/main/model.safetensors", hub.token).body

    old, new = release(b"old"), release(b"newer")
    publish(old, repo, api=api)
    before, outcomes = head(api, repo, "main"), []
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda seconds: None)  # between the client's own attempts
    for kind in ("refuse", "lost"):
        for after in range(30):
            hub.fault(Fault(kind, after=after))  # type: ignore[arg-type]
            try:
                publish(new, repo, api=api)
                done = True
            except UserError as error:
                assert "Nothing is lost" in str(error)
                done = False
            hub.heal()
            now = head(api, repo, "main")
            outcomes.append((kind, done, now == before))
            assert weights() == (b"old" if now == before else b"newer") * 1000
            names = set(api.list_repo_files(repo))
            assert names == {".gitattributes", "model.safetensors", *files}
            if now != before:
                assert raw(hub, "GET", f"/{repo}/resolve/main/run.json", hub.token).body == b"{}" + b" " * 5
                assert len(api.list_repo_commits(repo)) == 3, "one commit, however often it was tried"
            if done:
                break
        else:
            pytest.fail("it never got through")
        if kind == "refuse":  # back to the old release for the second round
            for tag in api.list_repo_refs(repo).tags:
                api.delete_tag(repo, tag=tag.name)
            api.delete_repo(repo)
            publish(old, repo, api=api)
            before = head(api, repo, "main")
    assert sum(not done for _, done, _ in outcomes) >= 10, "each kind of request has failed once"
    assert any(not done and not same for _, done, same in outcomes), "also the answer to the commit itself"


def test_a_release_cut_in_mid_upload_is_not_there(hub: HubProcess, api: HfApi, repo: str) -> None:
    api.create_repo(repo)
    hub.fault(Fault("cut", method="PUT", bytes=100_000))
    before = head(api, repo, "main")
    code = "import os, sys; from huggingface_hub import HfApi, CommitOperationAdd as Add\n"
    code += (
        "HfApi().create_commit(sys.argv[1], [Add('model.safetensors', os.urandom(10**6)), Add('config.json', b'{}')], commit_message='x')"
    )
    child = subprocess.Popen([sys.executable, "-c", code, repo], stderr=subprocess.DEVNULL)
    try:
        wait_for(lambda: sum("cut PUT" in hit and repo in hit for hit in hub.hits()) > 1)
    finally:
        child.kill()
        child.wait()
    assert head(api, repo, "main") == before and api.list_repo_files(repo) == [".gitattributes"]


def test_a_branch_that_moved_is_looked_at_again(hub: HubProcess, api: HfApi, repo: str, run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another machine pushes between our look at the branch and our commit."""
    make(run, 50)
    push(run, repo, api=api)
    make(run, 100)
    create_commit, theirs = api.create_commit, []

    def somebody_is_faster(*arguments: Any, **keywords: Any) -> Any:
        if not theirs:
            other = HfApi(endpoint=hub.url, token=hub.token)
            theirs.append(other.upload_file(path_or_fileobj=b"x", path_in_repo="x", repo_id=repo, revision="checkpoints-ag_news"))
        return create_commit(*arguments, **keywords)

    monkeypatch.setattr(api, "create_commit", somebody_is_faster)
    push(run, repo, api=api)
    assert theirs and on_branch(api, repo) == {"checkpoint-100"}
    monkeypatch.setattr(api, "create_commit", lambda *a, **k: always_moved())
    make(run, 150)
    with pytest.raises(UserError, match="Somebody else committed"):
        push(run, repo, api=api)


def always_moved() -> None:
    import httpx2

    request = httpx2.Request("POST", "http://127.0.0.1/commit")
    raise HfHubHTTPError("moved", response=httpx2.Response(412, request=request))
