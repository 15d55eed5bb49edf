"""Split a list of several models, in a container that does not say which layer belongs to which model.

A legacy `.h5` file lists all weights of an inner trainer; Keras 3's export lists all variables of the
exported object. Only the order separates the models: a part is a run of consecutive entries that matches its
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
"""Returns the end of the run that starts at an index and matches a spec, None if it does not match."""


def pieces_of(model: Source) -> list[Source]:
    """The runs of a model's layers or variables that may each be a part, in order, each as a `Source`."""
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
    """A run as a model of its own; `inside` names its first and last entry."""
    return replace(model, inside=f"{model.inside} {first} to {last}".strip(), others=[], **content)


def _runs(count: int, end_of: End) -> list[tuple[int, int]]:
    """Runs (start, end) that do not overlap; the longest one is used for each start."""
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
    """The end of the layer that starts at `start`, None if it does not match; adds solved sizes to `dims`."""
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
