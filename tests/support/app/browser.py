"""Headless Chromium for the drivers of the page, and what they all look at."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from playwright.sync_api import Browser, Locator, Page, expect, sync_playwright

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

# What has the focus, its name, and whether what had it before looked other than now, itself or around it.
_FOCUSED = r"""() => {
    const looks = (it) => {
        const found = [];
        for (let at = it; at && found.length < 4; at = at.parentElement) {
            const { outline, boxShadow, borderColor, backgroundColor } = getComputedStyle(at);
            found.push([outline, boxShadow, borderColor, backgroundColor].join());
        }
        return found.join();
    };
    const it = document.activeElement, before = window.focusedBefore;
    const seen = !before?.it.isConnected || before.it === it || looks(before.it) !== before.looks;
    window.focusedBefore = { it, looks: looks(it) };
    const name = it.ariaLabel || it.labels?.[0]?.innerText.split("\n")[0] || it.textContent;
    return { name: name.replace("▼", "").trim(), seen, before: before?.it.outerHTML.slice(0, 200) };
}"""


@contextmanager
def page_of(url: str, told: dict[str, Any], **options: Any) -> Iterator[Page]:
    """A page at `url`. `told` gets lists: `errors` of scripts, `elsewhere` (requests to other servers)."""
    told |= {"errors": [], "elsewhere": []}
    expect.set_options(timeout=LONG)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=shutil.which("chromium"), headless=True, args=FLAGS
        )
        yield visit(browser, url, told, **options)
        browser.close()


def visit(browser: Browser, url: str, told: dict[str, Any], **options: Any) -> Page:
    """The page at `url` as a visitor with cookies of their own sees it."""
    context = browser.new_context(**{"viewport": {"width": 1200, "height": 900}, **options})
    context.set_default_timeout(LONG)
    page = context.new_page()
    page.on("pageerror", lambda error: told["errors"].append(str(error)))
    host = urlsplit(url).netloc
    page.on("request", lambda it: _elsewhere(it.url, host, told["elsewhere"]))
    page.goto(url, wait_until="domcontentloaded")
    return page


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


def tabbed_to(page: Page, label: str, key: str = "Tab") -> Locator:
    """The control named `label`, reached from where the focus is with the Tab key. Each stop is visible."""
    page.add_style_tag(content="* { transition: none !important }")
    for _ in range(60):
        page.keyboard.press(key)
        at = page.evaluate(_FOCUSED)
        assert at["seen"], f"the focus cannot be seen: {at}"
        if at["name"] == label:
            return page.locator(":focus")
    raise AssertionError(f"the Tab key does not reach {label}")


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
