"""A whole small Stable Diffusion on Keras 3: its weights, and what KerasCV's own pipeline makes of it.

    python sample.py OUT VERSION BPE

OUT gets parts/<part>.weights.h5, inverted_<n>/text_encoder.weights.h5 with n rows for placeholder tokens,
the numbers of heads beside them, and sample.npz: `noise`, `latent` and `image` of one run, `formula`, the
latent with a formula for a UNet, and for each n `tokens_<n>` and `context_<n>` of a prompt with n
placeholder tokens. sample.json has the prompts.
"""

from __future__ import annotations

import json
import os
import sys
from functools import partial
from pathlib import Path
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import numpy as np
import stack
from keras_cv.src.models.stable_diffusion.clip_tokenizer import SimpleTokenizer
from keras_cv.src.models.stable_diffusion.stable_diffusion import StableDiffusionBase

PROMPT, NEGATIVE = "a photo of a red cat, in the style of Monet", "blurry"
PLACEHOLDERS = ("<my-cat>", "<my-dog>")
STEPS, GUIDANCE = 4, 7.5
VOCABULARY = 49408


def inversion_prompt(count: int) -> str:
    return " and ".join(["a photo of", *PLACEHOLDERS[:count]])


class Small(StableDiffusionBase):
    """KerasCV's pipeline with parts of other widths; it keeps the last latent."""

    def __init__(self, models: dict[str, Any], bpe: str) -> None:
        super().__init__(128, 128, jit_compile=False)
        self.models = models
        self.latent: Any = None
        self._decoder = self
        self._tokenizer = SimpleTokenizer(bpe_path=bpe)
        width = models["unet"].inputs[1].shape[1]
        self._get_timestep_embedding = partial(super()._get_timestep_embedding, dim=width)

    text_encoder = property(lambda self: self.models["text_encoder"])
    diffusion_model = property(lambda self: self.models["unet"])

    def predict_on_batch(self, latent: Any) -> Any:  # as the decoder
        self.latent = stack.array(latent)
        return stack.array(self.models["vae_decoder"](latent))


class Eager:
    """A model called as it is, where KerasCV's pipeline would compile it; its inputs go by position."""

    def __init__(self, model: Any, *names: str) -> None:
        self.model, self.inputs, self.names = model, model.inputs, names

    def predict_on_batch(self, given: dict[str, Any]) -> Any:
        return stack.array(self.model([given[name] for name in self.names]))


def eager_text_encoder(model: Any) -> Eager:
    return Eager(model, "tokens", "positions")


class Formula:
    """A UNet that rounds alike everywhere, so that it is the sampler that is compared."""

    def predict_on_batch(self, given: dict[str, Any]) -> Any:
        latent, cosine = stack.array(given["latent"]), stack.array(given["timestep_embedding"])[:, 0]
        context = stack.array(given["context"]).mean((1, 2))
        return np.sin(latent) * (1 + cosine / 2)[:, None, None, None] + context[:, None, None, None]


def save(model: Any, folder: Path, part: str) -> None:
    folder.mkdir(exist_ok=True)
    model.save_weights(folder / f"{part}.weights.h5")
    (folder / "kcv2diffusers.json").write_text(json.dumps(stack.HEADS))


def main(arguments: list[str]) -> None:
    out, version, bpe = Path(arguments[0]), int(arguments[1]), arguments[2]
    models = {
        part: stack.build(part, version, seed=seed, vocabulary=VOCABULARY)
        for seed, part in enumerate(stack.PARTS)
    }
    for part, model in models.items():
        save(model, out / "parts", part)
    called = {
        "unet": Eager(models["unet"], "latent", "timestep_embedding", "context"),
        "text_encoder": eager_text_encoder(models["text_encoder"]),
    }
    pipeline = Small(models | called, bpe)
    noise = np.random.default_rng(5).standard_normal((16, 16, 4), dtype=np.float32)

    def run() -> Any:
        return pipeline.generate_image(
            pipeline.encode_text(PROMPT),
            negative_prompt=NEGATIVE,
            num_steps=STEPS,
            unconditional_guidance_scale=GUIDANCE,
            diffusion_noise=noise,
        )

    results = {"noise": noise, "image": run(), "latent": pipeline.latent}
    pipeline.models["unet"] = Formula()
    run()
    results["formula"] = pipeline.latent
    for count in (1, 2):
        inverted = stack.build("text_encoder", version, seed=10 + count, vocabulary=VOCABULARY + count)
        save(inverted, out / f"inverted_{count}", "text_encoder")
        pipeline.models["text_encoder"] = eager_text_encoder(inverted)
        pipeline._tokenizer = SimpleTokenizer(bpe_path=bpe)
        pipeline._tokenizer.add_tokens(list(PLACEHOLDERS[:count]))
        prompt = inversion_prompt(count)
        results[f"tokens_{count}"] = np.array(pipeline.tokenizer.encode(prompt))
        results[f"context_{count}"] = pipeline.encode_text(prompt)
    np.savez(out / "sample.npz", **results)
    run = {"prompt": PROMPT, "negative_prompt": NEGATIVE, "guidance_scale": GUIDANCE}
    inversion = {str(count): inversion_prompt(count) for count in (1, 2)}
    told = {"run": run, "steps": STEPS, "placeholders": PLACEHOLDERS, "inversion": inversion}
    (out / "sample.json").write_text(json.dumps(told))


if __name__ == "__main__":
    main(sys.argv[1:])
