"""A served model over time: newer commits, bad ones, the way back, a Hub with faults, an engine that dies; all of it real:
the service in a process of its own, the Hub's own client, and a local Hub that misbehaves when told to."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import gc
import json
import os
import resource
import shutil
import signal
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from huggingface_hub import HfApi
from serving import LABELS, Serve, make_release, variant

from pipeline.local_hub.faults import Fault
from pipeline.local_hub.process import HubProcess
from serve.choice import carry_over, recall
from serve.hub import remove_damaged
from serve.metrics import Metrics
from serve.model import Model, load
from serve.release import pull
from serve.revisions import Revisions
from serve.serving import Serving, retire
from serve.settings import Settings
from serve.state import State

pytestmark = pytest.mark.timeout(180)
TOO_MANY = 6_000_000  # bytes of weights; the tiny release has 4 million


@pytest.fixture(scope="module")
def release_dir(encoder_dir: Path) -> Path:
    return make_release(encoder_dir)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[HubProcess]:
    with HubProcess(tmp_path_factory.mktemp("faulty"), faults=True) as hub:
        yield hub


def other_head(release: Path, folder: Path, shift: float) -> Path:
    """The release with another head: the first label's logit is larger by `shift`, and its golden examples say so."""
    import onnx
    from onnx import numpy_helper

    golden = json.loads((release / "golden.json").read_text())
    for example in golden["examples"]:
        example["logits"][0] += shift
    variant(release, folder, golden={"examples": golden["examples"]})
    graph = onnx.load(str(folder / "onnx" / "model.onnx"))
    (bias,) = [one for one in graph.graph.initializer if list(one.dims) == [len(LABELS)]]
    bias.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(bias) + np.float32([shift, 0, 0, 0]), bias.name))
    onnx.save(graph, str(folder / "onnx" / "model.onnx"))
    return folder


class Repo:
    """A repository on the local Hub, and what each of its commits answers."""

    def __init__(self, hub: HubProcess, name: str) -> None:
        self.hub, self.api = hub, HfApi(endpoint=hub.url, token=hub.token)
        self.name = self.api.create_repo(f"{hub.user}/{name}").repo_id
        self.expected: dict[str, dict[str, np.ndarray]] = {}  # commit -> text -> probabilities

    def push(self, folder: Path, gone: Sequence[str] = ()) -> str:
        commit = self.api.upload_folder(
            repo_id=self.name, folder_path=folder, commit_message="release", delete_patterns=list(gone) or None
        ).oid
        if (folder / "golden.json").exists():
            self.expect(commit, folder)
        return commit

    def expect(self, commit: str, folder: Path) -> None:
        examples = json.loads((folder / "golden.json").read_text())["examples"]
        logits = np.array([example["logits"] for example in examples])
        rows = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
        self.expected[commit] = {example["text"]: row for example, row in zip(examples, rows, strict=True)}

    def check(self, text: str, response: Any) -> str:
        """That the answer is the one of the commit it names; returns that."""
        assert response.status_code == 200, response.text
        answer = response.json()
        commit = str(answer["revision"])
        assert response.headers["X-Model-Revision"] == commit
        assert np.allclose(list(answer["probabilities"].values()), self.expected[commit][text], atol=1e-3), commit
        return commit

    def ask(self, serve: Serve) -> str:
        text = next(iter(next(iter(self.expected.values()))))
        return self.check(text, serve.client.post("/predict", json={"text": text}))


@pytest.fixture
def hub(server: HubProcess) -> Iterator[HubProcess]:
    yield server
    server.heal()


@pytest.fixture
def repo(hub: HubProcess, request: pytest.FixtureRequest) -> Repo:
    return Repo(hub, request.node.name.replace("_", "-")[:60])


