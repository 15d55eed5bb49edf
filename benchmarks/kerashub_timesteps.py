"""What timesteps in 0..1 do to a model trained with sigma * 1000: the DreamBooth example of keras.io.

    python benchmarks/kerashub_timesteps.py [--base-steps 4000] [--steps 400]

A small MMDiT of KerasHub is trained to draw latents of the tiny base, rightly, with five of its six objects.
Then it is trained on five pictures of the sixth, as DreamBooth does: once with the timesteps of the example,
once with sigma * 1000, and once the first again with sigma * 1000. Each draws with KerasHub's sampler from
the same noise. The table goes to .cache/kerashub-timesteps.md, the pictures to
docs/images/kerashub-timesteps.png.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

os.environ["KERAS_BACKEND"] = "torch"

import keras
import numpy as np
import torch
from interleaved import machine
from keras_hub.src.models.stable_diffusion_3.flow_match_euler_discrete_scheduler import (
    FlowMatchEulerDiscreteScheduler,
)
from keras_hub.src.models.stable_diffusion_3.mmdit import MMDiT

from kcv2diffusers import load_base
from kcv2diffusers.pictures import grid

ROOT = Path(__file__).parents[1]
PICTURE = ROOT / "docs" / "images" / "kerashub-timesteps.png"
OBJECTS = ("fox", "red car", "panda", "boat", "house", "rocket")
PLACES = ("in the snow", "in a meadow", "on a pink background", "on the beach", "at sunset", "at night")
SUBJECT = len(OBJECTS) - 1
COUNT, PHOTOS, DRAWN, SAMPLE_STEPS = 4, 5, 6, 28
WIDTH, BATCH, SHIFT = 48, 32, 3.0
Timesteps = Callable[[torch.Tensor], torch.Tensor]
RULES: dict[str, Timesteps] = {"0..1": lambda sigma: sigma, "sigma * 1000": lambda sigma: 1000 * sigma}


def latents(sampler: Any) -> np.ndarray:
    """Latents of every object in every place, (objects, pictures, 8, 8, 4)."""
    found = []
    for number, thing in enumerate(OBJECTS):
        prompts = [f"a {thing} {place}" for place in PLACES for _ in range(COUNT)]
        noise = np.random.default_rng(number).standard_normal((len(prompts), 8, 8, 4)).astype("float32")
        found.append(sampler.sample(prompts, noise, steps=15, guidance_scale=5.0))
    return np.stack(found)


class Trainer:
    """A small MMDiT whose condition is one fixed random embedding for each object."""

    def __init__(self) -> None:
        keras.utils.set_random_seed(0)
        self.model = MMDiT(
            2, 96, 4, 6, 8, latent_shape=(8, 8, 4), context_shape=(4, WIDTH), pooled_projection_shape=(WIDTH,)
        )
        rng = np.random.default_rng(1)
        self.context = torch.from_numpy(rng.standard_normal((len(OBJECTS), 4, WIDTH)).astype("float32"))
        self.pooled = torch.from_numpy(rng.standard_normal((len(OBJECTS), WIDTH)).astype("float32"))

    def predict(self, noisy: torch.Tensor, timesteps: torch.Tensor, things: torch.Tensor) -> torch.Tensor:
        return self.model(
            {
                "latent": noisy,
                "context": self.context[things],
                "pooled_projection": self.pooled[things],
                "timestep": timesteps[:, None],
            }
        )

    def train(
        self, data: torch.Tensor, shares: list[float], steps: int, rate: float, rule: Timesteps
    ) -> None:
        """`shares` is how often each object is drawn; the target is noise - latents, as in the example."""
        generator = torch.Generator().manual_seed(2)
        weights = [variable.value for variable in self.model.trainable_variables]
        optimizer = torch.optim.AdamW(weights, lr=rate, weight_decay=0.0)
        for _ in range(steps):
            things = torch.multinomial(torch.tensor(shares), BATCH, True, generator=generator)
            counts = torch.where(things == SUBJECT, PHOTOS, data.shape[1])
            clean = data[things, (torch.rand(BATCH, generator=generator) * counts).long()]
            sigma = torch.rand(BATCH, generator=generator)
            noise = torch.randn(clean.shape, generator=generator)
            s = sigma[:, None, None, None]
            predicted = self.predict((1 - s) * clean + s * noise, rule(sigma), things)
            loss = ((noise - clean - predicted) ** 2).mean()
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(weights, 1.0)
            optimizer.step()

    @torch.no_grad()
    def error(self, data: torch.Tensor, thing: int) -> float:
        """Mean squared error of the velocity at the sampler's timesteps, on pictures not trained on."""
        generator, total = torch.Generator().manual_seed(3), []
        for sigma in sigmas()[:-1]:
            clean = data[thing, PHOTOS:]
            noise = torch.randn(clean.shape, generator=generator)
            things = torch.full((len(clean),), thing)
            at = torch.full((len(clean),), float(sigma) * 1000)
            predicted = self.predict((1 - sigma) * clean + sigma * noise, at, things)
            total.append(float(((noise - clean - predicted) ** 2).mean()))
        return float(np.mean(total))

    @torch.no_grad()
    def draw(self, thing: int) -> np.ndarray:
        """Latents by KerasHub's Euler steps, (DRAWN, 8, 8, 4)."""
        x = torch.randn((DRAWN, 8, 8, 4), generator=torch.Generator().manual_seed(4))
        steps = sigmas()
        for sigma, following in pairwise(steps):
            at = torch.full((DRAWN,), float(sigma) * 1000)
            x = x + (following - sigma) * self.predict(x, at, torch.full((DRAWN,), thing))
        return x.numpy()


