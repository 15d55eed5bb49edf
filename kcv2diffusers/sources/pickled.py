"""Read `.ckpt` files: single files pickled by PyTorch, opened by its restricted unpickler if that is allowed.

Pickles can run code. The restricted unpickler (`weights_only=True`) creates only tensors and plain containers
and refuses everything else. It is used only if the user allows it, and only from PyTorch 2.6 on: in older
versions a crafted file could make it run code (CVE-2025-32434).
"""

from __future__ import annotations

import re
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from kcv2diffusers.dtypes import DTYPES
from kcv2diffusers.errors import Error, MissingExtra, SourceError
from kcv2diffusers.sources.tensor import Tensor

ENDINGS = (".ckpt", ".pt", ".pth", ".bin")
_SAFE = (2, 6)
_NESTED = "state_dict"  # the key under which training code stores the weights
_GET_OTHER = "Get the .safetensors file of the model."
_LENGTH = 160  # characters of PyTorch's message that are shown


def read_pickled(path: Path) -> list[Tensor]:
    """The tensors of a pickled file, memory-mapped if the file is a zip archive.

    Raises SourceError if the file holds anything but tensors and plain containers, MissingExtra without
    PyTorch, and Error for PyTorch older than 2.6.
    """
    try:
        import torch
    except ModuleNotFoundError as error:
        raise MissingExtra("torch", "diffusers") from error
    if tuple(map(int, re.findall(r"\d+", torch.__version__)[:2])) < _SAFE:
        needed = ".".join(map(str, _SAFE))
        raise Error(
            f"--allow-pickle needs PyTorch {needed} or newer, this is {torch.__version__}.\nUpdate it."
        )
    try:
        found = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except Exception as error:  # pickle, zipfile and torch raise many exception types for damaged files
        said = " ".join(str(error).split())
        problem = f"not weights that PyTorch's restricted unpickler reads ({said[:_LENGTH]})."
        raise SourceError(path, problem, _GET_OTHER) from error
    while isinstance(found, Mapping) and isinstance(found.get(_NESTED), Mapping):
        found = found[_NESTED]
    if not isinstance(found, Mapping):
        raise SourceError(path, "a pickle, but not of named tensors.", _GET_OTHER)
    return [
        _tensor(path, name, value)
        for name, value in found.items()
        if isinstance(name, str) and isinstance(value, torch.Tensor)
    ]


def _tensor(path: Path, name: str, value: Any) -> Tensor:
    kind = str(value.dtype).removeprefix("torch.")
    known = {**DTYPES, **{k: np.dtype(k) for k in ("float64", "int64", "int32")}}
    if kind not in known or value.layout != _strided():
        raise SourceError(path, f"{name}: dtype {kind} is not read here.", _GET_OTHER)
    return Tensor(name, tuple(value.shape), known[kind], path, None, _loader(value, known[kind]))


def _strided() -> Any:
    import torch

    return torch.strided


def _loader(value: Any, dtype: np.dtype) -> Callable[[], np.ndarray]:
    """A function that returns the values of a torch tensor as a NumPy array.

    bfloat16 is reinterpreted through int16, because NumPy has no bfloat16 of its own.
    """

    def load() -> np.ndarray:
        import torch

        if dtype == DTYPES["bfloat16"]:
            return np.asarray(value.contiguous().view(torch.int16).numpy()).view(dtype)
        return np.asarray(value.detach().numpy())

    return load