@pytest.fixture
def start(repo: Repo, tmp_path: Path) -> Callable[..., Serve]:
    """Starts the service on `repo`'s main, on a Hub cache and state that last for the test."""

    def started(*arguments: str, **environment: str) -> Serve:
        options = ["--model", repo.name, "--engine", "onnxruntime", "--threads", "1", "--watch_seconds", "0.2", *arguments]
        return Serve(*options, env={**repo.hub.env, "HF_HOME": str(tmp_path / "hf"), **environment})

    return started


def updates(serve: Serve) -> dict[str, Any]:
    found = serve.client.get("/info").json()["updates"]
    assert isinstance(found, dict)
    return found


def until(what: Callable[[], Any], serve: Serve, seconds: float = 30) -> Any:
    end = time.monotonic() + seconds
    while not (found := what()):
        assert serve.process.poll() is None, serve.log()
        assert time.monotonic() < end, (updates(serve), serve.log())
        time.sleep(0.05)
    return found


def children(process: int) -> list[int]:
    with contextlib.suppress(OSError):
        return [int(child) for task in Path(f"/proc/{process}/task").iterdir() for child in (task / "children").read_text().split()]
    return []


# ---- newer commits


def test_newer_commits_take_over_under_load_and_rollback_goes_back(
    repo: Repo, start: Callable[..., Serve], release_dir: Path, tmp_path: Path
) -> None:
    first = repo.push(release_dir)
    texts = list(repo.expected[first])
    stop, seen, failures = threading.Event(), set(), []

    def caller(serve: Serve, number: int) -> None:
        try:
            while not stop.is_set():
                number += 1
                text = texts[number % len(texts)]
                seen.add(repo.check(text, serve.client.post("/predict", json={"text": text})))
        except BaseException as error:
            failures.append(error)

    with start(DISTRINEWS_ADMIN_KEY="the-operators-key") as serve:

        def roll_back() -> Any:
            return serve.client.post("/rollback", headers={"X-API-Key": "the-operators-key"})

        assert roll_back().json()["code"] == "nothing_to_roll_back"
        callers = [threading.Thread(target=caller, args=(serve, number)) for number in range(8)]
        for thread in callers:
            thread.start()
        try:
            better = other_head(release_dir, tmp_path / "better", 1.0)
            second = repo.push(better)
            until(lambda: second in seen, serve)
            # A commit that touches no file that serves is taken over as it is.
            third = repo.api.upload_file(repo_id=repo.name, path_or_fileobj=b"# A card", path_in_repo="README.md").oid
            repo.expect(third, better)
            until(lambda: third in seen, serve)
            assert f"{third} takes over without loading" in serve.log()
            assert updates(serve)["swaps"] == serve.metric("distrinews_swaps_total") == 2

            assert roll_back().json()["revision"] == second
            seen.clear()
            until(lambda: second in seen, serve)
            time.sleep(1)  # some looks at the Hub, where main is still the third
            assert repo.ask(serve) == second
            (refused,) = updates(serve)["refused"]
            assert (refused["commit"], refused["reason"]) == (third, "rolled back by the operator")
            assert roll_back().json()["revision"] == first
            fourth = repo.push(other_head(release_dir, tmp_path / "best", 2.0))
            until(lambda: fourth in seen, serve)
        finally:
            stop.set()
            for thread in callers:
                thread.join(30)
        assert not failures, failures[:3]
        assert [line for line in serve.client.get("/metrics").text.splitlines() if line.startswith("distrinews_model{")] == [
            f'distrinews_model{{commit="{fourth}",engine="onnxruntime",model="{repo.name}"}} 1.0'
        ]
        assert serve.metric('distrinews_refusals_total{reason="rollback"}') == 2
        assert updates(serve)["fallback"] is None


