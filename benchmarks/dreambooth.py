"""Steps per second and peak memory of DreamBooth on SD1's sizes, ours beside diffusers and keras-cv.

    python benchmarks/dreambooth.py [--rounds 1] [--lora RANK] [--pixels 256] [--batch 1] [--small]
        [--precision float32]

A step is what each trainer does for a batch of photos: ours has encoded photos and prompts before; the others
are written as the popular scripts are, which run the VAE's encoder and (diffusers) the text encoder in every
step. Weights are random. On a GPU: gpu.py.
"""

from __future__ import annotations

import argparse
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import interleaved
import numpy as np

CONTENDERS = {
    "kcv2diffusers, TensorFlow": ("ours", "tensorflow"),
    "kcv2diffusers, JAX": ("ours", "jax"),
    "kcv2diffusers, PyTorch": ("ours", "torch"),
    "keras-cv, TensorFlow": ("kerascv", "tensorflow"),
    "diffusers, PyTorch": ("diffusers", "torch"),
}
SMALL = {"block_out_channels": (32, 64, 64, 64), "attention_head_dim": 2, "cross_attention_dim": 48}
FULL = {"attention_head_dim": 8, "cross_attention_dim": 768}
LEARNING_RATE = 1e-6
Step = Callable[[], float]


def ours(arguments: argparse.Namespace) -> Step:
    """The step of `kcv2diffusers dreambooth` with its cache."""
    import keras

    from kcv2diffusers import models
    from kcv2diffusers.dreambooth.config import Config
    from kcv2diffusers.dreambooth.lora import add_lora
    from kcv2diffusers.dreambooth.model import DreamBooth
    from kcv2diffusers.dreambooth.optimizers import make_optimizer
    from kcv2diffusers.models.layers import dtype_policy

    sizes = (
        {"widths": (32, 64, 64, 64), "heads": (2, 2, 2, 2), "context_width": 48} if arguments.small else {}
    )
    config = models.UNetConfig(**sizes, gelu="exact")
    with dtype_policy(arguments.precision):
        unet = models.build_unet(config)
        if arguments.lora:
            add_lora(unet, arguments.lora, arguments.lora)
        model = DreamBooth(unet)
    options = Config(learning_rate=LEARNING_RATE, optimizer=arguments.optimizer)
    model.compile(make_optimizer(options, ()), jit_compile=keras.backend.backend() == "jax")
    return training_step(model, config.context_width, arguments.pixels, arguments.batch)


def training_step(model: Any, context: int, pixels: int, n: int = 1) -> Step:
    """A step of a compiled `DreamBooth` on `n` random pictures, with a text encoder of width `context`."""
    import keras

    rng, side = np.random.default_rng(0), pixels // 8
    batch = {
        "latents": rng.standard_normal((n, side, side, 4), dtype="float32"),
        "noise": rng.standard_normal((n, side, side, 4), dtype="float32"),
        "timesteps": rng.integers(0, 1000, n).astype("int32"),
        "condition": rng.standard_normal((n, 77, context), dtype="float32"),
        "prior": np.zeros(n, "float32"),
    }
    given = {name: keras.ops.convert_to_tensor(value) for name, value in batch.items()}
    return lambda: float(model.train_on_batch(given, return_dict=True)["step_loss"])


def kerascv(arguments: argparse.Namespace) -> Step:
    """As Keras' DreamBooth example: encoded prompts, but photos go through the encoder in every step."""
    import keras
    import tensorflow as tf

    if arguments.small:
        sys.path.insert(0, str(interleaved.ROOT / "tests" / "support" / "kerascv"))
        from stack import small_unet, small_vae_encoder

        unet, encoder = small_unet(1, arguments.pixels), small_vae_encoder()
        width, context = 32, 48
    else:
        from keras_cv.models.stable_diffusion import DiffusionModel, ImageEncoder

        unet = DiffusionModel(arguments.pixels, arguments.pixels, 77, download_weights=False)
        encoder = ImageEncoder(download_weights=False)
        width, context = 320, 768
    optimizer = keras.optimizers.AdamW(LEARNING_RATE, weight_decay=0.01, global_clipnorm=1.0)
    optimizer.build(unet.trainable_variables)
    rng, n = np.random.default_rng(0), arguments.batch
    photos = tf.constant(rng.uniform(-1, 1, (n, arguments.pixels, arguments.pixels, 3)).astype("float32"))
    text = tf.constant(rng.standard_normal((n, 77, context), dtype="float32"))
    embedding = tf.constant(rng.standard_normal((n, width), dtype="float32"))

    @tf.function
    def step() -> Any:
        latents = encoder(photos)
        noise = tf.random.normal(tf.shape(latents))
        noisy = 0.7 * latents + 0.7 * noise
        with tf.GradientTape() as tape:
            predicted = unet({"latent": noisy, "timestep_embedding": embedding, "context": text})
            loss = tf.reduce_mean(tf.square(predicted - noise))
        gradients = tape.gradient(loss, unet.trainable_variables)
        optimizer.apply_gradients(zip(gradients, unet.trainable_variables, strict=True))
        return loss

    return lambda: float(step())


