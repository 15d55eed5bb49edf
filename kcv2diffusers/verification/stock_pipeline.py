"""The stock diffusers pipeline, started from the same latents as KerasCV's sampler.

With the same noise and KerasCV's integer timesteps, the pipeline's `EulerDiscreteScheduler` takes the same
steps as KerasCV's sampler. Images then differ only by what the models compute.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np

from kcv2diffusers.diffusion import Array
from kcv2diffusers.errors import MissingExtra
from kcv2diffusers.pipeline.scheduler import SCHEDULER, schedule_of
from kcv2diffusers.progress import Progress

KERASCV_EPSILON = 1e-5  # in every group normalisation; diffusers: 1e-6 in transformer blocks and the VAE


def replay(
    pipeline: str | PathLike[str],
    prompts: Sequence[str],
    noise: Array,
    *,
    tanh_gelu: bool = False,
    negative_prompt: str = "",
    steps: int = 50,
    guidance_scale: float = 7.5,
    progress: Progress | None = None,
) -> Array:
    """Images (prompts, height, width, 3) uint8 by `StableDiffusionPipeline` from folder `pipeline`.

    `noise` is (prompts, height / 8, width / 8, 4) float32. With `tanh_gelu` the UNet uses KerasCV's tanh
    approximation of GELU instead of the exact one. `progress` is called after each step with its number and
    the number of steps. Raises MissingExtra if diffusers is not installed.
    """
    pipe = load(pipeline)
    with kerascv_gelu(pipe.unet) if tanh_gelu else nullcontext():
        return draw(
            pipe,
            prompts,
            noise,
            negative_prompt=negative_prompt,
            steps=steps,
            guidance_scale=guidance_scale,
            progress=progress,
        )


def load(pipeline: str | PathLike[str], variant: str | None = None) -> Any:
    """The `StableDiffusionPipeline` of a folder in float32, without its safety checker.

    Pickled files are never loaded. Raises MissingExtra if diffusers is not installed.
    """
    try:
        import torch  # noqa: F401  (without it diffusers has only a dummy)
        from diffusers import EulerDiscreteScheduler, StableDiffusionPipeline
    except ModuleNotFoundError as error:
        raise MissingExtra(str(error.name), "diffusers") from error

    stock: Any = StableDiffusionPipeline
    pipe = stock.from_pretrained(
        pipeline,
        variant=variant,
        local_files_only=True,
        use_safetensors=True,
        safety_checker=None,
        feature_extractor=None,
        image_encoder=None,
    )
    pipe.set_progress_bar_config(disable=True)
    for model in (pipe.unet, pipe.vae, pipe.text_encoder):
        in_float32(model)
    if type(pipe.scheduler) is not EulerDiscreteScheduler:  # only Euler visits timesteps as KerasCV does
        scheduler: Any = EulerDiscreteScheduler
        pipe.scheduler = scheduler.from_config(pipe.scheduler.config, timestep_spacing="leading")
    return pipe


def in_float32(model: Any) -> Any:
    """A loaded torch model in float32.

    diffusers loads in float32. transformers loads in the dtype of the model's config.
    """
    import torch

    return model if model.dtype == torch.float32 else model.to(torch.float32)


def tokens(pipe: Any, prompts: Sequence[str]) -> Array:
    """The token ids of prompts, (prompts, tokens)."""
    text = pipe.tokenizer(
        list(prompts),
        padding="max_length",
        max_length=pipe.tokenizer.model_max_length,
        truncation=True,
        return_tensors="np",
    )
    ids: Array = text.input_ids
    return ids


def draw(
    pipe: Any,
    prompts: Sequence[str],
    noise: Array,
    *,
    negative_prompt: str = "",
    steps: int = 50,
    guidance_scale: float = 7.5,
    progress: Progress | None = None,
    observe: Callable[[Array], None] | None = None,
) -> Array:
    """Images (prompts, height, width, 3) uint8 by a loaded pipeline from `noise`, as in `replay`.

    Colour values are truncated, as in KerasCV. `progress` is called with the number of steps done and in
    total. `observe` is called with the latents after each step, (prompts, height / 8, width / 8, 4), in
    KerasCV's scale.
    """
    import torch

    def step_end(_: Any, step: int, __: Any, values: dict[str, Any]) -> dict[str, Any]:
        if progress is not None:
            progress(step + 1, steps)
        if observe is not None:
            # Euler's latents are image + sigma * noise; KerasCV's have about unit variance.
            sigma = float(pipe.scheduler.sigmas[step + 1])
            observe((values["latents"] / (sigma**2 + 1) ** 0.5).permute(0, 2, 3, 1).numpy())
        return values

    schedule = schedule_of(pipe.scheduler.config, Path(SCHEDULER["_class_name"]))
    timesteps = schedule.timesteps(steps)[::-1].tolist()
    pipe.scheduler.set_timesteps(timesteps=timesteps)
    # In Euler's scale, KerasCV's initial noise of variance 1 is multiplied by sqrt(sigma^2 + 1). The pipeline
    # multiplies by init_noise_sigma, which is this factor or, depending on timestep_spacing, sigma.
    unit = (pipe.scheduler.sigmas.max() ** 2 + 1) ** 0.5 / pipe.scheduler.init_noise_sigma
    images = pipe(
        prompt=list(prompts),
        negative_prompt=[negative_prompt] * len(prompts),
        latents=torch.from_numpy(np.ascontiguousarray(noise.transpose(0, 3, 1, 2))) * unit,
        timesteps=timesteps,
        guidance_scale=guidance_scale,
        output_type="np",
        callback_on_step_end=step_end,
    ).images
    return np.asarray(images * 255).astype("uint8")


@contextmanager
def kerascv_gelu(model: Any) -> Iterator[None]:
    """Within this block, the GEGLU layers of a torch model use KerasCV's tanh approximation of GELU."""
    from diffusers.models.activations import GEGLU
    from torch.nn.functional import gelu

    gated: list[Any] = [module for module in model.modules() if isinstance(module, GEGLU)]
    for module in gated:
        module.gelu = partial(gelu, approximate="tanh")
    try:
        yield
    finally:
        for module in gated:
            del module.gelu  # restores the method of the class


@contextmanager
def kerascv_epsilon(model: Any) -> Iterator[None]:
    """Within this block, the group normalisations of a torch model use KerasCV's epsilon."""
    from torch.nn import GroupNorm

    before = {module: module.eps for module in model.modules() if isinstance(module, GroupNorm)}
    for module in before:
        module.eps = KERASCV_EPSILON
    try:
        yield
    finally:
        for module, eps in before.items():
            module.eps = eps
