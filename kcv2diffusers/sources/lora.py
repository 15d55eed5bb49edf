"""Read LoRA files: low-rank updates of a UNet and a text encoder, with the names of diffusers or of kohya.

diffusers (PEFT) names a factor after its module: `unet.mid_block.attentions.0.proj_in.lora_A.weight`.
kohya's scripts, and A1111 and ComfyUI with them, replace the dots by underscores:
`lora_unet_mid_block_attentions_0_proj_in.lora_down.weight`. The weight maps give the modules and their sizes.
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from kcv2diffusers.errors import SourceError
from kcv2diffusers.maps.tables import Slot, specs, tables
from kcv2diffusers.pipeline_files import LORA_FILE
from kcv2diffusers.sources.diffusers_pipeline import read_header
from kcv2diffusers.sources.tensor import Tensor, values_of

ADAPTER = "lora_adapter_metadata"
"""The metadata entry in which diffusers stores PEFT's configs as JSON."""
KOHYA = {"unet": "lora_unet_", "text_encoder": "lora_te_"}
"""The prefix of kohya's names for each component."""
SPELLINGS = ("diffusers", "kohya")
# Related kinds of files, identified by tensor names; they combine their factors differently.
OTHER_KINDS = tuple(
    (re.compile(pattern), what)
    for pattern, what in (
        (r"(lora_(unet|te\d?)_.*|.*\.)hada_[wt]\d(_\w+)?", "a LoHa"),
        (r"(lora_(unet|te\d?)_.*|.*\.)lokr_[wt]\d(_\w+)?", "a LoKr"),
        (r".*\.(dora_scale|lora_magnitude_vector)(\..*)?", "a DoRA"),
        (r".*\.lora_mid\.weight", "a LoCon with Tucker decomposition"),
    )
)
_LORA_READ = "LoRA files of Stable Diffusion 1 and 2 in the spellings of diffusers and kohya are read."
_XL = re.compile(r"(lora_te2_|text_encoder_2\.).*")
_NAME = re.compile(
    r"(?P<module>.+?)(?:"
    r"(?P<down>\.lora_A(?:\.default)?\.weight|\.lora_down\.weight|(?:\.lora|\.lora_linear_layer|_lora)\.down\.weight)"
    r"|(?P<up>\.lora_B(?:\.default)?\.weight|\.lora_up\.weight|(?:\.lora|\.lora_linear_layer|_lora)\.up\.weight)"
    r"|(?P<alpha>(?:_lora)?\.alpha)"
    r")"
)
_LISTED = 8  # names listed in an error message
_MOST = 10_000  # tensors in a file; a LoRA of every layer of Stable Diffusion 2 has 1,100
_MAX_LAYERS = 100  # in a text encoder
_ATTENTION = {  # old names of the projections, in diffusers' attention processors -> their modules
    "unet": {"to_out": "to_out.0"},
    "text_encoder": {"to_q": "q_proj", "to_k": "k_proj", "to_v": "v_proj", "to_out": "out_proj"},
}


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


@dataclass(frozen=True)
class Lora:
    """A LoRA file: updates by (component, module), spelling ("diffusers" or "kohya"), and metadata."""

    path: Path
    spelling: str
    updates: Mapping[tuple[str, str], Update]
    metadata: Mapping[str, str]


def read_lora(path: Path) -> Lora:
    """Read a LoRA file, or the one in a pipeline folder: only the header and the alphas.

    Raises SourceError for a damaged file, a file of another kind, and a LoRA that does not fit the models.
    """
    if path.is_dir() and (path / LORA_FILE).is_file():
        path = path / LORA_FILE
    if not path.is_file():
        raise SourceError(path, "no such file.", "Check the path; give a .safetensors file.")
    tensors, metadata = read_header(path)
    if len(tensors) > _MOST:
        raise SourceError(path, f"its {len(tensors)} tensors are more than any LoRA here has.", _LORA_READ)
    for pattern, what in (*OTHER_KINDS, (_XL, "a LoRA of Stable Diffusion XL")):
        if any(pattern.fullmatch(tensor.name) for tensor in tensors):
            raise SourceError(path, f"of {what}, which is not read here.", _LORA_READ)
    factors, strangers, kohya = _factors(path, tensors)
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
        alpha = _alpha(held.get("alpha"), configs.get(component), module, up.shape[1], path)
        updates[component, module] = Update(component, module, down, up, alpha)
    _check_shapes(path, updates)
    return Lora(path, "kohya" if kohya else "diffusers", updates, metadata)


def listed(names: Iterable[str]) -> str:
    """The first names, cut to 120 characters each, and the number of the others."""
    every = list(names)
    more = f" and {len(every) - _LISTED} more" if len(every) > _LISTED else ""
    return ", ".join(name[:120] for name in every[:_LISTED]) + more


def _factors(
    path: Path, tensors: Iterable[Tensor]
) -> tuple[dict[tuple[str, str], dict[str, Tensor]], list[str], bool]:
    """The tensors by (component, module) and role, the unmatched names, and whether kohya's names occur."""
    factors: dict[tuple[str, str], dict[str, Tensor]] = {}
    strangers, kohya = [], False
    for tensor in tensors:
        found = _NAME.fullmatch(tensor.name)
        place = _module(found["module"]) if found else None
        if found is None or place is None:
            strangers.append(tensor.name)
            continue
        role = next(role for role in ("down", "up", "alpha") if found[role])
        held = factors.setdefault(place, {})
        if role in held:
            raise SourceError(path, f"{held[role].name} and {tensor.name} are the same.", _LORA_READ)
        held[role] = tensor
        kohya = kohya or tensor.name.startswith("lora_")
    return factors, strangers, kohya


def _module(name: str) -> tuple[str, str] | None:
    """The component and the module of a name in any spelling; None if it matches no module."""
    if name.startswith("lora_"):
        name = name.replace("lora_te1_", "lora_te_", 1)
        for component, prefix in KOHYA.items():
            if name.startswith(prefix):
                module = _flat(component).get(name.removeprefix(prefix))
                return (component, module) if module else None
        return None
    component = next((c for c in KOHYA if name.startswith(f"{c}.")), "")
    name = name.removeprefix(f"{component}.").removeprefix("base_model.model.")
    component = component or "unet"  # files with only a UNet may omit the prefix
    head, dot, last = name.replace(".processor.", ".").rpartition(".")
    module = head + dot + _ATTENTION[component].get(last, last)
    module = (tables()[component].rename(f"{module}.weight") or "").removesuffix(".weight")
    return (component, module) if module in modules(component) else None


@cache
def modules(component: str) -> Mapping[str, Slot]:
    """Maps each module of a component that has a kernel, by its name in diffusers, to the kernel's slot.

    All versions have the same modules. For a text encoder the result has more layers than any model.
    """
    spec = next(spec for spec in specs() if spec.table.name == component)
    return {
        slot.target.removesuffix(".weight"): slot
        for slot in spec.slots(_MAX_LAYERS)
        if slot.variable.name == "kernel"
    }


@cache
def _flat(component: str) -> Mapping[str, str]:
    """Maps the kohya name of each module, without prefix, to the module."""
    return {module.replace(".", "_"): module for module in modules(component)}


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
