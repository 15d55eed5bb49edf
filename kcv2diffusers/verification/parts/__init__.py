"""What verification needs to know of each part: one module per part, named as the part in the weight maps.

Each module has `inputs` (drawn by NumPy), `build` and `keras_inputs` (for our models), `kerascv_model`,
`forward` (through the torch model of its component) and `kinds` (the numerics in which it is measured).
Frameworks are imported inside functions, because the two sides run in separate processes.
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
    """The interface of a part for the levels "modules" and "images"."""

    LABELS: tuple[str, ...]
    """Labels of the inputs in the report; empty for "input 1" and so on."""
    DRAWS: bool
    """Whether generating an image needs the part."""
    LOOSE: str | None
    """The kind of numerics that the tolerance for stock diffusers allows for; None for none."""

    def inputs(self, side: Side, size: int, rng: np.random.Generator) -> Inputs:
        """Named arrays for forward passes, channels-last; axis 0 counts the passes. `size` is in pixels."""

    def build(self, side: Side, request: Request) -> Any:
        """Our Keras model of the part, without its weights."""

    def kerascv_model(self, cls: Any, side: Side, size: int) -> Any:
        """KerasCV's model of class `cls` for images of `size` pixels, with random weights."""

    def keras_inputs(self, side: Side, given: Inputs) -> Any:
        """The inputs of a forward pass in the form that the Keras model takes."""

    def forward(self, model: Any, given: Inputs) -> Any:
        """One forward pass of the torch model, as in `StableDiffusionPipeline`; returns a torch tensor."""

    def kinds(self, side: Side, request: Request) -> list[str]:
        """The numerics to measure: "stock", "epsilon", "gelu", "gelu, epsilon"; all of KerasCV's last."""


def adapter(part: str) -> Adapter | None:
    """The adapter of a part. None means that only the part's weights can be compared."""
    name = f"{__name__}.{part}"
    if not part.isidentifier() or find_spec(name) is None:
        return None
    return cast(Adapter, import_module(name))


def known(part: str) -> Adapter:
    """The adapter of a part that is known to have one."""
    found = adapter(part)
    assert found is not None
    return found
