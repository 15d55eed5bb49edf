"""The tensor names in LoRA files, and the modules of the models that they stand for.

- diffusers (PEFT) puts the factor after the name of its module:
  `unet.mid_block.attentions.0.proj_in.lora_A.weight`.
- kohya's scripts, and A1111 and ComfyUI with them, replace the dots by underscores:
  `lora_unet_mid_block_attentions_0_proj_in.lora_down.weight`.
- Some files have the modules of Stable Diffusion's original layout instead:
  `lora_unet_middle_block_1_proj_in.lora_down.weight`.

The weight maps have the modules and their names in both layouts.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache

from kcv2diffusers.maps.original import namings
from kcv2diffusers.maps.tables import Slot, specs, tables

KOHYA = {"unet": "lora_unet_", "text_encoder": "lora_te_"}
"""The prefix of kohya's names for each component."""
SPELLINGS = ("diffusers", "kohya")
"""The formats that are written."""
ORIGINAL = "original"
"""The format of files with the modules of the original layout. It is read but never written."""

_OTHER_PREFIXES = {  # prefixes of files that ComfyUI and SDXL trainers write -> those of kohya
    "lora_te1_": "lora_te_",
    "diffusion_model.": "lora_unet_",
    "text_encoders.clip_l.transformer.": "lora_te_",
    "text_encoders.clip_h.transformer.": "lora_te_",
}
_NAME = re.compile(
    r"(?P<module>.+?)(?:"
    r"(?P<down>\.lora_A(?:\.default)?\.weight|\.lora_down\.weight|(?:\.lora|\.lora_linear_layer|_lora)\.down\.weight)"
    r"|(?P<up>\.lora_B(?:\.default)?\.weight|\.lora_up\.weight|(?:\.lora|\.lora_linear_layer|_lora)\.up\.weight)"
    r"|(?P<alpha>(?:_lora)?\.alpha)"
    r")"
)
_ROLES = ("down", "up", "alpha")
_MAX_LAYERS = 100  # in a text encoder
_ATTENTION = {  # old names of the projections, in diffusers' attention processors -> their modules
    "unet": {"to_out": "to_out.0"},
    "text_encoder": {"to_q": "q_proj", "to_k": "k_proj", "to_v": "v_proj", "to_out": "out_proj"},
}


@dataclass(frozen=True, slots=True)
class Name:
    """What a tensor of a LoRA file is.

    `role` is "down", "up" or "alpha". It belongs to all `modules` of the `component`: to several where the
    original layout stores several layers as one, whose outputs are then divided among them in equal shares.
    `spelling` is "diffusers", "kohya" or "original".
    """

    component: str
    modules: tuple[str, ...]
    role: str
    spelling: str


def parse_name(text: str) -> Name | None:
    """Parse the name of a tensor in any spelling; None if it is of no known module."""
    if not (found := _NAME.fullmatch(text)):
        return None
    role = next(role for role in _ROLES if found[role])
    module = found["module"]
    for prefix, usual in _OTHER_PREFIXES.items():
        if module.startswith(prefix):
            module = usual + module.removeprefix(prefix).replace(".", "_")
    if module.startswith("lora_"):
        for component, prefix in KOHYA.items():
            if module.startswith(prefix) and (flat := _flat(component).get(module.removeprefix(prefix))):
                return Name(component, *flat[:1], role, flat[1])
        return None
    return _dotted(module, role)


def _dotted(name: str, role: str) -> Name | None:
    component = next((c for c in KOHYA if name.startswith(f"{c}.")), "")
    name = name.removeprefix(f"{component}.").removeprefix("base_model.model.")
    component = component or "unet"  # files with only a UNet may omit the prefix
    head, dot, last = name.replace(".processor.", ".").rpartition(".")
    module = head + dot + _ATTENTION[component].get(last, last)
    module = (tables()[component].rename(f"{module}.weight") or "").removesuffix(".weight")
    return Name(component, (module,), role, "diffusers") if module in modules(component) else None


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
def _flat(component: str) -> Mapping[str, tuple[tuple[str, ...], str]]:
    """Maps each name with underscores, without prefix, to its modules and its spelling."""
    shares: dict[str, dict[int, str]] = {}
    for naming in namings().get(component, {}).values():
        for module in modules(component):
            if place := naming.place(f"{module}.weight"):
                stored = place.name.removesuffix(".weight").removesuffix("_weight")  # .in_proj_weight
                shares.setdefault(stored.replace(".", "_"), {})[place.piece] = module
    original = {name: (tuple(of[n] for n in sorted(of)), ORIGINAL) for name, of in shares.items()}
    return original | {module.replace(".", "_"): ((module,), "kohya") for module in modules(component)}
