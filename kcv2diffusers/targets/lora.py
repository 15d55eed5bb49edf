"""LoRA files with the tensor names of diffusers or of kohya. The factors are copied bit for bit."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from kcv2diffusers.sources.lora import ADAPTER, Lora, Update
from kcv2diffusers.sources.lora_names import KOHYA
from kcv2diffusers.sources.tensor import Tensor
from kcv2diffusers.targets.safetensors import Entry, Stored, write_stored
from kcv2diffusers.targets.transfer import Job

WRITTEN = "kcv2diffusers.lora"
"""Metadata entry that identifies files written by this package."""
_DIFFUSERS = ("lora_A.weight", "lora_B.weight")
_KOHYA = ("lora_down.weight", "lora_up.weight")


@dataclass(frozen=True)
class LoraPlan:
    """The tensors and metadata of a LoRA file to write."""

    tensors: list[Stored]
    metadata: dict[str, str]

    @property
    def nbytes(self) -> int:
        """Total size of the tensors in bytes."""
        return sum(tensor.nbytes for tensor in self.tensors)


def lora_plan(lora: Lora, spelling: str) -> LoraPlan:
    """Return the tensors of `lora` in their stored dtypes, named as in `spelling` ("diffusers" or "kohya").

    kohya stores alpha as a tensor. diffusers assumes that alpha equals the rank; if any alpha differs, PEFT's
    config is written into the metadata.
    """
    metadata = {name: text for name, text in lora.metadata.items() if name not in ("format", ADAPTER)}
    metadata[WRITTEN] = spelling
    tensors: list[Stored] = []
    for update in lora.updates.values():
        if spelling == "kohya":
            name = KOHYA[update.component] + update.module.replace(".", "_")
            down, up = (f"{name}.{factor}" for factor in _KOHYA)
            tensors.append(_stored(f"{name}.alpha", _alpha(update)))
        else:
            down, up = (f"{update.component}.{update.module}.{factor}" for factor in _DIFFUSERS)
        tensors += [_stored(down, update.down), _stored(up, update.up)]
    if spelling == "diffusers" and any(u.alpha != u.rank for u in lora.updates.values()):
        config = adapter_config(
            {key: update.rank for key, update in lora.updates.items()},
            {key: update.alpha for key, update in lora.updates.items()},
        )
        metadata[ADAPTER] = json.dumps(config, sort_keys=True)
    # Larger dtypes come first, so that each tensor is aligned to its item size.
    return LoraPlan(sorted(tensors, key=lambda tensor: -tensor.dtype.itemsize), metadata)


def write_lora(path: Path, plan: LoraPlan) -> list[Job]:
    """Allocate the file, write its header, and return the jobs that fill it."""
    return write_stored(path, plan.tensors, plan.metadata)


def _stored(name: str, tensor: Tensor) -> Stored:
    return Stored(name, tensor.shape, tensor.dtype, (Entry(name, tensor.shape, tensor, None),))


def _alpha(update: Update) -> Tensor:
    """Return alpha as a 0-d tensor, in the dtype of the factors if that can represent it, else float32."""
    value = np.asarray(update.alpha, update.down.dtype)
    if float(value) != update.alpha:
        value = np.asarray(update.alpha, np.float32)
    return Tensor("alpha", (), value.dtype, update.down.path, None, load=lambda: value)


def adapter_config(
    ranks: Mapping[tuple[str, str], int], alphas: Mapping[tuple[str, str], float]
) -> dict[str, object]:
    """Return PEFT's configs as diffusers stores them in the metadata.

    `ranks` and `alphas` are those of each module, by its component and name.
    """
    entries: dict[str, object] = {}
    for component in KOHYA:
        # PEFT also matches names by their suffix. transformers 5 has no names that begin with text_model.
        mine = {key[1].removeprefix("text_model."): key for key in ranks if key[0] == component}
        if not mine:
            continue
        rank = Counter(ranks[key] for key in mine.values()).most_common(1)[0][0]
        alpha = Counter(alphas[key] for key in mine.values()).most_common(1)[0][0]
        config = {
            "r": rank,
            "lora_alpha": alpha,
            "rank_pattern": {name: ranks[key] for name, key in mine.items() if ranks[key] != rank},
            "alpha_pattern": {name: alphas[key] for name, key in mine.items() if alphas[key] != alpha},
            "target_modules": sorted(mine),
        }
        entries |= {f"{component}.{name}": value for name, value in config.items()}
    return entries
