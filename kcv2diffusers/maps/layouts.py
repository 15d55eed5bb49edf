"""Layouts: how the variables of one kind of Keras layer are stored in diffusers, as invertible data.

A layout either keeps the bytes of a variable or, for a kernel, reverses three axes,
(spatial, in, out) <-> (out, in, spatial), which is its own inverse. A Dense kernel is the case of
one spatial position; HWIO <-> OIHW is the case of H*W positions. In a kernel with an axis of heads, that axis
and the next one together are the inputs or the outputs.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, slots=True)
class Variable:
    """One variable of a Keras layer and the tensor it becomes.

    `name` is the variable's name in Keras, `suffix` the last step of the tensor's name in diffusers. `keras`
    and `diffusers` are the shapes on the two sides, in terms of the layout's sizes.
    """

    name: str
    suffix: str
    keras: tuple[str, ...]
    diffusers: tuple[str, ...]

    @property
    def reverses(self) -> bool:
        """Whether the conversion reverses the axes; otherwise it keeps the bytes."""
        return self.name == "kernel"


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
    "heads_out": _layout(
        "einsum_dense",
        "in heads head",
        ("kernel", "weight", "in heads head", "heads*head in"),
        ("bias", "bias", "heads head", "heads*head"),
    ),
    "heads_in": _layout(
        "einsum_dense", "heads head out", ("kernel", "weight", "heads head out", "out heads*head"), _BIAS
    ),
    "scale": _layout("rms_normalization", "width", ("scale", "weight", "width", "width")),
    "position_grid": _layout(
        "position_embedding", "side width", ("embeddings", "", "side*side width", "1 side*side width")
    ),
}


def core(diffusers_shape: Sequence[int]) -> tuple[int, int, int]:
    """The shape (spatial, in, out) of a kernel whose shape in diffusers is (out, in, ...)."""
    return math.prod(diffusers_shape[2:]), diffusers_shape[1], diffusers_shape[0]


def reverse(array: np.ndarray, shape: tuple[int, int, int], target: tuple[int, ...]) -> np.ndarray:
    """Reshape `array` to the three axes `shape` and reverse them; returns a contiguous array, shape `target`.

    It is the reference implementation of what `stream` does block by block.
    """
    return np.ascontiguousarray(array.reshape(shape).transpose(2, 1, 0)).reshape(target)
