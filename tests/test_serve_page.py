"""The page at `/` in a real Chromium without a window: by mouse, by keyboard, as a screen reader is told it, on a phone, dark and light."""

from __future__ import annotations

import concurrent.futures
import itertools
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from browsing import Browser, Page, chromium, expect
from contrast import SEEN, contrast
from serving import Serve, make_release, make_text, variant

# As awkward as labels get: a sentence, a path, a word that does not end.
LABELS = ["World affairs and all diplomacy", "comp.os.ms-windows.misc", "Donaudampfschifffahrtsgesellschaft", "Sci/Tech"]
EXAMPLE = "Striker scores twice in cup final"
TEXT = "Oil prices rise as the cartel cuts its output"

NewPage = Callable[..., Page]


@pytest.fixture(scope="module")
def release_dir(encoder_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    names = {"id2label": dict(enumerate(LABELS)), "label2id": {name: i for i, name in enumerate(LABELS)}}
    return variant(make_release(encoder_dir), tmp_path_factory.mktemp("page") / "awkward", config=names, golden={"label_names": LABELS})


def start(release: Path, *arguments: str, env: dict[str, str] | None = None) -> Serve:
    return Serve("--model", release, "--engine", "onnxruntime", *arguments, env=env)


@pytest.fixture(scope="module")
def serve(release_dir: Path) -> Iterator[Serve]:
    with start(
        release_dir, "--queue_tokens", "1000", "--max_texts", "20000", "--max_body_bytes", "9000000", "--deadline_seconds", "60"
    ) as serve:
        yield serve


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with chromium() as browser:
        yield browser


@pytest.fixture
def open_page(browser: Browser) -> Iterator[NewPage]:
    """Opens a page; when the test ends none of its pages may have asked elsewhere, or had an error in its script or policy."""
    contexts, asked, errors = [], [], []

    def open_page(url: str, **options: Any) -> Page:
        context = browser.new_context(**options)
        contexts.append(context)
        context.on("request", lambda request: asked.append((url, request.url)))
        # The browser reports each refusal (4xx, 5xx) and each failed connection as an error too; the page says those in words.
        context.on("console", lambda line: errors.append(line.text) if line.type == "error" and "Failed to load" not in line.text else None)
        context.on("weberror", lambda error: errors.append(str(error.error)))
        page = context.new_page()
        page.set_default_timeout(20_000)
        page.goto(url)
        expect(page.locator("#state")).to_have_text("Ready")
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert asked
    assert [there for here, there in asked if not there.startswith((f"{here}/", "data:"))] == []
    assert errors == []


def send(page: Page, text: str) -> None:
    page.get_by_label("Text to classify").fill(text)
    page.get_by_role("button", name="Classify").click()


def answer_of(page: Page) -> dict[str, Any]:
    """What the page shows, once all bars have grown to their width."""
    expect(page.locator("#result[data-is=answer]")).to_be_visible()
    page.evaluate("Promise.allSettled(document.getAnimations().map((animation) => animation.finished)).then(() => null)")
    script = """(row) => ({label: row.querySelector("dt").textContent, percent: row.querySelector("dd:last-child").textContent,
        share: row.querySelector(".track i").offsetWidth / row.querySelector(".track").offsetWidth})"""
    bars = [row.evaluate(script) for row in page.locator("#result dl > div").all()]
    return {"verdict": page.locator("#verdict").inner_text(), "bars": bars, "note": page.locator(".note").inner_text()}


# ---- what it shows


def test_an_example_by_mouse_and_a_text_by_ctrl_enter_show_what_the_api_says(serve: Serve, open_page: NewPage) -> None:
    page = open_page(serve.url)
    for text in (EXAMPLE, TEXT):
        if text == EXAMPLE:
            page.get_by_role("button", name=text).click()
        else:
            page.get_by_label("Text to classify").fill(text)
            with page.expect_response("**/predict"):
                page.keyboard.press("Control+Enter")
        said, shown = serve.client.post("/predict", json={"text": text}).json(), answer_of(page)
        ranked = sorted(said["probabilities"].items(), key=lambda item: -item[1])
        assert shown["verdict"].split("\n")[0] == said["label"] == ranked[0][0]
        assert f"{100 * said['confidence']:.1f}% sure" in shown["verdict"]
        assert [bar["label"] for bar in shown["bars"]] == [label for label, _ in ranked]
        assert [float(bar["percent"].rstrip("%")) for bar in shown["bars"]] == pytest.approx([100 * p for _, p in ranked], abs=0.051)
        assert [bar["share"] for bar in shown["bars"]] == pytest.approx([p for _, p in ranked], abs=0.02)
        assert sum(bar["share"] for bar in shown["bars"]) == pytest.approx(1, abs=0.05)
        expected = rf"Answered in \d+ ms \({said['tokens']} tokens\) by {said['model']} at {said['revision']}\."
        assert re.fullmatch(expected, shown["note"]), shown["note"]
        assert page.get_by_label("Text to classify").input_value() == text
    footer = page.locator("footer").inner_text()
    assert f"awkward at {said['revision']}, 4 labels, on onnxruntime (CPU, fp32)" in footer
    send(page, make_text(100, 1))
    expect(page.locator(".note")).to_contain_text("longer than the model reads")


def test_the_answer_is_to_the_newest_question(serve: Serve, open_page: NewPage) -> None:
    page = open_page(serve.url)
    page.evaluate("document.querySelectorAll('#examples button').forEach((button) => button.click())")
    text = page.get_by_label("Text to classify").input_value()
    assert text == page.locator("#examples button").last.inner_text()
    said = serve.client.post("/predict", json={"text": text}).json()
    assert answer_of(page)["verdict"].split("\n") == [said["label"], f"{100 * said['confidence']:.1f}% sure"]


def test_it_can_talk_to_no_other_origin(serve: Serve, browser: Browser) -> None:
    """Its policy is in force, and shows where `open_page` looks."""
    page, errors = browser.new_page(), []
    page.on("console", lambda line: errors.append(line.text))
    page.goto(serve.url)
    other = serve.url.replace("127.0.0.1", "localhost")
    assert page.evaluate("fetch('/health').then((answer) => answer.ok)")
    assert page.evaluate(f"fetch('{other}/health').then(() => 'answered', () => 'refused')") == "refused"
    page.evaluate(f"document.body.append(Object.assign(new Image(), {{src: '{other}/x.png'}}))")
    page.wait_for_timeout(100)
    for directive in ("connect-src", "img-src"):
        assert any("Content Security Policy" in line and directive in line for line in errors), errors
    page.close()


# ---- errors, in words


def test_a_blank_and_an_unreadable_text(serve: Serve, open_page: NewPage) -> None:
    page = open_page(serve.url)
    expect(page.get_by_label("Key", exact=True)).to_be_hidden()  # this service asks for none
    send(page, "  \n ")
    expect(page.get_by_role("status").last).to_have_text("There is no text yet. Type one, or pick an example.")
    expect(page.get_by_label("Text to classify")).to_be_focused()
    send(page, "a\0b")
    expect(page.locator("#verdict")).to_contain_text("NUL character")
    send(page, TEXT)
    assert len(answer_of(page)["bars"]) == 4


def test_a_full_queue_says_when_to_try_again(serve: Serve, open_page: NewPage) -> None:
    page = open_page(serve.url)
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        long = pool.submit(serve.client.post, "/predict/batch", json={"texts": [make_text(60, seed) for seed in range(8000)]})
        end = time.monotonic() + 30
        while serve.metric("distrinews_queue_tokens") < 1000:
            assert time.monotonic() < end and not long.done(), "the large request was never in the queue"
        send(page, TEXT)
        expect(page.locator("#verdict")).to_have_text(
            re.compile(r"Too many requests at the moment\. The queue is full\. Try again in \d+ s\.")
        )
        assert long.result().status_code == 200
    expect(page.locator("#verdict")).to_have_text("You can try again now.", timeout=70_000)
    send(page, TEXT)
    assert answer_of(page)["bars"]


def test_the_service_goes_and_comes_back_with_another_revision(release_dir: Path, tmp_path: Path, open_page: NewPage) -> None:
    newer = variant(release_dir, tmp_path / "newer", tokenizer_config={"note": "another commit"})
    with start(release_dir) as before:
        page = open_page(before.url)
        send(page, TEXT)
        old = answer_of(page)["note"]
        page.locator("#examples button").first.focus()
    send(page, TEXT)
    expect(page.locator("#verdict")).to_have_text("The service cannot be reached. Check the connection, and that the service runs.")
    expect(page.locator("#state")).to_have_text("Not reachable")
    again = start(newer)
    again.command[-1] = before.url.rsplit(":", 1)[1]  # the same port
    with again:
        expect(page.locator("#verdict")).to_have_text("You can try again now.")
        revision = again.client.get("/info").json()["commit"]
        expect(page.locator("#about")).to_contain_text(f"newer at {revision}")
        send(page, TEXT)
        note = answer_of(page)["note"]
        assert f"by newer at {revision}" in note and f"newer at {revision}" not in old


def test_a_service_with_keys_asks_for_one_and_the_page_keeps_it_nowhere(release_dir: Path, open_page: NewPage) -> None:
    with start(release_dir, env={"DISTRINEWS_API_KEYS": "first-key-of-the-test,second-key-of-the-test"}) as locked:
        page = open_page(locked.url)
        key = page.get_by_label("Key", exact=True)
        expect(key).to_be_visible()
        send(page, TEXT)
        expect(page.locator("#verdict")).to_have_text(
            "This service asks for a key. Type it above. It is forgotten when this page is closed."
        )
        expect(key).to_be_focused()
        page.keyboard.type("no-such-key")
        page.keyboard.press("Enter")
        expect(page.locator("#verdict")).to_have_text("That key is not accepted. Type another one above.")
        page.keyboard.type("sécret")  # over the wrong one, which is selected
        page.keyboard.press("Enter")
        expect(page.locator("#verdict")).to_contain_text("That cannot be a key.")
        key.fill("second-key-of-the-test")
        page.keyboard.press("Enter")
        assert len(answer_of(page)["bars"]) == 4
        assert "second-key" not in page.locator("body").inner_text() and '"X-API-Key: $KEY"' in (page.locator("#curl").text_content() or "")
        assert (
            page.evaluate("JSON.stringify([localStorage, sessionStorage, document.cookie, location.href])")
            == f'[{{}},{{}},"","{page.url}"]'
        )
        page.reload()
        send(page, TEXT)
        expect(page.locator("#verdict")).to_contain_text("asks for a key")
        expect(key).to_have_value("")


# ---- for everybody


def test_by_keyboard_alone_in_the_order_of_reading(serve: Serve, open_page: NewPage) -> None:
    page = open_page(serve.url)
    expect(page.locator("#examples button")).to_have_count(6)
    stops = []
    for _ in range(12):
        stop = page.evaluate("""() => {
            const at = document.activeElement, ring = getComputedStyle(at), box = getComputedStyle(at.closest("form") ?? at);
            return [at.id || at.textContent, ring.outlineStyle === "solid" || box.boxShadow !== "none"]; }""")
        stops.append(stop)
        page.keyboard.press("Tab")
    names = [name for name, _ in stops]
    assert names[:2] == ["text", "go"] and names[3] == EXAMPLE and names[8:12] == ["Ask from your own program", "API", "Model", "Metrics"]
    assert all(visible for _, visible in stops), stops
    for _ in range(9):
        page.keyboard.press("Shift+Tab")
    expect(page.get_by_role("button", name=EXAMPLE)).to_be_focused()
    page.keyboard.press("Enter")
    assert answer_of(page)["bars"]
    expect(page.get_by_role("button", name=EXAMPLE)).to_be_focused()  # not lost: the next one is a Tab away


def test_a_screen_reader_is_told(serve: Serve, open_page: NewPage) -> None:
    """Chromium's accessibility tree: the region that speaks is there before its words, and all that can be used has a name."""
    page = open_page(serve.url)
    devtools = page.context.new_cdp_session(page)

    def tree() -> dict[str, dict[str, Any]]:
        return {node["nodeId"]: node for node in devtools.send("Accessibility.getFullAXTree")["nodes"]}

    def roles(nodes: dict[str, dict[str, Any]], *names: str) -> list[dict[str, Any]]:
        return [node for node in nodes.values() if not node["ignored"] and node["role"]["value"] in names]

    def words(nodes: dict[str, dict[str, Any]], node: dict[str, Any]) -> str:
        if node.get("role", {}).get("value") == "StaticText":
            return node["name"]["value"]
        return " ".join(words(nodes, nodes[child]) for child in node["childIds"] if child in nodes)

    speaking = {
        node["backendDOMNodeId"]: {item["name"]: item["value"].get("value") for item in node["properties"]}
        for node in roles(tree(), "status")
    }
    send(page, TEXT)
    shown, nodes = answer_of(page), tree()
    (spoken,) = [node for node in roles(nodes, "status") if words(nodes, node).split() == shown["verdict"].split()]
    before = speaking[spoken["backendDOMNodeId"]]
    assert (before["live"], before["atomic"]) == ("polite", True)

    used = roles(nodes, "textbox", "button", "link", "region", "navigation")
    assert len(used) == 14 and all(node["name"]["value"] for node in used), [node["name"] for node in used]
    # A bar is for the eye alone: its number stands beside it.
    assert len(roles(nodes, "term")) == len(roles(nodes, "definition")) == 4


@pytest.mark.parametrize(("width", "zoom"), [(360, 100), (320, 100), (640, 100), (640, 200)])  # 640: 1280 at a zoom of 200%
def test_no_scrolling_sideways(serve: Serve, open_page: NewPage, width: int, zoom: int) -> None:
    """Down to 320 px, as WCAG 1.4.10 asks; `zoom` is of the letters alone, as a browser's setting for them does it."""
    page = open_page(serve.url, viewport={"width": width, "height": 740})
    page.evaluate(f"document.documentElement.style.fontSize = '{zoom}%'")
    page.get_by_text("Ask from your own program").click()
    for text in ("", "w" * 500, TEXT):
        send(page, text)
        page.wait_for_selector(f"#result[data-is={'answer' if text else 'failed'}]")
        assert page.evaluate("document.documentElement.scrollWidth") <= width
    answer_of(page)
    for box in (page.locator("#result"), page.get_by_role("button", name="Classify"), *page.locator("#result dl > div > *").all()):
        at = box.bounding_box()
        assert at and at["x"] >= 0 and at["x"] + at["width"] <= width
    small = [at for button in page.get_by_role("button").all() if (at := button.bounding_box()) and min(at["width"], at["height"]) < 24]
    assert small == []  # WCAG 2.5.8


def test_dark_and_light_differ_and_both_can_be_read(serve: Serve, open_page: NewPage) -> None:
    """WCAG AA: 4.5 for text, 3 for what shows a state, a border of what can be used, or a bar."""
    assert contrast((0, 0, 0), (255, 255, 255)) == pytest.approx(21)
    assert contrast((118, 118, 118), (255, 255, 255)) == pytest.approx(4.54, abs=0.01)
    grounds = []
    for scheme in ("light", "dark"):
        page = open_page(serve.url, color_scheme=scheme)
        page.get_by_text("Ask from your own program").click()
        for text in ("", TEXT):
            send(page, text)
            page.wait_for_selector(f"#result[data-is={'answer' if text else 'failed'}]")
            found, named = page.evaluate(SEEN)
            assert len(found) > 15
            assert [(words, contrast(ink, ground)) for words, ink, ground in found if contrast(ink, ground) < 4.5] == []
        for name, ground in itertools.product(("edge", "accent", "rest", "good", "bad"), ("page", "card")):
            assert contrast(named[name], named[ground]) >= 3, (scheme, name, ground)
        page.get_by_role("button", name=EXAMPLE).hover()
        assert contrast(named["accent"], named["page"]) >= 4.5
        grounds.append(named["page"])
    assert contrast(*grounds) > 10


def test_nothing_moves_for_those_who_asked_for_that(serve: Serve, open_page: NewPage) -> None:
    moves = []
    for wish in ("no-preference", "reduce"):
        page = open_page(serve.url, reduced_motion=wish)
        send(page, TEXT)
        moves.append(page.locator(".track i").first.evaluate("(bar) => bar.getAnimations().length"))
    assert moves == [1, 0]
