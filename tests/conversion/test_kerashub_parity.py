"""Converted Stable Diffusion 3 models compute in diffusers what KerasHub computes.

Figures are the largest error over the largest value. KerasHub computed the other side when the models were
made (support/kerashub/make_models.py).
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
)
from support import keras_hub
from transformers import CLIPTextModelWithProjection, T5Config, T5EncoderModel

from kcv2diffusers.conversion.to_diffusers import convert
from kcv2diffusers.maps.parts import family_named

pytestmark = pytest.mark.slow

KINDS = keras_hub.KINDS
CLIPS = {"clip_l": "text_encoder", "clip_g": "text_encoder_2"}


@pytest.fixture(scope="module", params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def converted(kind: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp(kind) / "out"
    convert(keras_hub.models() / kind / "task", out=out, base="none")
    return out


@pytest.fixture(scope="module")
def forward(kind: str) -> dict[str, np.ndarray]:
    return keras_hub.arrays(kind, "forward")


@pytest.fixture(autouse=True)
def no_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


def first(values: np.ndarray) -> torch.Tensor:
    """Channels first."""
    return torch.from_numpy(np.ascontiguousarray(np.moveaxis(values, -1, 1)))


def last(values: torch.Tensor) -> np.ndarray:
    return np.moveaxis(values.numpy(), 1, -1)


def error(name: str, got: Any, wanted: np.ndarray) -> float:
    got = np.asarray(got)
    assert got.shape == wanted.shape and np.isfinite(got).all()
    found = float(np.abs(got - wanted).max() / np.abs(wanted).max())
    print(f"\n{name}: {found:.1e}")
    return found


def test_mmdit(kind: str, converted: Path, forward: dict[str, np.ndarray]) -> None:
    model = SD3Transformer2DModel.from_pretrained(converted / "transformer").eval()
    given = [torch.from_numpy(forward[name]) for name in ("context", "pooled", "timestep")]
    made = model(first(forward["latent"]), *given).sample
    assert error(f"{kind} MMDiT", last(made), forward["transformer"]) < (1e-4 if kind == "sd3" else 2e-5)


@pytest.mark.parametrize("clip", CLIPS)
def test_clip(kind: str, converted: Path, forward: dict[str, np.ndarray], clip: str) -> None:
    """The pooled output differs by the epsilon of the last norm: 1e-6 in KerasHub, 1e-5 in transformers."""
    model = CLIPTextModelWithProjection.from_pretrained(converted / CLIPS[clip]).eval()
    tokens = torch.from_numpy(forward["tokens"]).long()
    made = model(tokens, output_hidden_states=True)
    assert error(f"{kind} {clip}", made.hidden_states[-2], forward[f"{clip}_penultimate"]) < 2e-6
    stock = error(f"{kind} {clip} pooled", made.text_embeds, forward[f"{clip}_pooled"])
    (norm,) = (module for name, module in model.named_modules() if name.endswith("final_layer_norm"))
    norm.eps = 1e-6
    pooled = model(tokens).text_embeds
    attributed = error(f"{kind} {clip} pooled, KerasHub's epsilon", pooled, forward[f"{clip}_pooled"])
    assert attributed < 2e-6 and attributed < stock < 1e-5


def test_t5(kind: str, converted: Path, forward: dict[str, np.ndarray]) -> None:
    """KerasHub's GELU is exact; that of transformers' gated-gelu is the tanh approximation."""
    if "t5" not in forward:
        pytest.skip("this kind has no T5")
    folder, errors = converted / "text_encoder_3", {}
    for gelu in ("gelu", "gelu_new"):
        config = T5Config.from_pretrained(folder)
        config.dense_act_fn = gelu
        model = T5EncoderModel.from_pretrained(folder, config=config).eval()
        made = model(torch.from_numpy(forward["t5_tokens"]).long())[0]
        errors[gelu] = error(f"{kind} T5, {gelu}", made, forward["t5"])
    assert errors["gelu"] < 2e-6 and errors["gelu"] < errors["gelu_new"] < 1e-3


def test_vae(kind: str, converted: Path, forward: dict[str, np.ndarray]) -> None:
    model = AutoencoderKL.from_pretrained(converted / "vae").eval()
    scale, shift = model.config.scaling_factor, model.config.shift_factor
    latent = (model.encode(first(forward["image"])).latent_dist.mean - shift) * scale
    assert error(f"{kind} VAE encoder", last(latent), forward["vae_encoder"]) < 1e-5
    image = model.decode(first(forward["latent"][:1]) / scale + shift).sample
    assert error(f"{kind} VAE decoder", last(image), forward["vae_decoder"]) < 1e-5


def embeddings(pipe: Any, held: dict[str, np.ndarray], number: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The context and the pooled embedding of a prompt as SD3's pipelines put them together."""
    hidden, pooled = [], []
    for name, model in (("clip_l", pipe.text_encoder), ("clip_g", pipe.text_encoder_2)):
        tokens = torch.from_numpy(held[f"{name}_{number}"]).long()
        made = model(tokens, output_hidden_states=True)
        hidden.append(made.hidden_states[-2])
        pooled.append(made.text_embeds)
    context = torch.cat(hidden, -1)
    wide = pipe.transformer.config.joint_attention_dim
    context = torch.nn.functional.pad(context, (0, wide - context.shape[-1]))
    if pipe.text_encoder_3 is None:
        third = torch.zeros_like(context)  # max_sequence_length=77, as in KerasHub
    else:
        third = pipe.text_encoder_3(torch.from_numpy(held[f"t5_{number}"]).long())[0]
    return torch.cat([context, third], 1), torch.cat(pooled, -1)


