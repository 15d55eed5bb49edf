"""Models that lie one after the other in a list, where the container does not say which layer is whose.

A legacy `.h5` file lists all weights that an inner trainer holds, and Keras 3's export all variables of
whatever was exported. Only their order tells the models apart: a part is a run of entries that fits its
table from the first row to the last.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache
from typing import Any

from kcv2diffusers.maps.tables import Slot, Spec, specs
from kcv2diffusers.sources.source import Source, Style, counted
from kcv2diffusers.sources.tensor import Tensor

End = Callable[[Spec, int], int | None]
"""Where the run that begins at an index ends, if a part lies there."""


def pieces_of(model: Source) -> list[Source]:
    """The runs of a model's layers or variables that could each be a part, in order."""
    if model.style is Style.ORDER:
        stems = [layer.layer for layer in model.layers]
        runs = _runs(len(stems), lambda spec, start: _layers_end(spec, stems, start))
        layers = model.layers
        return [
            _piece(model, layers[a].name, layers[b - 1].name, layers=counted(layers[a:b])) for a, b in runs
        ]
    if model.style is Style.FLAT:
        runs = _runs(len(model.flat), lambda spec, start: _flat_end(spec, model.flat, start))
        return [_piece(model, str(a), str(b - 1), flat=model.flat[a:b]) for a, b in runs]
    return []


def _piece(model: Source, first: str, last: str, **content: Any) -> Source:
    """A model of its own; its place names the first and the last entry."""
    return replace(model, inside=f"{model.inside} {first} to {last}".strip(), others=[], **content)


def _runs(count: int, end_of: End) -> list[tuple[int, int]]:
    """Runs that do not overlap; of those that begin at one entry the longest."""
    runs, start = [], 0
    while start < count:
        end = max((end for spec in specs() if (end := end_of(spec, start)) is not None), default=start)
        if end > start:
            runs.append((start, end))
        start = max(end, start + 1)
    return runs


def _layers_end(spec: Spec, stems: Sequence[str | None], start: int) -> int | None:
    at = start
    for row in spec.rows:
        first = at
        while at < len(stems) and stems[at] == row.layer and (row.repeated or at == first):
            at += 1
        if at == first:
            return None
    return at


def _flat_end(spec: Spec, flat: Sequence[Tensor], start: int) -> int | None:
    at, dims = start, dict[str, int]()
    for row, block in zip(spec.rows, _blocks(spec), strict=True):
        first = at
        while at == first or row.repeated:
            end = _block_end(block, flat, at, dims)
            if end is None:
                break
            at = end
        if at == first:
            return None
    return at


@cache
def _blocks(spec: Spec) -> list[list[Slot]]:
    return [spec.block(row, 0, 0) for row in spec.rows]


def _block_end(block: Sequence[Slot], flat: Sequence[Tensor], start: int, dims: dict[str, int]) -> int | None:
    """Where a layer that begins at `start` ends, None if it is another; sizes that it tells go to `dims`."""
    at, told = start, dict(dims)
    for slot in block:
        if not slot.exists(told):
            continue
        if at >= len(flat) or not _fits(slot, flat[at], told):
            return None
        at += 1
    dims |= told
    return at


def _fits(slot: Slot, tensor: Tensor, told: dict[str, int]) -> bool:
    if len(slot.shape) != len(tensor.shape):
        return False
    for size, value in zip(slot.shape, tensor.shape, strict=True):
        if (known := size.value(told)) is None and (solved := size.solve(value)):
            told[solved[0]] = solved[1]
        elif known != value:
            return False
    return True
