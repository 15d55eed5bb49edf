"""The records in the folder of a run.

`config.toml` repeats the whole run from its start. `legs.json` lists each start and resume of the run.
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


def keep_record(config: Config, start: int, processes: int = 1) -> None:
    """Record in the run's folder that the run starts or resumes at step `start` with these options.

    `config.toml` keeps the options that the run began with, except the number of steps, which is updated. An
    entry of `legs.json` has `start`, `date`, `backend`, `processes` (their number), `versions`, and in
    `changed` the options that differ from those in `config.toml`.
    """
    out = Path(config.out)
    given = replace(config, resume=False)
    first = (_begun(out / CONFIG_FILE) if start else None) or given
    had = asdict(first)
    leg = {
        "start": start,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "backend": config.backend,
        "processes": processes,
        "changed": {name: value for name, value in asdict(given).items() if value != had[name]},
        "versions": {"python": platform.python_version(), **versions(_PACKAGES)},
    }
    legs = [*(_legs(out / LEGS_FILE) if start else []), leg]
    _write(out / CONFIG_FILE, replace(first, steps=config.steps).toml())
    _write(out / LEGS_FILE, json.dumps(legs, indent=2) + "\n")


def _begun(path: Path) -> Config | None:
    """The options in a `config.toml`; None if there is no readable one."""
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
