"""A small model with the structure of Stable Diffusion 3 medium, trained to draw a latent for each prompt.

    python make_trained.py OUT TOKENIZER

Writes the task OUT/task and OUT/sample.npz: the `targets` of the prompts, the `noise` that `verify` starts
from, and where KerasHub's sampler arrives without guidance, `untrained` and `trained`. It runs on PyTorch,
which needs no compilation.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

os.environ["KERAS_BACKEND"] = "torch"
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import keras_hub
import numpy as np
import tiny
import torch
from keras_hub.src.models.stable_diffusion_3.mmdit import MMDiT
from make_models import task

PROMPTS = ("a photo of a red cat", "")
HEADS, CELLS, STEPS = 6, tiny.SIZE // 8, 4
MMDIT: dict[str, Any] = {
    "patch_size": 2,
    "hidden_dim": 16 * HEADS,  # more than the 64 values of a patch; with fewer it does not learn
    "num_layers": 2,
    "num_heads": HEADS,
    "position_size": CELLS // 2,  # the size of its pictures and no larger
    "qk_norm": None,
    "dual_attention_indices": None,
}
TRAINING_STEPS, BATCH, RATE, SHIFT = 200, 16, 3e-3, 3.0


def backbone(words: int) -> Any:
    """The whole model. All but the MMDiT is as random as the models of tiny.py."""
    made = keras_hub.models.StableDiffusion3Backbone(
        **{f"mmdit_{name}": value for name, value in MMDIT.items()},
        vae=tiny.vae(),
        clip_l=tiny.clip("clip_l", 16, 2, words, "quick_gelu"),
        clip_g=tiny.clip("clip_g", 24, 3, words, "gelu"),
        image_shape=(tiny.SIZE, tiny.SIZE, 3),
        name="stable_diffusion_3_backbone",
    )
    for part in (made.vae, made.clip_l, made.clip_g, made.clip_l_projection, made.clip_g_projection):
        tiny.randomise(part, 0)
    return made


def targets() -> torch.Tensor:
    """A smooth latent for each prompt, (prompts, 8, 8, 16); their variance is one."""
    rng = np.random.default_rng(5)
    places = (np.arange(CELLS) + 0.5) * np.pi / CELLS
    waves = np.cos(np.arange(3)[:, None] * places)
    made = np.einsum("pcij,ix,jy->pxyc", rng.standard_normal((len(PROMPTS), 16, 3, 3)), waves, waves)
    return torch.from_numpy((made / made.std()).astype("float32"))


def train(model: Any, context: torch.Tensor, pooled: torch.Tensor) -> None:
    """The target is noise - latents, at the timesteps of the sampler, with its shift."""
    generator = torch.Generator().manual_seed(2)
    prompts = torch.arange(BATCH) % len(PROMPTS)
    clean, context, pooled = targets()[prompts], context[prompts], pooled[prompts]
    weights = [variable.value for variable in model.trainable_variables]
    optimizer = torch.optim.AdamW(weights, lr=RATE, weight_decay=0.0)
    rates = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, TRAINING_STEPS)
    for _ in range(TRAINING_STEPS):
        uniform = torch.rand((BATCH, 1), generator=generator)
        sigma = SHIFT * uniform / (1 + (SHIFT - 1) * uniform)
        noise = torch.randn(clean.shape, generator=generator)
        s = sigma[:, :, None, None]
        predicted = model(
            {
                "latent": (1 - s) * clean + s * noise,
                "context": context,
                "pooled_projection": pooled,
                "timestep": 1000 * sigma,
            }
        )
        loss = ((noise - clean - predicted) ** 2).mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        rates.step()


def sample(model: Any, embeddings: Any, noise: np.ndarray) -> np.ndarray:
    """Where KerasHub's own steps arrive for each prompt."""
    model.configure_scheduler(STEPS)
    latents = keras.ops.convert_to_tensor(np.repeat(noise, len(PROMPTS), axis=0))
    for step in range(STEPS):
        latents = model.denoise_step(latents, embeddings, step, STEPS)
    return np.asarray(keras.ops.convert_to_numpy(latents))


def main(out: Path, tokenizer: Path) -> None:
    keras.utils.set_random_seed(0)
    torch.set_num_threads(1)
    model = backbone(len(json.loads((tokenizer / "vocab.json").read_text())))
    whole = task(model, tokenizer)
    tokens = whole.preprocessor.generate_preprocess(list(PROMPTS))
    noise = np.random.default_rng(0).standard_normal((1, CELLS, CELLS, 16)).astype("float32")
    with torch.no_grad():
        embeddings = model.encode_text_step(tokens, tokens)
        untrained = sample(model, embeddings, noise)
    # Beyond the width of the CLIPs the context is zero: a narrow model computes the same in half the time.
    width = model.clip_hidden_dim
    narrow = MMDiT(
        **MMDIT,
        latent_shape=(CELLS, CELLS, 16),
        context_shape=(None, width),
        pooled_projection_shape=(width,),
        name="diffuser",
    )
    train(narrow, embeddings[0][..., :width].contiguous(), embeddings[2])
    for variable, trained in zip(model.diffuser.weights, narrow.weights, strict=True):
        values = keras.ops.convert_to_numpy(variable).copy()
        values[: trained.shape[0]] = keras.ops.convert_to_numpy(trained)
        variable.assign(values)
    with torch.no_grad():
        found = {"untrained": untrained, "trained": sample(model, embeddings, noise)}
    np.savez(out / "sample.npz", targets=targets().numpy(), noise=noise, **found)
    whole.save_to_preset(out / "task")
    stated = {"transformer": {"num_attention_heads": HEADS}}  # the weights do not show it
    (out / "task" / "kcv2diffusers.json").write_text(json.dumps(stated))


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
