"""The local Hub's bad days: each fault is what it says, hits what it is meant for, and is over when healed."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from hub_helpers import raw
from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError

from pipeline.local_hub.faults import Fault
from pipeline.local_hub.process import HubProcess

pytestmark = pytest.mark.timeout(90)
WHOAMI = "/api/whoami-v2"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[HubProcess]:
    with HubProcess(tmp_path_factory.mktemp("faulty"), faults=True) as hub:
        yield hub


@pytest.fixture
def hub(server: HubProcess) -> Iterator[HubProcess]:
    yield server
    server.heal()


@pytest.fixture
def api(hub: HubProcess) -> HfApi:
    return HfApi(endpoint=hub.url, token=hub.token)


def ask(hub: HubProcess, path: str = WHOAMI) -> int:
    return raw(hub, "GET", path, hub.token).status


def test_refused_connections(hub: HubProcess) -> None:
    hub.fault(Fault("refuse"))
    for _ in range(2):
        with pytest.raises(ConnectionError):
            ask(hub)
    hub.heal()
    assert ask(hub) == 200
    assert hub.hits()[-2:] == [f"refuse GET {WHOAMI}"] * 2


def test_a_stall_lasts_until_healed(hub: HubProcess) -> None:
    hub.fault(Fault("stall", path="whoami"))
    with ThreadPoolExecutor(1) as pool:
        answer = pool.submit(ask, hub)
        time.sleep(0.7)
        assert not answer.done() and ask(hub, "/") == 200, "only what was meant"
        hub.heal()
        assert answer.result(10) == 200


@pytest.mark.parametrize("status", [429, 500, 503])
def test_refusals_with_a_status(hub: HubProcess, api: HfApi, status: int) -> None:
    hub.fault(Fault("status", status=status, retry_after=7, after=1, times=2))
    answers = [raw(hub, "GET", WHOAMI, hub.token) for _ in range(4)]
    assert [answer.status for answer in answers] == [200, status, status, 200]
    assert answers[1].headers["Retry-After"] == "7" and answers[3].headers["Retry-After"] is None
    hub.fault(Fault("status", status=status))  # counts anew
    with pytest.raises(HfHubHTTPError) as error:
        api.whoami()
    assert error.value.response.status_code == status


def test_an_upload_cut_short_leaves_nothing_and_the_client_sends_it_again(hub: HubProcess, api: HfApi) -> None:
    repo = api.create_repo("local/cut").repo_id
    weights = os.urandom(3_000_000)
    hub.fault(Fault("cut", method="PUT", bytes=1_000_000, times=1))
    api.upload_file(path_or_fileobj=weights, path_in_repo="w.safetensors", repo_id=repo)
    assert sum(hit.startswith("cut PUT /lfs/models/local/cut/") for hit in hub.hits()) == 1
    assert raw(hub, "GET", f"/{repo}/resolve/main/w.safetensors", hub.token).body == weights
    assert not list((hub.root / "temp").iterdir()), "no part of it is left"


def test_a_lost_answer_is_work_done(hub: HubProcess, api: HfApi) -> None:
    hub.fault(Fault("lost", method="POST", path="/repos/create"))
    with pytest.raises(Exception, match="disconnected"):
        api.create_repo("local/lost")
    hub.heal()
    assert api.repo_exists("local/lost")


def test_a_revoked_token(hub: HubProcess, api: HfApi) -> None:
    hub.revoke()
    try:
        with pytest.raises(HfHubHTTPError, match="Invalid user token"):
            api.whoami()
    finally:
        hub.restore()
    assert api.whoami()["name"] == "local"


def test_vanished_and_back_at_the_same_address(tmp_path: Path) -> None:
    with HubProcess(tmp_path, faults=True) as hub:
        api, url = HfApi(endpoint=hub.url, token=hub.token), hub.url
        api.create_repo("local/kept")
        hub.vanish()
        with pytest.raises(ConnectionError):
            ask(hub)
        hub.start()
        assert hub.url == url and api.repo_exists("local/kept")


def test_no_hub_has_faults_unless_started_with_them(local_hub: Any) -> None:
    (local_hub.root / "fault.json").write_text('{"kind": "refuse"}')
    try:
        assert ask(local_hub) == 200
        with pytest.raises(AssertionError, match="faults=True"):
            local_hub.fault(Fault("refuse"))
    finally:
        (local_hub.root / "fault.json").unlink()


def test_a_squashed_history_gives_back_its_room(hub: HubProcess, api: HfApi) -> None:
    repo = api.create_repo("local/squashed").repo_id
    objects = hub.root / "models" / repo / "repo.git" / "lfs" / "objects"

    def held() -> int:
        return sum(path.is_file() for path in objects.rglob("*"))

    api.create_branch(repo, branch="topic")
    for content in (b"one", b"two", b"three"):
        api.upload_file(path_or_fileobj=content, path_in_repo="w.safetensors", repo_id=repo, revision="topic")
    first = api.list_repo_commits(repo, revision="topic")[2].commit_id
    api.create_tag(repo, tag="kept", revision=first)
    assert held() == 3
    api.super_squash_history(repo, branch="topic")
    assert held() == 2, "what the tag leads to stays"
    assert raw(hub, "GET", f"/{repo}/resolve/topic/w.safetensors", hub.token).body == b"three"
    assert raw(hub, "GET", f"/{repo}/resolve/kept/w.safetensors", hub.token).body == b"one"
