"""Drive a running demo in headless Chromium, as a visitor: `python drive_demo.py URL FOLDER`.

Tries an empty prompt, then draws an example with seeds 4, 5 and 4; leaves the pictures and a screenshot in
FOLDER and prints, as JSON, what the page said.
"""

from __future__ import annotations

import base64
import json
import shutil
import sys
import tempfile
from pathlib import Path

from playwright.sync_api import Page, expect, sync_playwright

FLAGS = [
    "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync",
]  # fmt: skip
LONG = 600_000  # milliseconds; on a busy machine the page takes many times what it needs


def fill(page: Page, label: str, value: str) -> None:
    field = page.get_by_label(label).locator("visible=true").first
    field.fill(value)
    field.blur()


def drawn(page: Page, before: str) -> tuple[bytes, str]:
    """The picture on the page, as the server sent it, once its address is not `before`; and its address."""
    image = page.locator("img[data-testid='detailed-image'], .image-container img").first
    expect(image).to_be_visible()
    expect(image).not_to_have_attribute("src", before)
    code = """async (image) => {
        const bytes = new Uint8Array(await (await fetch(image.src)).arrayBuffer());
        return btoa(Array.from(bytes, (byte) => String.fromCharCode(byte)).join(""));
    }"""
    return base64.b64decode(image.evaluate(code)), image.get_attribute("src") or ""


def main(url: str, folder: Path) -> None:
    told: dict[str, object] = {"errors": []}
    with tempfile.TemporaryDirectory() as profile, sync_playwright() as playwright:
        browser = playwright.chromium.launch_persistent_context(
            profile, executable_path=shutil.which("chromium"), headless=True, args=FLAGS,
            viewport={"width": 1200, "height": 900},
        )  # fmt: skip
        page = browser.new_page()
        page.set_default_timeout(LONG)
        expect.set_options(timeout=LONG)
        page.on("pageerror", lambda error: told["errors"].append(str(error)))  # type: ignore[attr-defined]
        page.goto(url, wait_until="domcontentloaded")
        prompt = page.get_by_label("Prompt", exact=True)
        expect(prompt).to_be_visible()
        told["title"], told["prompt"] = page.title(), prompt.input_value()

        prompt.fill("  ")
        page.get_by_role("button", name="Draw").click()
        expect(page.get_by_text("Write what to draw first.")).to_be_visible()

        page.get_by_text("Steps, guidance and seed").click()
        fill(page, "Steps", "12")
        fill(page, "Guidance scale", "5")
        page.get_by_text("a red car in a meadow").last.click()
        expect(prompt).to_have_value("a red car in a meadow")
        address = ""
        for number, seed in enumerate(("4", "5", "4")):
            fill(page, "Seed (-1: any)", seed)
            page.get_by_role("button", name="Draw").click()
            expect(page.get_by_text(f"Seed {seed}", exact=True)).to_be_visible()
            picture, address = drawn(page, address)
            (folder / f"{number}.png").write_bytes(picture)
        page.screenshot(path=folder / "page.png")
        browser.close()
    print(json.dumps(told))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
