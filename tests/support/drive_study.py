"""Look at the page of a study in headless Chromium: `python drive_study.py PAGE FOLDER`.

Filters, orders, enlarges and walks by keyboard; leaves a screenshot of a phone in FOLDER and prints, as JSON,
what the page said.
"""

from __future__ import annotations

import json
import shutil
import sys
import tempfile
from pathlib import Path

from playwright.sync_api import expect, sync_playwright

FLAGS = ["--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking"]
LONG = 600_000  # milliseconds; on a busy machine the page takes many times what it needs


def main(path: Path, folder: Path) -> None:
    told: dict[str, object] = {"errors": [], "requests": []}
    with tempfile.TemporaryDirectory() as profile, sync_playwright() as playwright:
        browser = playwright.chromium.launch_persistent_context(
            profile, executable_path=shutil.which("chromium"), headless=True, args=FLAGS,
            viewport={"width": 360, "height": 740}, color_scheme="dark",
        )  # fmt: skip
        page = browser.new_page()
        page.set_default_timeout(LONG)
        expect.set_options(timeout=LONG)
        page.on("pageerror", lambda error: told["errors"].append(str(error)))  # type: ignore[attr-defined]
        page.on("console", lambda line: told["errors"].append(line.text))  # type: ignore[attr-defined]
        page.on("request", lambda asked: told["requests"].append(asked.url[:30]))  # type: ignore[attr-defined]
        page.goto(path.absolute().as_uri())
        cells = page.locator(".cell")
        told["title"], told["heading"] = page.title(), page.locator("h1").inner_text()
        told["injected"] = page.evaluate("typeof injected !== 'undefined' || !!document.querySelector('b')")
        told["wide"] = page.evaluate("document.documentElement.scrollWidth > window.innerWidth")
        told["first"] = [cell.get_attribute("data-cell") for cell in cells.all()]
        told["charts"] = page.locator("#charts svg").count()
        told["dots"] = page.locator("#charts svg").first.locator("circle").count()

        page.locator("#order").select_option(label="Class")
        told["by_class"] = [cell.get_attribute("data-cell") for cell in cells.all()]
        page.locator("#order").select_option(label="best first")

        page.locator("fieldset", has_text="scheduler").get_by_label("ddim", exact=True).uncheck()
        told["count"] = page.locator("#count").inner_text()
        told["left"] = cells.count()
        page.get_by_role("button", name="Show all").click()

        cells.first.focus()
        page.keyboard.press("Enter")
        image = page.locator("#large-image")
        expect(image).to_be_visible()
        told["drawn"] = image.evaluate("async image => { await image.decode(); return image.naturalWidth }")
        told["large"] = [page.locator("#large-title").inner_text()]
        told["train"] = page.locator("#train").inner_text()
        page.keyboard.press("ArrowRight")
        told["large"].append(page.locator("#large-title").inner_text())  # type: ignore[attr-defined]
        told["draw"] = page.locator("#draw").inner_text()
        page.screenshot(path=folder / "large.png")
        page.keyboard.press("Escape")
        expect(image).to_be_hidden()
        expect(cells.nth(1)).to_be_focused()  # a little later: the page hears of it in an event
        told["focused"] = page.evaluate("document.activeElement.dataset.cell")
        page.screenshot(path=folder / "phone.png", full_page=True)
        browser.close()
    print(json.dumps(told))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