def test_bad_commits_are_refused_once_and_the_good_one_serves_on(
    repo: Repo, start: Callable[..., Serve], release_dir: Path, tmp_path: Path
) -> None:
    import onnx
    from onnx import TensorProto, helper

    whole = (release_dir / "onnx" / "model.onnx").read_bytes()
    golden = json.loads((release_dir / "golden.json").read_text())
    for example in golden["examples"]:
        example["logits"].reverse()
    wrong = variant(release_dir, tmp_path / "wrong", golden={"examples": golden["examples"]})
    cut, corrupt, large, alien = (variant(release_dir, tmp_path / name) for name in ("cut", "corrupt", "large", "alien"))
    (cut / "onnx" / "model.onnx").write_bytes(whole[: len(whole) // 2])
    (corrupt / "onnx" / "model.onnx").write_bytes(whole[:200] + os.urandom(3000) + whole[3200:])
    (large / "onnx" / "model.onnx").write_bytes(whole + os.urandom(TOO_MANY))
    node = helper.make_node("Identity", ["pixels"], ["boxes"])
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [1]) for name in ("pixels", "boxes")]
    onnx.save(helper.make_model(helper.make_graph([node], "alien", ends[:1], ends[1:])), str(alien / "onnx" / "model.onnx"))
    masked = variant(release_dir, tmp_path / "masked", config={"architectures": ["DistilBertForMaskedLM"]})
    none = variant(release_dir, tmp_path / "none", golden=None)
    bare = variant(release_dir, tmp_path / "bare", config=None)  # nothing that tells the commit by itself
    bad: list[tuple[Path, str]] = [
        (wrong, "a probability is off by"),
        (cut, "did not prove itself"),
        (corrupt, "did not prove itself"),
        (alien, "did not prove itself"),
        (masked, "only text classifiers"),
        (none, "it has no golden.json"),
        (bare, "it has no config.json"),
        (large, f"allowed are at most {TOO_MANY}"),
    ]
    good = repo.push(release_dir)
    with start("--max_model_bytes", str(TOO_MANY)) as serve:
        for number, (folder, reason) in enumerate(bad, 1):
            commit = repo.push(folder, gone={none: ["golden.json"], bare: ["config.json"]}.get(folder, []))
            refused = until(lambda number=number: len(found := updates(serve)["refused"]) == number and found[-1], serve)
            assert refused["commit"] == commit and reason in refused["reason"], refused
            assert repo.ask(serve) == good
        assert serve.client.get("/ready").status_code == 200
        time.sleep(1)
        assert serve.log().count("refused, and not tried again") == len(bad)
        assert not list((tmp_path / "hf").rglob(f"snapshots/{commit}/onnx/*")), "nothing that is too large is fetched"
        better = repo.push(other_head(release_dir, tmp_path / "better", 1.0))
        until(lambda: repo.ask(serve) == better, serve)
        assert updates(serve)["fallback"] is None
        repo.push(wrong)
        until(lambda: len(updates(serve)["refused"]) == len(bad) + 1, serve)
    # Started again it remembers; a bad commit that it has not seen yet is found out in a child process.
    with start("--max_model_bytes", str(TOO_MANY)) as serve:
        assert repo.ask(serve) == better and "is refused" in updates(serve)["fallback"]
    newest = repo.push(cut)
    with start("--max_model_bytes", str(TOO_MANY), "--watch_seconds", "0") as serve:
        assert repo.ask(serve) == better and newest in updates(serve)["fallback"]
        assert not updates(serve)["watching"]
    # Under other settings a refusal is not for ever.
    repo.push(large)
    with start("--max_model_bytes", str(1 << 30), "--watch_seconds", "0") as serve:
        assert "is refused" not in updates(serve)["fallback"] and "did not prove itself" in updates(serve)["fallback"]


# ---- a Hub with faults


