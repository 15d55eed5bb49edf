"""Sample images of a run during training."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from kcv2diffusers.dreambooth.config import Config
from kcv2diffusers.dreambooth.memory import drawing_advice, memory_errors
from kcv2diffusers.models.sampler import TextToImage, initial_noise
from kcv2diffusers.pictures import grid


@dataclass
class Drawings:
    """Sample images of the configured prompts, from the same noise each time.

    `context` is the text encoder's output for the prompts. It is required once `sampler.text_encoder` has
    been removed to free memory.
    """

    config: Config
    sampler: TextToImage
    size: int
    context: np.ndarray[Any, Any] | None = None

    def encode(self) -> np.ndarray[Any, Any]:
        """Compute the value for `context`; needs the text encoder."""
        prompts = self.config.sample_prompt
        return self.sampler.encode_prompts([*[""] * len(prompts), *prompts])

    def draw(self, step: int) -> None:
        """Save a grid of sample images in the run's folder, if there are prompts."""
        prompts = self.config.sample_prompt
        if not prompts:
            return
        noise = initial_noise(len(prompts), self.size, self.size, self.config.seed)
        without, with_prompts = np.split(self.encode() if self.context is None else self.context, 2)
        at_once = self.config.sample_batch_size or self.config.batch_size
        drawn = []
        for first in range(0, len(prompts), at_once):
            some = slice(first, first + at_once)
            with memory_errors(lambda: drawing_advice(at_once)):
                latents = self.sampler.denoise(
                    np.concatenate([without[some], with_prompts[some]]),
                    noise[some],
                    steps=self.config.sample_steps,
                    guidance_scale=self.config.guidance_scale,
                )
                drawn.append(self.sampler.decode(latents))
        path = samples(Path(self.config.out), step)
        path.parent.mkdir(parents=True, exist_ok=True)
        images = np.concatenate(drawn)
        grid(images, min(4, len(images)), prompts, scale=max(1, 256 // self.size)).save(path)


def samples(out: Path, step: int) -> Path:
    """The path of the sample images after `step` steps of the run in `out`."""
    return out / "samples" / f"step-{step:06}.png"
