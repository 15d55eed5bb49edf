"""The commands for weight maps: list, show and check."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from kcv2diffusers.conversion.original_check import problems_of, read_by_diffusers
from kcv2diffusers.errors import Error
from kcv2diffusers.maps.layouts import LAYOUTS, core, reverse
from kcv2diffusers.maps.leaves import Share
from kcv2diffusers.maps.original import naming, namings
from kcv2diffusers.maps.parts import family_of, label
from kcv2diffusers.maps.sizes import Size
from kcv2diffusers.maps.tables import Spec, Table, served_versions, specs, tables
from kcv2diffusers.pipeline.configs import config_of


def listing() -> str:
    """Return one line for each map."""
    rows = []
    for table in tables().values():
        parts = ", ".join(label(part) for part in table.parts)
        rows.append((table.name, parts, " ".join(served_versions(table)), table.diffusers))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(f"{cell:{width}}" for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    )


def show(name: str, version: str | None = None) -> str:
    """Return a map expanded with Stable Diffusion's sizes, one line for each tensor.

    A line has the Keras name and shape, whether the axes are reversed, and the diffusers name and shape.
    Raises Error for an unknown map or version.
    """
    if name not in tables():
        raise Error(f"No map named {name!r}; there are {', '.join(tables())}.")
    chosen = [s for s in specs() if s.table.name == name and version in (None, s.version)]
    if not chosen:
        raise Error(f"{name} has no version {version!r}; it has {', '.join(tables()[name].versions)}.")
    blocks = []
    for spec in chosen:
        dims = spec.nominal
        lines = [f"# {label(spec.part)}{'' if spec.version == 'any' else ' ' + spec.version.upper()}"]
        for slot in spec.existing(dims):
            turn = "reversed" if slot.variable.reverses else "as is"
            shapes = [[size.value(dims) for size in side] for side in (slot.shape, slot.diffusers_shape)]
            shares = [_range(slot.columns, "columns", dims), _range(slot.rows, "rows", dims)]
            left, right = (f"{shape}{share}" for shape, share in zip(shapes, shares, strict=True))
            lines.append(f"{slot.keras_name} {left} -> {turn} -> {slot.target} {right}")
        blocks.append("\n".join(lines))
    return "\n\n".join(blocks)


def _range(share: Share | None, what: str, dims: Mapping[str, int]) -> str:
    if share is None:
        return ""
    first, count = share.first.value(dims) or 0, share.count.value(dims) or 0
    return f" {what} {first} to {first + count - 1}"


@dataclass
class Checked:
    """The result of the check of one map in one version.

    `compared` says whether the map was compared with diffusers or transformers.
    """

    name: str
    version: str
    tensors: int = 0
    compared: bool = False
    problems: list[str] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """Return the fields for JSON."""
        return vars(self)

    def text(self) -> str:
        """Return one line, or the list of problems."""
        label = f"{self.name}{'' if self.version == 'any' else ' ' + self.version.upper()}"
        if self.problems:
            return "\n".join([f"{label}: {len(self.problems)} problems", *(f"  {p}" for p in self.problems)])
        against = (
            "keys and shapes as in the library"
            if self.compared
            else "not compared with the library (pip install 'kcv2diffusers[diffusers]')"
        )
        return f"{label}: {self.tensors} tensors, one to one, invertible; {against}"


def check() -> list[Checked]:
    """Check that every map is bijective, invertible and, if diffusers is installed, complete.

    Complete means that the targets and their shapes are exactly those in the state dict of the model that
    diffusers or transformers builds from the generated config.json. The names of the original layout are
    checked in the same way: diffusers' converter must read the same component from them.
    """
    versions = [(table, version) for table in tables().values() for version in table.versions]
    return [
        *(_check(table, version) for table, version in versions),
        *(_check_original(table, version) for table, version in versions if table.name in namings()),
    ]


_SMALLER = 32  # divisor of sizes that it divides; sizes that differ still differ


def _check_original(table: Table, version: str) -> Checked:
    """Check the names of a component in the original layout."""
    named = naming(table.name, version)
    targets, _ = _shapes(table, version)
    small, dims = _shapes(table, version, _SMALLER)
    found = read_by_diffusers(named, small, config_of(table, version, dims, image_size=512))
    problems = [*problems_of(named, targets), *(found or ())]
    return Checked(f"{table.name}, original layout", version, len(targets), found is not None, problems)


def _shapes(
    table: Table, version: str, smaller: int = 1
) -> tuple[dict[str, tuple[int, ...]], dict[str, int]]:
    """Return names and shapes of a component's diffusers tensors, and the sizes that define them."""
    shapes: dict[str, tuple[int, ...]] = {}
    dims: dict[str, int] = {}
    for spec in (s for s in specs() if s.table is table and s.version == version):
        dims |= {n: v // smaller if v % smaller == 0 else v for n, v in spec.nominal.items()}
        for slot in spec.existing(dims):
            shapes[slot.target] = tuple(size.value(dims) or 0 for size in slot.diffusers_shape)
    return shapes, dims


def _check(table: Table, version: str) -> Checked:
    result = Checked(table.name, version)
    targets: dict[str, tuple[int, ...]] = {}
    for spec in (s for s in specs() if s.table is table and s.version == version):
        dims = spec.nominal
        slots = spec.existing(dims)
        sides = ((s.keras_name, s.shape[-1:], s.columns) for s in slots)
        others = ((s.target, s.diffusers_shape[:1], s.rows) for s in slots)
        result.problems += [*_shared(sides, dims), *_shared(others, dims), *_unused_blocks(spec)]
        for slot in slots:
            unknown = [s for s in (*slot.shape, *slot.diffusers_shape) if s.value(dims) is None]
            if unknown:
                result.problems.append(f"{slot.target}: size {unknown[0]} is not defined")
                continue
            targets[slot.target] = tuple(size.value(dims) or 0 for size in slot.diffusers_shape)
    result.tensors = len(targets)
    result.problems += _not_inverse()
    expected = _expected(table, version)
    if expected is not None:
        result.compared = True
        result.problems += [f"the library has no {k}" for k in sorted(targets.keys() - expected.keys())]
        result.problems += [f"nothing produces {k}" for k in sorted(expected.keys() - targets.keys())]
        result.problems += [
            f"{k}: shape {targets[k]}, the library has {expected[k]}"
            for k in sorted(targets.keys() & expected.keys())
            if targets[k] != expected[k]
        ]
    return result


def _shared(
    slots: Iterable[tuple[str, tuple[Size, ...], Share | None]], dims: Mapping[str, int]
) -> list[str]:
    """Return the tensors that slots use twice, or not wholly.

    A slot is given by the name of its tensor on one side, the shared axis, and its share of that axis.
    """
    used: dict[str, list[tuple[int, int]]] = {}
    wholes: dict[str, int] = {}
    for name, axis, share in slots:
        wholes[name] = (axis[0].value(dims) or 0) if axis else 1
        first, count = (
            (share.first.value(dims) or 0, share.count.value(dims) or 0) if share else (0, wholes[name])
        )
        used.setdefault(name, []).append((first, first + count))
    problems = []
    for name, ranges in used.items():
        ends = [0, *(end for _, end in sorted(ranges))]
        if [start for start, _ in sorted(ranges)] != ends[:-1] or ends[-1] != wholes[name]:
            problems.append(f"{name} is used twice, or only in part")
    return problems


def _unused_blocks(spec: Spec) -> list[str]:
    used = {row.block for rows in spec.table.parts.values() for row in rows}
    return [f"block {name} is used by no row" for name in spec.table.blocks if name not in used]


def _not_inverse() -> list[str]:
    """Return the layouts for which a round trip does not give the same array."""
    sizes = {"size": 3, "in": 5, "out": 7, "width": 5, "rows": 4, "heads": 2, "head": 3, "side": 4}
    problems = []
    for name, layout in LAYOUTS.items():
        for variable in layout.variables:
            keras, other = (
                tuple(Size.parse(size).value(sizes) or 0 for size in side)
                for side in (variable.keras, variable.diffusers)
            )
            array = np.arange(np.prod(keras)).reshape(keras)
            if variable.reverses:
                there = reverse(array, core(other), other)
                back = reverse(there, core(other)[::-1], keras)
                if not np.array_equal(array, back) or there.shape != other:
                    problems.append(f"layout {name}: {variable.name} is not inverted")
            elif np.prod(keras) != np.prod(other):
                problems.append(f"layout {name}: {variable.name} changes size")
    return problems


def _expected(table: Table, version: str) -> dict[str, tuple[int, ...]] | None:
    """Return keys and shapes of the library's model for our config.json, None if it is not installed."""
    library, name = table.diffusers.split(".")
    if any(importlib.util.find_spec(module) is None for module in ("torch", library)):
        return None
    import torch

    dims = {k: v for s in specs() if s.table is table and s.version == version for k, v in s.nominal.items()}
    entries = config_of(table, version, dims, image_size=family_of(table.parts).image_size)
    cls = getattr(importlib.import_module(library), name)
    with torch.device("meta"):
        model = cls.from_config(entries) if library == "diffusers" else cls(cls.config_class(**entries))
    keys = {key: tuple(value.shape) for key, value in model.state_dict().items()}
    # The models of transformers 5 have no text_model. prefix; it strips the prefix while loading.
    return {table.rename(key) or key: shape for key, shape in keys.items() if table.rename(key)}