def test_a_hub_that_fails_changes_nothing_until_it_is_back(
    repo: Repo, start: Callable[..., Serve], release_dir: Path, tmp_path: Path
) -> None:
    good = repo.push(release_dir)
    with start() as serve:

        def trouble(said: str) -> None:
            until(lambda: said in str(updates(serve)["hub"]), serve)
            assert repo.ask(serve) == good and serve.client.get("/ready").status_code == 200

        for fault, said in (
            (Fault("status", status=429, retry_after=1), "answered 429"),
            (Fault("status", status=503), "answered 503"),
            (Fault("refuse"), "cannot be reached"),
        ):
            repo.hub.fault(fault)
            trouble(said)
            repo.hub.heal()
            trouble("reachable")
        repo.hub.fault(Fault("refuse", method="GET", path="model.onnx"))
        commit = repo.push(other_head(release_dir, tmp_path / "next", 1.0))
        trouble("broke while")
        # Kept from writing a file of more than 2 MB, as by a disk that is full.
        soft, hard = resource.prlimit(serve.process.pid, resource.RLIMIT_FSIZE)
        resource.prlimit(serve.process.pid, resource.RLIMIT_FSIZE, (2_000_000, hard))
        repo.hub.heal()
        trouble("could not be stored")
        resource.prlimit(serve.process.pid, resource.RLIMIT_FSIZE, (soft, hard))
        until(lambda: repo.ask(serve) == commit, serve)
        until(lambda: updates(serve)["hub"] == "reachable", serve)
        assert not updates(serve)["refused"]
    # Cached files that are not what the Hub sent are fetched again, and no release is blamed for them.
    (snapshot,) = (tmp_path / "hf").rglob(f"snapshots/{commit}")
    content = (snapshot / "onnx" / "model.onnx").resolve()
    content.write_bytes(content.read_bytes()[:1000])
    with start() as serve:
        assert repo.ask(serve) == commit and updates(serve)["refused"] == []
    with start(HF_ENDPOINT="http://somebody:hunter2@127.0.0.1:9") as serve:  # gone at the start
        assert repo.ask(serve) == commit
        assert "cannot be reached" in updates(serve)["fallback"]
        assert "hunter2" not in serve.client.get("/info").text + serve.log()


def test_what_was_proven_serves_although_the_hub_answers_strangely_at_the_start(
    repo: Repo, start: Callable[..., Serve], release_dir: Path
) -> None:
    commit = repo.push(release_dir)
    with start():
        pass
    repo.hub.fault(Fault("status", status=403))
    with start() as serve:
        assert repo.ask(serve) == commit
        assert "answered 403" in updates(serve)["fallback"]
        repo.hub.heal()
        until(lambda: updates(serve)["fallback"] is None, serve)
    with portal() as url, start(HF_ENDPOINT=url) as serve:
        assert repo.ask(serve) == commit
        assert "does not answer as the Hub does" in updates(serve)["fallback"]


@contextlib.contextmanager
def portal() -> Iterator[str]:
    """The address of a server that answers everything with a page, as the network of a hotel does."""

    class Page(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.send_header("Content-Type", "text/html")
            self.end_headers()
            self.wfile.write(b"<p>Welcome! Please log in.")

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Page) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
            thread.join(10)


def test_a_signal_ends_it_in_the_middle_of_a_download_or_a_trial(
    repo: Repo, start: Callable[..., Serve], release_dir: Path, tmp_path: Path
) -> None:
    repo.push(release_dir)
    with start() as serve:
        repo.hub.fault(Fault("stall", method="GET", path="model.onnx"))
        repo.push(other_head(release_dir, tmp_path / "next", 1.0))
        until(lambda: any("model.onnx" in hit for hit in repo.hub.hits()), serve)
        serve.process.send_signal(signal.SIGTERM)
        assert serve.process.wait(9) == 0, serve.log()
    repo.hub.heal()
    with start("--engine", "auto") as serve:
        (trial, *_) = until(lambda: children(serve.process.pid), serve)
        serve.process.send_signal(signal.SIGTERM)
        assert serve.process.wait(9) == 0, serve.log()
        assert not Path(f"/proc/{trial}").exists()
        assert "Traceback" not in serve.log()


# ---- what is remembered


