"""Train the tiny base on the page, as a visitor: `python drive_train.py URL FOLDER PHOTO ...`.

A second visitor comes while it trains, and waits. The first one stops the training, resumes, exports and
downloads the single file. Leaves pictures of the page in FOLDER and prints, as JSON, what the page said.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

from browser import filled, nameless, page_of, refused, shots, tab, visit
from playwright.sync_api import Page, expect

LONG, MORE = 2000, 10  # steps of a run that is stopped, steps after it is resumed
WAITING = "Waiting: 1 command is before this one."


def main(url: str, folder: Path, photos: list[str]) -> None:
    told: dict[str, Any] = {}
    with page_of(url, told) as page:
        place = tab(page, "Train")
        costs, state = (place.get_by_label(label) for label in ("What it takes", "State of the training"))
        told["cost"] = costs.input_value()
        train = place.get_by_role("button", name="Train", exact=True)
        place.get_by_role("button", name="Resume").click()
        refused(page, "There is no training yet")

        base = place.get_by_label("Base to train")
        base.click()
        page.get_by_role("option", name="The tiny base").click()
        expect(place.get_by_label("Base on the Hub")).to_be_hidden()
        expect(costs).to_have_value(re.compile("Memory for the tiny base.*250 steps", re.S))
        told["tiny"] = costs.input_value()
        place.locator("input[type=file]").first.set_input_files(photos)
        told["photos"] = filled(place, "About the photos")
        seen = place.locator(".gallery-item img, .thumbnail-item img")
        expect(seen).to_have_count(len(photos) - 1)

        place.get_by_label("Prompt of the photos").fill("a sks cat")
        place.get_by_label("Prompt of the class").fill("a cat")
        place.get_by_label("Steps", exact=True).fill(str(LONG))
        place.get_by_label("Prompts of pictures on the way").fill("a sks cat in the snow\na cat")
        place.get_by_role("button", name="More options").click()
        place.get_by_label("Pictures of the class").fill("4")
        place.get_by_label("number input for Denoising steps of pictures").fill("2")
        train.click()
        expect(state).to_have_value(re.compile(r"^Step \d+ of"))
        expect(place.get_by_role("img", name="Loss from step")).to_be_visible()
        other = visit(page.context.browser, url, told)
        told["waits"] = waiting(other)
        file, seen_file = photo_of(other, photos[:1]), seen.first.get_attribute("src")
        told["live"] = state.input_value()
        place.get_by_role("button", name="Stop").click()
        expect(state).to_have_value(re.compile("Resume goes on"))
        told["stopped"] = state.input_value()
        told["theirs"] = filled(other.get_by_role("tabpanel").filter(visible=True), "Parts")
        told["files"] = [
            [visitor.request.get(address).status for address in (file, seen_file)]
            for visitor in (other, page)
        ]
        other.context.close()

        wanted = int(re.search(r"step (\d+)", told["stopped"])[1]) + MORE
        place.get_by_label("Steps", exact=True).fill(str(wanted))
        place.get_by_role("button", name="Resume").click()
        expect(state).to_have_value(re.compile("^Finished"))
        told["finished"] = state.input_value()
        place.get_by_role("button", name="Export").click()
        expect(place.get_by_role("button", name="Make a single file")).to_be_visible()
        told["verdict"] = filled(place, "Verdict")
        place.get_by_role("button", name="Make a single file").click()
        with page.expect_download() as download:
            place.locator("a[download='model.safetensors']").first.click()
        download.value.save_as(folder / "model.safetensors")
        told["nameless"] = nameless(page)
        told["over"] = shots(page, folder, "train")
    print(json.dumps(told))


def photo_of(page: Page, photos: list[str]) -> str:
    """The address of a photo that a visitor gives; it is shown while another one trains."""
    place = tab(page, "Train")
    place.locator("input[type=file]").first.set_input_files(photos)
    picture = place.locator(".gallery-item img, .thumbnail-item img")
    expect(picture).to_have_count(1)
    address = picture.get_attribute("src")
    tab(page, "Inspect")
    return address


def waiting(page: Page) -> str:
    """Begin something that waits for another visitor's training, stop it, and begin it again."""
    place = tab(page, "Inspect")
    log = place.get_by_label("Commands and progress")
    place.get_by_label("Model on the Hub").fill("tiny")
    look = place.get_by_role("button", name="Inspect")
    look.click()
    expect(log).to_have_value(re.compile(WAITING))
    place.get_by_role("button", name="Stop").click()
    expect(log).to_have_value("Stopped while it waited. It was not begun.")
    look.click()
    expect(log).to_have_value(re.compile(WAITING))
    return place.get_by_label("Parts").input_value()


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), sys.argv[3:])
