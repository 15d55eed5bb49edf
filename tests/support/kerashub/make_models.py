"""Tiny backbones in every container, with what they compute.

    python make_models.py OUT TOKENIZER

For each kind OUT/KIND gets, besides the containers below, `expected/COMPONENT.npz` (diffusers' tensors),
`forward.npz` (inputs and outputs of every part), `sample.npz` (8 steps of KerasHub's sampler), and what
make_lora.py writes.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

os.environ.setdefault("KERAS_BACKEND", "torch")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import expected
import h5py
import keras
import keras_hub
import make_lora
import numpy as np
import tiny

STEPS, GUIDANCE = 8, 5.0
TIMESTEPS = (3.0, 801.0)


def containers(backbone: Any, out: Path, tokenizer: Path) -> None:
    """Every way in which KerasHub's users save a model."""
    for part in ("diffuser", "clip_l", "clip_g", "t5", "vae"):
        if (model := getattr(backbone, part)) is not None:
            model.save_weights(out / f"{part}.weights.h5")
    backbone.diffuser.save(out / "diffuser.h5")
    backbone.save_weights(out / "backbone.weights.h5")
    backbone.save_weights(out / "sharded.weights.json", max_shard_size=0.002)
    backbone.save(out / "backbone.keras")
    backbone.save(out / "backbone.h5")
    backbone.save_to_preset(out / "preset")
    backbone.save_to_preset(out / "preset_sharded", max_shard_size=0.002)
    before_0_22(out / "backbone.weights.h5", out / "before_0_22.weights.h5")
    task(backbone, tokenizer).save_to_preset(out / "task")


def task(backbone: Any, tokenizer: Path) -> Any:
    """The text-to-image model with its preprocessor, as presets have it."""

    def preprocessor(name: str, *, pad_with_end_token: bool) -> Any:
        words = keras_hub.models.CLIPTokenizer(
            vocabulary=str(tokenizer / "vocab.json"),
            merges=[line for line in (tokenizer / "merges.txt").read_text().splitlines()[1:] if line],
            pad_with_end_token=pad_with_end_token,
            config_file=f"{name}_tokenizer.json",
            name=f"{name}_tokenizer",
        )
        return keras_hub.models.CLIPPreprocessor(
            words, config_file=f"{name}_preprocessor.json", name=f"{name}_preprocessor"
        )

    both = keras_hub.models.StableDiffusion3TextToImagePreprocessor(
        preprocessor("clip_l", pad_with_end_token=True), preprocessor("clip_g", pad_with_end_token=False)
    )
    return keras_hub.models.StableDiffusion3TextToImage(backbone, both)


def before_0_22(source: Path, target: Path) -> None:
    """The same weights under the names of KerasHub before 0.22."""
    with h5py.File(source) as old, h5py.File(target, "w") as new:

        def copy(name: str, item: Any) -> None:
            name = name.replace("clip_encoder_layer", "clip_encoder_block")
            made = (
                new.create_dataset(name, data=item[()])
                if isinstance(item, h5py.Dataset)
                else new.require_group(name)
            )
            for key, value in item.attrs.items():
                if value == "clip_encoder_layer":
                    value = "clip_encoder_block"
                made.attrs[key] = value

        old.visititems(copy)