def test_services_that_share_a_folder_keep_each_others_rollback(tmp_path: Path) -> None:
    settings = Settings("user/repo", state_dir=str(tmp_path))
    one, other = (Revisions(State(settings), settings) for _ in range(2))
    for revisions in (one, other):
        revisions.prove("good")
        revisions.prove("bad")
    one.refuse("bad", "rolled back by the operator", always=True)
    other.prove("bad")  # what serves there is proven again when an engine takes over
    other.prove("next")
    for revisions in (other, Revisions(State(settings), settings)):
        assert revisions.reason("bad") == "rolled back by the operator"
        assert revisions.proven() == ["next", "good"]


def test_only_names_that_are_digests_show_damage(tmp_path: Path) -> None:
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots" / "a-commit"
    blobs.mkdir()
    snapshot.mkdir(parents=True)
    for name, etag in {"config.json": "0" * 40, "golden.json": "an-etag-of-another-server"}.items():
        (blobs / etag).write_text("{}")
        (snapshot / name).symlink_to(blobs / etag)
    assert remove_damaged(snapshot) == ["config.json"]
    assert [path.name for path in blobs.iterdir()] == ["an-etag-of-another-server"]
    assert [path.name for path in snapshot.iterdir()] == ["golden.json"]


# ---- engines


@pytest.mark.parametrize("name", ["onnxruntime", "openvino-fp32"])
def test_a_retired_model_gives_its_memory_back_at_once(release_dir: Path, tmp_path: Path, name: str) -> None:
    settings = Settings(str(release_dir), engine=name, state_dir=str(tmp_path))
    model = load(pull(settings.model), settings)
    engine = weakref.ref(model.engine)

    async def serve_and_retire(model: list[Model]) -> None:
        old = [Serving.begin(model.pop(), settings, Metrics(), lambda: None)]
        with old[0].request():
            retiring = asyncio.create_task(retire(old[0]))
            await asyncio.sleep(0.2)
            (row,) = await old[0].batcher.logits([[101, 102]], ["text"])  # who began with it is answered by it
            assert row.shape == (len(LABELS),) and not retiring.done()
        old.clear()
        await asyncio.wait_for(retiring, 10)

    held = [model]
    del model
    gc.disable()  # it may come late, and a model is large
    try:
        asyncio.run(serve_and_retire(held))
        assert engine() is None
    finally:
        gc.enable()


def test_the_engine_is_measured_once_and_remembered(release_dir: Path, tmp_path: Path) -> None:
    options = ("--model", release_dir, "--state_dir", tmp_path, "--device", "cpu", "--min_agreement", "0.9")

    def choice(serve: Serve) -> dict[str, Any]:
        found = serve.client.get("/info").json()["engine_choice"]
        assert isinstance(found, dict)
        return found

    with Serve(*options) as serve:
        first = serve.client.post("/predict", json={"text": "Oil prices rise"}).json()
        until(lambda: (found := choice(serve))["state"] == "settled" and found["trials"], serve, 90)
        measured = choice(serve)
        assert {one["engine"] for one in measured["trials"]} >= {"onnxruntime", "openvino-fp32"}
        assert serve.client.get("/info").json()["engine"] == measured["engine"]
        again = serve.client.post("/predict", json={"text": "Oil prices rise"}).json()
        assert again["revision"] == first["revision"] and abs(again["confidence"] - first["confidence"]) < 0.03
    with Serve(*options) as serve:
        assert serve.client.get("/info").json()["engine"] == measured["engine"]
        until(lambda: choice(serve)["trials"], serve)
        assert choice(serve) == measured and not children(serve.process.pid)
    settings = Settings(str(release_dir), state_dir=str(tmp_path), device="cpu", min_agreement=0.9)
    old, state = pull(settings.model), State(settings)
    # Where one was asked for there is nothing to measure, and the next start knows its proof.
    forced = dataclasses.replace(settings, engine="onnxruntime")
    with Serve(*options, "--engine", "onnxruntime") as serve:
        until(lambda: recall(old, forced, state), serve)
        assert choice(serve)["trials"] == [] and not children(serve.process.pid)
    known = recall(old, forced, state)
    assert known and (proof := known.proof("onnxruntime")) and proof.examples == len(old.golden_texts)
    # It holds for a commit with the same files, too.
    new = dataclasses.replace(old, commit="next")
    assert recall(new, settings, state) is None
    carry_over(old, new, settings, state)
    found = recall(new, settings, state)
    assert found and found.engine == measured["engine"]


