"""Read LoRA files: low-rank updates of a UNet and a text encoder, in any spelling of `lora_names`."""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np

from kcv2diffusers.errors import SourceError
from kcv2diffusers.pipeline_files import LORA_FILE
from kcv2diffusers.sources.diffusers_pipeline import read_header
from kcv2diffusers.sources.locate import locate_lora
from kcv2diffusers.sources.lora_names import KOHYA, ORIGINAL, modules, parse_name
from kcv2diffusers.sources.tensor import Tensor, rows, values_of

ADAPTER = "lora_adapter_metadata"
"""The metadata entry in which diffusers stores PEFT's configs as JSON."""
# Related kinds of files, identified by tensor names; they combine their factors differently.
OTHER_KINDS = tuple(
    (re.compile(pattern), what)
    for pattern, what in (
        (r"(lora_(unet|te\d?)_.*|.*\.)hada_[wt]\d(_\w+)?", "a LoHa"),
        (r"(lora_(unet|te\d?)_.*|.*\.)lokr_[wt]\d(_\w+)?", "a LoKr"),
        (r".*\.(dora_scale|lora_magnitude_vector)(\..*)?", "a DoRA"),
        (r".*\.lora_mid\.weight", "a LoCon with Tucker decomposition"),
        (r".*\.diff(_b)?", "a difference of full rank"),
    )
)
_LORA_READ = "LoRA files of Stable Diffusion 1 and 2 in the spellings of diffusers and kohya are read."
_FACTOR = r".*\.(lora_(A|B|down|up)(\.default)?\.weight|alpha)"
_OTHER_MODELS = tuple(
    (re.compile(pattern + _FACTOR), f"a LoRA of {what}")
    for pattern, what in (
        (r"(lora_te2_|text_encoder_2\.)", "Stable Diffusion XL"),
        (r"(lora_unet_|diffusion_model\.)(joint|double|single)_blocks", "Stable Diffusion 3 or Flux"),
        (r"transformer\.", "Stable Diffusion 3 or Flux"),
    )
)
_LISTED = 8  # names listed in an error message
_MOST = 10_000  # tensors in a file; a LoRA of every layer of Stable Diffusion 2 has 1,100


