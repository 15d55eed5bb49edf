"""Keras' backend: the one that is asked for, else the best one that is installed."""

from __future__ import annotations

import difflib
import os
import sys
from collections.abc import Callable
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path

from kcv2diffusers.errors import Error
from kcv2diffusers.json_text import parse_object

VARIABLE = "KERAS_BACKEND"
BACKENDS = ("torch", "jax", "tensorflow")
"""Best first, by docs/benchmarks.md: PyTorch trains fastest on a CPU and compiles nothing."""
_WRITTEN = "tensorflow"
"""What Keras writes into its config file where nobody chose."""


def choose_backend(say: Callable[[str], None] = lambda line: None, asked: str = "auto") -> None:
    """Set KERAS_BACKEND, before Keras is imported, to a backend that is installed.

    The one that is `asked` for is taken, then one that the user has set, then one in Keras' own config file,
    then the first of `BACKENDS`; `say` is given a line where nobody has set one, or somebody another. Raises
    Error if none is there, or not the one that is set.
    """
    if "keras" in sys.modules or not _installed("keras"):
        return
    found = installed()
    name = os.environ.get(VARIABLE)
    if asked != "auto":
        _check(asked, found, "--backend ")
        os.environ[VARIABLE] = asked
        if name and name != asked:
            say(f"Keras runs on {asked}, as --backend or the --config file says, not on {VARIABLE}'s {name}.")
    elif name:
        _check(name, found)
    elif not (name := taken(found)):
        raise Error(f"No backend of Keras is installed.\nInstall one: {', '.join(BACKENDS)}.")
    else:
        os.environ[VARIABLE] = name
        say(f"Keras runs on {name}; {VARIABLE} sets another ({', '.join(found)} installed).")


def installed() -> list[str]:
    """The backends that are installed, best first."""
    return [name for name in BACKENDS if _installed(name)]


def taken(found: list[str]) -> str | None:
    """Which of the installed ones is taken where the environment names none."""
    configured = _configured()
    if configured in found and configured != _WRITTEN:
        return configured
    return found[0] if found else None


def _check(name: str, found: list[str], setting: str = f"{VARIABLE}=") -> None:
    if name in found:
        return
    if name in BACKENDS:
        others = f", or set {setting.strip(' =')} to {' or '.join(found)}" if found else ""
        raise Error(f"{setting}{name}: {name} is not installed.\nInstall it{others}.")
    near = difflib.get_close_matches(name.lower(), BACKENDS, 1, 0.5)
    meant = f" Did you mean {near[0]}?" if near else ""
    raise Error(f"{setting}{name}: not a Keras backend.\nSet one of {', '.join(BACKENDS)}.{meant}")


def _configured() -> str | None:
    """What Keras' config file names."""
    home = os.environ.get("KERAS_HOME") or "~/.keras"
    with suppress(OSError, RuntimeError):
        name = (parse_object((Path(home).expanduser() / "keras.json").read_bytes()) or {}).get("backend")
        return name if isinstance(name, str) else None
    return None


def _installed(package: str) -> bool:
    with suppress(ValueError, ImportError):  # a half-imported module without a spec
        return find_spec(package) is not None
    return False
