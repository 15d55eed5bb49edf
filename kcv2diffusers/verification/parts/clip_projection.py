"""The projection of a CLIP text encoder: the pooled embedding of its last hidden state."""

from __future__ import annotations

from typing import Any

import numpy as np

from kcv2diffusers.verification.parts import Inputs
from kcv2diffusers.verification.request import Request
from kcv2diffusers.verification.sides import Side

LABELS = ()
DRAWS = True
LOOSE = None
_TEXTS, _TOKENS = 2, 77


def inputs(side: Side, size: int, rng: np.random.Generator) -> Inputs:
    """Hidden states, and token ids whose largest is the end of the text; see `Adapter.inputs`."""
    tokens = rng.integers(0, 100, (_TEXTS, _TOKENS))
    tokens[:, 9] = 100
    return {"hidden": rng.standard_normal((_TEXTS, _TOKENS, side.source.dims["width"])), "tokens": tokens}


def keras_hub(model: Any, part: Any, given: Inputs) -> Any:
    """See `Adapter.keras_hub`."""
    return part(given["hidden"], given["tokens"], training=False)


def forward(model: Any, given: Inputs) -> Any:
    """As in transformers' `CLIPTextModelWithProjection`; see `Adapter.forward`."""
    import torch

    end = given["tokens"].argmax(-1)
    pooled = given["hidden"][np.arange(len(end)), end]
    return model.text_projection(torch.from_numpy(pooled))


def kinds(side: Side, request: Request) -> list[str]:
    """See `Adapter.kinds`."""
    return ["stock"]
