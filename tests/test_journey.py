"""From training to a page in a browser, in one go on the local Hub: each step is the command a person types, its outcome a line of a table."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
from browsing import chromium
from huggingface_hub import HfApi
from launching import ROOT, environment, launch, started
from real_release import DATA, put_dataset
from test_deploy_page import ASK, Site, npm, serve_folder, settings  # noqa: F401 (npm is a fixture)

from pipeline.deploy.rehearse import answers
from serve.text import TextTokenizer, softmax

REPO, SPACE, PAGE = "local/journey", "local/journey-api", "local/journey-page"


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_train_push_verify_deploy_ask(
    local_hub: Any,
    tiny_model_dir: Path,
    npm: Path,  # noqa: F811
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    env = environment(**local_hub.env, HF_HOME=str(tmp_path / "home"), HF_HUB_DISABLE_PROGRESS_BARS="1")
    api, table = HfApi(endpoint=local_hub.url, token=local_hub.token), []

    def step(name: str, work: Callable[[], str]) -> str:
        began = time.monotonic()
        outcome = work()
        table.append((name, f"{time.monotonic() - began:.0f} s", outcome.splitlines()[-1][:90]))
        return outcome

    def command(module: str, *options: str) -> str:
        done = launch(list(options), module=module, timeout=500, **env)
        assert done.returncode == 0, done.stderr
        return done.stdout

    data, run = put_dataset(local_hub, DATA), tmp_path / "run"
    options = ["--model", str(tiny_model_dir), "--dataset", DATA, "--output_dir", str(run), "--device", "cpu", "--precision", "fp32",
               "--max_length", "32", "--epochs", "2", "--learning_rate", "1e-2", "--validation_share", "0.1"]  # fmt: skip
    step("train, two processes", lambda: command("pipeline.launch", "train-ddp", *options))
    step("push", lambda: command("pipeline.hub", "--run", str(run), "--repo", REPO))
    step("verify", lambda: command("pipeline.verify", "--repo", REPO, "--revision", "v1"))
    commit = str(api.model_info(REPO, revision="v1").sha)

    port = 7860 if not answers(7860) else 17860 + os.getpid() % 1000
    with started(["--space", SPACE, "--port", str(port)], module="pipeline.deploy.rehearse", **env) as rehearsal:
        said = step("deploy-space", lambda: command("pipeline.deploy.space", "--space", SPACE, "--model", REPO, "--revision", "v1"))

        def curl() -> str:
            return subprocess.run(said.splitlines()[-1], shell=True, capture_output=True, text=True, timeout=60, check=True).stdout

        answer = json.loads(step("curl", curl))
        assert answer["revision"] == commit and answer["model"] == REPO
        rehearsal.terminate()
        rehearsal.communicate(timeout=60)

    page = ["--space", PAGE, "--model", REPO, "--revision", "v1", "--library", str(npm)]
    step("deploy-page", lambda: command("pipeline.deploy.page", *page))
    folder, release = tmp_path / "page", tmp_path / "release"
    api.snapshot_download(PAGE, repo_type="space", local_dir=folder)
    api.snapshot_download(REPO, revision="v1", local_dir=release)
    rows = Path(api.hf_hub_download(DATA, "test.csv", repo_type="dataset", revision=data)).read_text(encoding="utf-8").splitlines()[1:]
    texts = [row.rpartition(",")[0] for row in rows]
    labels = list(json.loads((release / "config.json").read_text(encoding="utf-8"))["id2label"].values())
    read = TextTokenizer(release, 512).encode(texts)
    session = onnxruntime.InferenceSession(release / "onnx" / "model.onnx")
    feeds = [{"input_ids": np.array([one.ids]), "attention_mask": np.ones((1, len(one.ids)), np.int64)} for one in read]
    expected = softmax(np.concatenate([session.run(["logits"], feed)[0] for feed in feeds]))

    def parity(replies: list[dict[str, Any]]) -> str:
        change = np.abs(np.array([[reply["probabilities"][label] for label in labels] for reply in replies]) - expected).max()
        assert [reply["label"] for reply in replies] == [labels[i] for i in expected.argmax(axis=1)] and change < 0.01
        return f"{len(replies)} texts, same labels as Python, a probability at most {change:.1e} apart"

    def in_node() -> str:
        shutil.copy(folder / "model.js", tmp_path / "model.mjs")
        site = settings(Site("", folder, local_hub, release))
        library = npm / "@huggingface" / "transformers" / "dist" / "transformers.node.mjs"
        program = ["node", "tests/page_parity.mjs", tmp_path / "cache", tmp_path / "model.mjs", library]
        given = json.dumps({"release": site, "texts": texts})
        done = subprocess.run(program, cwd=ROOT, input=given, capture_output=True, text=True, timeout=120, check=False)
        assert done.returncode == 0, done.stderr
        return parity(json.loads(done.stdout)["answers"])

    def in_browser() -> str:
        with serve_folder(folder) as url, chromium() as browser:
            visited = browser.new_page()
            visited.set_default_timeout(60_000)
            visited.goto(url)
            return parity(visited.evaluate(ASK, texts))

    step("page, in Node", in_node)
    step("page, in Chromium", in_browser)
    with capsys.disabled():
        print("\n" + "\n".join(f"{name:22} {seconds:>6}  {outcome}" for name, seconds, outcome in table))
