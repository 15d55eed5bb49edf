"""The pictures of a run, and their measures: `python -m kcv2diffusers.study.draw`.

The order comes as a line of JSON on the standard input. The process ends when that closes. Each picture is
written as soon as it is drawn.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from kcv2diffusers.backend import choose_backend
from kcv2diffusers.diffusion import Array
from kcv2diffusers.errors import Error, MissingExtra
from kcv2diffusers.study.measures import measure_cell, open_measures
from kcv2diffusers.study.one import MEASURES, PIPELINE, Order, read_measures, run_folder
from kcv2diffusers.study.schedulers import KERASCV, SCHEDULERS
from kcv2diffusers.system.children import end_with_parent, read_order
from kcv2diffusers.system.garbage import collect_seldom
from kcv2diffusers.system.output import whole_file

Artist = Callable[[Mapping[str, Any], Sequence[str], Sequence[int]], Array]
"""Draws a picture of each prompt from the seed beside it, with a setting: (n, height, width, 3) uint8.

The noise of a picture depends on its seed alone, not on what is drawn beside it.
"""


def keras_artist(pipeline: Path) -> Artist:
    """Drawing in Keras, as `generate` does."""
    from kcv2diffusers.models.base import load_base
    from kcv2diffusers.models.sampler import initial_noise

    base = load_base(pipeline)
    sampler, size = base.sampler(), base.image_size

    def draw(setting: Mapping[str, Any], prompts: Sequence[str], seeds: Sequence[int]) -> Array:
        latents = sampler.sample(
            prompts,
            np.concatenate([initial_noise(1, size, size, seed) for seed in seeds]),
            negative_prompt=setting["negative_prompt"],
            steps=setting["steps"],
            guidance_scale=setting["guidance_scale"],
        )
        return sampler.decode(latents)

    return draw


def diffusers_artist(pipeline: Path) -> Artist:
    """Drawing with the schedulers of diffusers, on a GPU in half precision if there is one."""
    from kcv2diffusers.verification.stock_pipeline import load

    pipe = load(pipeline)
    import diffusers
    import torch

    if torch.cuda.is_available():
        pipe.to("cuda", torch.float16)
    config = dict(pipe.scheduler.config)

    def draw(setting: Mapping[str, Any], prompts: Sequence[str], seeds: Sequence[int]) -> Array:
        name, changed = SCHEDULERS[setting["scheduler"]]
        pipe.scheduler = getattr(diffusers, name).from_config(config, **changed)
        images = pipe(
            list(prompts),
            negative_prompt=[setting["negative_prompt"]] * len(prompts),
            num_inference_steps=setting["steps"],
            guidance_scale=setting["guidance_scale"],
            generator=[torch.Generator("cpu").manual_seed(seed) for seed in seeds],
            output_type="np",
        ).images
        return np.asarray((np.nan_to_num(images) * 255).round().astype("uint8"))

    return draw


def draw_missing(order: Order, names: Sequence[str]) -> None:
    """Draw the pictures `names`, those with the same setting together."""
    place = run_folder(order.folder, order.run)
    if not (place / PIPELINE).is_dir():
        raise Error(f"{place / PIPELINE} is gone, and pictures are missing.\nRemove {place} to train again.")
    (place / "pictures").mkdir(exist_ok=True)
    artists: dict[bool, Artist] = {}
    for setting, group in _groups(order, names):
        own = setting["scheduler"] == KERASCV
        if own not in artists:
            artists.clear()  # one model at a time in memory
            artists[own] = (keras_artist if own else diffusers_artist)(place / PIPELINE)
        for first in range(0, len(group), order.batch):
            some = group[first : first + order.batch]
            told = [order.pictures[name] for name in some]
            images = artists[own](setting, [p["prompt"] for p in told], [p["seed"] for p in told])
            for name, image in zip(some, images, strict=True):
                with whole_file(place / "pictures" / f"{name}.png") as part:
                    Image.fromarray(image).save(part, format="png")


def _groups(order: Order, names: Sequence[str]) -> Iterator[tuple[dict[str, Any], list[str]]]:
    """Pictures by setting, those of Keras first."""
    groups: dict[str, list[str]] = {}
    for name in names:
        setting = {k: v for k, v in order.pictures[name].items() if k not in ("prompt", "seed")}
        groups.setdefault(json.dumps(setting), []).append(name)
    for key in sorted(groups, key=lambda key: json.loads(key)["scheduler"] != KERASCV):
        yield json.loads(key), groups[key]


def measure_missing(order: Order, cells: Sequence[str]) -> None:
    """Measure the cells `cells`."""
    place = run_folder(order.folder, order.run)
    models = open_measures(order.measure, order.options["instance_images"])
    found = read_measures(order.folder, order.run)
    for id in cells:
        cell = order.cells[id]
        images = []
        for told in cell["pictures"]:
            with Image.open(place / "pictures" / f"{told['name']}.png") as image:
                images.append(np.asarray(image.convert("RGB")))
        values = measure_cell(models, cell["pictures"], images)
        found[id] = {"key": cell["key"], "values": values, "models": models.names}
    with whole_file(place / MEASURES) as part:
        part.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


def main() -> None:
    """Read an order, draw and measure."""
    line = read_order()
    if not line:
        return
    end_with_parent()
    collect_seldom()
    told = json.loads(line)
    order, left = Order(**told["order"]), told["left"]
    try:
        choose_backend(asked=order.options.get("backend", "auto"))
        draw_missing(order, left["pictures"])
        measure_missing(order, left["cells"])
    except ModuleNotFoundError as error:
        sys.exit(f"kcv2diffusers: {MissingExtra(str(error.name), 'verify')}")
    except Error as error:
        sys.exit(f"kcv2diffusers: {error}")


if __name__ == "__main__":
    main()
