"""Extraction of a LoRA from the difference between a fine-tuned model and its base model."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
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
from kcv2diffusers.sources.gather import SourcePath, parts_of
from kcv2diffusers.sources.lora import Lora, Update
from kcv2diffusers.sources.lora_names import KOHYA, SPELLINGS
from kcv2diffusers.sources.recognise import Match
from kcv2diffusers.sources.tensor import Tensor, in_memory
from kcv2diffusers.system.output import check_folder, check_free_file, new_file
from kcv2diffusers.targets.lora import lora_plan, write_lora
from kcv2diffusers.targets.lora_merge import float_values, keras_axes, kernel_view
from kcv2diffusers.targets.stream import run_finite

AUTO = "auto"
_SLACK = 1 << 20  # bytes for the header and the folder
_BLOCK = 1 << 22  # numbers that are computed in float64 at a time
_SHOWN = 5  # modules that the text lists
_Place = tuple[str, str]  # the component and the diffusers name of a tensor


@dataclass(frozen=True, kw_only=True)
class ExtractedLora:
    """The result of `extract_lora`, or the plan after a dry run.

    `kept` is the share (0 to 1) of the difference between the models that the LoRA represents, measured as
    the sum of squares over all tensors of UNet and text encoder. `modules` is this share for each module, and
    `ranks` the rank of each module. `left_out` are tensors that differ but that a LoRA cannot represent:
    biases, norms and embeddings. `bytes_written` is the size of the tensors.

    A dry run reads no values: nothing is kept or left out in it, and `ranks` and `bytes_written` are the
    largest possible.
    """

    out: Path
    format: str
    kept: float
    modules: dict[str, float]
    ranks: dict[str, int]
    left_out: list[str]
    bytes_written: int
    dry_run: bool = False

    def text(self) -> str:
        """Return a few human-readable lines."""
        if self.dry_run:
            return (
                f"To write: LoRA in the format of {self.format}, {self.out}\n"
                f"  at most {len(self.ranks)} modules, rank {max(self.ranks.values())}, "
                f"{self.bytes_written / 1e6:.1f} MB\n"
                "Nothing was written (--dry-run)."
            )
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
    dry_run: bool = False,
    progress: Progress = silent,
) -> ExtractedLora:
    """Write a LoRA file that approximates the difference between the fine-tuned model `source` and `base`.

    Both are pipeline folders, checkpoints or single files. The difference of each linear layer and each
    convolution of UNet and text encoder is truncated to `rank` by its singular values. If `rank` is "auto",
    each layer has the smallest rank that keeps the share `keep` of its sum of squares. Only one layer at a
    time is in memory, in addition to the LoRA. A `dry_run` checks that the models fit each other, reads no
    values and writes nothing. `progress` is called with the bytes done and in total. Raises Error with a
    message for the user; `out` is then unchanged.
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
    if dry_run:
        return _planned(target, tuned.values(), rank, kind, format)
    total = sum(tensor.nbytes for _, _, tensor in tuned.values())
    updates: dict[_Place, Update] = {}
    shares: dict[str, float] = {}
    left_out: list[str] = []
    held = whole = done = 0.0
    for place, (match, slot, tensor) in tuned.items():
        difference = _difference((match, slot, tensor), plain[place])
        energy = _energy(difference)
        if not np.isfinite(energy):
            raise Error(f"{'.'.join(place)}: has NaN or infinite values.\nGive models without them.")
        whole += energy
        if energy and slot.variable.name == "kernel":
            component, module = place[0], place[1].removesuffix(".weight")
            shape = tuple(size.value(match.dims) or 0 for size in slot.diffusers_shape)
            down, up, share = _factors(difference, shape, rank, keep)
            del difference
            updates[component, module] = Update(
                component,
                module,
                in_memory("down", down.astype(kind), target),
                in_memory("up", up.astype(kind), target),
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


def _planned(
    target: Path, found: Iterable[_Found], rank: int | str, kind: np.dtype, format: str
) -> ExtractedLora:
    """Return the plan: every layer with the given rank, or with the largest that it can have."""
    updates = {}
    for match, slot, _ in found:
        if slot.variable.name == "kernel":
            outputs, *inner = (size.value(match.dims) or 0 for size in slot.diffusers_shape)
            most = min(outputs, math.prod(inner))
            count = most if rank == AUTO else min(int(rank), most)
            component, module = match.spec.table.name, slot.target.removesuffix(".weight")
            down = Tensor("down", (count, *inner), kind, target, None)
            up = Tensor("up", (outputs, count, *[1] * (len(inner) - 1)), kind, target, None)
            updates[component, module] = Update(component, module, down, up, float(count))
    nbytes = lora_plan(Lora(target, format, updates, {}), format).nbytes
    check_folder(target.absolute().parent, nbytes + _SLACK)
    ranks = {".".join(place): update.rank for place, update in updates.items()}
    empty: dict[str, Any] = {"kept": 0.0, "modules": {}, "left_out": []}
    return ExtractedLora(out=target, format=format, ranks=ranks, bytes_written=nbytes, dry_run=True, **empty)


def _tensors(source: SourcePath) -> dict[_Place, _Found]:
    """Return the tensors of UNet and text encoder, by component and diffusers name."""
    found = {
        (match.spec.table.name, slot.target): (match.require_complete(), slot, tensor)
        for match in parts_of(source, list(KOHYA)).values()
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
    difference = _values(one)
    difference -= _values(other)
    return difference


def _energy(difference: np.ndarray) -> float:
    """Return the sum of squares, added up in float64."""
    rows = difference.reshape(len(difference), -1)
    step = max(1, _BLOCK // rows.shape[1])
    return sum(
        float(np.square(rows[row : row + step], dtype=np.float64).sum()) for row in range(0, len(rows), step)
    )


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
    matrix = difference.reshape(outputs, -1)
    wide = matrix.shape[0] <= matrix.shape[1]
    matrix = matrix if wide else matrix.T
    squares, vectors = _left_singular(matrix)
    shares = np.cumsum(squares) / squares.sum()
    most = int(np.searchsorted(shares, keep * (1 - 1e-12))) + 1 if rank == AUTO else int(rank)
    count = min(most, len(squares))
    # The product of the factors does not depend on the scale, so that of values near zero may be any.
    root = np.maximum(squares[:count], 1e-14 * squares[0]) ** 0.25
    left = vectors[:, :count].astype(np.float32)
    right = (left.T @ matrix) / root[:, None].astype(np.float32)
    left *= root.astype(np.float32)
    up, down = (left, right) if wide else (right.T, left.T)
    down, up = down.reshape(count, inputs, *shape[2:]), up.reshape(outputs, count, *[1] * len(shape[2:]))
    return np.ascontiguousarray(down), np.ascontiguousarray(up), float(shares[count - 1])


def _left_singular(matrix: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the squares of the singular values, in descending order, and the left singular vectors.

    They are the eigenvalues and eigenvectors of matrix @ matrix.T, which takes a fifth of the time of a
    singular value decomposition if `matrix` is wide. In float64 the error is below that of float32 weights.
    """
    gram = np.zeros((len(matrix), len(matrix)))
    step = max(1, _BLOCK // len(matrix))
    for column in range(0, matrix.shape[1], step):
        block = matrix[:, column : column + step].astype(np.float64)
        gram += block @ block.T
    values, vectors = np.linalg.eigh(gram)
    return np.maximum(values[::-1], 0), vectors[:, ::-1]
