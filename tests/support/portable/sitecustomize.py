"""Hides from kcv2diffusers what Windows does not have, in each Python that has this folder on PYTHONPATH.

Only modules of the package are shown less; the tests and libraries keep what they use.
"""

from __future__ import annotations

import builtins
import importlib
import mmap
import types
from typing import Any

HIDDEN = {
    "os": {"fork", "memfd_create", "posix_fallocate", "preadv", "pwrite"},
    "signal": {"SIGALRM", "SIGKILL", "SIGPROF", "SIGUSR1", "pthread_kill", "pthread_sigmask", "setitimer"},
    "mmap": {name for name in dir(mmap) if name.startswith("MADV_")},
}
MISSING = {"resource", "fcntl"}


class _Less(types.ModuleType):
    def __init__(self, name: str) -> None:
        super().__init__(name)
        self._module = importlib.import_module(name)

    def __getattr__(self, name: str) -> Any:
        if name in HIDDEN[self.__name__]:
            raise AttributeError(f"{self.__name__}.{name}: hidden, as Windows has none")
        return getattr(self._module, name)


_less = {name: _Less(name) for name in HIDDEN}
_import = builtins.__import__


def _shown(name: str, globals: Any = None, *rest: Any, **named: Any) -> Any:
    if str((globals or {}).get("__name__", "")).split(".")[0] == "kcv2diffusers":
        if name in MISSING:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
        if name in _less:
            return _less[name]
    return _import(name, globals, *rest, **named)


builtins.__import__ = _shown
