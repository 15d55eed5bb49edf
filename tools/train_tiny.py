"""Train the tiny base that ships in kcv2diffusers/tiny: `python tools/train_tiny.py --help`.

Stages, each of which continues where an interruption left it: the VAE on pictures of `tiny_pictures`; the
UNet and text encoder on the VAE's latents; measuring; export. Every step draws from a generator seeded by its
number, so an interrupted run goes on as an uninterrupted one would.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path

os.environ["KERAS_BACKEND"] = "torch"  # the fastest of the three on a CPU at these sizes

import h5py
import keras
import numpy as np
import tiny_pictures
import tiny_quality
import torch

from kcv2diffusers.diffusion import alphas_cumprod, timestep_embedding
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
from kcv2diffusers.models.sampler import PROMPT_LENGTH, TextToImage
from kcv2diffusers.models.tokenizer import Tokenizer
from kcv2diffusers.pictures import grid, psnr
from kcv2diffusers.pipeline.tokenizer_files import write_tokenizer
from kcv2diffusers.pipeline_files import CONFIG_FILE

SEED = 20240
VAE = VAEConfig(widths=(24, 48, 64, 64), norm_groups=2)
VAE_STEPS = 1800
UNET_STEPS = 3000
PICTURES = 20_000
BATCH = 32
GUIDANCE = 5.0
SHOWN = [
    "a red car on a white background",
    "a blue car in a meadow",
    "a green balloon at sunset",
    "a purple heart on a yellow background",
    "a yellow star at night",
    "an orange fish on a blue background",
    "a red flower in the snow",
    "a blue book on the beach",
    "a purple mushroom in a meadow",
    "a yellow umbrella on the beach",
    "a red bird in the snow",
    "a green apple on a pink background",
    "a cat in a meadow",
    "a dog on the beach",
    "a panda in the snow",
    "a frog on a pink background",
    "a fox in the snow",
    "a pig at sunset",
    "a penguin on a blue background",
    "a tree at night",
    "a house at sunset",
    "a boat on the beach",
    "a rocket at night",
    "a cake on a gray background",
]


def tiny_config(tokenizer: Tokenizer) -> ModelConfig:
    """SD1's topology; few norm groups, because 32 groups of narrow layers would be instance normalisation."""
    return ModelConfig(
        unet=UNetConfig(widths=(80, 96, 48, 32), heads=(4, 4, 4, 4), context_width=96, norm_groups=4),
        text_encoder=TextEncoderConfig(width=96, layers=2, heads=4, vocabulary=len(tokenizer.vocabulary)),
        vae=VAE,
    )


class Muon(torch.optim.Optimizer):
    """Momentum whose update is orthogonalised, for matrices (Jordan et al. 2024); kernels count as (inputs,
    outputs).

    It takes about half as many steps as AdamW here. Updates are scaled to the size that AdamW's have, so that
    both share a learning rate. Matrices of one shape are orthogonalised together.
    """

    def __init__(self, weights: Sequence[torch.Tensor], lr: float, momentum: float = 0.95) -> None:
        super().__init__(weights, {"lr": lr, "momentum": momentum})

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]
        for group in self.param_groups:
            by_shape: dict[tuple[int, int], list[torch.Tensor]] = {}
            for weight in group["params"]:
                by_shape.setdefault((weight[..., 0].numel(), weight.shape[-1]), []).append(weight)
            for (rows, columns), weights in by_shape.items():
                updates = []
                for weight in weights:
                    held = self.state[weight].setdefault("momentum", torch.zeros_like(weight))
                    held.lerp_(weight.grad, 1 - group["momentum"])
                    updates.append(weight.grad.lerp(held, group["momentum"]).reshape(rows, columns))
                rate = 0.2 * max(rows, columns) ** 0.5 * group["lr"]
                for weight, update in zip(weights, _orthogonalise(torch.stack(updates)), strict=True):
                    weight.mul_(1 - 0.01 * group["lr"]).sub_(update.reshape(weight.shape), alpha=rate)


def _orthogonalise(matrices: torch.Tensor) -> torch.Tensor:
    """(n, rows, columns) with all singular values brought near 1, by five Newton-Schulz iterations."""
    tall = matrices.shape[1] > matrices.shape[2]
    x = matrices.mT if tall else matrices
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(5):
        gram = x @ x.mT
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return x.mT if tall else x


