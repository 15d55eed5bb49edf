"""diffusers' own Stable Diffusion 3 pipeline, started from the same noise as KerasHub's sampler.

Its `FlowMatchEulerDiscreteScheduler` has the same sigmas, so pictures differ only by what the models compute.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np

from kcv2diffusers.diffusion import Array
from kcv2diffusers.pipeline_files import MODEL_INDEX
from kcv2diffusers.sources.diffusers_pipeline import read_json
from kcv2diffusers.verification.stock_pipeline import in_float32

TOKENS, T5_TOKENS = 77, 256
"""The number of tokens for CLIP, and for T5: the default in diffusers."""


def load(pipeline: str | PathLike[str], variant: str | None = None) -> Any:
    """The `StableDiffusion3Pipeline` of a folder in float32. Pickled files are never loaded."""
    from diffusers import StableDiffusion3Pipeline

    stock: Any = StableDiffusion3Pipeline
    index = read_json(Path(pipeline) / MODEL_INDEX)
    without = {name: None for name, value in index.items() if value == [None, None]}
    pipe = stock.from_pretrained(
        pipeline, variant=variant, local_files_only=True, use_safetensors=True, **without
    )
    pipe.set_progress_bar_config(disable=True)
    for model in (pipe.transformer, pipe.vae, pipe.text_encoder, pipe.text_encoder_2, pipe.text_encoder_3):
        if model is not None:
            in_float32(model)
    return pipe


def tokens(pipe: Any, prompts: Sequence[str]) -> Array:
    """The ids of both CLIP tokenizers side by side, (prompts, 2 * 77)."""
    both = [
        tokenizer(
            list(prompts), padding="max_length", max_length=TOKENS, truncation=True, return_tensors="np"
        )
        for tokenizer in (pipe.tokenizer, pipe.tokenizer_2)
    ]
    return np.concatenate([found.input_ids for found in both], axis=1)


def draw(
    pipe: Any,
    prompts: Sequence[str],
    noise: Array,
    *,
    steps: int,
    guidance_scale: float,
    observe: Callable[[Array], None],
) -> Array:
    """Images (prompts, height, width, 3) uint8 by a loaded pipeline.

    `noise` is (prompts, height / 8, width / 8, channels) float32.
    Without T5, KerasHub pads the context with as many zeros as CLIP has tokens. Colour values are rounded, as
    in KerasHub. `observe` is called with the latents after each step, in the shape of `noise`.
    """
    import torch

    def step_end(_: Any, __: int, ___: Any, values: dict[str, Any]) -> dict[str, Any]:
        observe(values["latents"].permute(0, 2, 3, 1).numpy())
        return values

    images = pipe(
        prompt=list(prompts),
        negative_prompt=[""] * len(prompts),
        latents=torch.from_numpy(np.ascontiguousarray(noise.transpose(0, 3, 1, 2))),
        height=8 * noise.shape[1],
        width=8 * noise.shape[2],
        num_inference_steps=steps,
        guidance_scale=guidance_scale,
        max_sequence_length=TOKENS if pipe.text_encoder_3 is None else T5_TOKENS,
        output_type="np",
        callback_on_step_end=step_end,
    ).images
    return np.asarray(np.round(images * 255)).astype("uint8")
