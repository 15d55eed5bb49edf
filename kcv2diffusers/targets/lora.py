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
from kcv2diffusers.sources.tensor import Tensor, in_memory
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

    kohya stores alpha as a tensor. diffusers has it in the metadata, where it needs to be told.
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
    if spelling == "diffusers":
        metadata |= adapter_metadata(
            {place: update.rank for place, update in lora.updates.items()},
            {place: update.alpha for place, update in lora.updates.items()},
        )
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
    return in_memory("alpha", value, update.down.path)


def adapter_metadata(
    ranks: Mapping[tuple[str, str], int], alphas: Mapping[tuple[str, str], float]
) -> dict[str, str]:
    """Return PEFT's configs as diffusers stores them in the metadata.

    `ranks` and `alphas` are those of each module, by its component and name. The result is empty if all ranks
    are the same and each alpha is the rank: this is what diffusers assumes. For ranks that differ, not every
    version of diffusers assumes that alpha is the rank.
    """
    if len(set(ranks.values())) == 1 and ranks == alphas:
        return {}
    entries: dict[str, object] = {}
    for component in dict.fromkeys(component for component, _ in ranks):
        # PEFT also matches names by their suffix. transformers 5 has no names that begin with text_model.
        mine = {place[1].removeprefix("text_model."): place for place in ranks if place[0] == component}
        rank = Counter(ranks[place] for place in mine.values()).most_common(1)[0][0]
        alpha = Counter(alphas[place] for place in mine.values()).most_common(1)[0][0]
        config = {
            "r": rank,
            "lora_alpha": alpha,
            "rank_pattern": {name: ranks[place] for name, place in mine.items() if ranks[place] != rank},
            "alpha_pattern": {name: alphas[place] for name, place in mine.items() if alphas[place] != alpha},
            "target_modules": sorted(mine),
        }
        entries |= {f"{component}.{name}": value for name, value in config.items()}
    return {ADAPTER: json.dumps(entries, sort_keys=True)}