@dataclass(frozen=True, slots=True)
class Update:
    """The low-rank update of one module's weight: alpha / rank * up @ down.

    `down` has shape (rank, inputs) or, for a convolution, (rank, inputs, height, width). `up` has shape
    (outputs, rank), or (outputs, rank, 1, 1) for a convolution.
    """

    component: str
    module: str
    down: Tensor
    up: Tensor
    alpha: float

    @property
    def rank(self) -> int:
        """The rank: the number of columns of `up`."""
        return self.up.shape[1]

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the weight in diffusers, without trailing axes of size one."""
        return _short((self.up.shape[0], *self.down.shape[1:]))

    def values(self) -> tuple[np.ndarray, np.ndarray]:
        """The factors in float32: `down` as (rank, inputs, positions), `up` as (outputs, rank)."""
        down, up = (values_of(tensor).astype(np.float32) for tensor in (self.down, self.up))
        return down.reshape(self.rank, self.down.shape[1], -1), up.reshape(-1, self.rank)


@dataclass(frozen=True)
class Lora:
    """A LoRA file: updates by (component, module), spelling, and metadata.

    The spelling is "diffusers", "kohya" or "original".
    """

    path: Path
    spelling: str
    updates: Mapping[tuple[str, str], Update]
    metadata: Mapping[str, str]

    def of(self, component: str) -> list[Update]:
        """The updates of one component."""
        return [update for update in self.updates.values() if update.component == component]


def read_lora(source: str | PathLike[str]) -> Lora:
    """Read a LoRA file, or the one in a pipeline folder: only the header and the alphas.

    `source` is a path or an hf:// address. Raises SourceError for a damaged file, a file of another kind, and
    a LoRA that does not fit the models.
    """
    path = locate_lora(source)
    if path.is_dir() and (path / LORA_FILE).is_file():
        path = path / LORA_FILE
    if not path.is_file():
        raise SourceError(path, "no such file.", "Give a .safetensors file, or hf://user/repo for the Hub.")
    tensors, metadata = read_header(path)
    if len(tensors) > _MOST:
        raise SourceError(path, f"its {len(tensors)} tensors are more than any LoRA here has.", _LORA_READ)
    for pattern, what in (*OTHER_KINDS, *_OTHER_MODELS):
        if any(pattern.fullmatch(tensor.name) for tensor in tensors):
            raise SourceError(path, f"of {what}, which is not read here.", _LORA_READ)
    factors, strangers, spellings = _factors(path, tensors)
    if not factors:
        raise SourceError(path, f"its {len(tensors)} tensors are not those of a LoRA.", _LORA_READ)
    if strangers:
        raise SourceError(path, f"tensors of no known module: {listed(strangers)}.", _LORA_READ)
    configs = _configs(path, metadata)
    updates = {}
    for (component, module), held in factors.items():
        name = f"{component}.{module}"
        if missing := {"down", "up"} - held.keys():
            raise SourceError(path, f"{name}: the LoRA has no factor {min(missing)!r} for it.")
        down, up = held["down"], held["up"]
        if not _are_factors(down, up):
            problem = f"{name}: factors {list(down.shape)} and {list(up.shape)} do not fit each other."
            raise SourceError(path, problem)
        if down.shape[0] > max(up.shape[0], math.prod(down.shape[1:])):  # also bounds the memory of a merge
            raise SourceError(
                path, f"{name}: rank {down.shape[0]} is larger than the weight that it changes."
            )
        alpha = _alpha(held.get("alpha"), configs.get(component), module, up.shape[1], path)
        updates[component, module] = Update(component, module, down, up, alpha)
    _check_shapes(path, updates)
    spelling = next(s for s in (ORIGINAL, "kohya", "diffusers") if s in spellings)
    return Lora(path, spelling, updates, metadata)


def check_finite(lora: Lora) -> None:
    """Raise SourceError if a factor has a value that is NaN or infinite."""
    for update in lora.updates.values():
        for factor in update.values():
            if not np.isfinite(factor).all():
                problem = f"{update.component}.{update.module} has NaN or infinite values."
                raise SourceError(lora.path, problem, "Give a LoRA without them.")


def listed(names: Iterable[str]) -> str:
    """The first names, cut to 120 characters each, and the number of the others."""
    every = list(names)
    more = f" and {len(every) - _LISTED} more" if len(every) > _LISTED else ""
    return ", ".join(name[:120] for name in every[:_LISTED]) + more


def _factors(
    path: Path, tensors: Iterable[Tensor]
) -> tuple[dict[tuple[str, str], dict[str, Tensor]], list[str], set[str]]:
    """The tensors by (component, module) and role, the names of no known module, and the spellings."""
    factors: dict[tuple[str, str], dict[str, Tensor]] = {}
    strangers, spellings = [], set()
    for tensor in tensors:
        name = parse_name(tensor.name)
        if name is None:
            strangers.append(tensor.name)
            continue
        spellings.add(name.spelling)
        for number, module in enumerate(name.modules):
            held = factors.setdefault((name.component, module), {})
            if name.role in held:
                raise SourceError(path, f"{held[name.role].name} and {tensor.name} are the same.", _LORA_READ)
            held[name.role] = _share(path, tensor, number, len(name.modules)) if name.role == "up" else tensor
    return factors, strangers, spellings


def _share(path: Path, tensor: Tensor, number: int, count: int) -> Tensor:
    """Share `number` of `count` equal shares of a factor's outputs."""
    if count == 1:
        return tensor
    size, rest = divmod(tensor.shape[0] if tensor.shape else 0, count)
    if rest or not size:
        raise SourceError(path, f"{tensor.name}: {list(tensor.shape)} cannot be divided by {count}.")
    return rows(tensor, number * size, size)


