"""What a run leaves written of itself: `config.toml`, which repeats the whole of it from its start, and
`legs.json`, a list of how often it was started and taken up again.
"""

from __future__ import annotations

import json
import platform
from contextlib import suppress
from dataclasses import asdict, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from kcv2diffusers.dreambooth.config import Config, read_options
from kcv2diffusers.environment import versions
from kcv2diffusers.errors import Error
from kcv2diffusers.system.output import whole_file

CONFIG_FILE = "config.toml"
LEGS_FILE = "legs.json"
_PACKAGES = ("kcv2diffusers", "keras", "torch", "jax", "tensorflow", "numpy", "pillow")


def keep_record(config: Config, start: int) -> None:
    """Record in the folder of a run that it begins, or goes on, at step `start` with these options.

    `config.toml` keeps the options that the run began with, but for the number of steps, which is the newest.
    An entry of `legs.json` has `start`, `date`, `backend`, `versions`, and as `changed` the options that are
    not as `config.toml` had them.
    """
    out = Path(config.out)
    given = replace(config, resume=False)
    first = (_begun(out / CONFIG_FILE) if start else None) or given
    had = asdict(first)
    leg = {
        "start": start,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "backend": config.backend,
        "changed": {name: value for name, value in asdict(given).items() if value != had[name]},
        "versions": {"python": platform.python_version(), **versions(_PACKAGES)},
    }
    legs = [*(_legs(out / LEGS_FILE) if start else []), leg]
    _write(out / CONFIG_FILE, replace(first, steps=config.steps).toml())
    _write(out / LEGS_FILE, json.dumps(legs, indent=2) + "\n")


def _begun(path: Path) -> Config | None:
    """The options in a `config.toml`, None where there is none that can be read."""
    with suppress(Error):
        return replace(Config(**read_options(path)), resume=False)
    return None


def _legs(path: Path) -> list[Any]:
    with suppress(OSError, ValueError, RecursionError):
        legs = json.loads(path.read_bytes())
        return legs if isinstance(legs, list) else []
    return []


def _write(path: Path, text: str) -> None:
    with whole_file(path) as part:
        part.write_text(text, encoding="utf-8")
