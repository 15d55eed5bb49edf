"""CLIP's text encoder."""

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


def build(side: Side, request: Request) -> Any:
    """See `Adapter.build`."""
    from kcv2diffusers.models import build_text_encoder
    from kcv2diffusers.models.base import text_encoder_config

    return build_text_encoder(text_encoder_config(side.source, side.config))


def kerascv_model(cls: Any, side: Side, size: int) -> Any:
    """KerasCV's text encoder; see `Adapter.kerascv_model`.

    An SD2 text encoder whose config states "gelu" gets the exact GELU, as up to keras-cv 0.6.0.
    """
    dims = side.source.dims
    model = cls(dims["length"], dims["vocabulary"], download_weights=False)
    if side.source.version == "sd2" and side.config.get("hidden_act", "gelu") == "gelu":
        from kcv2diffusers.models.layers import ACTIVATIONS

        for layer in model.layers:
            if hasattr(layer, "clip_attn"):
                layer.activation = ACTIVATIONS["exact"]
    return model


def keras_inputs(side: Side, given: Inputs) -> Any:
    """See `Adapter.keras_inputs`."""
    tokens = given["tokens"]
    return [tokens, np.tile(np.arange(tokens.shape[1], dtype="int32"), (len(tokens), 1))]


def forward(model: Any, given: Inputs) -> Any:
    """See `Adapter.forward`."""
    import torch

    return model(torch.from_numpy(given["tokens"]).long())[0]


def kinds(side: Side, request: Request) -> list[str]:
    """See `Adapter.kinds`."""
    return ["stock"]
