"""What verification needs to know of each part: one module per part, which the weight maps name as `adapter`.

Each module has `inputs` (drawn by NumPy), `forward` (through the torch model of its component) and `kinds`
(the numerics in which it is measured). For our models and KerasCV's it has `build`, `keras_inputs` and
`kerascv_model`, for those of KerasHub `keras_hub`, and `OUTPUTS` if a layer has several outputs. Frameworks
are imported inside functions, because the two sides run in separate processes.
"""

from __future__ import annotations

from importlib import import_module
from importlib.util import find_spec
from typing import Any, Protocol, cast

import numpy as np

from kcv2diffusers.diffusion import Array
from kcv2diffusers.maps.parts import parts
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

    def keras_hub(self, model: Any, part: Any, given: Inputs) -> Any:
        """One forward pass of KerasHub's model of the part, as in its sampler; `model` is the whole model."""

    def forward(self, model: Any, given: Inputs) -> Any:
        """One forward pass of the torch model, as in diffusers' pipeline; returns a torch tensor."""

    def kinds(self, side: Side, request: Request) -> list[str]:
        """The numerics to measure: "stock", "epsilon", "gelu", "gelu, epsilon"; all of KerasCV's last."""


def outputs_of(part: str, layer: str) -> tuple[int, ...]:
    """For each output of a Keras layer of the class `layer`, its place in what diffusers' module returns."""
    found: tuple[int, ...] = getattr(known(part), "OUTPUTS", {}).get(layer, (0,))
    return found


def adapter(part: str) -> Adapter | None:
    """The adapter of a part. None means that only the part's weights can be compared."""
    stem = parts()[part].adapter
    name = f"{__name__}.{stem}"
    if not stem.isidentifier() or find_spec(name) is None:
        return None
    return cast(Adapter, import_module(name))


def known(part: str) -> Adapter:
    """The adapter of a part that is known to have one."""
    found = adapter(part)
    assert found is not None
    return found
