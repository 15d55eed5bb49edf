"""Load a complete model from any source that `convert` reads, or from a diffusers pipeline folder.

Tensors are copied from the files into the Keras variables one at a time, so peak memory stays near the size
of the weights. Attention heads and norm groups cannot be inferred from weights. They come from the pipeline's
configs or, for KerasCV checkpoints of unusual widths, from the `kcv2diffusers.json` in the same folder. The
fallback is Stable Diffusion's own values.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from os import PathLike
from typing import Any

import keras

from kcv2diffusers.diffusion import PIXELS_PER_LATENT, SD, Array, Schedule
from kcv2diffusers.dtypes import full_name
from kcv2diffusers.errors import Error
from kcv2diffusers.hub.address import snapshots
from kcv2diffusers.maps.layouts import core, reverse
from kcv2diffusers.maps.parts import family_of, label
from kcv2diffusers.maps.tables import Slot
from kcv2diffusers.models.config import Gelu, ModelConfig, TextEncoderConfig, UNetConfig, VAEConfig
from kcv2diffusers.models.layers import zeros
from kcv2diffusers.models.sampler import TextToImage
from kcv2diffusers.models.text_encoder import build_text_encoder
from kcv2diffusers.models.tokenizer import Tokenizer
from kcv2diffusers.models.unet import build_unet
from kcv2diffusers.models.vae import build_decoder, build_image_encoder
from kcv2diffusers.pipeline.configs import require_heads, scheduler_with, untold
from kcv2diffusers.pipeline.scheduler import deviations, prediction_in, schedule_of
from kcv2diffusers.pipeline.shapes import stated_beside
from kcv2diffusers.pipeline.tokenizer_files import find_tokenizer
from kcv2diffusers.pipeline.vocabulary import check_enough_rows, homes
from kcv2diffusers.sources.diffusers_pipeline import is_pipeline, read_pipeline
from kcv2diffusers.sources.gather import SourcePath, check_together, gather
from kcv2diffusers.sources.locate import locate, locate_all
from kcv2diffusers.sources.lora import check_finite
from kcv2diffusers.sources.recognise import Match
from kcv2diffusers.sources.tensor import Tensor, values_of
from kcv2diffusers.targets.lora_merge import check_merges, merged, read_merges

_ACTIVATIONS = {"quick_gelu": "quick_gelu", "gelu": "exact", "gelu_pytorch_tanh": "tanh"}


@dataclass
class Base:
    """All parts of a Stable Diffusion model.

    `version` is "sd1" or "sd2". `image_size` is the height and width in pixels of the training images.
    `prediction_type` is what the UNet predicts: "epsilon" (KerasCV) or "v_prediction". `stated` is the
    content of the kcv2diffusers.json that the checkpoints need; it is empty for the usual widths and noise
    schedule. `names` maps the `id` of a variable to its diffusers name. `schedule` is the noise schedule that
    the UNet was trained with.
    """

    version: str
    image_size: int
    prediction_type: str
    stated: dict[str, dict[str, Any]]
    names: dict[int, str]
    config: ModelConfig
    unet: keras.Model
    text_encoder: keras.Model
    decoder: keras.Model
    image_encoder: keras.Model
    tokenizer: Tokenizer
    schedule: Schedule = SD

    def sampler(self) -> TextToImage:
        """A text-to-image sampler that uses these models."""
        return TextToImage(
            self.text_encoder,
            self.unet,
            self.decoder,
            self.tokenizer,
            self.prediction_type,
            self.schedule,
            self.config.text_encoder.max_length,
        )


@dataclass
class BaseFiles:
    """The files of a Stable Diffusion model, read from their headers; no weights are read, no model is built.

    The fields are those of `Base`. `parts` holds the recognised files and, for each, the config entries
    stated with it.
    """

    parts: dict[str, tuple[Match, dict[str, Any]]]
    config: ModelConfig
    image_size: int
    prediction_type: str
    schedule: Schedule
    tokenizer: Tokenizer

    def check_prompts(self, *prompts: str) -> None:
        """Raise Error for a prompt with more tokens than the text encoder accepts."""
        for prompt in prompts:
            self.tokenizer.encode_within(prompt, self.config.text_encoder.max_length)

    def load(self, *, moments: bool = False, dtype: str | None = None) -> Base:
        """Build the models and load their weights.

        Variables are float32, whatever dtype the files hold. With `moments` the image encoder returns mean
        and log variance. `dtype` is a Keras dtype policy, or fp32, fp16 or bf16.
        """
        stated = {
            m.spec.table.folder: _stateable(m, entries) for m, entries in self.parts.values() if not m.known
        }
        if noise := deviations(self.prediction_type, self.schedule):
            stated |= {"scheduler": noise}
        dtype = dtype and full_name(dtype)
        with zeros():
            models = {
                "unet": build_unet(self.config.unet, dtype),
                "text_encoder": build_text_encoder(self.config.text_encoder, dtype),
                "vae_decoder": build_decoder(self.config.vae, dtype),
                "vae_encoder": build_image_encoder(self.config.vae, moments, dtype),
            }
        names: dict[int, str] = {}
        for part, model in models.items():
            names |= load_weights(model, self.parts[part][0])
        unet, text_encoder, decoder, image_encoder = models.values()
        return Base(
            self.parts["unet"][0].version,
            self.image_size,
            self.prediction_type,
            stated,
            names,
            self.config,
            unet,
            text_encoder,
            decoder,
            image_encoder,
            self.tokenizer,
            self.schedule,
        )


def load_base(
    *sources: str | PathLike[str],
    tokenizer: str | PathLike[str] | None = None,
    gelu: Gelu | None = None,
    lora: SourcePath | Sequence[SourcePath] = (),
    moments: bool = False,
    dtype: str | None = None,
) -> Base:
    """Build the models of `sources` and load their weights.

    `sources` are one diffusers pipeline folder, KerasCV checkpoints, an hf:// address, or "tiny". `tokenizer`
    is a folder or CLIP's merges file. The default is the tokenizer beside the weights, then one found on this
    machine. `gelu` is the variant in the UNet, "tanh" or "exact"; the default is "tanh" for KerasCV
    checkpoints and "exact" for pipelines. `lora` are LoRA files to merge into the weights, each a path or
    "PATH:STRENGTH". With `moments` the image encoder returns mean and log variance. `dtype` is a Keras dtype
    policy, or fp32, fp16 or bf16; variables are float32. Raises Error with a message for the user.
    """
    files = open_base(*sources, tokenizer=tokenizer, gelu=gelu, lora=lora)
    return files.load(moments=moments, dtype=dtype)


def open_base(
    *sources: str | PathLike[str],
    tokenizer: str | PathLike[str] | None = None,
    gelu: Gelu | None = None,
    lora: SourcePath | Sequence[SourcePath] = (),
) -> BaseFiles:
    """Open the files of `sources`: a pipeline folder, a single file, KerasCV checkpoints, or "tiny".

    A pipeline folder is one that diffusers has written. `tokenizer` is a folder or CLIP's merges file. The
    default is the tokenizer beside the weights, then one found on this machine. `gelu` is the variant in the
    UNet. The default is the one used in training: "tanh" for KerasCV checkpoints, "exact" for pipelines.
    `lora` are LoRA files to merge into the weights, each a path or "PATH:STRENGTH". Raises Error with a
    message for the user.
    """
    merges = read_merges([lora] if isinstance(lora, (str, PathLike)) else lora)
    paths = [path for source in sources for path in locate_all(source, pipelines=True)]
    if len(paths) == 1 and is_pipeline(paths[0]):
        components = read_pipeline(paths[0])
        configs = {part: (m, c.config) for c in components.values() for part, m in c.parts.items()}
        gelu = gelu or "exact"
    else:
        configs = {part: (match, _beside(match)) for part, match in gather(paths).items()}
        keras_own = any(match.keras for match, _ in configs.values())
        gelu = gelu or ("tanh" if keras_own else "exact")
    family = family_of(configs)
    if missing := [label(part) for part in family.parts if part not in configs]:
        raise Error(f"Not a whole model, {', '.join(missing)} missing: {', '.join(map(str, paths))}.")
    checked = check_together({part: match for part, (match, _) in configs.items()})
    check_merges(merges, checked.values())
    for merge in merges:
        check_finite(merge.lora)
    checked = {part: merged(match, merges) for part, match in checked.items()}
    configs = {part: (checked[part], stated) for part, (_, stated) in configs.items()}
    unet, text = checked["unet"], checked["text_encoder"]
    config = ModelConfig(
        unet_config(*configs["unet"], gelu=gelu),
        text_encoder_config(*configs["text_encoder"]),
        vae_config(*configs["vae_decoder"]),
    )
    named = None if tokenizer is None else locate(tokenizer, parts=())
    files = find_tokenizer(named, [*homes(text), *paths, *snapshots(paths)])
    check_enough_rows(text, files)
    scheduler, stating = scheduler_with(unet)
    prediction_type, schedule = prediction_in(scheduler, stating), schedule_of(scheduler, stating)
    latents = configs["unet"][1].get("sample_size", family.image_size // PIXELS_PER_LATENT)
    return BaseFiles(
        configs, config, PIXELS_PER_LATENT * latents, prediction_type, schedule, Tokenizer.of_files(files)
    )


def load_weights(model: keras.Model, match: Match) -> dict[int, str]:
    """Assign the tensors of a recognised part to the variables of one of our models.

    Tensors in diffusers' layout are transposed. Returns the diffusers name of each variable, by the
    variable's `id`.
    """
    slots = list(match.require_complete().slots())
    if len(slots) != len(model.weights):
        raise Error(f"{match.source.path}: {len(slots)} tensors for {len(model.weights)} variables.")
    for (slot, tensor), variable in zip(slots, model.weights, strict=True):
        variable.assign(read_values(match, slot, tensor, tuple(variable.shape)))
    return {id(variable): slot.target for (slot, _), variable in zip(slots, model.weights, strict=True)}


def read_values(match: Match, slot: Slot, tensor: Tensor, shape: tuple[int, ...]) -> Array:
    """A tensor of a recognised part in Keras' layout: float32 of `shape`, transposed if from diffusers.

    Raises Error for a tensor of another shape.
    """
    values = values_of(tensor)
    if not match.keras and slot.variable.reverses:
        values = reverse(values, core(slot.part_shape(match.dims, keras=False))[::-1], shape)
    if values.shape != shape:
        raise Error(f"{match.source.path}: {tensor.name} is {list(values.shape)}, not {list(shape)}.")
    return values.astype("float32", copy=False)


def unet_config(match: Match, stated: Mapping[str, Any], gelu: Gelu) -> UNetConfig:
    """The UNet's config, from its tensor shapes and from config entries under diffusers' names."""
    widths = _widths(match)
    heads = _stated(match, stated, "attention_head_dim")
    return UNetConfig(
        widths=widths,
        heads=tuple(heads) if isinstance(heads, list) else (heads,) * len(widths),
        context_width=match.dims["context"],
        linear_projection=match.version == "sd2",
        norm_groups=_stated(match, stated, "norm_num_groups"),
        gelu=gelu,
    )


def text_encoder_config(match: Match, stated: Mapping[str, Any]) -> TextEncoderConfig:
    """The text encoder's config, from its tensor shapes and from config entries under diffusers' names.

    If no entry states the activation of an SD2 text encoder, it is the tanh approximation of GELU for KerasCV
    checkpoints and the exact GELU for single files. Raises Error for an unknown activation.
    """
    sd2 = "gelu_pytorch_tanh" if match.keras else "gelu"
    activation = stated.get("hidden_act", "quick_gelu" if match.version == "sd1" else sd2)
    if activation not in _ACTIVATIONS:
        raise Error(f"{match.source.path}: unknown activation {activation!r} in the text encoder's config.")
    return TextEncoderConfig(
        width=match.dims["width"],
        layers=match.dims["repeat"],
        heads=_stated(match, stated, "num_attention_heads"),
        vocabulary=match.dims["vocabulary"],
        max_length=match.dims["length"],
        activation=_ACTIVATIONS[activation],  # type: ignore[arg-type]
    )


def vae_config(match: Match, stated: Mapping[str, Any]) -> VAEConfig:
    """The autoencoder's config, from either half."""
    return VAEConfig(_widths(match), _stated(match, stated, "norm_num_groups"))


def _widths(match: Match) -> tuple[int, ...]:
    return tuple(match.dims[name] for name in ("c0", "c1", "c2", "c3"))


def _stated(match: Match, stated: Mapping[str, Any], name: str) -> Any:
    table = match.spec.table
    return {**table.config, **table.versions[match.version].config, **stated}[name]


def _beside(match: Match) -> dict[str, Any]:
    """The entries of the `kcv2diffusers.json` beside a checkpoint.

    Raises Error if the widths are unusual and the file does not state the number of heads.
    """
    stated = stated_beside(match)
    require_heads(match, stated)
    return stated


def _stateable(match: Match, config: Mapping[str, Any]) -> dict[str, Any]:
    """The config entries that a kcv2diffusers.json may hold."""
    stated = untold(match.spec.table, config)
    return {name: value for name, value in stated.items() if value is not None}
