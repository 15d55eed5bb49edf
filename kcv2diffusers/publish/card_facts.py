"""Facts about a pipeline for its model card, read from the records in its folder. Nothing is guessed."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kcv2diffusers.dreambooth.config import PUBLIC, read_options
from kcv2diffusers.errors import Error
from kcv2diffusers.hub.address import SCHEME, parse
from kcv2diffusers.json_text import parse_object
from kcv2diffusers.pipeline import record
from kcv2diffusers.pipeline.configs import absent_arguments
from kcv2diffusers.pipeline_files import RUN_FILE, VERIFICATION_FILE
from kcv2diffusers.progress import Progress, silent
from kcv2diffusers.publish.check import Checked

_OLD_KERAS = (2, 12)  # the newest Keras for keras-cv before 0.5, the stack of the 2023 DreamBooth sprint


@dataclass(frozen=True)
class Facts:
    """The facts for a model card.

    `conversion` is conversion.json with hashes. `run` are the non-default options of a DreamBooth run (empty
    if there was none). `figures` are those of the verification. `pictures` are paths in the folder.
    """

    checked: Checked
    conversion: dict[str, Any]
    run: dict[str, Any]
    figures: list[tuple[str, str]]
    pictures: list[str]
    license: dict[str, str]
    base_model: str | None
    tags: Sequence[str]
    trained_with: frozenset[str]

    @property
    def checkpoints(self) -> dict[str, Any]:
        """The parts that were converted from Keras files."""
        parts: dict[str, Any] = self.conversion.get("parts", {})
        return {name: part for name, part in parts.items() if part["checkpoint"]}

    @property
    def variant(self) -> str | None:
        """The `variant` that `from_pretrained` needs if there are no weights without one, else None."""
        return self.checked.variant

    @property
    def absent(self) -> list[str]:
        """The components that `from_pretrained` needs as None."""
        return absent_arguments(self.checked.family, self.checked.parts)

    @property
    def instance_prompts(self) -> list[str]:
        """The prompts that name the subjects of a DreamBooth run."""
        subjects = self.run.get("subjects", [])
        prompts = [self.run.get("instance_prompt"), *(each.instance_prompt for each in subjects)]
        return [prompt for prompt in prompts if prompt]

    @property
    def old_stack(self) -> bool:
        """Whether a checkpoint was written by a Keras version that keras-cv before 0.5 ran on."""
        versions = [_numbers(part["keras"]) for part in self.checkpoints.values() if part["keras"]]
        return not self.run and any((2,) <= version[:2] <= _OLD_KERAS for version in versions)


def gather(
    checked: Checked,
    *,
    license: str | None = None,
    base_model: str | None = None,
    tags: Sequence[str] = (),
    trained_with: frozenset[str] = frozenset(),
    unlicensed: bool = False,
    progress: Progress = silent,
) -> Facts:
    """Return the facts about a checked pipeline.

    `progress` is called with the bytes of its sources hashed and in total. Raises Error if the license is
    unknown, because there is no default license; `unlicensed` allows that, for a card that is not published.
    """
    folder = checked.folder
    conversion = record.published(folder, progress)
    stated = {"license": license} if license else {} if unlicensed else _license(folder, conversion)
    return Facts(
        checked,
        conversion,
        _run(folder / RUN_FILE),
        figures(folder / VERIFICATION_FILE),
        [name for name in checked.files if name.endswith(".png")],
        stated,
        base_model or _base_model(conversion),
        tags,
        trained_with,
    )


def figures(path: Path) -> list[tuple[str, str]]:
    """Return the card's lines about a verification as (what, figure), [] if there is no readable one.

    The entries read are `passed`, `reason`, `weights.tensors` (part to number), `name` and `stock` (the
    error) of each of `modules`, and `stock.psnr` in dB (or "infinite") and `stock.ssim` of each of
    `images.runs`.
    """
    with suppress(OSError, ValueError, KeyError, TypeError, AttributeError):
        data = parse_object(path.read_bytes()[: 16 << 20]) or {}
        rows = [("verdict", "passed" if data["passed"] else str(data["reason"]))]
        if tensors := (data.get("weights") or {}).get("tensors"):
            rows.append(("tensors compared", str(sum(tensors.values()))))
        rows += [(f"error of {m['name']}", f"{_number(m['stock']):.1e}") for m in data.get("modules") or []]
        if runs := [run["stock"] for run in (data.get("images") or {}).get("runs") or []]:
            psnr, ssim = (min(_number(run[name]) for run in runs) for name in ("psnr", "ssim"))
            rows.append((f"pictures ({len(runs)}), the least alike", f"PSNR {psnr:.1f} dB, SSIM {ssim:.4f}"))
        return rows
    return []


def _number(value: Any) -> float:
    """Return a figure of a verification as a float. Infinity and NaN are strings, because JSON lacks them."""
    return {"infinite": math.inf, "not a number": math.nan}.get(value) or float(value)


def _license(folder: Path, conversion: Mapping[str, Any]) -> dict[str, str]:
    """Return the license that the base and the other sources state. Raises Error unless they agree on one."""
    stated = {
        origin["license"]: {k: v for k, v in origin.items() if k.startswith("license")}
        for origin in conversion.get("origins", [])
        if "license" in origin
    }
    if len(stated) == 1:
        return next(iter(stated.values()))
    what = f"its sources state {', '.join(stated)}" if stated else "none of its sources states one"
    raise Error(
        f"{folder}: the license is not known: {what}.\nGive --license ID, such as "
        "creativeml-openrail-m, which models made from Stable Diffusion 1 have to keep."
    )


def _base_model(conversion: Mapping[str, Any]) -> str | None:
    """Return the base's repository on the Hub, else the repository of the checkpoints, else None."""
    bases = [base for base in conversion.get("bases", []) if base.startswith(SCHEME)]
    origins = [o["source"] for o in conversion.get("origins", []) if o["source"].startswith(SCHEME)]
    return next((parse(source).repository for source in [*bases, *origins]), None)


def _run(path: Path) -> dict[str, Any]:
    """Return the options of a DreamBooth run that may be published, {} if there was none."""
    values = read_options(path) if path.is_file() else {}
    return {name: values[name] for name in values if name in PUBLIC}


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split(".") if part.isdecimal())
