"""Convert arrays to torch tensors and back."""

from __future__ import annotations

from typing import Any

import numpy as np

from kcv2diffusers.diffusion import Array


def first(values: Array) -> Any:
    """A torch tensor of an array; channels-first if the array is an image or feature map (4 axes)."""
    import torch

    return torch.from_numpy(np.ascontiguousarray(np.moveaxis(values, -1, 1) if values.ndim == 4 else values))


def last(values: Any) -> Array:
    """A float32 array of a torch tensor; channels-last if the tensor is an image or feature map (4 axes)."""
    array: Array = values.float().numpy()
    return np.moveaxis(array, 1, -1) if array.ndim == 4 else array
