"""Time and peak memory of one UNet forward and one training step, ours beside keras-cv and diffusers.

python benchmarks/train_step.py [--small] [--pixels 256] [--rounds 3] [--remat] [--json OUT]

A training step is forward, backward and AdamW on a batch of one, float32. Each contender runs in a process of
its own; the processes of a round follow each other, and rounds repeat, so that a busy spell of the machine
does not fall on one contender only. Times are the best of a process's repetitions, then the median over
rounds; peak memory is the largest resident set over rounds. The first step of a process, which compiles, is
timed apart.
"""

from __future__ import annotations

import argparse
import json
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import interleaved
import numpy as np
from dreambooth import training_step

ROOT = Path(__file__).parents[1]
CONTENDERS = {
    "kcv2diffusers, TensorFlow": ("ours", "tensorflow"),
    "kcv2diffusers, JAX": ("ours", "jax"),
    "kcv2diffusers, PyTorch": ("ours", "torch"),
    "keras-cv, TensorFlow": ("kerascv", "tensorflow"),
    "diffusers, PyTorch": ("diffusers", "torch"),
}
Calls = tuple[Callable[[], Any], Callable[[], Any]]


def keras_calls(kind: str, arguments: argparse.Namespace) -> Calls:
    """Forward and training step of our UNet, as `dreambooth` trains it, or of KerasCV's, both through Keras'
    own compiled loops.
    """
    import keras

    from kcv2diffusers import models
    from kcv2diffusers.dreambooth.config import Config
    from kcv2diffusers.dreambooth.model import DreamBooth
    from kcv2diffusers.dreambooth.optimizers import make_optimizer

    if kind == "ours":
        config = models.SD1.unet
        if arguments.small:
            config = models.UNetConfig(widths=(32, 64, 64, 64), heads=(2, 2, 2, 2), context_width=48)
        model = models.build_unet(config)
        models.rematerialise(model, arguments.remat)
        width, context = config.timestep_width, config.context_width
    elif arguments.small:
        sys.path.insert(0, str(ROOT / "tests" / "support" / "kerascv"))
        from stack import small_unet

        model, width, context = small_unet(1, arguments.pixels), 32, 48
    else:
        from keras_cv.models.stable_diffusion import DiffusionModel

        model = DiffusionModel(arguments.pixels, arguments.pixels, 77, download_weights=False)
        width, context = 320, 768

    latent, embedding, text = inputs(arguments.pixels, width, context)
    named = {"latent": latent, "timestep_embedding": embedding, "context": text}
    # XLA's convolutions on a CPU are slower than TensorFlow's own, for us and for KerasCV alike.
    jit = keras.backend.backend() == "jax"
    if kind == "kerascv":
        model.compile(keras.optimizers.AdamW(1e-5, weight_decay=0.01), loss="mse", jit_compile=jit)
        return lambda: model.predict_on_batch(named), lambda: model.train_on_batch(named, latent)
    model.compile(jit_compile=jit)
    trainer = DreamBooth(model)
    trainer.compile(make_optimizer(Config(learning_rate=1e-5, clip_norm=0.0), ()), jit_compile=jit)
    return lambda: model.predict_on_batch(named), training_step(trainer, context, arguments.pixels)


def diffusers_calls(arguments: argparse.Namespace) -> Calls:
    """The same of diffusers' UNet in PyTorch, eager, as its training scripts run it."""
    import torch
    from diffusers import UNet2DConditionModel

    small = {"block_out_channels": (32, 64, 64, 64), "attention_head_dim": 2, "cross_attention_dim": 48}
    full = {"attention_head_dim": 8, "cross_attention_dim": 768}
    model = UNet2DConditionModel(sample_size=arguments.pixels // 8, **(small if arguments.small else full))
    if arguments.remat:
        model.enable_gradient_checkpointing()
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)
    context = 48 if arguments.small else 768
    latent, _, text = (torch.from_numpy(x) for x in inputs(arguments.pixels, 32, context))
    latent = latent.permute(0, 3, 1, 2).contiguous()
    timestep = torch.tensor([500])

    def forward() -> Any:
        with torch.no_grad():
            return model(latent, timestep, text).sample

    def step() -> None:
        loss = torch.nn.functional.mse_loss(model(latent, timestep, text).sample, latent)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return forward, step


def inputs(pixels: int, width: int, context: int) -> tuple[Any, Any, Any]:
    """Latents, timestep embedding and text embeddings of a batch of one."""
    rng = np.random.default_rng(0)
    shapes = ((1, pixels // 8, pixels // 8, 4), (1, width), (1, 77, context))
    first, second, third = (rng.standard_normal(shape, dtype="float32") for shape in shapes)
    return first, second, third


def measure(arguments: argparse.Namespace) -> dict[str, float]:
    """One contender in this process: seconds and gigabytes."""
    kind, _ = CONTENDERS[arguments.worker]
    forward, step = diffusers_calls(arguments) if kind == "diffusers" else keras_calls(kind, arguments)
    result = {}
    for name, call in (("forward", forward), ("step", step)):
        times = []
        for _ in range(arguments.repeat + 1):
            started = time.perf_counter()
            call()
            times.append(time.perf_counter() - started)
        result[f"first {name}"], result[name] = times[0], min(times[1:])
        result[f"{name} memory"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    return result


def main() -> None:
    parser = interleaved.options(__doc__, CONTENDERS, 3)
    parser.add_argument("--remat", action="store_true", help="rematerialise blocks (ours and diffusers only)")
    parser.add_argument("--json", type=Path, help="write all figures here")
    arguments = parser.parse_args()
    if arguments.worker:
        interleaved.alone()
        return interleaved.report(measure(arguments))
    contenders = {name: CONTENDERS[name][1] for name in arguments.only}
    results = interleaved.rounds(__file__, contenders, arguments.rounds, sys.argv[1:])
    lines = [
        f"{interleaved.machine()}; the best of {arguments.repeat} calls, rounds: {arguments.rounds}",
        "",
        "| | forward | step | first step | peak memory of forward | of a step |",
        "|---|--:|--:|--:|--:|--:|",
    ]
    for name, found in results.items():
        middle = interleaved.medians(found)
        lines.append(
            f"| {name} | {middle['forward']:.2f} s | {middle['step']:.2f} s | {middle['first step']:.1f} s "
            f"| {middle['forward memory']:.1f} GB | {middle['step memory']:.1f} GB |"
        )
    print("\n".join(lines))
    (ROOT / ".cache").mkdir(exist_ok=True)
    (ROOT / ".cache" / "train_step.md").write_text("\n".join(lines) + "\n")
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=2))


if __name__ == "__main__":
    main()
