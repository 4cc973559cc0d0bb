"""What the pages tell people to run runs, what they link to is there, and what they take from elsewhere is what stands there."""

from __future__ import annotations

import functools
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from launching import ROOT, family, kill
from test_machines import understood

from benchmarks import figures
from pipeline.config import FIELDS, parse
from pipeline.launch import KINDS, take_restarts

# README first: its commands publish what the other pages use.
PAGES = ["README.md", *sorted(str(path.relative_to(ROOT)) for path in (ROOT / "docs").glob("*.md"))]
LINKED = [*PAGES, *sorted(str(path.relative_to(ROOT)) for path in (ROOT / "benchmarks").rglob("*.md"))]

# Commands that the test of all commands leaves out, by a pattern, each with the reason; the others run as they are printed.
NOT_RUN = {
    r"make test\b": "it is the tests",
    r"make quickstart": "run by test_quickstart.py",
    r"hf auth login": "asks at the keyboard; the token is in the environment here",
    r"gpu[12]\.yaml": "needs GPUs",
    r"--nnodes|two_nodes\.yaml": "needs two machines; run by test_two_nodes.py",
    r"TORCH_INDEX": "downloads another torch",
    r"make hub": "serves until it is stopped; every test with a Hub runs on it",
    r"make deploy-space": "waits for a container; run to its end by test_deploy_space.py",
    r"make kaggle": "wants a Kaggle account; its notebook is run by test_kaggle.py",
    r"^make (deploy-page|serve)$": "a target's name, in a table; the command with its variables stands below it",
    r"pipeline\.deploy\.rehearse": "runs a Space until it is stopped; run by test_deploy_space.py",
    r"\bdocker ": "needs a container engine",
    r"^kubectl |^sbatch |^srun ": "needs a cluster",
}
ELSEWHERE = {"docs/publish.md": "test_publish_docs.py"}  # pages that a test of their own runs
SERVERS = ("make serve", "python -m serve")
# What measures is run in small, and may end with 1, which make tells: other work on this machine disturbed it.
IN_SMALL = {"make explain": ' ARGS="--rounds 1 --steps 2"'}
ACTIVATE = "source .venv/bin/activate"
ENTRIES = {"pipeline.train", "pipeline.train_ddp"}


def text_of(page: str) -> str:
    return (ROOT / page).read_text(encoding="utf-8")


def commands(page: str) -> list[str]:
    """Every command of the page from top to bottom, those in shell blocks (without their comments) and those in tables."""
    found = []
    for block, row in re.findall(r"^```bash\n(.*?)^```$|^\|([^\n]*)", text_of(page), flags=re.DOTALL | re.MULTILINE):
        found += re.findall(r"`((?:accelerate launch|torchrun|make|python -m) [^`]*)`", row)
        lines = (re.sub(r"\s+# .*$", "", line).strip() for line in block.replace("\\\n", " ").splitlines())
        found += [line for line in lines if line and not line.startswith("#")]
    return found


def reason(command: str) -> str | None:
    return next((why for pattern, why in NOT_RUN.items() if re.search(pattern, command)), None)