# Real engines do not die to order: these do what the file that stands beside the release says.
FAULTY = """
import sys, time, pathlib
import serve.model
from serve.engine import open_engine
fault = pathlib.Path(sys.argv[1]) / "fault"

class Faulty:
    def __init__(self, engine):
        self.engine = engine
        self.born = time.time()
    def __getattr__(self, name):
        return getattr(self.engine, name)
    def logits(self, texts):
        if fault.exists() and fault.stat().st_mtime > self.born:
            if fault.read_text() == "die":
                raise RuntimeError("the device is gone")
            time.sleep(1000)
        return self.engine.logits(texts)

serve.model.open_engine = lambda *a: Faulty(open_engine(*a))
from serve.__main__ import main
sys.exit(main(sys.argv[2:]))
"""


@pytest.mark.parametrize("kind", ["die", "hang"])
def test_a_broken_engine_is_replaced_once_and_then_the_process_ends(release_dir: Path, tmp_path: Path, kind: str) -> None:
    # Who waits for an engine that hangs is refused when it is given up, long before the deadline.
    options = ("--engine", "onnxruntime", "--stall_seconds", "0.5", "--deadline_seconds", "25")
    with Serve(tmp_path, "--model", release_dir, *options, program=("-c", FAULTY)) as serve:

        def ask() -> str:
            answer = serve.client.post("/predict", json={"text": "Oil prices rise"}).json()
            return str(answer.get("code", "answered"))

        assert ask() == "answered"
        (tmp_path / "fault").write_text(kind)
        assert ask() == "engine_down"
        serve.wait_ready()
        assert ask() == "answered", "a new engine, which is younger than the fault"
        assert "is loaded anew" in serve.log()
        (tmp_path / "fault").write_text(kind)
        with contextlib.suppress(Exception):  # the answer may be the last thing it does
            assert ask() == "engine_down"
        assert serve.process.wait(20) == 70, serve.log()
        assert "the service ends" in serve.log()


HANGING_TOKENIZER = """
import sys, time
from serve.text import TextTokenizer
encode = TextTokenizer.encode
TextTokenizer.encode = lambda self, texts: time.sleep(1000) if list(texts) == ["hang"] else encode(self, texts)
from serve.__main__ import main
sys.exit(main(sys.argv[1:]))
"""


def test_a_tokenizer_that_never_returns_ends_the_process(release_dir: Path, tmp_path: Path) -> None:
    options = ("--engine", "onnxruntime", "--stall_seconds", "0.5", "--deadline_seconds", "1")
    options = (*options, "--state_dir", tmp_path)
    with Serve("--model", release_dir, *options, program=("-c", HANGING_TOKENIZER)) as serve:
        assert serve.client.post("/predict", json={"text": "hang"}).json()["code"] == "too_slow"
        assert serve.process.wait(20) == 70, serve.log()
        assert "the tokenizer has been busy" in serve.log()


def test_an_engine_that_cannot_be_loaded_anew_ends_the_process(release_dir: Path, tmp_path: Path) -> None:
    folder = tmp_path / "release"
    shutil.copytree(release_dir, folder)
    with Serve(tmp_path, "--model", folder, "--engine", "onnxruntime", program=("-c", FAULTY)) as serve:
        (folder / "onnx" / "model.onnx").write_text("no graph any more")
        (tmp_path / "fault").write_text("die")
        with contextlib.suppress(Exception):
            assert serve.client.post("/predict", json={"text": "Oil prices rise"}).status_code == 503
        assert serve.process.wait(20) == 70, serve.log()
