"""Choice of the Keras backend: the requested one, else the best installed one."""

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
"""Best first, as measured in docs/benchmarks.md: PyTorch trains fastest on a CPU and needs no compilation."""
_WRITTEN = "tensorflow"
"""The backend that Keras writes into a new config file by default; it is not a choice of the user."""


def choose_backend(say: Callable[[str], None] = lambda line: None, asked: str = "auto") -> None:
    """Set KERAS_BACKEND to an installed backend, before Keras is imported.

    The order of precedence is: `asked` (unless "auto"), the KERAS_BACKEND of the user, the backend in Keras'
    config file, the first installed one of `BACKENDS`. `say` is called with one line if the backend was
    chosen without the user, or if `asked` overrides KERAS_BACKEND. Raises Error if no backend is installed,
    or if the requested one is not.
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
    """Return the installed backends, best first."""
    return [name for name in BACKENDS if _installed(name)]


def taken(found: list[str]) -> str | None:
    """Return the backend to use, out of `found`, if KERAS_BACKEND is unset. None if `found` is empty."""
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
    """Return the backend named in Keras' config file, None if there is none."""
    home = os.environ.get("KERAS_HOME") or "~/.keras"
    with suppress(OSError, RuntimeError):
        name = (parse_object((Path(home).expanduser() / "keras.json").read_bytes()) or {}).get("backend")
        return name if isinstance(name, str) else None
    return None


def _installed(package: str) -> bool:
    with suppress(ValueError, ImportError):  # a partially imported module has no spec
        return find_spec(package) is not None
    return False
