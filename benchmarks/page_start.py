"""How soon the page that runs the model in the visitor's browser answers, and what it fetches for that; all files on this machine.

    python -m benchmarks.page_start --model outputs/ag_news/release      # half a minute on an idle machine; results/page_start.json

The page is the one `make deploy-page` makes with the library in the Space, opened in a Chromium without a window and with an empty
cache: a text is sent at once and waits for library, tokenizer and model; the golden texts of the release follow, one at a time, and
must get their labels. Medians of three visits. Needs requirements-dev.txt, a Chromium or Chrome on the PATH, and `--library`. Exit
code 1 where the first answer takes longer than BOUND_SECONDS or a label is another.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import http.server
import json
import shutil
import statistics
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from benchmarks.common import ROOT, provenance, write_results
from pipeline.deploy.page import RELEASE_FILES, Release, compose
from pipeline.errors import UserError, run_entry

if TYPE_CHECKING:
    from playwright.sync_api import Browser

# Also the tests' own; --no-sandbox because a container has none to give.
FLAGS = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
         "--disable-background-networking", "--disable-component-update", "--disable-sync"]  # fmt: skip
MODEL, COMMIT = "local/release", "0" * 40  # what the page takes it for; it is served from a folder
VISITS, TEXTS, BOUND_SECONDS, PATIENCE_SECONDS = 3, 20, 10, 60
ASK = """async (texts) => {
    const { ask } = await import("./browser.js"), answers = [];
    for (const text of texts) answers.push(await (await ask("predict", { body: JSON.stringify({ text }) })).json());
    return answers; }"""


def find_browser() -> str | None:
    return next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


@contextlib.contextmanager
def served(folder: Path) -> Iterator[tuple[str, Counter[str]]]:
    """Serves the files of `folder` on loopback: the address, and by path the bytes of those sent whole so far."""
    sent: Counter[str] = Counter()

    class Files(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_: Any) -> None: ...

        def copyfile(self, source: Any, output: Any) -> None:
            with contextlib.suppress(ConnectionError):  # the browser hangs up when it has seen enough
                super().copyfile(source, output)
                sent[self.path] += source.tell()

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Files, directory=str(folder))) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            yield f"http://127.0.0.1:{server.server_port}", sent
        finally:
            server.shutdown()


def build(release: Path, library: Path, folder: Path, host: str) -> None:
    """The Space's files in `folder`, and the release where the page looks for it on a Hub. Raises UserError where one is missing."""
    if missing := [name for name in (*RELEASE_FILES, "golden.json") if not (release / name).is_file()]:
        raise UserError(
            f"--model {release} has no {', '.join(missing)}: give the release folder of a run that was trained with onnx: true."
        )
    size = sum((release / name).stat().st_size for name in RELEASE_FILES)
    for name, content in compose(Release(MODEL, "main", COMMIT, size), str(library), host).items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(content if isinstance(content, bytes) else content.read_bytes())
    (folder / MODEL / "resolve").mkdir(parents=True)
    (folder / MODEL / "resolve" / COMMIT).symlink_to(release.resolve())


def visit(browser: Browser, address: str, texts: Sequence[str]) -> tuple[float, list[dict[str, Any]]]:
    """Seconds from opening the page to its first answer, and its answers to `texts`, for a visitor with an empty cache."""
    from playwright.sync_api import TimeoutError as Late

    context = browser.new_context()
    try:
        page, began = context.new_page(), time.perf_counter()
        page.set_default_timeout(1000 * PATIENCE_SECONDS)
        page.goto(f"{address}/index.html")
        page.get_by_label("Text to classify").fill(texts[0])
        page.get_by_role("button", name="Classify").click()
        try:
            page.locator("#result[data-is=answer]").wait_for()
        except Late as error:
            said = " ".join(page.locator("#verdict").inner_text().split())
            raise UserError(f"The page gives no answer within {PATIENCE_SECONDS} s; it says: {said or 'nothing'}") from error
        return time.perf_counter() - began, page.evaluate(ASK, texts)
    finally:
        context.close()


def spread(seconds: Sequence[float]) -> dict[str, float]:
    return {"median": statistics.median(seconds), "lowest": min(seconds), "highest": max(seconds)}


def measure(release: Path, library: Path, browser: str) -> dict[str, Any]:
    """Sizes in MB, seconds of the first and of a further answer over the visits, and how many labels are the golden ones."""
    from playwright.sync_api import sync_playwright

    firsts, further, same = list[float](), list[float](), list[int]()
    with tempfile.TemporaryDirectory(prefix="page-start-") as folder, served(Path(folder)) as (address, sent):
        build(release, library, Path(folder), address)
        golden = json.loads((release / "golden.json").read_text(encoding="utf-8"))
        examples = golden["examples"][:TEXTS]
        wanted = [golden["label_names"][max(range(len(one["logits"])), key=one["logits"].__getitem__)] for one in examples]
        with sync_playwright() as playwright:
            chromium = playwright.chromium.launch(executable_path=browser, args=FLAGS)
            version = chromium.version
            for _ in tqdm(range(VISITS), desc="visits"):
                sent.clear()
                first, answers = visit(chromium, address, [one["text"] for one in examples])
                firsts.append(first)
                further += [answer["milliseconds"] / 1000 for answer in answers]
                same.append(sum(answer["label"] == label for answer, label in zip(answers, wanted, strict=True)))
            chromium.close()
        fetched = {part: sum(size for path, size in sent.items() if part in path) / 1e6 for part in ("/library/", "/resolve/", ".onnx")}
    held = max(firsts) <= BOUND_SECONDS and min(same) == len(wanted)
    return {
        "browser": f"Chromium {version}", "visits": VISITS, "texts": len(wanted), "same_labels": min(same),
        "model_mb": fetched[".onnx"], "release_mb": fetched["/resolve/"], "library_mb": fetched["/library/"],
        "first_seconds": spread(firsts), "further_seconds": spread(further), "bound_seconds": BOUND_SECONDS, "held": held,
    }  # fmt: skip


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.page_start", allow_abbrev=False, description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, required=True, help="Folder of a release, with onnx/model.onnx and golden.json.")
    parser.add_argument(
        "--library", type=Path, default=ROOT / ".cache" / "npm" / "node_modules",
        help="Folder node_modules with transformers.js. (.cache/npm/node_modules, where the tests put it)",
    )  # fmt: skip
    arguments = parser.parse_args(argv)
    if not (browser := find_browser()):
        raise UserError("No chromium, chromium-browser or google-chrome on the PATH: install one.")
    provenance()
    results = measure(arguments.model, arguments.library, browser)
    path = write_results("page_start", results)
    first, further = results["first_seconds"], results["further_seconds"]
    print(
        f"fetched     {results['release_mb']:.1f} MB of the release, {results['library_mb']:.1f} MB of the library\n"
        f"first       {first['median']:.1f} s ({first['lowest']:.1f} to {first['highest']:.1f}) after opening the page; allowed {BOUND_SECONDS} s\n"
        f"further     {1000 * further['median']:.0f} ms\nlabels      {results['same_labels']} of {results['texts']} are the golden ones\n"
        f"written     {path.relative_to(ROOT)}"
    )
    return 0 if results["held"] else 1


if __name__ == "__main__":
    sys.exit(run_entry(main))
