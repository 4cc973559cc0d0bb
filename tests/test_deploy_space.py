"""A Docker Space from the command to the answer to curl, on the local Hub; its image's own steps carried out as an ordinary user."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml
from hub_helpers import raw
from huggingface_hub import HfApi, ModelInfo, metadata_load
from launching import ROOT, environment, launch, started
from serving import make_release

from pipeline.deploy.dockerfile import Image, steps
from pipeline.deploy.rehearse import answers
from pipeline.deploy.space import NEEDED, compose, curl_line, deploy, read_secrets, wait_until_running
from pipeline.deploy.upload import OURS, upload
from pipeline.errors import UserError
from pipeline.local_hub.faults import Fault
from pipeline.local_hub.process import HubProcess
from serve.settings import PREFIX, Settings

MB = 1_000_000
PAGE = b"---\ntitle: page\nsdk: static\n---\n"


@pytest.fixture(scope="module")
def hub() -> Any:
    with HubProcess(faults=True) as hub:
        yield hub


@pytest.fixture(scope="module")
def api(hub: Any) -> HfApi:
    return HfApi(endpoint=hub.url, token=hub.token)


@pytest.fixture(scope="module")
def model(api: HfApi, encoder_dir: Path) -> str:
    """A private repository with a release that can be served."""
    name = "local/news"
    api.create_repo(name, private=True)
    api.upload_folder(repo_id=name, folder_path=make_release(encoder_dir))
    return name


def space_name() -> str:
    return f"local/space-{uuid.uuid4().hex[:8]}"


def test_an_update_removes_what_it_no_longer_wants_and_keeps_what_the_owner_added(hub: Any, api: HfApi) -> None:
    name = space_name()
    first = upload(
        name, "static", {"README.md": PAGE, "a.txt": b"a", "old/b.txt": b"b"}, variables={"X": "1"}, secrets={"S": "hush"}, api=api
    )
    assert upload(name, "static", {"README.md": PAGE, "a.txt": b"a", "old/b.txt": b"b"}, variables={"X": "1"}, api=api) == first
    api.upload_file(path_or_fileobj=b"mine", path_in_repo="mine.txt", repo_id=name, repo_type="space")
    api.add_space_variable(name, "THEIRS", "kept")
    commit = upload(name, "static", {"README.md": PAGE, "a.txt": b"changed"}, variables={"X": "2"}, api=api)
    assert set(api.list_repo_files(name, repo_type="space")) - {".gitattributes"} == {"README.md", "a.txt", "mine.txt", OURS}
    assert len(api.list_repo_commits(name, repo_type="space")) == 4  # creation, two uploads, the owner's
    assert api.space_info(name).sha == commit
    assert {key: item.value for key, item in api.get_space_variables(name).items()} == {"X": "2", "THEIRS": "kept"}
    assert set(api.get_space_secrets(name)) == {"S"}
    api.upload_file(path_or_fileobj=b"[]", path_in_repo=OURS, repo_id=name, repo_type="space")  # a list nobody can use
    upload(name, "static", {"README.md": PAGE}, api=api)
    assert api.file_exists(name, "a.txt", repo_type="space")


class Gated(HfApi):
    """To it every model is public and gated, which the local Hub does not offer."""

    def model_info(self, *args: Any, **kwargs: Any) -> ModelInfo:
        info = super().model_info(*args, **kwargs)
        info.private, info.gated = False, "manual"
        return info


def refused(call: Callable[[], object], *words: str) -> None:
    with pytest.raises(UserError) as caught:
        call()
    line = str(caught.value)
    assert all(word in line for word in words) and "\n" not in line, line


def until(come: Callable[[], bool], seconds: float = 30) -> None:
    deadline = time.monotonic() + seconds
    while not come():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_what_cannot_be_done_is_said_with_the_next_step(hub: Any, api: HfApi, model: str) -> None:
    name, page = space_name(), {"README.md": PAGE}
    reader = HfApi(endpoint=hub.url, token=hub.add_user("local", role="read"))
    stranger = hub.add_user("stranger")
    refused(lambda: upload(name, "static", page, api=reader), "may only read", "Access Tokens")
    refused(lambda: upload("somebody/page", "static", page, api=api), "'somebody'", "local/...")
    refused(lambda: upload("page", "static", page, api=api), "your-name/page")
    refused(lambda: upload(name, "static", page, api=HfApi(endpoint=hub.url, token="hf_unknown_token")), "does not know this token")
    assert not api.repo_exists(name, repo_type="space")

    hub.fault(Fault("status", path="repos/create", status=402))
    try:
        refused(lambda: upload(name, "docker", page, api=api), "402", "paid plan", "make deploy-page", "compose.yaml", "make serve")
        with pytest.raises(UserError, match="no room"):  # a static Space costs nobody anything: this is not about the plan
            upload(name, "static", page, api=api)
    finally:
        hub.heal()
    upload(name, "static", page, api=api)
    refused(lambda: upload(name, "docker", page, api=api), "exists already as a static Space", "another name")
    refused(lambda: upload(name, "static", page, private=True, api=api), "is public", "--private")

    refused(lambda: deploy(space_name(), model, api=api), "is private", "--secret HF_TOKEN=READ_TOKEN")
    refused(lambda: deploy(space_name(), model, secrets={"HF_TOKEN": stranger}, api=api), "may not read", model)
    refused(lambda: deploy(space_name(), model, "v9", api=api), "No such revision")
    api.create_repo("local/torch-only")
    api.upload_file(path_or_fileobj=b"{}", path_in_repo="config.json", repo_id="local/torch-only")
    refused(lambda: deploy(space_name(), "local/torch-only", api=api), "has no", "onnx/model.onnx", "make push")
    refused(lambda: deploy(space_name(), model, api=Gated(endpoint=hub.url, token=hub.token)), "is gated", "--secret HF_TOKEN=READ_TOKEN")
    refused(lambda: read_secrets(["NOT_SET_ANYWHERE"]), "not set here")
    for module in ("pipeline.deploy.space", "pipeline.deploy.rehearse"):  # every --secret counts, not the last alone
        model_too = ["--model", model] if module.endswith("space") else []
        secrets = ["--secret", "NOT_SET_ANYWHERE", "--secret", "HF_TOKEN"]
        done = launch(["--space", name, *model_too, *secrets], module=module, timeout=30, **hub.env)
        assert done.returncode == 2 and "NOT_SET_ANYWHERE is not set here" in done.stderr, done.stderr
    done = launch(["--space", "page", "--model", model, "--secret", "HF_TOKEN"], module="pipeline.deploy.space", **hub.env)
    assert done.returncode == 2 and done.stderr.startswith("error: --space is 'page': allowed is owner/name"), done.stderr


def test_a_space_that_nobody_runs_is_not_said_to_run(hub: Any, api: HfApi, monkeypatch: pytest.MonkeyPatch) -> None:
    name = space_name()
    commit = upload(name, "docker", {"README.md": b"---\ntitle: x\nsdk: docker\n---\n"}, api=api)
    monkeypatch.setattr("pipeline.deploy.space.NOTICE_SECONDS", 0)
    refused(lambda: wait_until_running(api, name, commit, time.monotonic() + 60), "STOPPED", "pipeline.deploy.rehearse")

    def say(stage: str, sha: str, token: str = hub.token, **more: str) -> int:
        return raw(hub, "POST", f"/api/spaces/{name}/runner", token, {"stage": stage, "sha": sha, **more}).status

    assert say("RUNNING", commit, token=hub.add_user("passer-by")) == 403 and say("SLEEPING", commit) == 400
    assert say("BUILD_ERROR", commit, error="pip found\nno wheel") == 200
    refused(lambda: wait_until_running(api, name, commit, time.monotonic() + 60), "BUILD_ERROR", "pip found no wheel", "logs=build")
    say("RUNNING", "0" * 40)  # of the commit before: that is no news of this one
    refused(lambda: wait_until_running(api, name, commit, time.monotonic() + 3), "longer than --minutes")
    monkeypatch.setattr("pipeline.deploy.space.POLL_SECONDS", 0.2)
    say("APP_STARTING", "0" * 40)  # that one again, with a variable changed
    threading.Timer(1, say, ("RUNNING", "0" * 40)).start()
    refused(lambda: wait_until_running(api, name, commit, time.monotonic() + 3), "longer than --minutes")
    say("RUNNING", commit, host="http://127.0.0.1:1")
    wait_until_running(api, name, commit, time.monotonic() + 60)
    assert api.space_info(name).host == "http://127.0.0.1:1"
    api.restart_space(name)
    assert raw(hub, "POST", f"/api/spaces/{name}/runner", hub.token, {"stage": "RUNNING", "sha": commit}).json() == {
        "restarts": 2
    }  # one by the wait
    until(lambda: api.get_space_runtime(name).stage == "STOPPED")  # nobody says any more that it runs


def test_an_update_knows_that_the_space_is_private_and_asks_for_keys(hub: Any, api: HfApi, model: str, tmp_path: Path) -> None:
    name, token = space_name(), {"HF_TOKEN": hub.add_user("local", role="read")}
    for private, secrets in ((True, token | {"DISTRINEWS_API_KEYS": "k"}), (False, token)):
        refused(partial(deploy, name, model, private=private, secrets=secrets, minutes=0, api=api), "longer than --minutes")
        readme = Path(api.hf_hub_download(name, "README.md", repo_type="space", local_dir=tmp_path)).read_text(encoding="utf-8")
        assert '"Authorization: Bearer $HF_TOKEN" -H "X-API-Key: $API_KEY"' in readme, private


def test_a_space_that_fails_says_why(hub: Any, api: HfApi, tmp_path: Path) -> None:
    name, readme = space_name(), b"---\ntitle: x\nsdk: docker\n---\n"
    env = environment(**hub.env, HF_HOME=str(tmp_path), HF_HUB_DISABLE_PROGRESS_BARS="1")
    with started(["--space", name, "--port", "0"], module="pipeline.deploy.rehearse", **env) as rehearsal:
        for step, stage, why in (
            ("RUN echo no such wheel; exit 3", "BUILD_ERROR", "no such wheel"),
            ("COPY a b", "BUILD_ERROR", "COPY a b cannot be carried out"),
            ('CMD ["python", "-c", "import os; exit(\'no \' + os.environ[\'X\'])"]', "RUNTIME_ERROR", "no model"),
        ):
            files = {"README.md": readme, "Dockerfile": f"FROM python:3.12-slim\n{step}".encode()}
            commit = upload(name, "docker", files, variables={"X": "model"}, api=api)
            with pytest.raises(UserError, match=f"{stage} .*{why}"):
                wait_until_running(api, name, commit, time.monotonic() + 60)
        api.restart_space(name)
        until(lambda: api.get_space_runtime(name).stage in ("BUILDING", "APP_STARTING"))
        rehearsal.terminate()
        rehearsal.communicate(timeout=30)
    assert rehearsal.returncode == 0


def test_the_image_is_small_unprivileged_and_holds_no_secret(api: HfApi, model: str) -> None:
    files = compose(
        "local/news-api",
        api.model_info(model),
        curl_line("https://local-news-api.hf.space", True, {"DISTRINEWS_API_KEYS"}),
        api.endpoint,
    )
    readme = bytes(files["README.md"]).decode()  # type: ignore[arg-type]
    front = yaml.safe_load(readme.split("---\n")[1])
    gated = Gated(endpoint=api.endpoint, token=api.token).model_info(model)
    assert b"preload_from_hub" not in bytes(compose("local/news-api", gated, "curl", api.endpoint)["README.md"])  # type: ignore[arg-type]
    assert front["sdk"] == "docker" and front["models"] == [model] and "preload_from_hub" not in front  # it is private
    assert len(front["short_description"]) <= 60  # the Hub's limit
    assert '"Authorization: Bearer $HF_TOKEN" -H "X-API-Key: $API_KEY"' in readme

    dockerfile = (ROOT / "serve" / "space" / "Dockerfile").read_text(encoding="utf-8")
    said = steps(dockerfile)
    environment = dict(pair.split("=", 1) for name, pairs in said if name == "ENV" for pair in pairs.split())
    assert environment["DISTRINEWS_HOST"] == "0.0.0.0" and environment["HOME"] == "/home/user"
    assert environment["DISTRINEWS_PORT"] == str(front["app_port"]) == dict(said)["EXPOSE"] == "7860"
    assert said[0][0] == "FROM" and re.fullmatch(r"python:3\.\d+\.\d+-slim-\w+", said[0][1])
    assert ("USER", "1000") in said and not [
        argument for name, argument in said if name != "RUN" and re.search("TOKEN|SECRET|KEY", argument)
    ]
    copied = {argument.split()[0] for name, argument in said if name == "COPY"}
    assert copied == {"serve", "serve/requirements.txt"} and {"serve/app.py", "serve/static/index.html"} <= set(files)
    assert not [name for name in files if "__pycache__" in name or name.startswith("serve/space")]
    assert not re.search(r"^(torch|transformers)\b", (ROOT / "serve" / "requirements.txt").read_text(), re.MULTILINE)


def test_a_step_that_is_not_understood_is_refused(tmp_path: Path) -> None:
    image = Image(tmp_path / "root", tmp_path)
    refused(lambda: image.carry_out("FROM", "nginx:1"), "python images only")
    refused(lambda: image.carry_out("ADD", "a b"), "does not know the step ADD")
    refused(lambda: image.carry_out("RUN", "rm -r /etc"), "absolute path")
    assert steps('# x\nRUN a \\\n  && b\n\nCMD ["c"]\n') == [("RUN", "a    && b"), ("CMD", '["c"]')]


def test_compose_and_kubernetes_files_say_what_the_service_understands() -> None:
    schemas = [["check-jsonschema", "--builtin-schema", "vendor.compose-spec", "configs/deploy/compose.yaml"],
               ["kubernetes-validate", "--strict", "--kubernetes-version", "1.37", "configs/deploy/kubernetes.yaml"]]  # fmt: skip
    for program, *arguments in schemas:
        done = subprocess.run(
            [Path(sys.executable).with_name(program), *arguments], cwd=ROOT, capture_output=True, text=True, timeout=120, check=False
        )
        assert done.returncode == 0, done.stdout + done.stderr

    api = yaml.safe_load((ROOT / "configs/deploy/compose.yaml").read_text())["services"]["api"]
    deployment, service = yaml.safe_load_all((ROOT / "configs/deploy/kubernetes.yaml").read_text())
    pod = deployment["spec"]["template"]["spec"]
    container = pod["containers"][0]
    # The schemas know neither our settings nor that these names have to meet.
    fields = {f"{PREFIX}{name.upper()}" for name in Settings.__dataclass_fields__} | {"HF_TOKEN"}
    assert {*api["environment"], *(entry["name"] for entry in container["env"])} <= fields
    assert service["spec"]["selector"].items() <= deployment["spec"]["template"]["metadata"]["labels"].items()
    assert deployment["spec"]["selector"]["matchLabels"].items() <= deployment["spec"]["template"]["metadata"]["labels"].items()
    assert container["ports"] == [{"name": "http", "containerPort": 7860}] and api["ports"] == ["127.0.0.1:7860:7860"]
    probes = {
        container[f"{kind}Probe"]["httpGet"]["path"]: container[f"{kind}Probe"]["httpGet"]["port"] for kind in ("liveness", "readiness")
    }
    assert probes == {"/health": "http", "/ready": "http"} and "/ready" in str(api["healthcheck"]["test"])
    assert pod["securityContext"]["runAsNonRoot"] and container["securityContext"]["readOnlyRootFilesystem"] and api["read_only"]
    writable = {mount["mountPath"] for mount in container["volumeMounts"]}
    assert writable == {api["volumes"][0].split(":")[1], *api["tmpfs"]} == {"/home/user/.cache/huggingface", "/tmp"}


@pytest.mark.timeout(600)  # it downloads what the image installs
def test_from_deploy_to_curl(hub: Any, api: HfApi, model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A private release with a token and keys, then the same made public and without either: each deployed, run from the pulled Space."""
    name = space_name()
    port = 7860 if not answers(7860) else 17860 + os.getpid() % 1000
    reading = hub.add_user("local", role="read")
    keys = {"DISTRINEWS_API_KEYS": "one-key,another-key", "API_KEY": "another-key"}
    env = environment(**hub.env, **keys, HF_HOME=str(tmp_path), READ_TOKEN=reading, HF_HUB_DISABLE_PROGRESS_BARS="1")
    options = ["--space", name, "--model", model, "--revision", "main"]

    def deployed(*more: str, answered: str) -> str:
        done = launch([*options, *more], module="pipeline.deploy.space", timeout=400, **env)
        assert done.returncode == 0, done.stderr
        assert "paid plan" in done.stdout.splitlines()[0] and "make deploy-page" in done.stdout.splitlines()[0]
        line = done.stdout.splitlines()[-1]
        assert line.startswith(f"curl -s http://127.0.0.1:{port}/predict ") and '"X-API-Key: $API_KEY"' in line
        assert re.search(rf"^answered    {answered}$", done.stdout, re.MULTILINE), done.stdout
        return line

    def asked(line: str) -> dict[str, Any]:
        assert shutil.which("curl"), "this test asks as the README tells people to"
        done = subprocess.run(line, shell=True, env=env, capture_output=True, text=True, timeout=60, check=True)
        return json.loads(done.stdout)

    secrets = ["--secret", "HF_TOKEN=READ_TOKEN", "--secret", "DISTRINEWS_API_KEYS"]
    rehearsing = ["--space", name, "--port", str(port), *secrets, "--results", str(tmp_path / "measured.json")]
    with started(rehearsing, module="pipeline.deploy.rehearse", **env) as rehearsal:
        commit = api.model_info(model).sha
        answer = asked(deployed(*secrets, answered=r".*, \d+\.\d% sure"))
        assert answer["revision"] == commit and answer["model"] == model and answer["label"] in answer["probabilities"]
        assert api.get_space_runtime(name).stage == "RUNNING"

        service = next(child for child in psutil.Process(rehearsal.pid).children() if "serve" in child.cmdline())
        code, given = Path(service.cwd()), service.environ()
        assert given["HF_TOKEN"] == reading and hub.token not in given.values()  # its own token, not the one that deployed
        assert not [path for path in code.rglob("*") if path.stat().st_mode & 0o222]
        if os.getuid() == 0:
            assert service.uids().real == 1000
            touch = subprocess.run(
                ["touch", code / "serve" / "new.py"], user=1000, group=1000, extra_groups=[], capture_output=True, check=False
            )
            assert touch.returncode != 0
        assert Path(given["HOME"]).is_relative_to(code.parent) and (Path(given["HOME"]) / ".cache/huggingface/distrinews").is_dir()

        api.update_repo_settings(model, private=False)
        try:
            answer = asked(deployed(answered="/info; .*"))  # the keys are the Space's still, and nobody can read them back
            assert answer["revision"] == commit
            space = Path(api.snapshot_download(name, repo_type="space", local_dir=tmp_path / "space"))
            assert metadata_load(space / "README.md")["preload_from_hub"] == [f"{model} {','.join(NEEDED)} {commit}"]
        finally:
            api.update_repo_settings(model, private=True)
        rehearsal.terminate()
        output, errors = rehearsal.communicate(timeout=60)
    assert rehearsal.returncode == 0, errors
    assert not code.exists() and not service.is_running()
    everything = [path.read_text(encoding="utf-8", errors="replace") for path in space.rglob("*") if path.is_file()]
    assert not [hidden for hidden in (reading, hub.token, "one-key", "another-key") if hidden in output + errors + "".join(everything)]

    assert f"preloaded   {model} at {commit}" in output
    sizes = [int(size) for size in re.findall(r"^installed   (\d+) MiB", output, re.MULTILINE)]
    peaks = [int(size) for size in re.findall(r"^memory      (\d+) MiB", output, re.MULTILINE)]
    assert len(sizes) == len(peaks) == 2 and 0 < max(sizes) * 2**20 < 450 * MB and 0 < max(peaks) < 1024  # the container's limit
    measured = json.loads((tmp_path / "measured.json").read_text(encoding="utf-8"))
    assert round(measured["installed_mib"]) == sizes[-1] and round(measured["peak_mib"]) == peaks[-1] and measured["open_seconds"] > 0
    with capsys.disabled():
        print(f"\ninstalled {max(sizes)} MiB, peak memory {max(peaks)} MiB")