def diffusers(
    arguments: argparse.Namespace, device: str = "cpu", compiled: bool = False, reads_loss: bool = True
) -> Step:
    """As diffusers' DreamBooth scripts: VAE and text encoder in every step, clipping, AdamW. `compiled`: the
    UNet by torch.compile. Steps that do not read their loss do not wait for a GPU.
    """
    import torch
    from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    half = {"mixed_bfloat16": torch.bfloat16, "mixed_float16": torch.float16}.get(arguments.precision)
    unet = UNet2DConditionModel(**(SMALL if arguments.small else FULL)).to(device)
    widths = (32, 64, 96, 96) if arguments.small else (128, 256, 512, 512)
    vae = AutoencoderKL(
        block_out_channels=widths,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=2,
    )
    width = 48 if arguments.small else 768
    text = CLIPTextModel(
        CLIPTextConfig(hidden_size=width, intermediate_size=4 * width, num_attention_heads=12)
    )
    vae, text = vae.to(device, half).requires_grad_(False), text.to(device, half).requires_grad_(False)
    if arguments.lora:
        from peft import LoraConfig

        unet.requires_grad_(False)
        if half:
            unet.to(dtype=half)
        unet.add_adapter(
            LoraConfig(
                r=arguments.lora,
                lora_alpha=arguments.lora,
                target_modules=["to_k", "to_q", "to_v", "to_out.0"],
            )
        )
        for parameter in unet.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.float()
    unet.train()
    if compiled:
        unet.compile()
    trained = [parameter for parameter in unet.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=LEARNING_RATE)
    schedule = DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    n = arguments.batch
    photos = torch.rand(n, 3, arguments.pixels, arguments.pixels, device=device, dtype=half) * 2 - 1
    tokens = torch.randint(0, 49408, (n, 77), device=device)

    def step() -> float:
        latents = vae.encode(photos).latent_dist.sample() * vae.config.scaling_factor
        noise = torch.randn_like(latents)
        timesteps = torch.randint(0, 1000, (n,), device=device)
        noisy = schedule.add_noise(latents, noise, timesteps)
        context = text(tokens)[0]
        with torch.autocast(device, half, enabled=half is not None):
            predicted = unet(noisy, timesteps, context).sample
        loss = torch.nn.functional.mse_loss(predicted.float(), noise.float())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return float(loss) if reads_loss else 0.0

    return step


def measure(arguments: argparse.Namespace) -> interleaved.Figures:
    """One contender in this process."""
    kind, _ = CONTENDERS[arguments.worker]
    step = {"ours": ours, "kerascv": kerascv, "diffusers": diffusers}[kind](arguments)
    started = time.perf_counter()
    step()
    first, times = time.perf_counter() - started, []
    for _ in range(arguments.repeat):
        started = time.perf_counter()
        step()  # its loss comes back to the host, so it has ended
        times.append(time.perf_counter() - started)
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    return {"step": min(times), "first step": first, "memory": memory}


def main() -> None:
    parser = interleaved.options(__doc__, CONTENDERS, 1)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--lora", type=int, default=0, help="rank; 0 trains all weights")
    parser.add_argument("--optimizer", default="adamw", help="ours only, as in kcv2diffusers dreambooth")
    parser.add_argument("--precision", default="float32")
    arguments = parser.parse_args()
    if arguments.worker:
        interleaved.alone()
        return interleaved.report(measure(arguments))
    left_out = ["keras-cv, TensorFlow"] if arguments.lora else []
    contenders = {name: CONTENDERS[name][1] for name in arguments.only if name not in left_out}
    results = interleaved.rounds(__file__, contenders, arguments.rounds, sys.argv[1:])
    middle = {name: interleaved.medians(found) for name, found in results.items()}
    theirs = middle.get("diffusers, PyTorch", {}).get("step")
    what = f"LoRA of rank {arguments.lora}" if arguments.lora else "all weights"
    head = f"| {what}, {arguments.pixels} px, batch {arguments.batch} | steps/s | to diffusers | first step"
    lines = [
        f"{interleaved.machine()}; the best of {arguments.repeat} steps, rounds: {arguments.rounds}",
        "",
        f"{head} | peak memory |",
        "|---|--:|--:|--:|--:|",
    ]
    for name, figures in middle.items():
        ratio = f"{theirs / figures['step']:.2f}" if theirs else ""
        line = f"| {name} | {1 / figures['step']:.3f} | {ratio} | {figures['first step']:.0f} s "
        lines.append(f"{line}| {figures['memory']:.1f} GB |")
    print("\n".join(lines))
    kept = Path(interleaved.ROOT / ".cache" / f"dreambooth-{'lora' if arguments.lora else 'full'}.md")
    kept.parent.mkdir(exist_ok=True)
    kept.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
