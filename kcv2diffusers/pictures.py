"""Image grids, line charts, and PSNR between two sets of images."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from kcv2diffusers.diffusion import Array

__all__ = ["chart", "grid", "psnr"]

_GAP = 4  # pixels between cells
_FONT = 11


def grid(images: Array, columns: int, captions: Sequence[str] = (), scale: int = 1) -> Image.Image:
    """Return a grid of `images` (n, height, width, 3) uint8, filled row by row, each enlarged `scale` times.

    `captions` are drawn below the images, wrapped to the image width.
    """
    height, width = images.shape[1] * scale, images.shape[2] * scale
    font = ImageFont.load_default(_FONT)
    letters = max(1, int(width / (0.55 * _FONT)))
    wrapped = ["\n".join(textwrap.wrap(caption, letters)) for caption in captions]
    ruler = ImageDraw.Draw(Image.new("RGB", (1, 1)))
    boxes = [ruler.multiline_textbbox((0, 0), text, font, "ma") for text in wrapped]
    below = math.ceil(max((bottom for _, _, _, bottom in boxes), default=0))
    rows = -(-len(images) // columns)
    sheet = Image.new("RGB", (columns * (width + _GAP), rows * (height + below + _GAP)), "white")
    draw = ImageDraw.Draw(sheet)
    for number, image in enumerate(images):
        x = number % columns * (width + _GAP) + _GAP // 2
        y = number // columns * (height + below + _GAP) + _GAP // 2
        sheet.paste(Image.fromarray(image).resize((width, height), Image.Resampling.BICUBIC), (x, y))
        if number < len(wrapped):
            draw.multiline_text(
                (x + width / 2, y + height), wrapped[number], "black", font, "ma", align="center"
            )
    return sheet


def psnr(images: Array, others: Array) -> Array:
    """Return the peak signal-to-noise ratio in dB of each pair of (n, height, width, 3) uint8 images: (n,).

    It is infinite for equal images.
    """
    error = ((images.astype("float64") - others.astype("float64")) ** 2).mean((1, 2, 3))
    with np.errstate(divide="ignore"):
        return np.asarray(10 * np.log10(255**2 / error))


def chart(values: Sequence[float], name: str, size: tuple[int, int] = (640, 320)) -> Image.Image:
    """Return a line chart of `values` with a moving average drawn over it.

    The x axis runs from 1 to the number of values, the y axis from their minimum to their maximum. `size` is
    (width, height) in pixels.
    """
    width, height = size
    left, top, right, bottom = 56, 12, width - 12, height - 28
    sheet = Image.new("RGB", size, "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(_FONT)
    draw.line([(left, top), (left, bottom), (right, bottom)], "black")
    if not values:
        return sheet
    low, high = min(values), max(values)
    span = high - low or 1.0
    window = max(1, len(values) // 20)
    smooth = [
        sum(values[max(0, i - window) : i + 1]) / (i + 1 - max(0, i - window)) for i in range(len(values))
    ]
    for line, colour, thick in ((values, (170, 200, 235), 1), (smooth, (20, 90, 180), 2)):
        points = [
            (left + (right - left) * i / max(1, len(values) - 1), bottom - (bottom - top) * (v - low) / span)
            for i, v in enumerate(line)
        ]
        draw.line(points if len(points) > 1 else points * 2, colour, thick)
    draw.text((left - 4, top), f"{high:.3g}", "black", font, "rt")
    draw.text((left - 4, bottom), f"{low:.3g}", "black", font, "rs")
    draw.text((left, bottom + 4), "1", "black", font, "lt")
    draw.text((right, bottom + 4), f"{len(values)} steps", "black", font, "rt")
    draw.text(((left + right) / 2, bottom + 4), name, "black", font, "mt")
    return sheet
