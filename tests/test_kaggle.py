"""The notebook for Kaggle is fit to be pushed, is pushed by Kaggle's own client, and every cell of it runs: two CPU processes, a local Hub."""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any, ClassVar

import pytest
import yaml
from datasets import ClassLabel, Dataset, Features, Value
from huggingface_hub import HfApi
from launching import ROOT, environment, error_lines, launch, lose, started, wait_until

from benchmarks import bench_report
from benchmarks.common import RESULTS
from benchmarks.kaggle.__main__ import execute, main
from benchmarks.kaggle.check import code_cells, commands, credentials, problems, read, with_parameters
from benchmarks.tiny_release import LABELS, WORDS
from pipeline.backup import find
from pipeline.errors import UserError

OUTPUTS = ROOT / "outputs" / "kaggle"
MODULE = "benchmarks.kaggle"


def test_the_committed_notebook_is_fit() -> None:
    notebook = read()
    assert problems(notebook, {}) == []
    given = with_parameters(notebook, {"HUB_REPO": "ann/news", "MAX_TRAIN_SAMPLES": "500", "DEVICE": "cpu", "QUICK": "True"})
    assert problems(given, {}) == []
    told = commands(given)
    assert sum("--hub_checkpoints --hub_repo ann/news" in line and "--max_train_samples 500" in line for line in told) == 4
    assert sum("configs/accelerate/cpu2.yaml" in line for line in told) == 2, "the doctor and the Trainer"
    assert not any("accelerate/gpu" in line or "CUDA" in line for line in told)
    helps: dict[str, str] = {}
    for line in told:
        if " -m benchmarks." in line or " -m pipeline.hub" in line:
            module, *arguments = line.split(" -m ")[1].split()
            if module not in helps:
                command = [sys.executable, "-m", module, "--help"]
                done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=True)
                helps[module] = done.stdout
            assert all(word in helps[module] for word in arguments if word.startswith("--")), line


def test_what_would_waste_a_session_or_tell_a_secret_is_refused() -> None:
    notebook = read()
    cell = next(cell for cell in notebook["cells"] if cell["id"] == "doctor")
    source = "".join(cell["source"])
    cell["source"] = source + "\nrun(f'python -m pipeline.trainn {DEVICE}')\nrun('accelerate launch -m pipeline.train --epoch 3')"
    found = "\n".join(problems(notebook, {}))
    assert "no module pipeline.trainn" in found and "unknown option '--epoch'" in found
    cell["source"] = source.replace("options =", "others =")
    assert "name 'options' is not defined" in problems(notebook, {})[0]
    cell["source"] = source + "\ntoken = 'hf_" + "a" * 34 + "'"
    cell["outputs"] = [{"output_type": "stream", "name": "stdout", "text": "https://ann:geheim@example.org, correct-horse-battery"}]
    found = "\n".join(problems(notebook, {"MY_TOKEN": "correct-horse-battery", "MY_NAME": "output_type", "KEY": "cuda"}))
    for words in ("a Hugging Face token", "a password in an address", "the value of MY_TOKEN", "'doctor' has outputs"):
        assert words in found, words
    assert "hf_a" not in found and "geheim" not in found and "MY_NAME" not in found and "of KEY" not in found


def test_mistakes_are_told_in_a_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/usr/bin:/bin")  # where git is, and no client of Kaggle
    cases = [
        (["--set", "EPOCH=1"], "no parameter 'EPOCH'. Did you mean 'EPOCHS'?"),
        (["--set", "QUICK=yes"], "QUICK is 'yes': allowed is True or False"),
        (["--set", "EPOCHS=none"], "EPOCHS is 'none': allowed is a number"),
        (["--set", "REPO=https://example.org/a.git"], "give --user your-name"),
        (["--user", "ann", "--set", "REPO="], "give its public git address"),
    ]
    if not Path(sys.executable).with_name("kaggle").exists():
        cases.append((["--user", "ann", "--set", "REPO=https://example.org/a.git"], "Kaggle's client is not installed"))
    for arguments, words in cases:
        with pytest.raises(UserError, match=re.escape(words)):
            main(arguments)


