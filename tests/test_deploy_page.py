"""The static Space: deployed to a local Hub, pulled from there, opened in a real Chromium, and its answers compared with Python's."""

from __future__ import annotations

import contextlib
import functools
import html
import http.server
import json
import os
import re
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import onnxruntime
import pytest
from browsing import Browser, Page, chromium, expect
from huggingface_hub import HfApi

from benchmarks.page_start import ASK
from pipeline.deploy.page import CDN, LIBRARY, Release, compose
from pipeline.errors import UserError
from pipeline.local_hub.process import HubProcess
from serve.text import TextTokenizer, softmax

ROOT = Path(__file__).resolve().parent.parent
LABELS = ["World", "Sports", "Business", "Sci/Tech"]
MAX_LENGTH = 48
MODEL, SPACE = "local/news", "local/page"
TEXT = "Oil prices rise as the cartel cuts its output"
# What tokenizers may read differently: special tokens written out, accents, other scripts, emoji, control characters, words without end.
AWKWARD = ["[SEP] oil [MASK] [CLS]", "Café İstanbul naïve ß ﬁ a\u0301", "東京 の 株価 上昇", "😀 stocks 👩‍👩‍👧 up", "zero\u200bwidth tab\t\r\n\u00a0",
           "हिन्दी समाचार العربية خبر", "U.S.-based $1.5bn (AP) -- 50% & more; don't", "x" * 150 + " oil", "\u0007bell \ufffd \ufeff bom", "🚀" * 100]  # fmt: skip
# What transformers.js reads as other tokens, as docs/deploy.md says: a word's last sigma, and ideographs beyond the basic plane.
DIFFERENT = ["ΝΟΜΟΣ ΛΟΓΟΣ ΚΟΣΜΟΣ", "\U00020bb7\U00020bb7"]


class Site(NamedTuple):
    """A Space as a static Space is served, its folder and the Hub that has its model."""

    url: str
    folder: Path
    hub: HubProcess
    release: Path


@pytest.fixture(scope="module")
def npm() -> Path:
    """The folder node_modules with the pinned packages, in .cache/npm."""
    found, folder = ROOT / "tests" / "npm", ROOT / ".cache" / "npm"
    if os.environ.get("CI_BROWSER") != "1" and not (shutil.which("npm") and shutil.which("node")):
        pytest.skip("these tests need node and npm on the PATH: install Node 18 or newer")
    lock, installed = (found / "package-lock.json").read_bytes(), folder / "installed.json"
    if not installed.is_file() or installed.read_bytes() != lock:
        folder.mkdir(parents=True, exist_ok=True)
        for name in ("package.json", "package-lock.json"):
            shutil.copy(found / name, folder / name)
        command = ["npm", "ci", "--ignore-scripts", "--no-audit", "--no-fund"]
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=300, check=False)
        if done.returncode and os.environ.get("CI_BROWSER") != "1":
            pytest.skip(f"npm cannot fetch transformers.js: {done.stderr[-300:]}")
        assert done.returncode == 0, done.stderr
        installed.write_bytes(lock)
    return folder / "node_modules"


