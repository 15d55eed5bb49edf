"""Extraction of a LoRA from the difference between a fine-tuned model and its base model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from safetensors import safe_open

from kcv2diffusers.conversion.lora import ENDING, is_output
from kcv2diffusers.dtypes import ALIASES, DTYPES, full_name
from kcv2diffusers.errors import Error, no_choice
from kcv2diffusers.maps.tables import Slot
from kcv2diffusers.progress import Progress, silent
from kcv2diffusers.sources.diffusers_pipeline import is_pipeline, read_pipeline
from kcv2diffusers.sources.gather import SourcePath, gather
from kcv2diffusers.sources.locate import locate_all
from kcv2diffusers.sources.lora import KOHYA, SPELLINGS, Lora, Update
from kcv2diffusers.sources.recognise import Match
from kcv2diffusers.sources.tensor import Tensor
from kcv2diffusers.system.output import check_free_file, new_file
from kcv2diffusers.targets.lora import lora_plan, write_lora
from kcv2diffusers.targets.lora_merge import float_values, keras_axes, kernel_view
from kcv2diffusers.targets.stream import run_finite

AUTO = "auto"
_SLACK = 1 << 20  # bytes for the header and the folder
_SHOWN = 5  # modules that the text lists
_Place = tuple[str, str]  # the component and the diffusers name of a tensor


@dataclass(frozen=True, kw_only=True)
class ExtractedLora:
    """The result of `extract_lora`.

    `kept` is the share (0 to 1) of the difference between the models that the LoRA represents, measured as
    the sum of squares over all tensors of UNet and text encoder. `modules` is this share for each module, and
    `ranks` the rank of each module. `left_out` are tensors that differ but that a LoRA cannot represent:
    biases, norms and embeddings.
    """

    out: Path
    format: str
    kept: float
    modules: dict[str, float]
    ranks: dict[str, int]
    left_out: list[str]
    bytes_written: int

    def text(self) -> str:
        """Return a few human-readable lines."""
        ranks = sorted(set(self.ranks.values()))
        rank = str(ranks[0]) if len(ranks) == 1 else f"{ranks[0]} to {ranks[-1]}"
        lines = [
            f"LoRA in the format of {self.format}, {self.out}",
            f"  {len(self.modules)} modules, rank {rank}, {self.bytes_written / 1e6:.1f} MB",
            f"  {self.kept:.1%} of the difference is kept; least of these modules:",
        ]
        for name in sorted(self.modules, key=self.modules.__getitem__)[:_SHOWN]:
            lines.append(f"    {self.modules[name]:.1%} {name} (rank {self.ranks[name]})")
        if self.left_out:
            others = f"Other tensors that differ and are not in it: {len(self.left_out)}"
            lines.append(f"  {others} (biases, norms, embeddings)")
        return "\n".join(lines)

    def to_dict(self) -> dict[str, Any]:
        """Return the fields for JSON."""
        return asdict(self) | {"out": str(self.out)}


def extract_lora(
    source: SourcePath,
    *,
    base: SourcePath,
    out: SourcePath,
    rank: int | Literal["auto"] = 32,
    keep: float = 0.95,
    format: Literal["diffusers", "kohya"] = "diffusers",
    dtype: str = "float32",
    overwrite: bool = False,
    progress: Progress = silent,
) -> ExtractedLora:
    """Write a LoRA file that approximates the difference between the fine-tuned model `source` and `base`.

    Both are pipeline folders, checkpoints or single files. The difference of each linear layer and each
    convolution of UNet and text encoder is truncated to `rank` by a singular value decomposition. If `rank`
    is "auto", each layer has the smallest rank that keeps the share `keep` of its sum of squares. Only one
    layer at a time is in memory, in addition to the LoRA. `progress` is called with the bytes done and in
    total. Raises Error with a message for the user; `out` is then unchanged.
    """
    target, kind = Path(out), DTYPES.get(full_name(dtype))
    if kind is None:
        raise no_choice("--dtype", dtype, [*DTYPES, *ALIASES])
    if format not in SPELLINGS:
        raise no_choice("--format", format, SPELLINGS)
    if rank != AUTO and (not isinstance(rank, int) or rank < 1):
        raise Error(f"--rank {rank}: give a number of at least 1, or {AUTO}.")
    if not 0 < keep <= 1:
        raise Error(f"--keep {keep}: give a share above 0 and at most 1.")
    if target.suffix != ENDING:
        raise Error(f"{target}: a LoRA file ends in {ENDING}.\nGive --out {target.name or 'lora'}{ENDING}.")
    check_free_file(target, overwrite=overwrite, replaceable=is_output)
    tuned, plain = _tensors(source), _tensors(base)
    _check(source, base, tuned, plain)
    total = sum(tensor.nbytes for _, _, tensor in tuned.values())
    updates: dict[_Place, Update] = {}
    shares: dict[str, float] = {}
    left_out: list[str] = []
    held = whole = done = 0.0
    for place, (match, slot, tensor) in tuned.items():
        difference = _difference((match, slot, tensor), plain[place])
        energy = float(np.square(difference, dtype=np.float64).sum())
        if not np.isfinite(energy):
            raise Error(f"{'.'.join(place)}: has NaN or infinite values.\nGive models without them.")
        whole += energy
        if energy and slot.variable.name == "kernel":
            component, module = place[0], place[1].removesuffix(".weight")
            shape = tuple(size.value(match.dims) or 0 for size in slot.diffusers_shape)
            down, up, share = _factors(difference, shape, rank, keep)
            paths = {"dtype": kind, "path": target, "offset": None}
            updates[component, module] = Update(
                component,
                module,
                Tensor("down", down.shape, load=_constant(down.astype(kind)), **paths),
                Tensor("up", up.shape, load=_constant(up.astype(kind)), **paths),
                float(len(down)),
            )
            shares[f"{component}.{module}"] = share
            held += share * energy
        elif energy:
            left_out.append(".".join(place))
        done += tensor.nbytes
        progress(int(done), total)
    if not updates:
        raise Error(f"{source} and {base} do not differ in any layer.\nGive the model before the training.")
    plan = lora_plan(Lora(target, format, updates, {}), format)
    with new_file(target, overwrite=overwrite, replaceable=is_output, needed=plan.nbytes + _SLACK) as file:
        run_finite(write_lora(file, plan), silent, allow_nonfinite=False)
        with safe_open(file, framework="numpy"):  # safetensors itself validates the header
            pass
    return ExtractedLora(
        out=target,
        format=format,
        kept=held / whole,
        modules=shares,
        ranks={f"{c}.{m}": update.rank for (c, m), update in updates.items()},
        left_out=left_out,
        bytes_written=plan.nbytes,
    )


_Found = tuple[Match, Slot, Tensor]


def _tensors(source: SourcePath) -> dict[_Place, _Found]:
    """Return the tensors of UNet and text encoder, by component and diffusers name."""
    paths = locate_all(source, pipelines=True)
    matches: list[Match] = []
    for path in paths:
        if is_pipeline(path):
            components = read_pipeline(path, list(KOHYA))
            matches += [match for component in components.values() for match in component.parts.values()]
    matches += gather([path for path in paths if not is_pipeline(path)]).values()
    found = {
        (match.spec.table.name, slot.target): (match.require_complete(), slot, tensor)
        for match in matches
        if match.spec.table.name in KOHYA
        for slot, tensor in match.slots()
    }
    if not found:
        raise Error(f"{source}: has neither a UNet nor a text encoder.\nGive a model that has one.")
    return found


def _check(
    source: SourcePath, base: SourcePath, tuned: Mapping[_Place, _Found], plain: Mapping[_Place, _Found]
) -> None:
    """Raise Error if a tensor of the tuned components is missing in one model or has another shape there."""
    components = {component for component, _ in tuned}
    for place in (*tuned, *(place for place in plain if place[0] in components)):
        if place not in tuned or place not in plain or _shape(tuned[place]) != _shape(plain[place]):
            raise Error(
                f"{source} and {base} do not fit: {'.'.join(place)} has another shape or is missing.\n"
                "Give the model that the training began with as --base."
            )


def _shape(found: _Found) -> tuple[int | None, ...]:
    """Return the shape in diffusers, without the kernel axes if they all have size 1."""
    match, slot, _ = found
    shape = tuple(size.value(match.dims) for size in slot.diffusers_shape)
    return shape[:2] if set(shape[2:]) <= {1} else shape


def _difference(one: _Found, other: _Found) -> np.ndarray:
    """Return the difference of two tensors in float32. Kernels are (outputs, inputs, positions)."""
    first, second = (_values(found) for found in (one, other))
    difference: np.ndarray = first - second
    return difference


def _values(found: _Found) -> np.ndarray:
    match, slot, tensor = found
    values = float_values(tensor)
    if slot.variable.name == "kernel":
        return kernel_view(values, keras_axes(match, slot))
    return values


def _factors(
    difference: np.ndarray, shape: tuple[int, ...], rank: int | str, keep: float
) -> tuple[np.ndarray, np.ndarray, float]:
    """Return `down` and `up` of a difference, and the share of its sum of squares that they keep.

    `difference` is (outputs, inputs, positions). `shape` is that of the weight in diffusers. Each factor is
    scaled by the square root of the singular values.
    """
    outputs, inputs, _ = difference.shape
    left, values, right = np.linalg.svd(difference.reshape(outputs, -1), full_matrices=False)
    squares = np.square(values, dtype=np.float64)
    shares = np.cumsum(squares) / squares.sum()
    most = int(np.searchsorted(shares, keep * (1 - 1e-12))) + 1 if rank == AUTO else int(rank)
    count = min(most, len(values))
    root = np.sqrt(values[:count])
    down = (root[:, None] * right[:count]).reshape(count, inputs, *shape[2:])
    up = (left[:, :count] * root).reshape(outputs, count, *[1] * len(shape[2:]))
    return np.ascontiguousarray(down), np.ascontiguousarray(up), float(shares[count - 1])


def _constant(values: np.ndarray) -> Any:
    """Return a function that returns the values."""
    return lambda: values
