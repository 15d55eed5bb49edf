"""Check of the tables in `weight_maps/original/`: bijective, complete, and consistent with diffusers."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

from kcv2diffusers.maps.original import Naming

Shapes = Mapping[str, tuple[int, ...]]


def problems_of(naming: Naming, targets: Shapes) -> list[str]:
    """Return the problems of a naming. `targets` maps the component's diffusers tensors to their shapes."""
    places = naming.places(targets)
    problems = [f"no row of the original layout names {t}" for t in sorted(targets.keys() - places.keys())]
    taken: dict[tuple[str, int], str] = {}
    held: dict[str, set[int]] = {}
    shapes: dict[str, tuple[int, ...]] = {}
    for target, place in places.items():
        other = taken.setdefault((place.name, place.piece), target)
        if other != target:
            problems.append(f"{other} and {target} are both {place.name} in the original layout")
        held.setdefault(place.name, set(range(place.pieces))).discard(place.piece)
        shape = place.shape(targets[target])
        if shapes.setdefault(place.name, shape) != shape:
            problems.append(f"the pieces of {place.name} have different shapes")
    problems += [f"{name}: no tensor is piece {min(rest)}" for name, rest in held.items() if rest]
    stored, tensors = (sum(map(math.prod, side)) for side in (shapes.values(), targets.values()))
    if not problems and stored != tensors:
        problems.append(f"the original layout holds {stored} values, the component {tensors}")
    return [*problems, *_unused(naming, targets)]


def _unused(naming: Naming, targets: Shapes) -> list[str]:
    """Return a problem for each row and each leaf of a block that matches no tensor."""
    problems, used = [], set[tuple[str, str]]()
    for module, (_, inside) in naming.rows.items():
        pattern = re.compile(re.escape(module).replace(r"\{i\}", r"\d+") + r"\.(.*)")
        rests = [found[1] for target in targets if (found := pattern.fullmatch(target))]
        if not rests:
            problems.append(f"row {module} of the original layout names no tensor")
        for leaf in naming.blocks.get(inside or "", {}):
            if any(rest.startswith(f"{leaf}.") for rest in rests):
                used.add((inside or "", leaf))
    for block, leaves in naming.blocks.items():
        problems += [
            f"{leaf} in block {block} of the original layout names no tensor"
            for leaf in leaves
            if (block, leaf) not in used
        ]
    return problems


def read_by_diffusers(naming: Naming, targets: Shapes, config: Mapping[str, Any]) -> list[str] | None:
    """Return the tensors that diffusers' converter does not read back correctly from the original layout.

    Each tensor is filled with its own number, so `targets` should be those of a small model. `config` is its
    config.json. Returns None if diffusers has no such converter or is not installed.
    """
    try:
        import torch
        from diffusers.loaders import single_file_utils as converters
    except ImportError:
        return None
    convert: Any = getattr(converters, _CONVERTERS[naming.component, naming.version], None)
    if convert is None:
        return None
    tensors = {
        name: torch.full(shape, number, dtype=torch.int32)
        for number, (name, shape) in enumerate(targets.items())
    }
    pieces: dict[str, dict[int, Any]] = {}
    for target, place in naming.places(targets).items():
        tensor = tensors[target]
        pieces.setdefault(naming.prefix + place.name, {})[place.piece] = tensor.reshape(
            *tensor.shape, *(1,) * place.ones
        )
    file = {name: torch.cat([held[piece] for piece in sorted(held)]) for name, held in pieces.items()}
    if naming.component == "text_encoder":
        found = convert(_TextModel(config), file) if naming.version == "sd2" else convert(file)
    else:
        found = convert(file, config)
    return [
        f"diffusers does not read {name} back from the original layout"
        for name, tensor in tensors.items()
        if name not in found or not torch.equal(found[name], tensor)
    ] + [f"diffusers reads {name}, which the component has not" for name in found.keys() - tensors.keys()]


_CONVERTERS = {
    ("unet", "any"): "convert_ldm_unet_checkpoint",
    ("vae", "any"): "convert_ldm_vae_checkpoint",
    ("text_encoder", "sd1"): "convert_ldm_clip_checkpoint",
    ("text_encoder", "sd2"): "convert_open_clip_checkpoint",
}


class _TextModel:
    """A stand-in for a model: the converter of text encoders reads only the width from its config."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        self.config = self
        self.hidden_size = config["hidden_size"]