@pytest.fixture(scope="module")
def release_dir(encoder_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a browser fetches of a release: half of MiniLM, 70 MB, with a head that is sure of itself, as a trained one is."""
    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    from pipeline.export import export_onnx
    from pipeline.release import golden_logits, release_tokenizer

    folder = tmp_path_factory.mktemp("page") / "release"
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_pretrained(encoder_dir, num_hidden_layers=3, id2label=dict(enumerate(LABELS))).eval()
    tokenizer = release_tokenizer(AutoTokenizer.from_pretrained(encoder_dir), MAX_LENGTH)
    logits = torch.tensor(golden_logits(model, tokenizer, [TEXT, *AWKWARD]))
    with torch.no_grad():  # an untrained head says nearly the same to every text
        sharpness = 2 / logits.std(dim=0).mean()
        model.classifier.bias.copy_(sharpness * (model.classifier.bias - logits.mean(dim=0)))
        model.classifier.weight *= sharpness
    model.config.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    with (
        pytest.MonkeyPatch.context() as patch
    ):  # a head that sharp sharpens rounding as well; here JavaScript is compared with this very file
        patch.setattr("pipeline.export.TOLERANCE", 1e-2)
        export_onnx(model, folder / "onnx" / "model.onnx", MAX_LENGTH)
    return folder


@pytest.fixture(scope="module")
def site(release_dir: Path, npm: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    folder = tmp_path_factory.mktemp("space")
    with HubProcess() as hub:
        api = HfApi(hub.url, hub.token)
        api.create_repo(MODEL)
        api.upload_folder(repo_id=MODEL, folder_path=release_dir)
        api.create_tag(MODEL, tag="v1")
        api.delete_file("tokenizer_config.json", MODEL)  # main goes on; the page keeps to its commit
        for library in (CDN, str(npm)):  # the second time it is an update
            done = deploy(hub, "--revision", "v1", "--library", library)
            assert done.returncode == 0, done.stderr
        commit = api.space_info(SPACE).sha
        assert f"space       {SPACE} at {commit}" in done.stdout and f"at          {hub.url}/spaces/{SPACE}" in done.stdout
        api.snapshot_download(SPACE, repo_type="space", local_dir=folder)
        with serve_folder(folder) as url:
            yield Site(url, folder, hub, release_dir)


def deploy(hub: HubProcess, *options: str, model: str = MODEL, space: str = SPACE) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pipeline.deploy.page", "--space", space, "--model", model, *options]
    return subprocess.run(command, cwd=ROOT, env={**os.environ, **hub.env}, capture_output=True, text=True, timeout=120, check=False)


@contextlib.contextmanager
def serve_folder(folder: Path, cut: str = "", cdn: bool = False) -> Iterator[str]:
    """As a static Space is served, or as a CDN serves every page's scripts; the connection breaks after a MiB of the file `cut`."""

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_: Any) -> None: ...

        def end_headers(self) -> None:
            if cdn:
                self.send_header("Access-Control-Allow-Origin", "*")
            super().end_headers()

        def copyfile(self, source: Any, output: Any) -> None:
            with contextlib.suppress(ConnectionError):  # the browser hangs up when it has seen enough
                if cut and self.path.endswith(cut):
                    output.write(source.read(1 << 20))
                else:
                    super().copyfile(source, output)

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=str(folder))) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/index.html"
        server.shutdown()


def settings(site: Site) -> dict[str, Any]:
    found = re.search(r'data-space="([^"]*)"', (site.folder / "index.html").read_text(encoding="utf-8"))
    assert found
    return json.loads(html.unescape(found[1]))


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with chromium() as browser:
        yield browser


@pytest.fixture
def visit(browser: Browser) -> Iterator[Callable[..., Page]]:
    """Opens pages of one visitor with an empty cache. `page.context` has what they asked the network for in `asked`."""
    context = browser.new_context(viewport={"width": 390, "height": 800})
    context.asked = []  # type: ignore[attr-defined]
    context.on("request", lambda request: context.asked.append((request.method, request.url, request.post_data)))  # type: ignore[attr-defined]

    def visit(url: str, script: str = "") -> Page:
        page = context.new_page()
        page.set_default_timeout(40_000)
        if script:
            page.add_init_script(script)
        page.goto(url)
        return page

    yield visit
    context.close()


def send(page: Page, text: str) -> None:
    page.get_by_label("Text to classify").fill(text)
    page.get_by_role("button", name="Classify").click()


# ---- the same answers


@pytest.fixture(scope="module")
def texts(r8_dir: Path) -> list[str]:
    """200 real ones: of AG News where it is here, and of Reuters, many of which are longer than the model reads; and the awkward."""
    import pyarrow.parquet as parquet

    ag_news = sorted(Path(os.environ.get("AG_NEWS_DIR", ROOT.parent / "shared" / "ag_news")).glob("data/test-*.parquet"))
    real = parquet.read_table(ag_news[0], columns=["text"])["text"].to_pylist()[:150] if ag_news else []
    reuters = parquet.read_table(r8_dir / "data" / "test.parquet", columns=["text"])["text"].to_pylist()
    return [*real, *reuters[: 200 - len(real)], *AWKWARD]


class Expected(NamedTuple):
    tokens: list[int]
    truncated: list[bool]
    probabilities: np.ndarray  # (texts, classes)