class Trainer:
    """Muon and AdamW with a moving average of the weights, and a state file that is always whole.

    The learning rate warms up over 100 steps, stays, and falls linearly to zero over the last third.
    """

    def __init__(
        self, models: Sequence[keras.Model], state: Path, steps: int, lr: float, decay: float
    ) -> None:
        self.weights = [w.value for model in models for w in model.trainable_variables]
        self.average = [w.detach().clone() for w in self.weights]
        matrices = [v.value for model in models for v in model.trainable_variables if _is_matrix(v)]
        taken = {id(weight) for weight in matrices}
        others = [weight for weight in self.weights if id(weight) not in taken]
        self.optimizers: list[torch.optim.Optimizer] = [
            Muon(matrices, lr),
            torch.optim.AdamW(others, lr, betas=(0.9, 0.99), weight_decay=0),
        ]
        self.state, self.steps, self.lr, self.decay, self.step = state, steps, lr, decay, 0
        if state.exists():
            saved = torch.load(state, weights_only=True)
            self.step = saved["step"]
            for optimizer, state_dict in zip(self.optimizers, saved["optimizers"], strict=True):
                optimizer.load_state_dict(state_dict)
            _copy(saved["weights"], self.weights)
            _copy(saved["average"], self.average)

    def save(self) -> None:
        """Replace the state file in one go."""
        part = self.state.with_suffix(".part")
        saved = {"step": self.step, "weights": self.weights, "average": self.average}
        torch.save({**saved, "optimizers": [optimizer.state_dict() for optimizer in self.optimizers]}, part)
        part.replace(self.state)

    def run(self, loss: Callable[[int], torch.Tensor], report: Callable[[], str], every: int) -> None:
        """Take the remaining steps of `loss(step)`; now and then print `report()` on averaged weights."""
        started = saved = time.monotonic()
        losses = []
        while self.step < self.steps:
            rate = min(1.0, (self.step + 1) / 100, 3 * (self.steps - self.step) / self.steps)
            value = loss(self.step)
            for optimizer in self.optimizers:
                optimizer.zero_grad()
                for group in optimizer.param_groups:
                    group["lr"] = self.lr * rate
            value.backward()
            torch.nn.utils.clip_grad_norm_(self.weights, 1.0)
            for optimizer in self.optimizers:
                optimizer.step()
            self.step += 1
            decay = min(self.decay, self.step / (self.step + 10))
            torch._foreach_lerp_(self.average, [w.detach() for w in self.weights], 1 - decay)
            losses.append(value.item())
            if self.step % 50 == 0:
                pace, started = (time.monotonic() - started) / len(losses), time.monotonic()
                progress = f"{self.state.stem} {self.step}/{self.steps}"
                print(f"{progress} loss {np.mean(losses):.4f} {pace:.2f} s/step", flush=True)
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


def _is_matrix(variable: keras.Variable) -> bool:
    """Whether a weight is one for Muon: not an embedding, and not next to pixels, latents or moments."""
    shape = variable.shape
    return len(shape) > 1 and "embedding" not in variable.path and min(shape[-1], shape[-2]) >= 16


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


