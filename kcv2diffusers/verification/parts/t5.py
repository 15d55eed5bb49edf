"""T5's encoder."""

from __future__ import annotations

from typing import Any

import numpy as np

from kcv2diffusers.verification.parts import Inputs
from kcv2diffusers.verification.request import Request
from kcv2diffusers.verification.sides import Side

LABELS = ()
DRAWS = True
LOOSE = "gelu"
_TEXTS, _TOKENS = 2, 77


def inputs(side: Side, size: int, rng: np.random.Generator) -> Inputs:
    """See `Adapter.inputs`."""
    return {"tokens": rng.integers(0, side.source.dims["vocabulary"], (_TEXTS, _TOKENS))}


def keras_hub(model: Any, part: Any, given: Inputs) -> Any:
    """Without a mask, as in KerasHub's sampler and in diffusers; see `Adapter.keras_hub`."""
    tokens = given["tokens"]
    return part({"token_ids": tokens, "padding_mask": np.ones_like(tokens)}, training=False)


def forward(model: Any, given: Inputs) -> Any:
    """See `Adapter.forward`."""
    import torch

    return model(torch.from_numpy(given["tokens"]).long())[0]


def kinds(side: Side, request: Request) -> list[str]:
    """See `Adapter.kinds`."""
    return ["stock", "gelu"]