@pytest.fixture(scope="module")
def expected(release_dir: Path, texts: list[str]) -> Expected:
    """By the service's own tokenizer and onnxruntime, each text alone."""
    read = TextTokenizer(release_dir, 512).encode(texts)
    session = onnxruntime.InferenceSession(release_dir / "onnx" / "model.onnx")
    feeds = [{"input_ids": np.array([one.ids]), "attention_mask": np.ones((1, len(one.ids)), np.int64)} for one in read]
    logits = np.concatenate([session.run(["logits"], feed)[0] for feed in feeds])
    found = Expected([len(one.ids) for one in read], [one.truncated for one in read], softmax(logits))
    assert sum(found.truncated) > 20 and len(set(found.probabilities.argmax(axis=1))) == 4
    return found


def compare(who: str, answers: list[dict[str, Any]], expected: Expected, seconds: float) -> None:
    assert [one["tokens"] for one in answers] == expected.tokens
    assert [one["truncated"] for one in answers] == expected.truncated
    assert [one["label"] for one in answers] == [LABELS[i] for i in expected.probabilities.argmax(axis=1)]
    assert [one["confidence"] for one in answers] == [max(one["probabilities"].values()) for one in answers]
    probabilities = np.array([[one["probabilities"][label] for label in LABELS] for one in answers])
    change = np.abs(probabilities - expected.probabilities).max()
    print(f"\n{who}: {len(answers)} texts, same labels, largest change of a probability {change:.1e}, first answer after {seconds:.1f} s")
    assert change < 0.01
    assert seconds < 30


def test_node_answers_as_python(site: Site, npm: Path, texts: list[str], expected: Expected, tmp_path: Path) -> None:
    shutil.copy(site.folder / "model.js", tmp_path / "model.mjs")  # as a module, for every Node
    library = npm / "@huggingface" / "transformers" / "dist" / "transformers.node.mjs"
    command = ["node", "tests/page_parity.mjs", tmp_path / "cache", tmp_path / "model.mjs", library]
    given = json.dumps({"release": settings(site), "texts": texts + DIFFERENT})
    done = subprocess.run(command, cwd=ROOT, input=given, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout)
    compare("node", said["answers"][: len(texts)], expected, said["seconds"])
    for one, python in zip(said["answers"][len(texts) :], TextTokenizer(site.release, 512).encode(DIFFERENT), strict=True):
        assert one["tokens"] != len(python.ids), "no difference any more: take it out of docs/deploy.md"


def test_the_browser_answers_as_python_keeps_what_it_fetched_and_tells_nobody(
    site: Site, visit: Callable[..., Page], texts: list[str], expected: Expected
) -> None:
    watch = """addEventListener("DOMContentLoaded", () => {
        globalThis.seen = [];
        new MutationObserver(() => seen.push(document.getElementById("loaded").textContent)).observe(
            document.getElementById("loaded"), { childList: true }); })"""
    started = time.monotonic()
    page = visit(site.url, watch)
    send(page, TEXT)  # at once: it waits for the model
    expect(page.locator("#result[data-is=answer]")).to_be_visible(timeout=60_000)
    seconds = time.monotonic() - started

    release = settings(site)
    total = sum(
        (site.release / name).stat().st_size for name in ("config.json", "tokenizer.json", "tokenizer_config.json", "onnx/model.onnx")
    )
    assert release["bytes"] == total + sum(file.bytes for file in LIBRARY.values())
    shown = [re.fullmatch(r"(\d+) of (\d+) MB", one) for one in page.evaluate("seen") if one != "Starting the model"]
    assert shown and all(one and one[2] == str(round(release["bytes"] / 1e6)) for one in shown)
    assert sorted(int(one[1]) for one in shown if one) == [int(one[1]) for one in shown if one]
    expect(page.locator("#load")).to_be_hidden()
    expect(page.locator("#state")).to_have_text("Ready")

    answers = page.evaluate(ASK, texts)
    compare("chromium", answers, expected, seconds)
    (said,) = page.evaluate(ASK, [TEXT])
    assert page.locator("#verdict").inner_text().split("\n") == [said["label"], f"{100 * said['confidence']:.1f}% sure"]
    assert re.fullmatch(
        rf"Answered in \d+ ms \({said['tokens']} tokens\) by {MODEL} at {release['commit'][:8]}\.", page.locator(".note").inner_text()
    )
    assert f"{MODEL} at v1 ({release['commit'][:8]}), 4 labels, on onnxruntime in this browser" in page.locator("footer").inner_text()
    expect(page.get_by_role("link", name="Model on the Hub")).to_have_attribute("href", f"{site.hub.url}/{MODEL}/tree/{release['commit']}")
    expect(page.get_by_text("Ask from your own program")).to_be_hidden()  # there is nothing to ask
    assert page.evaluate("document.documentElement.scrollWidth") <= 390

    # Refused as by the service.
    for text, words in {
        "a\0b": "NUL character",
        "\u200b": "holds no character that the model can read",
        "a" * (1 << 20) + "b": "1048576 bytes",
    }.items():
        page.evaluate("(text) => { document.getElementById('text').value = text; }", text)
        page.get_by_role("button", name="Classify").click()
        expect(page.locator("#verdict")).to_contain_text(words)

    # Nothing was sent, and nobody but the Space and the Hub was asked, of the model for files of its commit alone.
    asked = page.context.asked  # type: ignore[attr-defined]
    here, files = site.url.removesuffix("index.html"), f"{site.hub.url}/{MODEL}/resolve/{release['commit']}/"
    assert {(method, data) for method, _, data in asked} == {("GET", None)}
    assert [url for _, url, _ in asked if not url.startswith((here, files, f"blob:{here}", "data:"))] == []
    assert not any(TEXT.split()[0].lower() in url.lower() for _, url, _ in asked)

    asked.clear()
    again = visit(site.url)
    send(again, TEXT)
    expect(again.locator("#result[data-is=answer]")).to_be_visible()
    assert [url for _, url, _ in asked if url.startswith(site.hub.url)] == []