@functools.cache
def help_of(module: str) -> str:
    done = subprocess.run([sys.executable, "-m", module, "--help"], cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, (module, done.stderr)
    return done.stdout


@pytest.mark.parametrize("page", PAGES)
def test_commands_are_understood(page: str) -> None:
    """Make targets and their variables exist; files named are there; options stand in the program's --help."""
    for command in (part for line in commands(page) for part in line.split(" && ")):
        words = shlex.split(command)
        for file in re.findall(r"(?<![\w./])(?:configs|pipeline|serve|benchmarks|tests)/[\w/]+\.\w+", command):
            assert (ROOT / file).exists(), (page, command, file)
        if words[0] == "make":
            done = subprocess.run(["make", "-n", *words[1:]], cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
            assert done.returncode == 0, (page, command, done.stderr)
            makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
            given = dict(word.split("=", 1) for word in words[1:] if "=" in word)
            assert all(f"$({name})" in makefile for name in given), (page, command)
            if words[1] in KINDS:
                arguments = [given.get("CONFIG", "configs/ag_news.yaml"), *shlex.split(given.get("ARGS", ""))]
                take_restarts(arguments)  # the launchers' option, not the entries'
                parse(arguments)
            elif module := re.search(r"-m ([\w.]+)", done.stdout):
                options = re.findall(r"(?<!\S)--([\w-]+)", given.get("ARGS", ""))  # the doctor takes those of a run, too
                assert all(f"--{name}" in help_of(module[1]) or name in FIELDS for name in options), (page, command)
        if words[:3] == ["python", "-m", "pipeline.launch"]:
            words = words[3:]
        if words[0] in ("accelerate", "torchrun"):
            assert understood(words).dataset
        elif ENTRIES & set(words[2:3]) and "--help" not in words:
            parse(words[3:])
        elif words[:2] == ["python", "-m"] and not ENTRIES & set(words[2:3]):
            options = [word.split("=")[0] for word in words[3:] if word.startswith("--")]
            assert all(option in help_of(words[2]) for option in options), (page, command)


def test_named_options_exist() -> None:
    for page in PAGES:
        for name in re.findall(r"^- `(\w+):", text_of(page), flags=re.MULTILINE):
            assert name in FIELDS, (page, name)


def slug(heading: str) -> str:
    """The anchor GitHub gives a heading."""
    return re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")


@pytest.mark.parametrize("page", LINKED)
def test_links_lead_somewhere(page: str) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", text_of(page)):
        if target.startswith(("http://", "https://", "mailto:")):
            continue
        name, _, anchor = target.partition("#")
        file = (ROOT / page).parent / name if name else ROOT / page
        assert file.exists(), f"{page} links to {target}"
        if anchor and file.suffix == ".md":
            headings = re.findall(r"^#+ (.+)$", file.read_text(encoding="utf-8"), flags=re.MULTILINE)
            assert anchor in map(slug, headings), f"{page} links to {target}"


def test_what_is_taken_from_elsewhere_is_what_stands_there() -> None:
    for page in figures.pages():
        text = page.read_text(encoding="utf-8")
        assert figures.fill(text) == text, f"{page.name} is out of date: python -m benchmarks.figures"
    assert figures.OPTIONS.read_text(encoding="utf-8") == figures.options_page(), "out of date: python -m benchmarks.figures"


def test_a_figure_that_leads_nowhere_and_one_not_measured(tmp_path: Path) -> None:
    (tmp_path / "speed.json").write_text('{"ratios": [0.5, 1.8349]}', encoding="utf-8")
    assert figures.fill("<!-- figure: speed ratios.1 .2f -->?<!-- / -->x", tmp_path) == "<!-- figure: speed ratios.1 .2f -->1.83<!-- / -->x"
    assert ">not measured<" in figures.fill("<!-- figure: other ratios.1 .2f -->1.8<!-- / -->", tmp_path)
    with pytest.raises(ValueError, match=r"speed\.json has no ratios\.7"):
        figures.fill("<!-- figure: speed ratios.7 .2f -->1<!-- / -->", tmp_path)


def test_both_entries_and_the_guide_carry_the_ten_markers() -> None:
    numbers = {str(n) for n in range(1, 11)}
    assert set(figures.marker_lines()) == numbers, "each section of the guide has the script's own title"
    for page in ("pipeline/train.py", "pipeline/train_ddp.py", "docs/ddp.md"):
        assert set(re.findall(r"\[DDP (\d+)\]", text_of(page))) == numbers, page


def test_the_readme_fits() -> None:
    assert len(text_of("README.md").splitlines()) <= 200


# ---- every command, as it is printed


@dataclass
class World:
    """A copy of the checkout, and a Hub with the mission's data set and model in small under their own names."""

    folder: Path
    environment: dict[str, str]
    user: str
    port: int

    def printed(self, command: str) -> str:
        return command.replace("your-name", self.user).replace("127.0.0.1:8000", f"127.0.0.1:{self.port}")

    def run(self, program: list[str], seconds: float) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            program, cwd=self.folder, env=self.environment, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=seconds, check=False
        )  # fmt: skip


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory, local_hub: Any, ag_news_dir: Path, tiny_model_dir: Path) -> World:
    from datasets import load_dataset
    from huggingface_hub import HfApi

    folder = tmp_path_factory.mktemp("docs") / "checkout"
    listed = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    for name in subprocess.run(listed, cwd=ROOT, capture_output=True, text=True, check=True, timeout=60).stdout.split("\0"):
        if name and (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, folder / name)
    for name in (".venv", ".cache"):
        (folder / name).symlink_to(ROOT / name)
    rows, small = load_dataset(str(ag_news_dir)), tmp_path_factory.mktemp("ag_news")
    for split, count in (("train", 240), ("test", 60)):
        (small / "data").mkdir(exist_ok=True)
        rows[split].shuffle(seed=0).select(range(count)).to_parquet(small / "data" / f"{split}-00000-of-00001.parquet")
    rows["test"].select(range(20)).to_csv(folder / "texts.csv")
    hub = HfApi(endpoint=local_hub.url, token=local_hub.token)
    for repository, kind, source in (
        ("fancyzhx/ag_news", "dataset", small),
        ("distilbert/distilbert-base-uncased", "model", tiny_model_dir),
    ):
        hub.create_repo(repository, repo_type=kind, exist_ok=True)
        hub.upload_folder(repo_id=repository, repo_type=kind, folder_path=source)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    # Without the environment's commands, which a reader does not have either before the page has made them theirs.
    path = [part for part in os.environ["PATH"].split(os.pathsep) if Path(part) != Path(sys.executable).parent]
    environment = os.environ | local_hub.env | {
        "HF_HOME": str(folder.parent / "home"), "PATH": os.pathsep.join(path), "DISTRINEWS_PORT": str(port), "AG_NEWS_DIR": str(ag_news_dir),
        "DISTRINEWS_ADMIN_KEY": "key-of-the-operators", "NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1", "BENCH": "quick",
    }  # fmt: skip
    return World(folder, environment, local_hub.user, port)


