"""Headless Chromium for the drivers of the page, and what they all look at."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from playwright.sync_api import Locator, Page, expect, sync_playwright

FLAGS = [
    "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync",
]  # fmt: skip
LONG = 600_000  # milliseconds; on a busy machine the page takes many times what it needs
# The visible controls that have no accessible name.
_NAMELESS = """() => [...document.querySelectorAll("input, textarea, select, button")].filter((it) => {
    const named = it.labels?.length || it.ariaLabel || it.title || it.textContent.trim() || it.alt
        || it.getAttribute("aria-labelledby");
    return it.checkVisibility() && it.type !== "hidden" && !named;
}).map((it) => it.outerHTML.slice(0, 200))"""


@contextmanager
def page_of(url: str, told: dict[str, Any], **options: Any) -> Iterator[Page]:
    """A page at `url`. `told` gets lists: `errors` of scripts, `elsewhere` (requests to other servers)."""
    told |= {"errors": [], "elsewhere": []}
    with tempfile.TemporaryDirectory() as profile, sync_playwright() as playwright:
        browser = playwright.chromium.launch_persistent_context(
            profile, executable_path=shutil.which("chromium"), headless=True, args=FLAGS,
            **{"viewport": {"width": 1200, "height": 900}, **options},
        )  # fmt: skip
        page = browser.new_page()
        page.set_default_timeout(LONG)
        expect.set_options(timeout=LONG)
        page.on("pageerror", lambda error: told["errors"].append(str(error)))
        host = urlsplit(url).netloc
        page.on("request", lambda it: _elsewhere(it.url, host, told["elsewhere"]))
        page.goto(url, wait_until="domcontentloaded")
        yield page
        browser.close()


def _elsewhere(address: str, host: str, found: list[str]) -> None:
    parts = urlsplit(address)
    if parts.scheme in ("http", "https") and parts.netloc != host:
        found.append(address)


def tab(page: Page, name: str) -> Locator:
    """The content of a tab, once it is open."""
    page.get_by_role("tab", name=name, exact=True).click()
    panel = page.get_by_role("tabpanel").filter(visible=True).first
    expect(panel).to_be_visible()
    return panel


def nameless(page: Page) -> list[str]:
    """The visible controls without an accessible name."""
    return list(page.evaluate(_NAMELESS))


def refused(page: Page, words: str) -> None:
    """Wait for an error that says `words`, and close it."""
    message = page.get_by_test_id("toast-body").filter(has_text=words)
    expect(message).to_be_visible()
    message.get_by_test_id("toast-close").click()
    expect(message).to_have_count(0)


def filled(place: Locator, label: str) -> str:
    """The text of a field once it has one."""
    field = place.get_by_label(label, exact=True)
    expect(field).not_to_have_value("")
    return field.input_value()


def words(page: Page) -> str:
    """All that the page shows."""
    fields = page.evaluate('[...document.querySelectorAll("textarea")].map((it) => it.value)')
    return "\n".join([page.locator("body").inner_text(), *fields])


def shots(page: Page, folder: Path, name: str) -> list[int]:
    """Pictures of the page: light, dark, on a phone. Returns the pixels by which each is too wide."""
    over = []
    for kind, width, scheme in (("light", 1200, "light"), ("dark", 1200, "dark"), ("phone", 390, "light")):
        page.set_viewport_size({"width": width, "height": 900})
        page.emulate_media(color_scheme=scheme)  # type: ignore[arg-type]
        page.evaluate(f"document.body.classList.toggle('dark', {str(scheme == 'dark').lower()})")
        page.wait_for_timeout(300)
        over.append(page.evaluate("document.documentElement.scrollWidth") - width)
        page.screenshot(path=folder / f"{name}-{kind}.png", full_page=True)
    page.set_viewport_size({"width": 1200, "height": 900})
    return over
