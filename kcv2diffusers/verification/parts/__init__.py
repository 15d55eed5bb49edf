"""What verification has to know of each part: one module a part, called as the part in the weight maps.

Each has `inputs` (drawn by NumPy), `build` and `keras_inputs` (for our models), `kerascv_model`, `forward`
(through the torch model of its component) and `kinds` (the numerics in which it is measured). Frameworks are
imported within the functions: the two sides run in processes of their own.
"""

from __future__ import annotations

from importlib import import_module
from importlib.util import find_spec
from typing import Any, Protocol, cast

import numpy as np

from kcv2diffusers.diffusion import Array
from kcv2diffusers.verification.request import Request
from kcv2diffusers.verification.sides import Side

Inputs = dict[str, Array]


class Adapter(Protocol):
    """One part as the levels "modules" and "images" see it."""

    LABELS: tuple[str, ...]
    """What each of the inputs is called in the report; empty for "input 1" and so on."""
    DRAWS: bool
    """Whether drawing a picture needs the part."""
    LOOSE: str | None
    """The kind of numerics that the tolerance for stock diffusers allows for, None for none."""

    def inputs(self, side: Side, size: int, rng: np.random.Generator) -> Inputs:
        """Named arrays for forward passes, channels last; the first axis counts them. `size` is in pixels."""

    def build(self, side: Side, request: Request) -> Any:
        """Our Keras model without weights."""

    def kerascv_model(self, cls: Any, side: Side, size: int) -> Any:
        """KerasCV's model of class `cls` for pictures of `size` pixels, weights random."""

    def keras_inputs(self, side: Side, given: Inputs) -> Any:
        """The inputs of a forward pass as the Keras model takes them."""

    def forward(self, model: Any, given: Inputs) -> Any:
        """One forward pass of the torch model, as `StableDiffusionPipeline` makes it: a torch tensor."""

    def kinds(self, side: Side, request: Request) -> list[str]:
        """The numerics to measure: "stock", "epsilon", "gelu, epsilon"; all of KerasCV's last."""


def adapter(part: str) -> Adapter | None:
    """The adapter of a part; None if there is none, and only its weights can be compared."""
    name = f"{__name__}.{part}"
    if not part.isidentifier() or find_spec(name) is None:
        return None
    return cast(Adapter, import_module(name))


def known(part: str) -> Adapter:
    """The adapter of a part that has one."""
    found = adapter(part)
    assert found is not None
    return found