def sigmas() -> np.ndarray:
    scheduler = FlowMatchEulerDiscreteScheduler(shift=SHIFT, dtype="float32")
    scheduler.set_sigmas(SAMPLE_STEPS)
    return keras.ops.convert_to_numpy(scheduler.sigmas)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--base-steps", type=int, default=4000)
    parser.add_argument("--steps", type=int, default=400)
    args = parser.parse_args()
    sampler = load_base("tiny").sampler()
    data = torch.from_numpy(latents(sampler))
    trainer = Trainer()
    trainer.train(data, [1.0] * SUBJECT + [0.0], args.base_steps, 1e-3, RULES["sigma * 1000"])
    base = trainer.model.get_weights()
    # As DreamBooth: half of each batch is the subject, half pictures of the class.
    shares = [1.0 / SUBJECT] * SUBJECT + [1.0]
    rows, sheets, captions = [], [], []

    def look(name: str) -> None:
        errors = trainer.error(data, SUBJECT), np.mean([trainer.error(data, n) for n in range(SUBJECT)])
        rows.append(f"| {name} | {errors[0]:.3f} | {errors[1]:.3f} |")
        print(rows[-1], flush=True)
        for thing in (SUBJECT, 0):
            sheets.append(sampler.decode(trainer.draw(thing)))
            captions.extend([name if n == 0 else "" for n in range(DRAWN)])

    def tune(rule: str) -> None:
        trainer.train(data, shares, args.steps, 3e-4, RULES[rule])

    look("before")
    tune("0..1")
    look("as the example: 0..1")
    tune("sigma * 1000")
    look("then sigma * 1000")
    trainer.model.set_weights(base)
    tune("sigma * 1000")
    look("sigma * 1000")
    table = [
        f"{machine()}; an MMDiT of {trainer.model.count_params() / 1e6:.2f} M parameters, {args.base_steps} "
        f"steps on five objects, then {args.steps} on {PHOTOS} pictures of a sixth. Mean squared error of "
        "the predicted velocity at the timesteps of the sampler, on pictures that no training saw:",
        "",
        "| trained with timesteps | the subject | the other objects |",
        "|---|--:|--:|",
        *rows,
    ]
    (ROOT / ".cache").mkdir(exist_ok=True)
    (ROOT / ".cache" / "kerashub-timesteps.md").write_text("\n".join(table) + "\n")
    sheet = grid(np.concatenate(sheets), 2 * DRAWN, captions, scale=1)
    sheet.quantize(128).save(PICTURE, optimize=True)
    print(f"{PICTURE.relative_to(ROOT)}: {PICTURE.stat().st_size / 1e3:.0f} kB")


if __name__ == "__main__":
    main()
