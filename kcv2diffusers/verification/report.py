"""The report: one self-contained HTML page, and the same figures as JSON."""

from __future__ import annotations

import base64
import json
import math
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, PackageLoader, StrictUndefined, select_autoescape
from markupsafe import escape
from PIL import Image

from kcv2diffusers.diffusion import Array
from kcv2diffusers.hub.address import cached, shown
from kcv2diffusers.maps.parts import label, parts
from kcv2diffusers.system.output import whole_file
from kcv2diffusers.verification.chart import log_chart
from kcv2diffusers.verification.exchange import Arrays
from kcv2diffusers.verification.images import SIDES, Images
from kcv2diffusers.verification.modules import KINDS
from kcv2diffusers.verification.result import Verified

_SHOWN = 12  # runs whose images are shown, least similar first
# Colours of the heat map from no difference to the largest: black, violet, orange, yellow.
_HEAT = np.array([[0, 0, 4], [107, 24, 110], [237, 105, 37], [252, 255, 164]], dtype="float64")


def write(folder: Path, arrays: Path | None, result: Verified) -> None:
    """Write report.html, and report.json with full paths, into `folder`.

    Images are read from `arrays`, the folder where both sides wrote them.
    """
    environment = Environment(
        loader=PackageLoader("kcv2diffusers.verification", "."),
        autoescape=select_autoescape(default=True),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"short": _short, "decibels": _decibels, "gigabytes": _gigabytes}
    drawn = result.images if result.images is not None and result.images.runs else None
    page = environment.get_template("report.html").render(
        result=result,
        failures=result.failures(),
        label=label,
        kinds=KINDS,
        tolerances=lambda part: parts()[part].tolerances["block"],
        command=result.request.command(),
        pictures=_pictures(arrays, drawn) if arrays is not None and drawn else [],
        chart=_chart(drawn) if drawn else None,
    )
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in (
        ("report.html", _without_places(page, result)),
        ("report.json", json.dumps(result.to_dict(), indent=2) + "\n"),
    ):
        with whole_file(folder / name) as part:
            part.write_text(text, encoding="utf-8")


def _without_places(page: str, result: Verified) -> str:
    """The page with each file path shortened to its last two components.

    The page is meant to be shared, and full paths reveal the machine and its user. Files from the Hub are
    shown by their address.
    """
    request = result.request
    given = [request.pipeline, *request.sources, *request.named.values(), *request.base]
    paths = {*map(Path, given), *map(Path, result.sources.values()), *(entry.path for entry in result.inputs)}
    for path in sorted(paths, key=lambda path: -len(str(path))):
        if path.is_absolute():
            known = cached(path)
            page = page.replace(str(escape(path)), str(escape(shown(path) if known else _last_names(path))))
    return page


def _last_names(path: Path) -> str:
    return "/".join(("…", *path.parts[-2:]))


def _pictures(folder: Path, images: Images) -> list[dict[str, Any]]:
    """The images of each run as data URIs: Keras, diffusers and their difference.

    At most `_SHOWN` runs are shown, least similar first.
    """
    numbers = sorted(range(len(images.runs)), key=lambda number: images.runs[number].stock.psnr)[:_SHOWN]
    shown = []
    for number in numbers:
        keras = Arrays(folder / "keras").load("picture", number)[0]
        stock = Arrays(folder / "diffusers").load("picture", "stock", number)[0]
        shown.append(
            {
                "run": images.runs[number],
                "keras": _data_uri(keras),
                "stock": _data_uri(stock),
                "difference": _data_uri(_heat(keras, stock)),
            }
        )
    return shown


def _heat(one: Array, other: Array) -> Array:
    """A heat map of the largest channel difference per pixel, scaled to the largest in the image."""
    apart = np.abs(one.astype("float64") - other).max(-1)
    scaled = apart / max(1.0, apart.max()) * (len(_HEAT) - 1)
    channels = [np.interp(scaled, np.arange(len(_HEAT)), _HEAT[:, channel]) for channel in range(3)]
    return np.stack(channels, -1).astype("uint8")


def _data_uri(picture: Array) -> str:
    buffer = BytesIO()
    Image.fromarray(picture).save(buffer, format="png", optimize=True)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def _chart(images: Images) -> Any:
    """A chart of the largest error over all runs at each step, by side."""
    lines = {}
    for side in SIDES:
        runs = [getattr(run, side).steps for run in images.runs]
        lines[side] = [max(errors) for errors in zip(*runs, strict=True)]
    return log_chart(lines)


def _short(value: float) -> str:
    return f"{value:.1e}" if math.isfinite(value) else "infinite"


def _decibels(value: float) -> str:
    return f"{value:.1f} dB" if math.isfinite(value) else "identical"


def _gigabytes(count: int) -> str:
    return f"{count / 1e9:.2f} GB" if count >= 1e8 else f"{count / 1e6:.2f} MB"
