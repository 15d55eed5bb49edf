"""Merging of LoRAs into a model's weights during the conversion, one tensor at a time.

A tensor that a LoRA changes is replaced by one whose `load` computes the merged values. The later steps of
the conversion are therefore the same with and without a LoRA.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np

from kcv2diffusers.dtypes import DTYPES
from kcv2diffusers.errors import Error, SourceError
from kcv2diffusers.maps.layouts import core
from kcv2diffusers.maps.tables import Slot
from kcv2diffusers.sources.gather import SourcePath
from kcv2diffusers.sources.lora import Lora, Update, listed, read_lora
from kcv2diffusers.sources.recognise import Match
from kcv2diffusers.sources.tensor import Tensor, values_of
from kcv2diffusers.targets.transfer import check_checksum

_STRENGTH = re.compile(r"(.+):([+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?)", re.S)
_BLOCK = 4 << 20  # bytes of an update computed at a time


@dataclass(frozen=True)
class Merge:
    """A LoRA and the strength at which it is merged."""

    lora: Lora
    strength: float

    def text(self) -> str:
        """Return one human-readable line."""
        return f"LoRA {self.lora.path.name}: {len(self.lora.updates)} modules, strength {self.strength:g}"


def read_merges(given: Iterable[SourcePath]) -> list[Merge]:
    """Read LoRA files, each given as a path, an hf:// address, or either with :STRENGTH (default: 1).

    Raises Error for a file that cannot be read.
    """
    return [Merge(read_lora(source), strength) for source, strength in map(parse_strength, given)]


def parse_strength(given: SourcePath) -> tuple[SourcePath, float]:
    """Split SOURCE:STRENGTH into the source and the strength, which is 1 by default.

    Raises Error if the strength does not fit into float32.
    """
    if not isinstance(given, str):
        return given, 1.0
    found = None if Path(given).exists() else _STRENGTH.fullmatch(given)
    if found is None:
        return given, 1.0
    strength = float(found[2])
    if abs(strength) > float(np.finfo(np.float32).max):
        raise Error(f"--lora {given}: the strength is too large.\nGive a number such as 0.8.")
    return found[1], strength


def check_merges(merges: Sequence[Merge], matches: Iterable[Match]) -> None:
    """Raise SourceError if a LoRA changes modules that none of the models has, or that have another shape.

    The message lists these modules.
    """
    weights: dict[tuple[str, str], tuple[int, ...]] = {}
    for match in matches:
        for slot in match.found:
            if place := _place(match, slot):
                weights[place] = tuple(size.value(match.dims) or 0 for size in slot.diffusers_shape)
    for merge in merges:
        path, updates = merge.lora.path, merge.lora.updates
        if absent := [".".join(place) for place in updates if place not in weights]:
            problem = f"changes {len(absent)} modules that the model does not have: {listed(absent)}."
            raise SourceError(path, problem, "Give a LoRA that was trained on such a model.")
        wrong = [
            f"{'.'.join(place)} {list(update.shape)}, expected {list(weights[place])}"
            for place, update in updates.items()
            if not _fits(update, weights[place])
        ]
        if wrong:
            raise SourceError(
                path,
                f"{len(wrong)} shapes are not those of the model: {listed(wrong)}.",
                "Give a LoRA that was trained on a model of the same version.",
            )


def merged(match: Match, merges: Sequence[Merge]) -> Match:
    """Return the match with the LoRAs merged into its weights. The changed weights are float32.

    W + strength * alpha / rank * up @ down is computed in float32 when a tensor is loaded.
    """
    found: dict[Slot, Tensor] = {}
    for slot, tensor in match.found.items():
        place = _place(match, slot)
        changes = [(m.lora.updates[place], m.strength) for m in merges if place and place in m.lora.updates]
        if changes:
            axes = keras_axes(match, slot)
            found[slot] = replace(
                tensor,
                dtype=DTYPES["float32"],
                offset=None,
                load=partial(_load, tensor, axes, changes),
                crc32c=None,
                pitch=None,
            )
        else:
            found[slot] = tensor
    return replace(match, found=found)


def _place(match: Match, slot: Slot) -> tuple[str, str] | None:
    """Return the component and the module whose kernel a slot is, None if it is not a kernel."""
    if slot.variable.name != "kernel":
        return None
    return match.spec.table.name, slot.target.removesuffix(".weight")


def _fits(update: Update, shape: tuple[int, ...]) -> bool:
    """Return whether an update has the shape of a weight, ignoring trailing axes of size 1."""
    longer = (*update.shape, *[1] * (len(shape) - len(update.shape)))
    return longer == shape


def float_values(tensor: Tensor) -> np.ndarray:
    """Return all values of a tensor as a new float32 array. Raises SourceError if the checksum is wrong."""
    stored = values_of(tensor)
    if tensor.crc32c is not None:
        check_checksum(np.ascontiguousarray(stored).reshape(-1), tensor)
    # What was loaded may be held elsewhere; what was read from a file here is not.
    return stored.astype(np.float32, order="C", copy=tensor.load is not None)


def keras_axes(match: Match, slot: Slot) -> tuple[int, int, int] | None:
    """Return the axes (positions, inputs, outputs) of a kernel in Keras' layout; None for diffusers'."""
    turned = match.keras and slot.variable.reverses
    return core(slot.part_shape(match.dims, keras=False)) if turned else None


def kernel_view(values: np.ndarray, axes: tuple[int, int, int] | None) -> np.ndarray:
    """Return a view of a kernel as (outputs, inputs, positions). `axes` are as in `keras_axes`."""
    if axes:
        return values.reshape(axes).transpose(2, 1, 0)
    return values.reshape(*values.shape[:2], -1)


def _load(
    tensor: Tensor, axes: tuple[int, int, int] | None, changes: Sequence[tuple[Update, float]]
) -> np.ndarray:
    """Return the weight with its updates, float32, in the layout of `tensor` (Keras' if it has `axes`)."""
    values = float_values(tensor)
    weight = kernel_view(values, axes)
    outputs, inputs, positions = weight.shape
    step = max(1, _BLOCK // (4 * inputs * positions))
    for update, strength in changes:
        down, up = update.values()
        down = down.reshape(update.rank, inputs * positions)
        scale = np.float32(strength * update.alpha / update.rank)
        for row in range(0, outputs, step):
            product = up[row : row + step] @ down
            product *= scale
            weight[row : row + step] += product.reshape(-1, inputs, positions)
    return values
