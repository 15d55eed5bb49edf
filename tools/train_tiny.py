"""Train the tiny base that ships in kcv2diffusers/tiny: `python tools/train_tiny.py --help`.

Stages, each of which continues where an interruption left it: the VAE on pictures of `tiny_pictures`; the UNet
and text encoder on the VAE's latents; measuring; export. Every step draws from a generator seeded by its number,
so an interrupted run goes on as an uninterrupted one would.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path

os.environ["KERAS_BACKEND"] = "torch"  # the fastest of the three on a CPU at these sizes

import keras
import numpy as np
import tiny_pictures
import torch

from kcv2diffusers.models import (
    LATENT_SCALE,
    ModelConfig,
    TextEncoderConfig,
    UNetConfig,
    VAEConfig,
    build_decoder,
    build_image_encoder,
    build_text_encoder,
    build_unet,
)

SEED = 20240
VAE = VAEConfig(widths=(24, 48, 64, 64), norm_groups=8)


class Trainer:
    """AdamW with an exponential moving average of the weights, and a state file that is always whole.

    The learning rate warms up over 100 steps, stays, and falls linearly to zero over the last third.
    """

    def __init__(self, models: Sequence[keras.Model], state: Path, steps: int, lr: float, decay: float) -> None:
        self.weights = [w.value for model in models for w in model.trainable_variables]
        self.average = [w.detach().clone() for w in self.weights]
        self.optimizer = torch.optim.AdamW(self.weights, lr=lr, betas=(0.9, 0.99), weight_decay=0.01)
        self.state, self.steps, self.lr, self.decay, self.step = state, steps, lr, decay, 0
        if state.exists():
            saved = torch.load(state, weights_only=True)
            self.step = saved["step"]
            self.optimizer.load_state_dict(saved["optimizer"])
            _copy(saved["weights"], self.weights)
            _copy(saved["average"], self.average)

    def save(self) -> None:
        """Replace the state file in one go."""
        part = self.state.with_suffix(".part")
        saved = {"step": self.step, "weights": self.weights, "average": self.average}
        torch.save({**saved, "optimizer": self.optimizer.state_dict()}, part)
        part.replace(self.state)

    def run(self, loss: Callable[[int], torch.Tensor], report: Callable[[], str], every: int) -> None:
        """Take the remaining steps of `loss(step)`; every `every` steps print `report()` on averaged weights."""
        started = saved = time.monotonic()
        losses = []
        while self.step < self.steps:
            rate = min(1.0, (self.step + 1) / 100, 3 * (self.steps - self.step) / self.steps)
            for group in self.optimizer.param_groups:
                group["lr"] = self.lr * rate
            value = loss(self.step)
            self.optimizer.zero_grad()
            value.backward()
            torch.nn.utils.clip_grad_norm_(self.weights, 1.0)
            self.optimizer.step()
            self.step += 1
            decay = min(self.decay, self.step / (self.step + 10))
            torch._foreach_lerp_(self.average, [w.detach() for w in self.weights], 1 - decay)
            losses.append(float(value))
            if self.step % 50 == 0:
                pace, started = (time.monotonic() - started) / len(losses), time.monotonic()
                print(f"{self.state.stem} {self.step}/{self.steps} loss {np.mean(losses):.4f} {pace:.2f} s/step", flush=True)
                losses = []
            if self.step % every == 0 or self.step == self.steps:
                self.swap()
                print(f"{self.state.stem} {self.step} {report()}", flush=True)
                self.swap()
            if time.monotonic() - saved > 120 or self.step == self.steps:
                self.save()
                saved = time.monotonic()

    def swap(self) -> None:
        """Exchange the weights in the models with their moving averages."""
        held = [w.detach().clone() for w in self.weights]
        _copy(self.average, self.weights)
        _copy(held, self.average)


def _copy(source: Sequence[torch.Tensor], target: Sequence[torch.Tensor]) -> None:
    with torch.no_grad():
        torch._foreach_copy_(list(target), list(source))


def pictures(
    count: int, seed: Sequence[int], unseen: bool = False
) -> tuple[np.ndarray, list[str], list[tiny_pictures.Concept]]:
    """`count` pictures (count, 64, 64, 3) uint8 with their captions and concepts."""
    rng = np.random.default_rng(seed)
    concepts = [tiny_pictures.sample_concept(rng, unseen) for _ in range(count)]
    images = np.stack([tiny_pictures.draw(concept, rng) for concept in concepts])
    return images, [tiny_pictures.caption(concept, rng) for concept in concepts], concepts


def to_tensor(images: np.ndarray) -> torch.Tensor:
    """uint8 pictures to float32 in -1..1."""
    return torch.from_numpy(images).float() / 127.5 - 1


def to_uint8(images: torch.Tensor) -> np.ndarray:
    """The inverse of `to_tensor`, rounded and clipped."""
    return ((images + 1) * 127.5).round().clamp(0, 255).byte().numpy()


def psnr(images: np.ndarray, others: np.ndarray) -> float:
    """Mean over pictures of the peak signal-to-noise ratio in decibels."""
    error = ((images.astype("float32") - others.astype("float32")) ** 2).mean((1, 2, 3))
    return float(np.mean(10 * np.log10(255**2 / np.maximum(error, 1e-6))))


def train_vae(folder: Path, steps: int) -> tuple[keras.Model, keras.Model]:
    """Encoder (with both moments) and decoder, trained on pictures, as averaged over the last steps.

    The loss is L1 and L2 over pixels with a KL term just strong enough to keep the decoder at ease with latents
    that are slightly off, as a diffusion model's are.
    """
    keras.utils.set_random_seed(SEED)
    encoder, decoder = build_image_encoder(VAE, moments=True), build_decoder(VAE)
    trainer = Trainer([encoder, decoder], folder / "vae.pt", steps, lr=2e-3, decay=0.995)
    held_out = to_tensor(pictures(256, (SEED, 1), unseen=True)[0])

    def loss(step: int) -> torch.Tensor:
        images = to_tensor(pictures(8, (SEED, 2, step))[0])
        mean, log_variance = encoder(images).chunk(2, dim=-1)
        log_variance = log_variance.clamp(-20, 10)
        noise = torch.randn(mean.shape, generator=torch.Generator().manual_seed(step))
        decoded = decoder((mean + noise * (log_variance / 2).exp()) * LATENT_SCALE)
        kl = (mean**2 + log_variance.exp() - 1 - log_variance).mean() / 2
        return (decoded - images).abs().mean() + 2 * ((decoded - images) ** 2).mean() + 1e-3 * kl

    @torch.no_grad()
    def report() -> str:
        means, decoded = [], []
        for images in held_out.split(32):
            means.append(encoder(images)[..., :4])
            decoded.append(to_uint8(decoder(means[-1] * LATENT_SCALE)))
        shown = np.concatenate([to_uint8(held_out[:20]), np.concatenate(decoded)[:20]])
        tiny_pictures.grid(shown, 10).save(folder / "vae.png")
        deviation = torch.cat(means).std(dim=(0, 1, 2)).numpy().round(2)
        return f"held-out PSNR {psnr(to_uint8(held_out), np.concatenate(decoded)):.2f} dB, latent deviation {deviation}"

    trainer.run(loss, report, every=250)
    trainer.swap()
    return encoder, decoder


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="where state, log pictures and the result go")
    parser.add_argument("--vae-steps", type=int, default=4000)
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    arguments.folder.mkdir(parents=True, exist_ok=True)
    (arguments.folder / "pid").write_text(str(os.getpid()))
    train_vae(arguments.folder, arguments.vae_steps)


if __name__ == "__main__":
    main()