def test_the_dry_check_says_what_will_be_different() -> None:
    done = launch(["--dry", "--set", "HUB_REPO=ann/news", "--set", "REPO=https://example.org/a.git"], module=MODULE, timeout=60)
    assert done.returncode == 0, done.stderr
    for words in ("NvidiaTeslaT4", "fp16", "requirements-base.txt", "12 h", "HF_TOKEN", "ann/news", "https://example.org/a.git"):
        assert words in done.stdout, words


def test_no_key_of_the_origin_goes_into_the_notebook(repository: Path) -> None:
    git = ["git", "-C", str(repository), "remote"]
    subprocess.run([*git, "add", "origin", "https://ann:not@a-key@example.org/ann/news.git"], check=True, timeout=20)
    done = launch(["--dry"], module=MODULE, timeout=60, cwd=repository, PYTHONPATH="")
    assert done.returncode == 0 and "git clone of https://example.org/ann/news.git" in done.stdout, done.stderr
    assert "a-key" not in done.stdout + done.stderr


def test_the_executed_copy_of_ci_is_kept() -> None:
    steps = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text(encoding="utf-8"))["jobs"]["test"]["steps"]
    kept = next(step for step in steps if step.get("uses", "").startswith("actions/upload-artifact@"))
    assert steps.index(kept) > steps.index({"run": "bash .ci/run"}) and kept["if"] == "always()"
    assert ROOT / kept["with"]["path"] == OUTPUTS / "executed.ipynb"


@pytest.mark.skipif(shutil.which("nvidia-smi") is not None, reason="there may be two GPUs here")
def test_without_two_gpus_it_stops_at_once(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="choose the accelerator 'GPU T4 x2'"):
        execute(with_parameters(read(), {"WORK": str(tmp_path / "work")}), tmp_path / "executed.ipynb")
    numbers = {cell["id"]: cell["execution_count"] for cell in read(tmp_path / "executed.ipynb")["cells"] if cell["cell_type"] == "code"}
    assert numbers["accelerator"] and not numbers["install"] and not (tmp_path / "work").exists()