def test_the_library_from_a_cdn(site: Site, npm: Path, visit: Callable[..., Page], tmp_path: Path) -> None:
    """The default, with the packages on another server in place of the CDN."""
    packages, page = tmp_path / "cdn", tmp_path / "page"
    for file in LIBRARY.values():
        folder = packages / f"{file.package}@{file.version}"
        folder.parent.mkdir(parents=True, exist_ok=True)
        if not folder.exists():
            folder.symlink_to(npm / file.package)
    with serve_folder(packages, cdn=True) as cdn, serve_folder(page) as url:
        base = cdn.removesuffix("/index.html")
        done = deploy(site.hub, "--revision", "v1", "--library", base, space="local/cdn-page")
        assert done.returncode == 0, done.stderr
        HfApi(site.hub.url, site.hub.token).snapshot_download("local/cdn-page", repo_type="space", local_dir=page)
        opened = visit(url)
        send(opened, TEXT)
        expect(opened.locator("#result[data-is=answer]")).to_be_visible(timeout=60_000)
        asked = {address for _, address, _ in opened.context.asked if address.startswith(base)}  # type: ignore[attr-defined]
    assert asked == {f"{base}/{f.package}@{f.version}/{f.path}" for f in LIBRARY.values()}
    assert not (page / "library").exists()


# ---- what is wrong, in words


def test_a_browser_without_webassembly(site: Site, visit: Callable[..., Page]) -> None:
    page = visit(site.url, "delete globalThis.WebAssembly")
    expect(page.locator("#verdict")).to_contain_text("This browser cannot run the model. It has no WebAssembly")
    expect(page.locator("#state")).to_have_text("Not available")
    expect(page.locator("#load")).to_be_hidden()
    send(page, TEXT)
    expect(page.locator("#verdict")).to_contain_text("It has no WebAssembly")


def test_a_hub_that_is_gone_and_comes_back(site: Site, visit: Callable[..., Page]) -> None:
    site.hub.vanish()
    try:
        page = visit(site.url)
        expect(page.locator("#verdict")).to_contain_text(
            f"The model cannot be fetched. {site.hub.url.removeprefix('http://')} cannot be reached. Check the network, then try again."
        )
    finally:
        site.hub.start()
    send(page, TEXT)
    expect(page.locator("#result[data-is=answer]")).to_be_visible(timeout=60_000)
    expect(page.locator("#state")).to_have_text("Ready")