def _are_factors(down: Tensor, up: Tensor) -> bool:
    return (
        len(down.shape) in (2, 4)
        and len(up.shape) in (2, 4)
        and set(up.shape[2:]) <= {1}
        and down.shape[0] == up.shape[1]
        and math.prod(down.shape) > 0
        and math.prod(up.shape) > 0
        and not {down.dtype.kind, up.dtype.kind} & {"i", "u"}
    )


def _check_shapes(path: Path, updates: Mapping[tuple[str, str], Update]) -> None:
    """Raise SourceError if a shape does not match its module.

    The sizes of the model are solved from all shapes by majority.
    """
    votes: dict[tuple[str, str], Counter[int]] = {}
    for (component, module), update in updates.items():
        for size, value in zip(modules(component)[module].diffusers_shape, update.shape, strict=False):
            if solved := size.solve(value):
                votes.setdefault((component, solved[0]), Counter())[solved[1]] += 1
    dims = {key: counter.most_common(1)[0][0] for key, counter in votes.items()}
    wrong = []
    for (component, module), update in updates.items():
        own = {symbol: value for (of, symbol), value in dims.items() if of == component}
        expected = [size.value(own) for size in modules(component)[module].diffusers_shape]
        shape = [*update.shape, *[1] * (len(expected) - len(update.shape))]
        agree = len(shape) == len(expected) and all(
            e in (None, s) for e, s in zip(expected, shape, strict=True)
        )
        if not agree:
            wrong.append(f"{component}.{module} {list(update.shape)}")
    if wrong:
        raise SourceError(path, f"shapes that do not fit their modules: {listed(wrong)}.", _LORA_READ)


def _short(shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape without the spatial axes of a 1x1 kernel."""
    return shape[:2] if set(shape[2:]) <= {1} else shape


def _alpha(
    tensor: Tensor | None, config: Mapping[str, Any] | None, module: str, rank: int, path: Path
) -> float:
    """The alpha of a module: that of its tensor, else that of PEFT's config, else the rank."""
    if tensor is not None:
        if math.prod(tensor.shape) != 1:
            raise SourceError(path, f"{tensor.name}: shape {list(tensor.shape)}, expected one number.")
        alpha: Any = float(values_of(tensor).reshape(()))
    elif config is not None:
        names = [name for name in config["alpha_pattern"] if f".{module}".endswith(f".{name}")]
        alpha = config["alpha_pattern"][max(names, key=len)] if names else config["lora_alpha"]
    else:
        return float(rank)
    if isinstance(alpha, bool) or not isinstance(alpha, (int, float)) or not math.isfinite(alpha):
        raise SourceError(path, f"{module}: alpha {alpha!r} is not a number.")
    return float(alpha)


def _configs(path: Path, metadata: Mapping[str, str]) -> dict[str, dict[str, Any]]:
    """PEFT's configs in the metadata, by component."""
    if ADAPTER not in metadata:
        return {}
    try:
        data = json.loads(metadata[ADAPTER])
    except (ValueError, RecursionError):
        data = None
    if not isinstance(data, dict):
        raise SourceError(path, f"{ADAPTER} in its metadata is not a JSON object.")
    found = {}
    for component in KOHYA:
        config = {
            n.removeprefix(f"{component}."): v for n, v in data.items() if n.startswith(f"{component}.")
        }
        if "lora_alpha" not in config:
            continue
        for option in ("use_rslora", "use_dora"):
            if config.get(option):
                raise SourceError(path, f"of a LoRA with {option}, which is not read here.", _LORA_READ)
        pattern = config.get("alpha_pattern") or {}
        if not isinstance(pattern, dict) or not all(re.fullmatch(r"\^?[\w.]+", name) for name in pattern):
            raise SourceError(path, f"alpha_pattern in its {ADAPTER} is not one of names.", _LORA_READ)
        names = {name.removeprefix("^"): alpha for name, alpha in pattern.items()}
        found[component] = {"lora_alpha": config["lora_alpha"], "alpha_pattern": names}
    return found
