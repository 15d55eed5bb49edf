"""Environment information for bug reports: versions, Keras backends, devices. No paths and no tokens."""

from __future__ import annotations

import os
import platform
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from kcv2diffusers.backend import VARIABLE, installed, taken

PACKAGES = (
    "accelerate",
    "diffusers",
    "google-crc32c",
    "h5py",
    "huggingface-hub",
    "jax",
    "jaxlib",
    "keras",
    "keras-cv",
    "ml-dtypes",
    "numkong",
    "numpy",
    "open-clip-torch",
    "peft",
    "pillow",
    "rich",
    "safetensors",
    "scikit-image",
    "tensorboard",
    "tensorflow",
    "tf-keras",
    "tokenizers",
    "torch",
    "transformers",
    "typer",
    "wandb",
)


@dataclass(frozen=True)
class Environment:
    """Versions, Keras backends and devices.

    `backends` are the installed Keras backends. `backend` is the one that a command would use, None if none
    is installed or KERAS_BACKEND is not an installed one. `devices` are those that PyTorch and JAX report.
    """

    kcv2diffusers: str
    python: str
    system: str
    cpus: int | None
    packages: dict[str, str]
    backends: list[str]
    backend: str | None
    devices: dict[str, list[str]]

    def to_dict(self) -> dict[str, Any]:
        """Return the fields for JSON."""
        return asdict(self)

    def text(self) -> str:
        """Return a few human-readable lines."""
        rows = {
            "kcv2diffusers": self.kcv2diffusers,
            "Python": self.python,
            "system": f"{self.system}, {self.cpus} CPUs",
            "Keras backends": ", ".join(self.backends) or "none installed",
            "taken": self.backend or "none",
            **{f"devices of {name}": ", ".join(found) for name, found in self.devices.items()},
            **self.packages,
        }
        width = max(map(len, rows))
        return "\n".join(f"{name:<{width}}  {value}" for name, value in rows.items())


def environment() -> Environment:
    """Return the environment of this process.

    Of the packages, only PyTorch and JAX are imported, because only they can list the devices.
    """
    backends = installed()
    named = os.environ.get(VARIABLE)
    backend = (named if named in backends else None) if named else taken(backends)
    return Environment(
        kcv2diffusers=own_version(),
        python=f"{platform.python_version()} ({platform.python_implementation()})",
        system=platform.platform(),
        cpus=os.cpu_count(),
        packages=versions(PACKAGES),
        backends=backends,
        backend=backend,
        devices={name: _devices(ask) for name, ask in _ASK.items() if name in backends},
    )


def own_version() -> str:
    """Return the installed version of this package."""
    return version("kcv2diffusers")


def versions(packages: Iterable[str]) -> dict[str, str]:
    """Return the versions of `packages`, without those that are not installed."""
    found = {}
    for package in packages:
        with suppress(PackageNotFoundError):
            found[package] = version(package)
    return found


def _of_torch() -> list[str]:
    import torch

    names = [f"cuda: {torch.cuda.get_device_name(at)}" for at in range(torch.cuda.device_count())]
    return [*names, *(["mps"] if torch.backends.mps.is_available() else []), "cpu"]


def _of_jax() -> list[str]:
    import jax

    return [f"{device.platform}: {device.device_kind}" for device in jax.devices()]


_ASK: dict[str, Callable[[], list[str]]] = {"torch": _of_torch, "jax": _of_jax}


def _devices(ask: Callable[[], list[str]]) -> list[str]:
    try:
        return ask()
    except Exception as error:  # a broken installation may raise anything, and the text may contain paths
        return [f"cannot be asked ({type(error).__name__})"]
