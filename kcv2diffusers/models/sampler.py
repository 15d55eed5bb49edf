"""Text to image by the sampling loop of KerasCV 0.9.0.

Tokens, timesteps and update rule are the same, so the same noise gives the same latents.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import keras
import numpy as np
from keras import ops

from kcv2diffusers.diffusion import (
    LATENT_CHANNELS,
    PIXELS_PER_LATENT,
    SD,
    Array,
    Schedule,
    timestep_embedding,
)
from kcv2diffusers.errors import Error
from kcv2diffusers.models.layers import Tensor
from kcv2diffusers.models.tokenizer import Tokenizer
from kcv2diffusers.progress import Progress

PROMPT_LENGTH = 77
"""Prompts of Stable Diffusion and KerasCV are padded to this many tokens, with the end token."""
GRANULARITY = 64
"""Heights and widths must be multiples of this: 8 pixels per latent, halved three times in the UNet."""


class GuidedStep(keras.Model):  # type: ignore[misc]
    """One denoising step with classifier-free guidance, as a Keras model so that each backend compiles it.

    The unconditional and the conditional prediction run as one batch of twice the size.
    """

    def __init__(self, unet: keras.Model, prediction_type: str) -> None:
        super().__init__(name="guided_step")
        self.unet, self.prediction_type = unet, prediction_type

    def call(self, inputs: dict[str, Tensor]) -> Tensor:
        latents = ops.cast(inputs["latents"], "float32")
        twice = ops.concatenate([latents, latents])
        predicted = self.unet(
            {"latent": twice, "timestep_embedding": inputs["embedding"], "context": inputs["context"]}
        )
        unconditional, conditional = ops.split(ops.cast(predicted, "float32"), 2)
        # One row of numbers per image, because predict_on_batch takes batched inputs only.
        scale, signal, signal_before = (inputs["numbers"][:, i, None, None, None] for i in range(3))
        guided = unconditional + scale * (conditional - unconditional)
        if self.prediction_type == "v_prediction":  # Salimans and Ho 2022, arXiv:2202.00512
            noise = ops.sqrt(signal) * guided + ops.sqrt(1 - signal) * latents
            picture = ops.sqrt(signal) * latents - ops.sqrt(1 - signal) * guided
        else:
            noise = guided
            picture = (latents - ops.sqrt(1 - signal) * noise) / ops.sqrt(signal)
        return ops.sqrt(1 - signal_before) * noise + ops.sqrt(signal_before) * picture


@dataclasses.dataclass
class TextToImage:
    """The three models and the tokenizer of a Stable Diffusion model, with the sampling loop.

    `prediction_type` is what the UNet predicts: "epsilon" or "v_prediction". `schedule` is the noise schedule
    it was trained with. `length` is the number of tokens that the text encoder takes. Raises Error for a UNet
    that cannot be sampled.
    """

    text_encoder: keras.Model
    unet: keras.Model
    decoder: keras.Model
    tokenizer: Tokenizer
    prediction_type: str = "epsilon"
    schedule: Schedule = SD
    length: int = PROMPT_LENGTH

    def __post_init__(self) -> None:
        self.schedule.check(self.prediction_type)
        self._step = GuidedStep(self.unet, self.prediction_type)

    def tokens(self, prompts: Sequence[str]) -> Array:
        """Token ids of each prompt, padded with the end token: (prompts, length) int32.

        Raises Error for a prompt with more than `length` tokens.
        """
        tokens = [self.tokenizer.encode_within(prompt, self.length) for prompt in prompts]
        padded = [ids + [self.tokenizer.end] * (self.length - len(ids)) for ids in tokens]
        return np.array(padded, dtype="int32")

    def encode_prompts(self, prompts: Sequence[str]) -> Array:
        """The text encoder's output for each prompt: (prompts, length, width)."""
        tokens = self.tokens(prompts)
        positions = np.broadcast_to(np.arange(self.length, dtype="int32"), tokens.shape)
        inputs = {"tokens": tokens, "positions": np.ascontiguousarray(positions)}
        return np.asarray(self.text_encoder.predict_on_batch(inputs))

    def sample(
        self,
        prompts: Sequence[str],
        noise: Array,
        *,
        negative_prompt: str = "",
        steps: int = 50,
        guidance_scale: float = 7.5,
        progress: Progress | None = None,
    ) -> Array:
        """Latents for `prompts`. Noise and latents are (prompts, height / 8, width / 8, 4) float32.

        `progress` is called after each step with its number and the number of steps.
        """
        context = self.encode_prompts([*[negative_prompt] * len(prompts), *prompts])
        return self.denoise(context, noise, steps=steps, guidance_scale=guidance_scale, progress=progress)

    def denoise(
        self,
        context: Array,
        noise: Array,
        *,
        steps: int = 50,
        guidance_scale: float = 7.5,
        progress: Progress | None = None,
        observe: Callable[[Array], None] | None = None,
    ) -> Array:
        """`sample` with encoded prompts: `context` holds the negative prompts' rows, then the prompts' rows.

        `observe` is called with the latents after each step.
        """
        timesteps, signal = self.schedule.timesteps(steps), self.schedule.alphas_cumprod
        latents = np.asarray(noise, dtype="float32")
        width = self.unet.input_shape[1][-1]
        for done, timestep in enumerate(reversed(timesteps), start=1):
            signal_before = signal[timesteps[steps - done - 1]] if done < steps else 1.0
            numbers = np.array([guidance_scale, signal[timestep], signal_before], dtype="float32")
            latents = self._step.predict_on_batch(
                {
                    "latents": latents,
                    "embedding": timestep_embedding(np.full(len(context), timestep), width),
                    "context": context,
                    "numbers": np.tile(numbers, (len(latents), 1)),
                }
            )
            if progress is not None:
                progress(done, steps)
            if observe is not None:
                observe(np.asarray(latents))
        return np.asarray(latents)

    def decode(self, latents: Array) -> Array:
        """Decode scaled latents to images (batch, height, width, 3) uint8, truncated as in KerasCV."""
        decoded = np.asarray(self.decoder.predict_on_batch(latents)).astype("float32")
        return np.clip((decoded + 1) / 2 * 255, 0, 255).astype("uint8")

    def __call__(
        self,
        prompts: Sequence[str],
        *,
        height: int = 512,
        width: int = 512,
        seed: int | None = None,
        negative_prompt: str = "",
        steps: int = 50,
        guidance_scale: float = 7.5,
        progress: Progress | None = None,
    ) -> Array:
        """Images (prompts, height, width, 3) uint8, one for each of `prompts`.

        `height` and `width` are in pixels, multiples of 64. A seed gives the same noise as KerasCV on the
        same Keras backend; noise differs between backends. `progress` is called after each step with its
        number and the number of steps. Raises Error for a size, a number of steps or a prompt that the models
        do not accept.
        """
        latents = self.sample(
            prompts,
            initial_noise(len(prompts), height, width, seed),
            negative_prompt=negative_prompt,
            steps=steps,
            guidance_scale=guidance_scale,
            progress=progress,
        )
        return self.decode(latents)


def check_size(height: int, width: int) -> None:
    """Raise Error for a size in pixels that the UNet cannot halve three times."""
    if height % GRANULARITY or width % GRANULARITY or min(height, width) < GRANULARITY:
        raise Error(f"{width}x{height} pixels: both sides must be multiples of {GRANULARITY}")


def initial_noise(batch: int, height: int, width: int, seed: int | None = None) -> Array:
    """Standard normal noise (batch, height / 8, width / 8, 4) float32, as KerasCV draws it from `seed`."""
    check_size(height, width)
    shape = (batch, height // PIXELS_PER_LATENT, width // PIXELS_PER_LATENT, LATENT_CHANNELS)
    return np.asarray(ops.convert_to_numpy(keras.random.normal(shape, seed=seed)))