def forwards(backbone: Any) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(7)
    words = backbone.clip_l.vocabulary_size
    size = backbone.image_shape[0]
    given: dict[str, Any] = {
        "latent": rng.standard_normal((2, size // 8, size // 8, 16)),
        "context": rng.standard_normal((2, 20, backbone.t5_hidden_dim)),
        "pooled": rng.standard_normal((2, backbone.clip_hidden_dim)),
        "timestep": np.array(TIMESTEPS),
        "image": rng.uniform(-1, 1, (1, size, size, 3)),
    }
    given = {name: value.astype("float32") for name, value in given.items()}
    tokens = rng.integers(0, words - 2, (2, 77))
    tokens[:, 0], tokens[0, 9:], tokens[1, 30:] = words - 2, words - 1, words - 1
    given["tokens"] = tokens.astype("int32")
    given["transformer"] = backbone.diffuser(
        {
            "latent": given["latent"],
            "context": given["context"],
            "pooled_projection": given["pooled"],
            "timestep": given["timestep"][:, None],
        }
    )
    for name in ("clip_l", "clip_g"):
        made = getattr(backbone, name)({"token_ids": given["tokens"]})
        given[f"{name}_penultimate"] = made["intermediate_output"]
        pool = getattr(backbone, f"{name}_projection")
        given[f"{name}_pooled"] = pool(made["sequence_output"], given["tokens"])
    if backbone.t5 is not None:
        given["t5_tokens"] = rng.integers(2, tiny.VOCABULARY, (2, 24)).astype("int32")
        mask = np.ones_like(given["t5_tokens"])
        given["t5"] = backbone.t5({"token_ids": given["t5_tokens"], "padding_mask": mask})
    given["vae_encoder"] = backbone.encode_image_step(given["image"])
    given["vae_decoder"] = backbone.decode_step(given["latent"][:1])
    return {name: keras.ops.convert_to_numpy(value) for name, value in given.items()}


def sample(backbone: Any) -> dict[str, np.ndarray]:
    """KerasHub's own steps from fixed noise, with classifier-free guidance."""
    rng = np.random.default_rng(11)
    words = backbone.clip_l.vocabulary_size
    prompts = np.full((2, 1, 77), words - 1, "int32")
    prompts[:, :, 0] = words - 2
    prompts[0, 0, 1:6] = rng.integers(0, words - 2, 5)
    ids = []
    for tokens in prompts:  # CLIP-G pads with 0, CLIP-L with the end of the text
        padded = tokens.copy()
        end = int(np.argmax(tokens[0] == words - 1))
        padded[0, end + 1 :] = 0
        ids.append({"clip_l": tokens, "clip_g": padded})
    if backbone.t5 is not None:
        for number, each in enumerate(ids):
            each["t5"] = np.full((1, 24), 1 + number, "int32")
    size = backbone.image_shape[0] // 8
    noise = rng.standard_normal((1, size, size, 16)).astype("float32")
    backbone.configure_scheduler(STEPS)
    tensors = [{part: keras.ops.convert_to_tensor(value) for part, value in each.items()} for each in ids]
    embeddings = backbone.encode_text_step(*tensors)
    latents, steps = keras.ops.convert_to_tensor(noise), []
    for step in range(STEPS):
        latents = backbone.denoise_step(latents, embeddings, step, STEPS, GUIDANCE)
        steps.append(keras.ops.convert_to_numpy(latents))
    named = {f"{part}_{n}": value for n, each in enumerate(ids) for part, value in each.items()}
    return {
        **named,
        "noise": noise,
        "steps": np.stack(steps),
        "image": keras.ops.convert_to_numpy(backbone.decode_step(latents)),
        "sigmas": keras.ops.convert_to_numpy(backbone.scheduler.sigmas),
    }


def make(out: Path, kind: str, tokenizer: Path) -> None:
    words = len(json.loads((tokenizer / "vocab.json").read_text()))
    backbone = tiny.backbone(kind, words, with_t5=kind == "sd35m")
    expected.write(out / "expected", backbone)
    containers(backbone, out, tokenizer)
    if kind == "sd3":  # its weights do not show the number of heads
        heads = {"transformer": {"num_attention_heads": backbone.mmdit_num_heads}}
        for folder in (out, out / "preset", out / "preset_sharded", out / "task"):
            (folder / "kcv2diffusers.json").write_text(json.dumps(heads))
    np.savez(out / "forward.npz", **forwards(backbone))
    np.savez(out / "sample.npz", **sample(backbone))
    if kind in make_lora.KINDS:
        make_lora.make(backbone, out, kind)


def main(arguments: list[str]) -> None:
    out, tokenizer = map(Path, arguments)
    for kind in tiny.KINDS:
        (out / kind).mkdir()
        make(out / kind, kind, tokenizer)


if __name__ == "__main__":
    main(sys.argv[1:])
