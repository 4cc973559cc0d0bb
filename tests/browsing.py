"""The browser of the tests: a real Chromium without a window. Importing this skips a test file where there is none."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator

import pytest

from benchmarks.page_start import FLAGS, find_browser

BROWSER = find_browser()
if os.environ.get("CI_BROWSER") == "1":
    assert BROWSER, "CI_BROWSER=1 and there is no chromium, chromium-browser or google-chrome on the PATH"
else:
    pytest.importorskip("playwright.sync_api", reason="the page's tests need playwright: pip install -r requirements-dev.txt")
    if not BROWSER:
        pytest.skip("the page's tests need a browser on the PATH: install chromium, or Google Chrome", allow_module_level=True)

from playwright.sync_api import Browser, Page, expect, sync_playwright  # noqa: E402 (only where it is installed)

__all__ = ["Browser", "Page", "chromium", "expect"]

expect.set_options(timeout=20_000)


@contextlib.contextmanager
def chromium() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=BROWSER, args=FLAGS)  # with a new, empty profile, which goes with it
        yield browser
        browser.close()