@contextmanager
def serving(world: World, command: str) -> Iterator[None]:
    process = subprocess.Popen(["bash", "-c", command], cwd=world.folder, env=world.environment, start_new_session=True)
    try:
        opener, deadline = urllib.request.build_opener(urllib.request.ProxyHandler({})), time.monotonic() + 90
        while True:
            try:
                opener.open(f"http://127.0.0.1:{world.port}/ready", timeout=5).read()
                break
            except OSError:
                assert process.poll() is None and time.monotonic() < deadline, command
                time.sleep(0.2)
        yield
    finally:
        kill(family(process), signal.SIGTERM)
        process.wait(30)


@pytest.mark.slow
@pytest.mark.timeout(3000)
@pytest.mark.parametrize("page", [page for page in PAGES if page not in ELSEWHERE])
def test_commands_run_as_they_are_printed(world: World, page: str) -> None:
    active = ACTIVATE if f"`{ACTIVATE}`" in text_of(page) else ":"  # a page that says so; or its own line, for those after it
    with ExitStack() as servers:
        for command in dict.fromkeys(commands(page)):
            if reason(command):
                continue
            printed = world.printed(command) + IN_SMALL.get(command, "")
            print(f"$ {printed}", flush=True)
            if printed.startswith(SERVERS):
                servers.close()
                servers.enter_context(serving(world, f"{active} && {printed}"))
                continue
            done = world.run(["bash", "-ec", f"{active} && {printed}"], 900)
            if ACTIVATE in command:
                active = ACTIVATE
            disturbed = command in IN_SMALL and done.stderr.rstrip().endswith("Error 1") and "Traceback" not in done.stderr
            assert done.returncode == 0 or disturbed, f"{page}: {printed}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
            assert "/predict " not in command or '"label"' in done.stdout, (page, printed, done.stdout)  # curl is content with any answer
        for block in re.findall(r"```python\n(.*?)```", text_of(page), flags=re.DOTALL):
            done = world.run([sys.executable, "-c", world.printed(block)], 300)
            assert done.returncode == 0, f"{page}:\n{block}\n{done.stderr[-3000:]}"