def test_eight_steps(kind: str, converted: Path) -> None:
    """With classifier-free guidance, from the same noise."""
    held = keras_hub.arrays(kind, "sample")
    t5 = None
    if (converted / "text_encoder_3").is_dir():
        config = T5Config.from_pretrained(converted / "text_encoder_3")
        config.dense_act_fn = "gelu"
        t5 = T5EncoderModel.from_pretrained(converted / "text_encoder_3", config=config).eval()
    family = family_named("StableDiffusion3Pipeline")
    assert family is not None
    scheduler = FlowMatchEulerDiscreteScheduler.from_config(dict(family.scheduler))
    pipe = StableDiffusion3Pipeline(
        SD3Transformer2DModel.from_pretrained(converted / "transformer").eval(),
        scheduler,
        AutoencoderKL.from_pretrained(converted / "vae").eval(),
        CLIPTextModelWithProjection.from_pretrained(converted / "text_encoder").eval(),
        None,
        CLIPTextModelWithProjection.from_pretrained(converted / "text_encoder_2").eval(),
        None,
        t5,
        None,
    )
    pipe.set_progress_bar_config(disable=True)
    (context, pooled), (negative, negative_pooled) = (embeddings(pipe, held, n) for n in (0, 1))
    steps: list[np.ndarray] = []

    def step_end(_: Any, __: int, ___: Any, values: dict[str, Any]) -> dict[str, Any]:
        steps.append(last(values["latents"]))
        return values

    image = pipe(
        prompt_embeds=context,
        negative_prompt_embeds=negative,
        pooled_prompt_embeds=pooled,
        negative_pooled_prompt_embeds=negative_pooled,
        latents=first(held["noise"]),
        num_inference_steps=len(held["steps"]),
        guidance_scale=5.0,
        output_type="pt",
        callback_on_step_end=step_end,
    ).images
    assert error(f"{kind} sigmas", pipe.scheduler.sigmas.numpy(), held["sigmas"]) < 2e-7
    assert error(f"{kind}, 8 steps", np.stack(steps), held["steps"]) < 1e-4
    wanted = np.clip(held["image"] / 2 + 0.5, 0, 1)
    assert error(f"{kind}, picture", last(image), wanted) < 1e-4
