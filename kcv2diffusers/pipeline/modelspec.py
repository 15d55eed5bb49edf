"""Metadata of a single file, as defined by the Stability AI Model Metadata Standard (modelspec) 1.0.1.

One additional entry of our own holds the content of a `kcv2diffusers.json`: config entries that cannot be
inferred from the tensors.
"""

from __future__ import annotations

import json
import os
from collections.abc import Collection, Mapping
from contextlib import suppress
from datetime import UTC, datetime
from importlib.metadata import version
from typing import Any

from kcv2diffusers.json_text import parse_object
from kcv2diffusers.maps.parts import Family

PREFIX = "modelspec."
OWN = "kcv2diffusers"
_VERSION = "1.0.1"
_TOOL = "tool"
_PREDICTIONS = {"epsilon": "epsilon", "v_prediction": "v"}


def modelspec(
    *,
    title: str,
    family: Family,
    version: str,
    components: Collection[str],
    prediction_type: str,
    image_size: tuple[int, int],
    trigger_phrase: str | None = None,
) -> dict[str, str]:
    """Return the modelspec entries of a file with these component folders, except the hash.

    The hash is added when the tensors are written. `version` is "sd1", "sd2" or, for a VAE alone, "any".
    `image_size` is (width, height) in pixels. The date is the current time, or that of the environment
    variable SOURCE_DATE_EPOCH, which makes files reproducible.
    """
    known = family.modelspec.get(version) or next(iter(family.modelspec.values()))
    part = f"/{next(iter(components))}" if len(components) == 1 else ""
    entries = {
        "sai_model_spec": _VERSION,
        "architecture": known["architecture"][prediction_type] + part,
        "implementation": known["implementation"],
        "title": title,
        "date": _now().isoformat(timespec="seconds").replace("+00:00", "Z"),
    }
    if "unet" in components:
        entries["resolution"] = "{}x{}".format(*image_size)
        entries["prediction_type"] = _PREDICTIONS[prediction_type]
    if trigger_phrase:
        entries["trigger_phrase"] = trigger_phrase
    # File names may contain bytes that are not valid Unicode, which JSON in UTF-8 cannot represent.
    return {PREFIX + name: value.encode("utf-8", "replace").decode() for name, value in entries.items()}


def _now() -> datetime:
    with suppress(KeyError, ValueError, OverflowError, OSError):
        return datetime.fromtimestamp(int(os.environ["SOURCE_DATE_EPOCH"]), UTC)
    return datetime.now(UTC)


def own_entry(stated: Mapping[str, Any]) -> dict[str, str]:
    """Return our own entry: the tool, and the sections of a kcv2diffusers.json."""
    data = {_TOOL: f"kcv2diffusers {version('kcv2diffusers')}", **stated}
    return {OWN: json.dumps(data, sort_keys=True)}


def own_sections(metadata: Mapping[str, str]) -> dict[str, Any] | None:
    """Return the sections of our own entry: {} if there is no entry, None if it is not a JSON object."""
    if OWN not in metadata:
        return {}
    data = parse_object(metadata[OWN].encode("utf-8", "surrogatepass"))
    return data and {name: entry for name, entry in data.items() if name != _TOOL}


def prediction_in(metadata: Mapping[str, str]) -> str | None:
    """Return the prediction type in modelspec: "epsilon", "v_prediction", or None if it is not stated."""
    stated = metadata.get(f"{PREFIX}prediction_type", "")
    if stated in ("v", "v_prediction", "v-prediction"):
        return "v_prediction"
    if stated == "epsilon":
        return "epsilon"
    return "v_prediction" if metadata.get(f"{PREFIX}architecture") == "stable-diffusion-v2-768-v" else None
