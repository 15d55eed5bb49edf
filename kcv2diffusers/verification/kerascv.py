"""KerasCV's own classes as the Keras side: `--reference keras-cv`."""

from __future__ import annotations

import gzip
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from kcv2diffusers.diffusion import Array
from kcv2diffusers.models.sampler import TextToImage
from kcv2diffusers.pipeline.tokenizer_files import BPE_NAME
from kcv2diffusers.verification.parts import known
from kcv2diffusers.verification.sides import Side

_HOME = "keras_cv.src.models.stable_diffusion"
_FILES = {
    "DiffusionModel": "diffusion_model",
    "DiffusionModelV2": "diffusion_model",
    "TextEncoder": "text_encoder",
    "TextEncoderV2": "text_encoder",
    "Decoder": "decoder",
    "ImageEncoder": "image_encoder",
}


def _get(module: str, name: str) -> Any:
    return getattr(import_module(f"{_HOME}.{module}"), name)


def build(side: Side, size: int) -> Any:
    """KerasCV's model of a part with random weights, for images of `size` pixels."""
    name = side.source.spec.keras_class
    return known(side.part).kerascv_model(_get(_FILES[name], name), side, size)


def drawing(
    sampler: TextToImage, version: str, size: int, steps: int, guidance: float
) -> Callable[[Sequence[str], Array, Callable[[Array], None]], Array]:
    """A function that generates images by `generate_image` of KerasCV's StableDiffusion.

    It uses the models and the vocabulary of `sampler`. One prompt and noise (1, size / 8, size / 8, 4) give
    an image (1, size, size, 3) uint8. The third argument of the function is called with the latents after
    each step.
    """
    name = "StableDiffusionV2" if version == "sd2" else "StableDiffusion"
    stable = _get("stable_diffusion", name)(size, size, jit_compile=False)
    stable._tokenizer = _tokenizer(sampler)
    stable._text_encoder = sampler.text_encoder

    def pictures(prompts: Sequence[str], noise: Array, observe: Callable[[Array], None]) -> Array:
        stable._diffusion_model = watched = _Watched(sampler.unet, observe)
        stable._decoder = _Before(sampler.decoder, observe)
        made = stable.generate_image(
            stable.encode_text(prompts[0]),
            negative_prompt="",
            num_steps=steps,
            unconditional_guidance_scale=guidance,
            diffusion_noise=noise[0],
        )
        assert watched.calls == 2 * steps
        return np.asarray(made)

    return pictures


class _Watched:
    """The UNet in KerasCV's loop, called twice per step.

    Its input latents are the result of the previous step.
    """

    def __init__(self, model: Any, observe: Callable[[Array], None]) -> None:
        self.model, self.observe, self.calls = model, observe, 0

    def predict_on_batch(self, given: Mapping[str, Any]) -> Any:
        if self.calls and self.calls % 2 == 0:
            self.observe(np.asarray(given["latent"]))
        self.calls += 1
        return self.model.predict_on_batch(given)


class _Before:
    """The decoder, whose input latents are the result of the last step."""

    def __init__(self, model: Any, observe: Callable[[Array], None]) -> None:
        self.model, self.observe = model, observe

    def predict_on_batch(self, latents: Any) -> Any:
        self.observe(np.asarray(latents))
        return self.model.predict_on_batch(latents)


def _tokenizer(sampler: TextToImage) -> Any:
    """KerasCV's SimpleTokenizer with the pipeline's merges and placeholder tokens."""
    files = sampler.tokenizer.files
    with TemporaryDirectory(prefix="kcv2diffusers-") as folder:
        path = Path(folder, BPE_NAME)
        path.write_bytes(gzip.compress("\n".join(["#version: 0.2", *files.merges]).encode()))
        tokenizer = _get("clip_tokenizer", "SimpleTokenizer")(str(path))
    if files.placeholder_tokens:
        tokenizer.add_tokens(list(files.placeholder_tokens))
    return tokenizer
