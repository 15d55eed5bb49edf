"""Convert an upload on the page, as a visitor: `python drive_convert.py URL FOLDER TOKEN LORA FILE ...`.

Leaves pictures of the page and the downloads in FOLDER and prints, as JSON, what the page said.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from browser import filled, nameless, page_of, refused, shots, tab, tabbed_to, words
from playwright.sync_api import Locator, Page, expect


def main(url: str, folder: Path, token: str, lora: str, files: list[str]) -> None:
    told: dict[str, Any] = {}
    with page_of(url, told) as page:
        place = tab(page, "Convert")
        told["title"] = page.title()
        convert = place.get_by_role("button", name="Convert", exact=True)
        convert.click()
        refused(page, "Give a model")
        covers = place.locator("[data-testid=status-tracker] .error").first
        expect(covers).to_be_attached()
        expect(covers).to_be_hidden()
        address = place.get_by_label("Model on the Hub")
        with_keys(page)
        refused(page, "give an id on the Hub")
        expect(address).to_have_value("/etc/hostname")
        address.fill("")

        upload(place, files)
        place.get_by_label("Base of the missing parts").fill("tiny")
        place.get_by_role("button", name="Verification").first.click()
        place.get_by_label("number input for Denoising steps").fill("2")
        convert.click()
        told["verdict"] = filled(place, "Verdict")
        told["recognised"] = filled(place, "Recognised")
        told["missing"] = filled(place, "Missing parts")
        pictures = place.locator(".gallery-item img, .thumbnail-item img")
        expect(pictures).to_have_count(3)
        width = "async it => { await it.decode(); return it.naturalWidth }"  # 0 until it is loaded
        told["pictures"] = [pictures.nth(at).evaluate(width) for at in range(3)]

        for button, name in (
            ("Pack the pipeline", "pipeline.zip"),
            ("Make a single file", "model.safetensors"),
        ):
            place.get_by_role("button", name=button).click()
            with page.expect_download() as download:
                place.locator(f"a[download='{name}']").first.click()
            download.value.save_as(folder / name)

        publish = place.get_by_role("button", name="Publish on the Hub")
        page.get_by_role("button", name="Login to the Hugging Face Hub").click()
        page.get_by_label("Access token").fill(token)
        place.get_by_label("Publish as").fill("../etc")
        publish.click()
        refused(page, "USER/NAME")
        place.get_by_label("Publish as").fill("alice/from-the-page")
        publish.click()
        told["published"] = filled(place, "Published")
        told["nameless"] = nameless(page)
        told["over"] = shots(page, folder, "convert")

        place = tab(page, "LoRA")
        upload(place, [lora])
        place.get_by_role("button", name="Convert LoRA").click()
        with page.expect_download() as download:
            place.locator("a[download='kohya.safetensors']").first.click()
        download.value.save_as(folder / "kohya.safetensors")

        place = tab(page, "Inspect")
        place.get_by_label("Model on the Hub").fill("tiny")
        place.get_by_role("button", name="Inspect").click()
        told["inspected"] = filled(place, "Parts")
        told["details"] = filled(place, "Details")
        told["over"] += shots(page, folder, "inspect")
        told["text"] = words(page)
    print(json.dumps(told))


def upload(place: Locator, files: list[str]) -> None:
    """Returns when the server has all files: then each has a link."""
    place.locator("input[type=file]").first.set_input_files(files)
    expect(place.locator(".file-preview .download a")).to_have_count(len(files))


def with_keys(page: Page) -> None:
    """Leave the Convert tab, come back, set an option, name a path, press Convert: with keys only."""
    page.locator("body").evaluate("it => { it.tabIndex = -1; it.focus(); }")
    for step, name, key in (("Tab", "LoRA", "Enter"), ("Shift+Tab", "Convert", "Space")):
        tabbed_to(page, name, step).press(key)
        expect(page.get_by_role("tab", name=name, exact=True)).to_have_attribute("aria-selected", "true")
    tabbed_to(page, "Model on the Hub")
    page.keyboard.type("/etc/hostname")
    tabbed_to(page, "Options").press("Space")
    tabbed_to(page, "Dtype of the weights").press("ArrowDown")
    page.keyboard.press("ArrowDown")
    page.keyboard.press("Enter")
    expect(page.get_by_label("Dtype of the weights")).to_have_value("float16")
    tabbed_to(page, "Convert")
    expect(page.get_by_role("listbox")).to_have_count(0)  # no list is left open over other fields
    page.keyboard.press("Enter")


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), sys.argv[3], sys.argv[4], sys.argv[5:])
