"""Train the tiny base on the page, as a visitor: `python drive_train.py URL FOLDER PHOTO ...`.

It stops the training, resumes, exports and downloads the single file. Leaves pictures of the page in
FOLDER and prints, as JSON, what the page said.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

from browser import filled, nameless, page_of, refused, shots, tab
from playwright.sync_api import expect

STEPS = 40


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
        place.get_by_label("Steps", exact=True).fill(str(STEPS))
        place.get_by_label("Prompts of pictures on the way").fill("a sks cat in the snow\na cat")
        place.get_by_role("button", name="More options").click()
        place.get_by_label("Pictures of the class").fill("4")
        place.get_by_label("number input for Denoising steps of pictures").fill("2")
        train.click()
        expect(state).to_have_value(re.compile(r"^Step \d+ of"))
        told["live"] = state.input_value()
        expect(place.get_by_role("img", name="Loss from step")).to_be_visible()
        place.get_by_role("button", name="Stop").click()
        expect(state).to_have_value(re.compile("Resume goes on"))
        told["stopped"] = state.input_value()

        place.get_by_role("button", name="Resume").click()
        expect(state).to_have_value(re.compile("^Finished"))
        told["finished"] = state.input_value()
        place.get_by_role("button", name="Export").click()
        expect(place.get_by_role("button", name="Make a single file")).to_be_visible()
        place.get_by_role("button", name="Make a single file").click()
        with page.expect_download() as download:
            place.locator("a[download='model.safetensors']").first.click()
        download.value.save_as(folder / "model.safetensors")
        told["nameless"] = nameless(page)
        told["over"] = shots(page, folder, "train")
    print(json.dumps(told))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), sys.argv[3:])
