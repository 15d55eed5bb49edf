"""The diffusers side of a comparison: the stock pipeline, started where KerasCV's sampler starts.

Given the same noise and KerasCV's integer timesteps, the pipeline's `EulerDiscreteScheduler` makes the steps
of KerasCV's sampler, so that pictures differ only by what the models compute.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from os import PathLike
from typing import Any

import numpy as np

from kcv2diffusers.errors import MissingExtra
from kcv2diffusers.schedule import Array, sampling_timesteps


def replay(
    pipeline: str | PathLike[str],
    prompts: Sequence[str],
    noise: Array,
    *,
    negative_prompt: str = "",
    steps: int = 50,
    guidance_scale: float = 7.5,
    tanh_gelu: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> Array:
    """Pictures (prompts, height, width, 3) uint8 by `StableDiffusionPipeline` from folder `pipeline`.

    `noise` is (prompts, height / 8, width / 8, 4) float32. `tanh_gelu` gives the UNet KerasCV's approximation
    of the GELU in place of the exact one. Fractions of colours are cut off, as KerasCV does.
    """
    try:
        import torch
        from diffusers import StableDiffusionPipeline
        from diffusers.models.activations import GEGLU
    except ModuleNotFoundError as error:
        raise MissingExtra(str(error.name), "diffusers") from error

    stock: Any = StableDiffusionPipeline
    pipe = stock.from_pretrained(pipeline, local_files_only=True)
    pipe.set_progress_bar_config(disable=True)
    if tanh_gelu:
        for module in pipe.unet.modules():
            if isinstance(module, GEGLU):
                setattr(module, "gelu", partial(torch.nn.functional.gelu, approximate="tanh"))  # noqa: B010

    def step_end(_: Any, step: int, __: Any, values: dict[str, Any]) -> dict[str, Any]:
        if progress is not None:
            progress(step + 1, steps)
        return values

    images = pipe(
        prompt=list(prompts),
        negative_prompt=[negative_prompt] * len(prompts),
        latents=torch.from_numpy(np.ascontiguousarray(noise.transpose(0, 3, 1, 2))),
        timesteps=sampling_timesteps(steps)[::-1].tolist(),
        guidance_scale=guidance_scale,
        output_type="np",
        callback_on_step_end=step_end,
    ).images
    return np.asarray(images * 255).astype("uint8")