def test_a_connection_that_breaks_in_the_middle_of_the_model(site: Site, visit: Callable[..., Page], tmp_path: Path) -> None:
    folder, release = shutil.copytree(site.folder, tmp_path / "here"), settings(site)
    (folder / MODEL / "resolve").mkdir(parents=True)
    (folder / MODEL / "resolve" / release["commit"]).symlink_to(site.release)
    with serve_folder(folder, cut="model.onnx") as url:
        page = (folder / "index.html").read_text(encoding="utf-8")
        (folder / "index.html").write_text(page.replace(release["host"], url.removesuffix("/index.html")), encoding="utf-8")
        expect(visit(url).locator("#verdict")).to_contain_text("cannot be reached. Check the network, then try again.")


def test_a_model_that_was_deleted_and_a_library_that_was_changed(site: Site, visit: Callable[..., Page], tmp_path: Path) -> None:
    gone = shutil.copytree(site.folder, tmp_path / "gone")
    page = (gone / "index.html").read_text(encoding="utf-8")
    (gone / "index.html").write_text(page.replace(MODEL, "local/no-such-model"), encoding="utf-8")
    changed = shutil.copytree(site.folder, tmp_path / "changed")
    with (changed / "library" / "transformers.min.js").open("a") as file:
        file.write("\n")
    for folder, words in {gone: "The model is not there.", changed: "or gives another file than this page was made with"}.items():
        with serve_folder(folder) as url:
            expect(visit(url).locator("#verdict")).to_contain_text(words)


# ---- deploying


def test_what_cannot_be_deployed_is_said_in_one_line(site: Site, npm: Path, tmp_path: Path) -> None:
    api = HfApi(site.hub.url, site.hub.token)
    api.create_repo("local/secret", private=True)
    api.upload_folder(repo_id="local/secret", folder_path=site.release, ignore_patterns="*.onnx")
    assert "has no onnx/model.onnx" in refused(site.hub, model="local/secret")
    api.upload_file(path_or_fileobj=b"", path_in_repo="onnx/model.onnx", repo_id="local/secret")
    assert "is private, and a page that anyone may open can hold no token" in refused(site.hub, model="local/secret")
    assert "No such revision" in refused(site.hub, "--revision", "v9")
    assert "has no tokenizer_config.json" in refused(site.hub, "--revision", "main")
    assert "No such repository" in refused(site.hub, model="local/nothing")
    assert "allowed is owner/name" in refused(site.hub, model="outputs/ag_news/release")
    assert "No folder nowhere" in refused(site.hub, "--revision", "v1", "--library", "nowhere")
    assert "npm i --ignore-scripts" in refused(site.hub, "--revision", "v1", "--library", str(tmp_path))
    assert refused(site.hub, "--no-such").count("Usage") == 1
    site.hub.vanish()
    try:
        line = refused(site.hub, "--revision", "v1")
    finally:
        site.hub.start()
    assert f"The Hub at {site.hub.url} cannot be reached" in line and "local folder" not in line


def refused(hub: HubProcess, *options: str, model: str = MODEL) -> str:
    done = deploy(hub, *options, model=model)
    assert done.returncode == 2 and not done.stdout, (done.stdout, done.stderr)
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: ")
    return line


def test_from_a_cdn_every_file_is_pinned_by_version_and_hash(npm: Path) -> None:
    release = Release(MODEL, "v1", "0" * 40, 1)
    files = compose(release, "https://cdn.example/npm/")
    assert set(files) == {"README.md", "index.html", "browser.js", "worker.js", "model.js"}
    page = html.unescape(bytes(files["index.html"]).decode())  # type: ignore[arg-type]
    for file in LIBRARY.values():
        package = json.loads((npm / file.package / "package.json").read_text())
        assert package["version"] == file.version and (npm / file.package / file.path).stat().st_size == file.bytes
        assert f'"https://cdn.example/npm/{file.package}@{file.version}/{file.path}", "integrity": "sha384-{file.sha384}"' in page
    wanted = json.loads((npm / LIBRARY["library"].package / "package.json").read_text())["dependencies"]
    assert wanted["onnxruntime-web"] == LIBRARY["wasm"].version
    with pytest.raises(UserError, match="node_modules"):
        compose(release, "ftp://cdn.example")
