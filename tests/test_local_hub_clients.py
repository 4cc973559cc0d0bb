"""The real clients, unchanged, against the real local Hub: huggingface_hub, the hf command, transformers, datasets."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
import uuid
from pathlib import Path
from typing import Any

import pytest
from hub_helpers import raw
from huggingface_hub import CommitOperationAdd, CommitOperationCopy, CommitOperationDelete, HfApi, HfFileSystem
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, RepositoryNotFoundError, RevisionNotFoundError
from huggingface_hub.hf_api import RepoFile

pytestmark = pytest.mark.timeout(120)


@pytest.fixture
def api(local_hub: Any) -> HfApi:
    return HfApi(endpoint=local_hub.url, token=local_hub.token)


@pytest.fixture
def model(api: HfApi) -> str:
    """A fresh model repository."""
    repo_id = f"local/client-{uuid.uuid4().hex[:8]}"
    api.create_repo(repo_id)
    return repo_id


def run(hub: Any, home: Path, *command: str, **extra: str) -> str:
    """Run a command as a user of the Hub would, with an empty cache; returns stdout, fails with both streams shown."""
    env = {**os.environ, **hub.env, "HF_HOME": str(home), "OMP_NUM_THREADS": "1", "NO_COLOR": "1", **extra}
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=90)
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def python(hub: Any, home: Path, code: str) -> dict[str, Any]:
    """Run code that prints one line of JSON last; returns it."""
    printed = run(hub, home, sys.executable, "-c", code)
    found: dict[str, Any] = json.loads(printed.strip().splitlines()[-1])
    return found


def test_identity_and_whole_repositories(api: HfApi, model: str) -> None:
    who = api.whoami()
    assert (who["name"], who["auth"]["accessToken"]["role"]) == ("local", "write")
    assert api.create_repo(model, exist_ok=True).repo_id == model
    with pytest.raises(HfHubHTTPError) as raised:
        api.create_repo(model)
    assert raised.value.response.status_code == 409
    api.auth_check(model, write=True)
    assert api.repo_exists(model) and not api.repo_exists(model + "-not")

    api.update_repo_settings(model, private=True)
    assert api.model_info(model).private
    anonymous = HfApi(endpoint=api.endpoint, token=False)
    assert not anonymous.repo_exists(model)
    api.update_repo_settings(model, private=False)
    assert anonymous.repo_exists(model)

    moved = model + "-moved"
    api.move_repo(model, moved)
    assert api.repo_exists(moved) and not api.repo_exists(model)
    assert moved in [info.id for info in api.list_models(author="local", search="-moved")]
    assert moved not in [info.id for info in [*api.list_models(author="fancyzhx"), *api.list_models(search="-other")]]
    assert moved in [item.id for item in api.list_user_repos()]
    api.delete_repo(moved)
    assert not api.repo_exists(moved)
    api.delete_repo(moved, missing_ok=True)


def test_create_for_each_kind(local_hub: Any, api: HfApi) -> None:
    name = f"local/kind-{uuid.uuid4().hex[:8]}"  # the same name thrice: each kind has its own names
    assert api.create_repo(name).repo_type == "model"
    assert api.create_repo(name, repo_type="dataset").url.endswith(f"/datasets/{name}")
    assert api.create_repo(name, repo_type="space", space_sdk="docker", space_variables=[{"key": "A", "value": "1"}]).repo_type == "space"
    assert api.dataset_info(name).id == name
    assert api.space_info(name).sdk == "docker"
    assert name in [info.id for info in api.list_datasets(author="local")]
    assert name in [info.id for info in api.list_spaces(author="local")]

    api.upload_file(path_or_fileobj=b"FROM scratch\n", path_in_repo="Dockerfile", repo_id=name, repo_type="space")
    assert api.add_space_variable(name, "MODEL", "local/m", description="what to serve")["MODEL"].value == "local/m"
    assert set(api.delete_space_variable(name, "A")) == {"MODEL"}
    api.add_space_secret(name, "HF_TOKEN", "a-secret-value")
    assert set(api.get_space_secrets(name)) == {"HF_TOKEN"}
    for path in (f"/api/spaces/{name}/secrets", f"/api/spaces/{name}"):
        assert b"a-secret-value" not in raw(local_hub, "GET", path, local_hub.token).body
    assert api.get_space_runtime(name).stage == "STOPPED"


def test_commit_and_read_back(api: HfApi, model: str, tmp_path: Path) -> None:
    weights = os.urandom(3_000_000)
    card = "---\nlicense: mit\npipeline_tag: text-classification\nlibrary_name: transformers\ntags: [news]\n---\n# A model\n"
    commit = api.create_commit(
        model,
        [
            CommitOperationAdd("model.safetensors", weights),
            CommitOperationAdd("README.md", card.encode()),
            CommitOperationAdd("data/ünï code/a b+c#d%2F.txt", io.BytesIO("größe\n".encode())),
            CommitOperationAdd("empty.bin", b""),
        ],
        commit_message="First",
        commit_description="with a description",
    )
    files = {entry.path: entry for entry in api.list_repo_tree(model, recursive=True) if isinstance(entry, RepoFile)}
    assert files["model.safetensors"].size == len(weights) and files["model.safetensors"].lfs
    assert files["README.md"].lfs is None and files["empty.bin"].size == 0
    top = {entry.path for entry in api.list_repo_tree(model)}
    assert top == {".gitattributes", "README.md", "data", "empty.bin", "model.safetensors"}

    for name, content in (("model.safetensors", weights), ("data/ünï code/a b+c#d%2F.txt", "größe\n".encode()), ("empty.bin", b"")):
        assert Path(api.hf_hub_download(model, name, cache_dir=tmp_path)).read_bytes() == content
    info: Any = api.model_info(model, files_metadata=True)
    assert (info.sha, info.pipeline_tag, info.library_name, info.card_data["license"]) == (
        commit.oid, "text-classification", "transformers", "mit",
    )  # fmt: skip
    assert "news" in info.tags and {s.rfilename: s.size for s in info.siblings}["model.safetensors"] == len(weights)
    assert [path.path for path in api.get_paths_info(model, ["README.md", "data", "not-there"])] == ["README.md", "data"]
    assert api.file_exists(model, "README.md") and not api.file_exists(model, "not-there")

    # Unchanged content makes no new commit; a copy and a deletion make one.
    assert api.upload_file(path_or_fileobj=weights, path_in_repo="model.safetensors", repo_id=model).oid == commit.oid
    api.create_commit(
        model, [CommitOperationCopy("model.safetensors", "copy.safetensors"), CommitOperationDelete("data/")], commit_message="Second"
    )
    assert Path(api.hf_hub_download(model, "copy.safetensors", cache_dir=tmp_path)).read_bytes() == weights
    assert not api.file_exists(model, "data/ünï code/a b+c#d%2F.txt")
    api.delete_file("empty.bin", model)
    assert [c.title for c in api.list_repo_commits(model)][1:] == ["Second", "First", "initial commit"]
    last = {entry.path: entry.last_commit for entry in api.list_repo_tree(model, expand=True)}
    assert {path: commit and commit.title for path, commit in last.items()} == {
        ".gitattributes": "initial commit", "README.md": "First", "model.safetensors": "First", "copy.safetensors": "Second",
    }  # fmt: skip

    snapshot = Path(api.snapshot_download(model, revision=commit.oid, cache_dir=tmp_path / "again"))
    assert snapshot.name == commit.oid and (snapshot / "empty.bin").exists() and not (snapshot / "copy.safetensors").exists()


def test_upload_folder_with_gitignore(api: HfApi, model: str, tmp_path: Path) -> None:
    (tmp_path / "deep" / "er").mkdir(parents=True)
    for name in ("keep.txt", "deep/er/keep.txt", "skip.log", "deep/skip.log"):
        (tmp_path / name).write_text(name)
    (tmp_path / ".gitignore").write_text("*.log\n")
    api.upload_folder(folder_path=tmp_path, repo_id=model)
    assert set(api.list_repo_files(model)) == {".gitattributes", ".gitignore", "keep.txt", "deep/er/keep.txt"}


def test_branches_and_tags(api: HfApi, model: str, tmp_path: Path) -> None:
    first = api.upload_file(path_or_fileobj=b"1", path_in_repo="n.txt", repo_id=model).oid
    api.create_branch(model, branch="dev/next")
    api.create_tag(model, tag="v1", tag_message="the first")
    second = api.upload_file(path_or_fileobj=b"2", path_in_repo="n.txt", repo_id=model, revision="dev/next").oid
    api.create_tag(model, tag="20240101", revision="dev/next")

    refs = api.list_repo_refs(model)
    assert {b.name: b.target_commit for b in refs.branches} == {"main": first, "dev/next": second}
    assert {t.name: t.target_commit for t in refs.tags} == {"v1": first, "20240101": second}
    for revision, content in (
        ("v1", "1"), ("refs/tags/v1", "1"), (first, "1"), (first[:8], "1"), ("dev/next", "2"), ("20240101", "2"), ("main", "1"),
    ):  # fmt: skip
        assert Path(api.hf_hub_download(model, "n.txt", revision=revision, cache_dir=tmp_path)).read_text() == content
    api.create_branch(model, branch="main", exist_ok=True)
    api.create_tag(model, tag="v1", exist_ok=True)
    with pytest.raises(HfHubHTTPError, match="409"):
        api.create_branch(model, branch="dev/next")
    with pytest.raises(HfHubHTTPError, match="409"):
        api.create_branch(model, branch="dev")  # a branch cannot also be the folder of another
    with pytest.raises(HfHubHTTPError, match="409"):
        api.create_tag(model, tag="v1")
    api.delete_branch(model, branch="dev/next")
    api.delete_tag(model, tag="v1")
    with pytest.raises(RevisionNotFoundError):
        api.hf_hub_download(model, "n.txt", revision="v1", cache_dir=tmp_path / "fresh")
    api.super_squash_history(model)
    assert len(api.list_repo_commits(model)) == 1 and api.file_exists(model, "n.txt")


def test_the_errors_clients_tell_apart(api: HfApi, model: str) -> None:
    with pytest.raises(RepositoryNotFoundError):
        api.model_info("local/none-such")
    with pytest.raises(RepositoryNotFoundError):
        api.model_info("word-without-namespace")
    with pytest.raises(RevisionNotFoundError):
        api.model_info(model, revision="none-such")
    with pytest.raises(EntryNotFoundError):
        api.hf_hub_download(model, "none-such")
    with pytest.raises(EntryNotFoundError):
        list(api.list_repo_tree(model, "none-such"))
    with pytest.raises(EntryNotFoundError, match="A file with this name doesn't exist"):
        api.delete_file("none-such", model)
    with pytest.raises(RevisionNotFoundError):
        api.upload_file(path_or_fileobj=b"x", path_in_repo="x", repo_id=model, revision="no-branch")
    with pytest.raises(ValueError, match="Invalid YAML"):
        api.upload_file(path_or_fileobj=b"---\na: [\n---\n", path_in_repo="README.md", repo_id=model)


def test_ids_in_another_case_lead_to_the_same_repository(api: HfApi, model: str, tmp_path: Path) -> None:
    api.upload_file(path_or_fileobj=b"1", path_in_repo="n.txt", repo_id=model)
    assert api.model_info(model.upper()).id == model
    assert Path(api.hf_hub_download(model.upper(), "n.txt", cache_dir=tmp_path)).read_text() == "1"
    with pytest.raises(HfHubHTTPError) as raised:
        api.create_repo(f"local/{model.split('/')[1].upper()}")
    assert raised.value.response.status_code == 409


def test_long_listings_come_in_pages(api: HfApi, model: str) -> None:
    api.create_commit(model, [CommitOperationAdd(f"d/{n:04}.txt", b"%d" % n) for n in range(1010)], commit_message="Many")
    assert len(list(api.list_repo_tree(model, recursive=True))) == 1010 + 2  # the directory and .gitattributes
    expanded = [e.path for e in api.list_repo_tree(model, "d", expand=True)][:120]
    assert expanded == [f"d/{n:04}.txt" for n in range(120)]


def test_ranges(local_hub: Any, api: HfApi, model: str) -> None:
    large = os.urandom(2_500_000)
    api.create_commit(model, [CommitOperationAdd("l.bin", large), CommitOperationAdd("s.txt", b"0123456789")], commit_message="Both")
    filesystem = HfFileSystem(endpoint=api.endpoint, token=api.token)
    with filesystem.open(f"{model}/l.bin", "rb", block_size=100_000) as file:
        file.seek(1_200_000)
        assert file.read(1000) == large[1_200_000:1_201_000]
    for name, content in (("l.bin", large), ("s.txt", b"0123456789")):
        path, last = f"/{model}/resolve/main/{name}", len(content) - 1
        for given, expected in (("2-5", content[2:6]), ("7-", content[7:]), ("-3", content[-3:]), ("5-99999999", content[5:])):
            answer = raw(local_hub, "GET", path, headers={"Range": f"bytes={given}"})
            assert (answer.status, answer.body) == (206, expected), given
        assert answer.headers["Content-Range"] == f"bytes 5-{last}/{len(content)}"
        for beyond in ("99999999-", f"{last + 1}-", "5-2", "-0"):
            answer = raw(local_hub, "GET", path, headers={"Range": f"bytes={beyond}"})
            assert (answer.status, answer.headers["Content-Range"]) == (416, f"bytes */{len(content)}"), beyond
        for not_ours in ("lines=1-2", "bytes=1-2,4-5", "bytes=-", "bytes=" + "9" * 6000 + "-"):
            assert raw(local_hub, "GET", path, headers={"Range": not_ours}).body == content
        head = raw(local_hub, "HEAD", path)
        assert int(head.headers["Content-Length"]) == len(content) and head.headers["X-Repo-Commit"]


def test_hf_command(local_hub: Any, api: HfApi, model: str, tmp_path: Path) -> None:
    folder, back, name = tmp_path / "folder", tmp_path / "back", model + "-cli"
    (folder / "sub").mkdir(parents=True)
    (folder / "sub" / "weights.bin").write_bytes(os.urandom(2_000_000))
    (folder / "README.md").write_text("---\nlicense: mit\n---\n")

    def hf(*words: str) -> str:
        return run(local_hub, tmp_path / "home", str(Path(sys.executable).parent / "hf"), *words)

    assert "local" in hf("auth", "whoami")
    hf("repos", "create", name, "--private")
    hf("upload", name, str(folder))
    assert name in hf("models", "list", "--author", "local", "--quiet")
    hf("download", name, "--local-dir", str(back))
    assert (back / "sub" / "weights.bin").read_bytes() == (folder / "sub" / "weights.bin").read_bytes()
    hf("repos", "delete", name, "--yes")
    assert not api.repo_exists(name)


def test_hf_command_with_datasets_and_spaces(local_hub: Any, api: HfApi, model: str, tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "rows.csv").write_text("text,label\na,b\n")

    def hf(*words: str) -> str:
        return run(local_hub, tmp_path / "home", str(Path(sys.executable).parent / "hf"), *words)

    for kind, extra in (("dataset", []), ("space", ["--space-sdk", "static"])):
        hf("repos", "create", model, "--repo-type", kind, "--exist-ok", *extra)
        hf("upload", model, str(tmp_path / "folder"), "--repo-type", kind)
        hf("download", model, "--repo-type", kind, "--local-dir", str(tmp_path / kind))
        assert (tmp_path / kind / "rows.csv").read_text() == "text,label\na,b\n"
        cached = api.snapshot_download(model, repo_type=kind, cache_dir=tmp_path / "cache")
        assert (Path(cached) / "rows.csv").exists()
    env = {**os.environ, **local_hub.env, "HF_HOME": str(tmp_path / "home2")}
    code = f"from datasets import load_dataset; print(load_dataset({model!r})['train'][0])"
    assert (
        "'text': 'a'"
        in subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=120, check=True).stdout
    )


TRANSFORMERS = """
import json, sys, torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer, pipeline
folder, repo = sys.argv[1:] if len(sys.argv) > 1 else (FOLDER, REPO)
tokenizer = AutoTokenizer.from_pretrained(folder)
model = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=3)
commit = model.push_to_hub(repo, private=True).oid
tokenizer.push_to_hub(repo)
again = AutoModelForSequenceClassification.from_pretrained(repo)
pinned = AutoModelForSequenceClassification.from_pretrained(repo, revision=commit)
inputs = AutoTokenizer.from_pretrained(repo)("Stocks rise.", return_tensors="pt")
model.eval()
logits = [m(input_ids=inputs["input_ids"]).logits for m in (model, again, pinned)]
print(json.dumps({"same": all(torch.equal(logits[0], other) for other in logits[1:]), "commit": commit}))
"""


def test_transformers_push_and_pull(local_hub: Any, api: HfApi, tiny_model_dir: Path, tmp_path: Path) -> None:
    repo_id = f"local/tiny-{uuid.uuid4().hex[:8]}"
    code = TRANSFORMERS.replace("FOLDER", repr(str(tiny_model_dir))).replace("REPO", repr(repo_id))
    found = python(local_hub, tmp_path, code)
    assert found["same"] and api.model_info(repo_id).private
    assert {"model.safetensors", "config.json", "tokenizer.json"} <= set(api.list_repo_files(repo_id))
    assert found["commit"] in [commit.commit_id for commit in api.list_repo_commits(repo_id)]


DATASETS = """
import json
from datasets import Dataset, DatasetDict, load_dataset
rows = {"text": [f"row {n}" for n in range(500)], "label": [n % 4 for n in range(500)]}
made = DatasetDict({"train": Dataset.from_dict(rows), "test": Dataset.from_dict({k: v[:9] for k, v in rows.items()})})
commit = made.push_to_hub(REPO, private=True).oid
Dataset.from_dict({"text": ["new"], "label": [0]}).push_to_hub(REPO, split="test")
now, before = load_dataset(REPO), load_dataset(REPO, revision=commit)
streamed = [row["text"] for row in load_dataset(REPO, split="train", streaming=True).skip(490)]
print(json.dumps({"train": now["train"].to_dict() == rows, "test": [len(now["test"]), len(before["test"])], "streamed": streamed}))
"""


def test_datasets_push_and_load(local_hub: Any, tmp_path: Path) -> None:
    repo_id = f"local/rows-{uuid.uuid4().hex[:8]}"
    found = python(local_hub, tmp_path, DATASETS.replace("REPO", repr(repo_id)))
    assert found == {"train": True, "test": [1, 9], "streamed": [f"row {n}" for n in range(490, 500)]}


XET_ON = """
import json, time
from huggingface_hub import HfApi
from huggingface_hub.utils._runtime import is_xet_available
started, message = time.monotonic(), ""
try:
    HfApi().upload_file(path_or_fileobj=bytes(5000), path_in_repo="a.bin", repo_id=REPO)
except Exception as error:
    message = str(error)
print(json.dumps({"xet": is_xet_available(), "message": message, "seconds": time.monotonic() - started}))
"""


def test_a_client_with_xet_on_is_told_what_to_set(local_hub: Any, model: str, tmp_path: Path) -> None:
    printed = run(local_hub, tmp_path, sys.executable, "-c", XET_ON.replace("REPO", repr(model)), HF_HUB_DISABLE_XET="0")
    found = json.loads(printed.strip().splitlines()[-1])
    assert found["xet"] and "set-HF_HUB_DISABLE_XET=1" in found["message"]
    assert found["seconds"] < 10
