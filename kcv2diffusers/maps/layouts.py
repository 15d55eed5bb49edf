"""How one Keras layer's variables are laid out in diffusers: named, invertible, data.

Every layout is one of two things: the bytes as they are, or the reversal of three axes,
(spatial, in, out) <-> (out, in, spatial), which is its own inverse. A Dense kernel is the case of
one spatial position; HWIO <-> OIHW is the case of H*W of them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, slots=True)
class Variable:
    """One variable of a Keras layer and the tensor it becomes.

    `keras` and `diffusers` are the shapes on the two sides, in terms of the layout's sizes.
    """

    name: str
    suffix: str
    keras: tuple[str, ...]
    diffusers: tuple[str, ...]

    @property
    def reverses(self) -> bool:
        """Whether the axes are reversed on the way (else the bytes stay as they are)."""
        return self.keras != self.diffusers


@dataclass(frozen=True, slots=True)
class Layout:
    """The variables of a kind of layer, in Keras' order; `layer` is the Keras class in snake case."""

    layer: str
    sizes: tuple[str, ...]
    variables: tuple[Variable, ...]


def _layout(layer: str, sizes: str, *variables: tuple[str, str, str, str]) -> Layout:
    return Layout(
        layer,
        tuple(sizes.split()),
        tuple(Variable(n, s, tuple(k.split()), tuple(d.split())) for n, s, k, d in variables),
    )


_BIAS = ("bias", "bias", "out", "out")
_NORM = (("gamma", "weight", "width", "width"), ("beta", "bias", "width", "width"))

LAYOUTS: dict[str, Layout] = {
    "dense": _layout("dense", "in out", ("kernel", "weight", "in out", "out in"), _BIAS),
    "dense_no_bias": _layout("dense", "in out", ("kernel", "weight", "in out", "out in")),
    "conv": _layout(
        "conv2d", "size in out", ("kernel", "weight", "size size in out", "out in size size"), _BIAS
    ),
    "conv1x1_linear": _layout("conv2d", "in out", ("kernel", "weight", "1 1 in out", "out in"), _BIAS),
    "group_norm": _layout("group_normalization", "width", *_NORM),
    "layer_norm": _layout("layer_normalization", "width", *_NORM),
    "embedding": _layout("embedding", "rows width", ("embeddings", "weight", "rows width", "rows width")),
}


def core(keras_shape: tuple[int, ...]) -> tuple[int, int, int]:
    """(spatial, in, out) of a kernel's Keras shape."""
    return math.prod(keras_shape[:-2]), keras_shape[-2], keras_shape[-1]


def reverse(array: np.ndarray, shape: tuple[int, int, int], target: tuple[int, ...]) -> np.ndarray:
    """The three axes `shape` of `array` reversed, as a contiguous array of shape `target`.

    The plain statement of what `stream` does block by block.
    """
    return np.ascontiguousarray(array.reshape(shape).transpose(2, 1, 0)).reshape(target)
