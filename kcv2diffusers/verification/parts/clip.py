"""A CLIP text encoder of Stable Diffusion 3: its penultimate hidden state, and its last one."""

from __future__ import annotations

from typing import Any

import numpy as np

from kcv2diffusers.verification.parts import Inputs
from kcv2diffusers.verification.request import Request
from kcv2diffusers.verification.sides import Side

LABELS = ()
DRAWS = True
LOOSE = None
_TEXTS = 2


def inputs(side: Side, size: int, rng: np.random.Generator) -> Inputs:
    """See `Adapter.inputs`."""
    dims = side.source.dims
    return {"tokens": rng.integers(0, dims["vocabulary"], (_TEXTS, dims["length"]))}


def keras_hub(model: Any, part: Any, given: Inputs) -> Any:
    """See `Adapter.keras_hub`."""
    import keras

    made = part({"token_ids": given["tokens"]}, training=False)
    return keras.ops.concatenate([made["intermediate_output"], made["sequence_output"]], axis=1)


def forward(model: Any, given: Inputs) -> Any:
    """See `Adapter.forward`."""
    import torch

    made = model(torch.from_numpy(given["tokens"]).long(), output_hidden_states=True)
    return torch.cat([made.hidden_states[-2], made.last_hidden_state], 1)


def kinds(side: Side, request: Request) -> list[str]:
    """See `Adapter.kinds`."""
    return ["stock", "epsilon"]