class Kaggle(BaseHTTPRequestHandler):
    """Stands for Kaggle: keeps what is pushed, answers as told."""

    requests: ClassVar[list[tuple[str, dict[str, Any]]]] = []
    answer: ClassVar[dict[str, Any]] = {}

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])) or b"{}")
        self.requests.append((self.path, body))
        sent = json.dumps(self.answer).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(sent)))
        self.end_headers()
        self.wfile.write(sent)

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def kaggle() -> Iterator[tuple[type[Kaggle], int]]:
    server = HTTPServer(("127.0.0.1", 0), Kaggle)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield Kaggle, server.server_port
    server.shutdown()
    server.server_close()


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_kaggles_own_client_pushes_it(kaggle: tuple[type[Kaggle], int], tmp_path: Path) -> None:
    server, port = kaggle
    subprocess.run([sys.executable, "-m", "venv", str(tmp_path / "venv")], check=True, timeout=100)
    requirements = ROOT / "benchmarks" / "kaggle" / "requirements.txt"
    install = [str(tmp_path / "venv" / "bin" / "python"), "-m", "pip", "install", "--quiet", "-r", str(requirements)]
    subprocess.run(install, check=True, timeout=200)
    known = {"KAGGLE_USERNAME": "ann", "KAGGLE_KEY": "not-a-real-key-0123"}
    # Set to a server of this machine the client calls http://localhost/, port 80; as a proxy ours is asked whatever its port.
    place = {"PATH": f"{tmp_path}/venv/bin:{os.environ['PATH']}", "HOME": str(tmp_path), "KAGGLE_API_ENVIRONMENT": "LOCALHOST",
             "http_proxy": f"http://127.0.0.1:{port}", "no_proxy": "", "NO_PROXY": ""}  # fmt: skip
    arguments = ["--user", "ann", "--set", "REPO=https://example.org/a.git", "--set", "HUB_REPO=ann/news"]
    server.answer = {"ref": "ann/distrinews", "url": "https://www.kaggle.com/code/ann/distrinews", "versionNumber": 1}
    done = launch(arguments, module=MODULE, timeout=60, **place, **known)
    assert done.returncode == 0, done.stderr
    assert "successfully pushed" in done.stdout and "kaggle kernels output ann/distrinews" in done.stdout
    _, sent = next(request for request in server.requests if request[0].endswith("SaveKernel"))
    assert sent["slug"] == "ann/distrinews" and sent["machineShape"] == "NvidiaTeslaT4"
    assert sent["isPrivate"] and sent["enableGpu"] and sent["enableInternet"]
    assert "HUB_REPO = 'ann/news'" in sent["text"] and not credentials(sent["text"], known)
    server.answer = {"error": "Maximum batch GPU session count reached"}
    refused = launch(arguments, module=MODULE, timeout=60, **place, **known)
    assert refused.returncode == 2 and "Maximum batch GPU session" in error_lines(refused)[0]
    unknown = launch(arguments, module=MODULE, timeout=60, **place)
    assert unknown.returncode == 2 and "Kaggle does not know you" in error_lines(unknown)[0]


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    """What is here, committed or not, as a git repository to clone."""
    folder = tmp_path / "repository"
    names = subprocess.run(["git", "ls-files", "-coz", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for name in names.split("\0"):
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, folder / name)
    git = ["git", "-C", str(folder), "-c", "user.name=test", "-c", "user.email=test@example.org", "-c", "commit.gpgsign=false"]
    for words in (["init", "--quiet"], ["add", "--all"], ["commit", "--quiet", "-m", "What is here"]):
        subprocess.run([*git, *words], check=True, timeout=60)
    return folder


@pytest.fixture
def news(tmp_path: Path) -> Path:
    """Generated texts of AG News' labels in the Hub's layout: so that this runs on every machine."""
    draw, folder = random.Random(0), tmp_path / "news"
    for split, rows in (("train", 6000), ("test", 600)):
        labels = [row % len(LABELS) for row in range(rows)]
        texts = [" ".join(draw.choices(WORDS[label :: len(LABELS)] + WORDS[:8], k=draw.randint(5, 60))) for label in labels]
        features = Features({"text": Value("string"), "label": ClassLabel(names=LABELS)})
        (folder / "data").mkdir(parents=True, exist_ok=True)
        Dataset.from_dict({"text": texts, "label": labels}, features).to_parquet(folder / "data" / f"{split}-00000-of-00001.parquet")
    return folder


@pytest.mark.slow
@pytest.mark.timeout(1300)
def test_every_cell_runs_and_a_lost_session_is_gone_on_with(
    local_hub: Any, tiny_model_dir: Path, news: Path, repository: Path, tmp_path: Path
) -> None:
    api = HfApi(endpoint=local_hub.url, token=local_hub.token)
    model, data, release = (f"{local_hub.user}/{name}" for name in ("tiny", "generated-news", "kaggle-news"))
    for name, kind, folder in ((model, "model", tiny_model_dir), (data, "dataset", news)):
        api.create_repo(name, repo_type=kind, exist_ok=True)
        api.upload_folder(repo_id=name, repo_type=kind, folder_path=folder)
    values = {"REPO": repository, "DEVICE": "cpu", "MODEL": model, "DATASET": data, "EPOCHS": 8, "MAX_TRAIN_SAMPLES": 320, "HUB_REPO": release,
              "LABEL": "twocpus", "QUICK": True}  # fmt: skip

    def session(name: str) -> tuple[list[str], dict[str, str]]:
        """A session as Kaggle begins it: nothing is left of an earlier one, neither files nor caches."""
        given = values | {"WORK": tmp_path / name, "KEEP": tmp_path / f"{name}-kept"}
        # Passive: on a busy machine threads that spin while they wait take the cores from those they wait for.
        place = {**local_hub.env, "HF_HOME": str(tmp_path / f"{name}-home"), "OMP_WAIT_POLICY": "passive"}
        return ["--run", *(word for key, value in given.items() for word in ("--set", f"{key}={value}"))], place

    arguments, place = session("first")
    with started(arguments, module=MODULE, **place) as process:
        wait_until(process, lambda: bool(api.repo_exists(release) and find("ag_news-1", release, api)), seconds=300, look=0.3)
        lose(process)
    assert not (tmp_path / "first" / "outputs" / "ag_news-1" / "run.json").exists(), "it was lost in mid-run"
    assert (pushed := find("ag_news-1", release, api))

    arguments, place = session("second")
    # As on Kaggle: the token is no variable, its own module gives it; and nothing of this checkout is on the path.
    image = tmp_path / "image"
    image.mkdir()
    secrets = f"class UserSecretsClient:\n    def get_secret(self, label):\n        return {{'HF_TOKEN': {local_hub.token!r}}}[label]\n"
    (image / "kaggle_secrets.py").write_text(secrets, encoding="utf-8")
    place = {name: value for name, value in place.items() if name != "HF_TOKEN"} | {"PYTHONPATH": str(image)}
    assert "HF_TOKEN" not in environment(**place)
    done = launch(arguments, module=MODULE, timeout=900, **place)
    assert done.returncode == 0, done.stderr[-3000:]
    executed = read(OUTPUTS / "executed.ipynb")
    said = {cell["id"]: text_of(cell) for cell in executed["cells"] if cell["cell_type"] == "code"}
    assert all(cell["execution_count"] for cell in executed["cells"] if cell["cell_type"] == "code")
    assert len(said) == len(list(code_cells(read()))) + 1, "the committed cells, and that of the parameters given here"
    assert f"pulled      checkpoint-{pushed.step}" in said["train-1"] and f"resumed     after step {pushed.step}" in said["train-1"]
    assert "resumed" not in said["train-2"]
    assert said["table"].count("| cpu |") == 3
    assert "proof" in said["publish"] and api.list_repo_refs(release).tags[0].name == "v1"
    shown = next(cell for cell in executed["cells"] if cell["id"] == "explain")["outputs"]
    assert "x of 2: " in said["explain"] and any("image/png" in output.get("data", {}) for output in shown)
    assert "| 4 | off |" in said["gpu-step"], "a step was taken apart"
    kept = tmp_path / "second-kept"
    names = {folder: {path.name for path in (kept / folder).iterdir()} for folder in ("results", "runs", "release")}
    assert names["results"] == {"bench-twocpus.json", "explain-twocpus.json", "scaling-twocpus.json", "gpu_step-twocpus.json"}
    assert names["runs"] == {"ag_news-1.json", "ag_news-2.json", "ag_news-raw.json"} and "model.safetensors" in names["release"]
    # What `make bench-report` makes of it, copied to where the notebook says.
    together = shutil.copytree(RESULTS, tmp_path / "together")
    shutil.copytree(kept / "results", together, dirs_exist_ok=True)
    pages = bench_report.pages(bench_report.load(together))
    assert pages["README.md"].count("(twocpus)") == 4 and "| [A training step on a GPU](single_gpu.md) (twocpus) | " in pages["README.md"]
    assert "single_gpu-twocpus.png" in pages["single_gpu.md"] and "explain-twocpus.png" in pages["ddp_2gpu.md"]
    # To be read by people: no secret, no bar redrawn a hundred times, no page of one cell's output.
    assert credentials(json.dumps(executed), environment(**local_hub.env)) == [] and local_hub.token not in json.dumps(executed)
    assert all(text.count("\n") < 120 and "\r" not in text for text in said.values()), {
        name: text.count("\n") for name, text in said.items()
    }


def text_of(cell: dict[str, Any]) -> str:
    """All that a cell's outputs show as text."""
    parts = [output.get("text") or output.get("data", {}).get("text/markdown", "") for output in cell["outputs"]]
    return "".join("".join(part) for part in parts)
