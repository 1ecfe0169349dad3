"""The page in a real browser; skipped where there is none (Debian: chromium, and pip install playwright)."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from clora.serve.keys import digest
from clora.serve.page_files import FILES, FOLDER
from clora.serve.service import Service
from tests.serve.conftest import listening, model_of, png

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
needs_browser = pytest.mark.skipif(CHROMIUM is None, reason="needs chromium")


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    playwright = pytest.importorskip("playwright.sync_api")
    with playwright.sync_playwright() as started:
        found = started.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])
        yield found
        found.close()


@pytest.fixture
def page(browser: Any) -> Iterator[Any]:
    """A fresh tab; what the page logs, and any error in it, fails the test."""
    context = browser.new_context(viewport={"width": 390, "height": 800})
    tab = context.new_page()
    errors: list[str] = []
    tab.on("pageerror", lambda error: errors.append(str(error)))
    tab.set_default_timeout(15_000)
    yield tab
    context.close()
    assert errors == []


def test_the_page_names_nothing_from_elsewhere() -> None:
    for name, _ in FILES.values():
        text = (FOLDER / name).read_text(encoding="utf-8")
        assert "http://" not in text and "https://" not in text and "innerHTML" not in text


@needs_browser
def test_the_page_edits_an_upload_and_remembers_it(service: Service, page: Any) -> None:
    with listening(service) as address:
        page.goto(address)
        page.wait_for_selector(".effect")
        assert page.is_disabled("#run")
        page.set_input_files("#file", {"name": "in.png", "mimeType": "image/png", "buffer": png()})
        page.keyboard.press("Tab")
        page.focus(".effect")
        page.keyboard.press("ArrowRight")
        page.keyboard.press("Enter")
        page.click(".effect[data-name=a]")
        assert page.inner_text("#chosen") == "First b, then a."
        page.select_option("#count", "2")
        page.fill("#seed", "7")
        page.click("#run")
        page.wait_for_selector("#save:not([hidden])")
        assert page.inner_text("#status") == "Done: b+a, seed 7, 8."
        assert page.get_attribute("#save", "download") == "b+a-seed7.png"
        page.click("#results button:nth-child(2)")
        assert page.get_attribute("#save", "download") == "b+a-seed8.png"
        page.focus("#slider")
        page.keyboard.press("ArrowRight")
        assert page.eval_on_selector("#compare", "one => one.style.getPropertyValue('--at')") == "51%"
        page.wait_for_selector("#history button")
        page.reload()
        page.click("#history button")
        page.wait_for_selector("#save:not([hidden])")
        width = page.evaluate("document.documentElement.scrollWidth")
        assert width <= 390  # nothing is wider than the phone
    assert model_of(service).batcher.stats()["done"] == 2


@needs_browser
def test_the_page_says_what_is_wrong(make_service: Callable[..., Service], page: Any) -> None:
    service = make_service(limits={"image_pixels": 10_000})
    with listening(service) as address:
        page.goto(address)
        page.wait_for_selector(".effect")
        page.set_input_files("#file", {"name": "in.gif", "mimeType": "image/gif", "buffer": b"GIF89a"})
        assert "no PNG, JPEG or WebP" in page.inner_text("#status")
        page.set_input_files("#file", {"name": "in.png", "mimeType": "image/png", "buffer": png(0, (200, 200))})
        page.click(".effect[data-name=a]")
        page.click("#run")
        page.wait_for_selector("#status.bad")
        assert "40000 pixels" in page.inner_text("#status") or "200 x 200 pixels" in page.inner_text("#status")
        assert page.is_enabled("#run")


@needs_browser
def test_the_page_asks_for_a_key(make_service: Callable[..., Service], page: Any) -> None:
    service = make_service({"alice": digest("clora-right")})
    with listening(service) as address:
        page.goto(address)
        page.wait_for_selector("#key-dialog[open]")
        page.fill("#key", "clora-wrong")
        page.keyboard.press("Enter")
        page.wait_for_selector("#key-wrong:not([hidden])")
        page.fill("#key", "clora-right")
        page.keyboard.press("Enter")
        page.wait_for_selector(".effect")