def train_vae(folder: Path, steps: int) -> tuple[keras.Model, keras.Model]:
    """Encoder (with both moments) and decoder, trained on pictures, as averaged over the last steps.

    The loss is L1 and L2 over pixels with a KL term just strong enough to keep the decoder at ease with
    latents that are slightly off, as a diffusion model's are.
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
        grid(shown, 10, scale=2).save(folder / "vae.png")
        deviation = torch.cat(means).std(dim=(0, 1, 2)).numpy().round(2)
        quality = psnr(to_uint8(held_out), np.concatenate(decoded)).mean()
        return f"held-out PSNR {quality:.2f} dB, latent deviation {deviation}"

    trainer.run(loss, report, every=250)
    trainer.swap()
    return encoder, decoder


def whiten(encoder: keras.Model, decoder: keras.Model) -> None:
    """Give scaled latents zero mean and unit deviation per channel, folded into the 1x1 convolutions around
    them.

    The pair computes the same pictures as before; only the latents between them change.
    """
    with torch.no_grad():
        images = to_tensor(pictures(512, (SEED, 3))[0])
        means = torch.cat([encoder(part)[..., :4] for part in images.split(32)])
        mean, deviation = means.mean((0, 1, 2)), means.std((0, 1, 2))
        scale = deviation * LATENT_SCALE
        kernel, bias = (w.value for w in encoder.layers[-1].weights)
        bias[:4] = (bias[:4] - mean) / scale
        bias[4:] -= 2 * scale.log()
        kernel[..., :4] /= scale
        first = next(layer for layer in decoder.layers if layer.weights)
        kernel, bias = (w.value for w in first.weights)
        bias += mean @ kernel[0, 0]
        kernel *= scale[:, None]


def train_unet(folder: Path, encoder: keras.Model, decoder: keras.Model, steps: int) -> TextToImage:
    """UNet and text encoder trained together on cached latents; returned as averaged over the last steps.

    Noise prediction on Stable Diffusion's schedule, weighted by min-SNR with gamma 5; one caption in ten is
    empty so that guidance has something to guide away from.
    """
    keras.utils.set_random_seed(SEED)
    tokenizer = Tokenizer.of_words(tiny_pictures.words())
    config = tiny_config(tokenizer)
    unet, text_encoder = build_unet(config.unet), build_text_encoder(config.text_encoder)
    for layer in unet.layers:  # every block starts as the identity, the network as zero
        last = {"ResBlock": lambda x: x.exit_flow[-1], "SpatialTransformer": lambda x: x.proj2}.get(
            type(layer).__name__
        )
        if last is not None:
            last(layer).weights[0].assign(last(layer).weights[0] * 0)
    unet.layers[-1].weights[0].assign(unet.layers[-1].weights[0] * 0)
    trainer = Trainer([unet, text_encoder], folder / "unet.pt", steps, lr=1e-3, decay=0.999)

    latents, captions = cached_latents(folder, encoder)
    tokens = torch.tensor(
        [tokenizer.encode(caption, PROMPT_LENGTH) for caption in captions], dtype=torch.int32
    )
    empty = torch.tensor(tokenizer.encode("", PROMPT_LENGTH), dtype=torch.int32)
    positions = torch.arange(PROMPT_LENGTH, dtype=torch.int32).expand(BATCH, -1)
    signal = torch.from_numpy(alphas_cumprod())
    weight = (signal / (1 - signal)).clamp(max=5) / (signal / (1 - signal))
    sampler = TextToImage(text_encoder, unet, decoder, tokenizer)

    def loss(step: int) -> torch.Tensor:
        draw = torch.Generator().manual_seed(SEED + step)
        chosen = torch.randint(len(latents), (BATCH,), generator=draw)
        clean = latents[chosen]
        ids = torch.where(torch.rand((BATCH, 1), generator=draw) < 0.1, empty, tokens[chosen])
        timesteps = torch.randint(len(signal), (BATCH,), generator=draw)
        noise = torch.randn(clean.shape, generator=draw)
        share = signal[timesteps, None, None, None]
        embedding = torch.from_numpy(timestep_embedding(timesteps.numpy(), config.unet.timestep_width))
        predicted = unet(
            [share.sqrt() * clean + (1 - share).sqrt() * noise, embedding, text_encoder([ids, positions])]
        )
        return (((predicted - noise) ** 2).mean((1, 2, 3)) * weight[timesteps]).mean()

    def report() -> str:
        show(sampler, folder / "samples.png")
        return "samples.png is new"

    trainer.run(loss, report, every=500)
    trainer.swap()
    return sampler


def show(sampler: TextToImage, path: Path) -> None:
    """A grid of pictures of the prompts in SHOWN, one seed, none left out."""
    noise = np.random.default_rng(7).standard_normal((len(SHOWN), 8, 8, 4)).astype("float32")
    images = sampler.decode(sampler.sample(SHOWN, noise, steps=25, guidance_scale=GUIDANCE))
    grid(images, 8, SHOWN, scale=2).save(path)


def cached_latents(folder: Path, encoder: keras.Model) -> tuple[torch.Tensor, list[str]]:
    """Scaled latents of the training pictures, (pictures, 8, 8, 4), from the cache if it is there, and
    captions.
    """
    images, captions, _ = pictures(PICTURES, (SEED, 4))
    cache = folder / "latents.npy"
    if not cache.exists():
        with torch.no_grad():
            parts = [
                encoder(to_tensor(images[i : i + 32]))[..., :4] * LATENT_SCALE
                for i in range(0, len(images), 32)
            ]
        with cache.with_suffix(".part").open("wb") as part:
            np.save(part, torch.cat(parts).numpy())
        cache.with_suffix(".part").replace(cache)
    return torch.from_numpy(np.load(cache)), captions


def measure(sampler: TextToImage, encoder: keras.Model, path: Path) -> None:
    """Print and keep in file `path` how good the base is, in figures that `tiny_quality` explains."""
    unseen, _, concepts = pictures(512, (SEED, 1), unseen=True)
    with torch.no_grad():
        latents = [encoder(part)[..., :4] * LATENT_SCALE for part in to_tensor(unseen).split(32)]
        decoded = np.concatenate([to_uint8(sampler.decoder(part)) for part in latents])
    judge = tiny_quality.train_judge()
    lines = [
        f"VAE on {len(unseen)} held-out pictures: {psnr(unseen, decoded).mean():.2f} dB PSNR",
        f"judge on held-out drawn pictures: {tiny_quality.score(judge, unseen, concepts)}",
        f"judge on their VAE reconstructions: {tiny_quality.score(judge, decoded, concepts)}",
    ]
    concepts = tiny_quality.prompts_to_judge()
    prompts = [tiny_pictures.prompt(concept) for concept in concepts]
    seeds = (0, 1, 2)
    generated = []
    for seed in seeds:
        noise = np.random.default_rng(seed).standard_normal((len(prompts), 8, 8, 4)).astype("float32")
        for i in range(0, len(prompts), 24):
            part = sampler.sample(prompts[i : i + 24], noise[i : i + 24], steps=25, guidance_scale=GUIDANCE)
            generated.append(sampler.decode(part))
    images = np.concatenate(generated)
    trained = np.tile([not tiny_pictures.held_out(c) for c in concepts], len(seeds))
    for name, chosen in (("trained", trained), ("never trained", ~trained)):
        these = [c for c, wanted in zip(concepts * len(seeds), chosen, strict=True) if wanted]
        result = tiny_quality.score(judge, images[chosen], these)
        lines.append(f"generated, {len(these)} pictures of {name} combinations, {len(seeds)} seeds: {result}")
    text = "\n".join(lines) + "\n"
    path.write_text(text)
    print(text, end="", flush=True)


def export(sampler: TextToImage, encoder: keras.Model, target: Path) -> None:
    """Write the base to `target`: float16 weights as KerasCV's own models save them, what weights cannot
    tell, tokenizer.
    """
    target.mkdir(parents=True, exist_ok=True)
    config = tiny_config(sampler.tokenizer)
    stated = {
        "unet": {
            "attention_head_dim": config.unet.heads[0],
            "norm_num_groups": config.unet.norm_groups,
            "sample_size": tiny_pictures.SIZE // 8,
        },
        "text_encoder": {"num_attention_heads": config.text_encoder.heads},
        "vae": {"norm_num_groups": config.vae.norm_groups, "sample_size": tiny_pictures.SIZE},
    }
    (target / CONFIG_FILE).write_text(json.dumps(stated, indent=2) + "\n")
    write_tokenizer(sampler.tokenizer.files, target / "tokenizer")
    models = {
        "unet": sampler.unet,
        "text_encoder": sampler.text_encoder,
        "vae_decoder": sampler.decoder,
        "vae_encoder": encoder,
    }
    for name, model in models.items():
        path = target / f"{name}.weights.h5"
        model.save_weights(path)
        _compact(path)
    size = sum(path.stat().st_size for path in target.rglob("*") if path.is_file())
    count = sum(model.count_params() for model in models.values())
    print(f"{target}: {count / 1e6:.2f} M parameters, {size / 1e6:.2f} MB", flush=True)


def _compact(path: Path) -> None:
    """Rewrite a weight file in float16, as Keras saves a float16 model, and without Keras' groups for layers
    that have no weights.

    At these sizes the groups would otherwise take a tenth of the file.
    """
    part = path.with_suffix(".part")
    with h5py.File(path) as old, h5py.File(part, "w", libver="latest") as new:

        def copy(name: str, item: h5py.Group | h5py.Dataset) -> None:
            if isinstance(item, h5py.Dataset):
                new[name] = item[()].astype("float16")

        old.visititems(copy)
    part.replace(path)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, help="where state, log pictures and the result go")
    parser.add_argument("--vae-steps", type=int, default=VAE_STEPS)
    parser.add_argument("--unet-steps", type=int, default=UNET_STEPS)
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    folder: Path = arguments.folder
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "pid").write_text(str(os.getpid()))
    encoder, decoder = train_vae(folder, arguments.vae_steps)
    whiten(encoder, decoder)
    sampler = train_unet(folder, encoder, decoder, arguments.unet_steps)
    tiny = folder / "tiny"
    export(sampler, encoder, tiny)
    show(sampler, tiny / "samples.png")
    measure(sampler, encoder, tiny / "quality.txt")


if __name__ == "__main__":
    main()
