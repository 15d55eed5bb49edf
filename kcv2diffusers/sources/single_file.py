"""Single `.safetensors` files: whole checkpoints or one component in Stable Diffusion's original layout.

ComfyUI and A1111 read these files, and most fine-tunes are published in this form. The content is determined
from the names of the tensors; `maps/original.py` maps them to the tensors of the components.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from kcv2diffusers.errors import SourceError
from kcv2diffusers.maps.original import Naming, Place, namings
from kcv2diffusers.maps.tables import Spec, Table, specs, tables
from kcv2diffusers.sources.diffusers_pipeline import read_header
from kcv2diffusers.sources.leftovers import COUNTERS, EMA
from kcv2diffusers.sources.lora import OTHER_KINDS
from kcv2diffusers.sources.pickled import read_pickled
from kcv2diffusers.sources.source import Source, Style
from kcv2diffusers.sources.tensor import Tensor, rows

CONTAINER = "single file .safetensors"
PICKLED = "single file .ckpt"
_MAX_LAYERS = 1000  # guards against a file with a million names
_MOST = 20_000  # tensors in a file; Stable Diffusion with its EMA copy has 2,000
_READ = "Single files of Stable Diffusion 1 and 2 that draw from text are read."
_LORA = "Merge it into its base first, or give the base alone."
_MERGE = "Give the base here and the LoRA with --lora of convert, which merges it."
# Tensor names that identify files of other kinds: a pattern, the kind, and the remedy.
_OTHERS = tuple((pattern, what, _LORA) for pattern, what in OTHER_KINDS) + tuple(
    (re.compile(pattern), what, remedy)
    for pattern, what, remedy in (
        (r"lora_(unet|te\d?)_.*|.*\.(lora_(down|up|A|B)|lora_linear_layer|lora)\..*", "a LoRA", _MERGE),
        (r"(.*\.)?(double_blocks|single_blocks|single_transformer_blocks)\.\d+\..*", "Flux", _READ),
        (r"(.*\.)?joint_blocks\.\d+\..*|transformer_blocks\.\d+\.attn\..*", "Stable Diffusion 3", _READ),
        (r"conditioner\.embedders\.1\..*", "Stable Diffusion XL", _READ),
        (r"text_encoders\..*", "Stable Diffusion 3 or a later family", _READ),
        (
            r"(.*\.)?label_emb\..*",
            "Stable Diffusion XL, unCLIP or another model with class embeddings",
            _READ,
        ),
        (r"(control_model\.|zero_convs\.|input_hint_block\.).*", "a ControlNet", _READ),
        (r"(.*\.)?motion_modules\..*|(.*\.)?temporal_transformer\..*", "AnimateDiff, a video model", _READ),
        (r"(.*\.)?(time_mixer|time_stack)\..*", "Stable Video Diffusion", _READ),
        (r"(emb_params|clip_[gl]|string_to_param(\..*)?)", "a textual inversion", _READ),
        (r"(.*\.)?transformer\.(encoder|decoder)\.block\..*|(.*\.)?t5xxl\..*", "a T5 text encoder", _READ),
        (r"(.*\.)?ip_adapter\..*|image_proj\..*", "an IP-Adapter", _READ),
        (r"cond_stage_model\.roberta\..*", "AltDiffusion", _READ),
    )
)
# Other families by the input channels of the first convolution, of the UNet or the autoencoder's decoder.
_UNET_IN = r"(model\.diffusion_model\.)?input_blocks\.0\.0\.weight|conv_in\.weight"
_DECODER_IN = r"(first_stage_model\.|vae\.)?decoder\.conv_in\.weight"
_CHANNELS = tuple(
    (re.compile(pattern), channels, what)
    for pattern, channels, what in (
        (_UNET_IN, 9, "an inpainting model (9 input channels)"),
        (_UNET_IN, 8, "an InstructPix2Pix model (8 input channels)"),
        (_UNET_IN, 7, "an upscaling model (7 input channels)"),
        (_UNET_IN, 5, "a depth model (5 input channels)"),
        (_DECODER_IN, 16, "an autoencoder with 16 latent channels (Stable Diffusion 3, Flux)"),
    )
)
# Buffers of the original code outside of the models: the noise schedule, which that code computes itself.
_SCHEDULE = re.compile(
    r"(sqrt_|log_)?(recip(m1)?_|one_minus_)?alphas_cumprod(_prev)?|betas|logvar|lvlb_weights|scale_factor"
    r"|posterior_\w+|sqrt_\w+|log_one_minus_alphas_cumprod|denoiser\.\w+|v_pred|ztsnr"
)
_EMA_PREFIX = "model_ema."
_BESIDE = "tensors of no model"
_UNUSED = "parts that pictures do not need"


@dataclass(frozen=True)
class _Fit:
    """A component found in a file under a prefix.

    `named` has the tensors by their names in diffusers, `spelled` the file's name of each tensor that the
    component may have, by its name in diffusers.
    """

    naming: Naming
    prefix: str
    named: dict[str, Tensor]
    spelled: dict[str, str]
    stored: dict[str, Tensor]  # the tensors of the file that `named` is taken from, by name


def read_single_file(path: Path, *, ema: bool = False) -> list[Source]:
    """The models in a `.safetensors` file, one `Source` for each part.

    With `ema` the UNet is its moving average (`model_ema.*`); without it the average is used only if there is
    no other UNet. Raises SourceError for a file of another family, a file without any of the models, a file
    without the requested average, and a damaged file.
    """
    return _sources(path, *read_header(path), CONTAINER, ema)


def read_pickled_file(path: Path, *, ema: bool = False) -> list[Source]:
    """As `read_single_file`, for a pickled file (`.ckpt`); call it only if the user has allowed pickles."""
    return _sources(path, read_pickled(path), {}, PICKLED, ema)


def _sources(
    path: Path, tensors: Sequence[Tensor], metadata: Mapping[str, str], container: str, ema: bool
) -> list[Source]:
    if len(tensors) > _MOST:
        raise SourceError(path, f"its {len(tensors)} tensors are more than any model here has.", _READ)
    stored = {tensor.name: tensor for tensor in tensors}
    _refuse_others(path, stored)
    fits = {name: fit for name in namings() if (fit := _whole(name, stored))}
    average = _averaged(stored) if ema or "unet" not in fits else None
    if average:
        fits["unet"] = average
    elif ema:
        raise SourceError(path, "holds no EMA copy of the UNet (model_ema.*).", "Omit --ema.")
    if not fits and (alone := _alone(stored)):
        fits[alone.naming.component] = alone
    if not fits:
        raise SourceError(
            path, f"its {len(stored)} tensors are not those of a Stable Diffusion model.", _READ
        )
    leftovers, strangers = _rest(stored, fits.values(), average)
    sources: list[Source] = []
    for name, fit in fits.items():
        for part in tables()[name].parts:
            named = _of_part(fit, part)
            if not named:
                continue
            sources.append(
                Source(
                    path,
                    f"{container}, EMA weights" if fit is average else container,
                    Style.NAMED,
                    named=named,
                    spelled=fit.spelled,
                    part=part,
                    version=_version(fit),
                    others=[] if sources else strangers,
                    leftovers={} if sources else leftovers,
                    metadata=metadata,
                )
            )
    return sources


def _version(fit: _Fit) -> str | None:
    """The version that a file's tensor names determine: OpenCLIP is Stable Diffusion 2's text encoder."""
    return "sd2" if fit.naming.version == "sd2" else None


def _refuse_others(path: Path, stored: Mapping[str, Tensor]) -> None:
    """Raise SourceError for a file of another family; the message names the family."""
    for pattern, what, remedy in _OTHERS:
        if any(pattern.fullmatch(name) for name in stored):
            raise SourceError(path, f"of {what}, which is not read here.", remedy)
    for pattern, channels, what in _CHANNELS:
        for name, tensor in stored.items():
            if pattern.fullmatch(name) and len(tensor.shape) == 4 and tensor.shape[1] == channels:
                raise SourceError(path, f"of {what}, which is not read here.", _READ)


def _whole(component: str, stored: Mapping[str, Tensor]) -> _Fit | None:
    """The component in a whole checkpoint, under the prefix of the component."""
    fits = [
        _fit(naming, prefix, stored)
        for naming in namings()[component].values()
        for prefix in (naming.prefix, *naming.also)
        if prefix and any(name.startswith(prefix) for name in stored)
    ]
    best = max(fits, key=lambda fit: len(fit.named), default=None)
    return best if best and best.named else None


def _alone(stored: Mapping[str, Tensor]) -> _Fit | None:
    """The only component of a file without prefixes, with its original names or those of diffusers."""
    fits = [
        fit
        for component, versions in namings().items()
        for naming in versions.values()
        for fit in (_fit(naming, "", stored), _in_diffusers(tables()[component], naming, stored))
    ]
    best = max(fits, key=lambda fit: len(fit.named), default=None)
    return best if best and 2 * len(best.stored) > len(stored) else None


def _averaged(stored: Mapping[str, Tensor]) -> _Fit | None:
    """The moving average of the UNet in a file: its names have a prefix of their own and no dots."""
    (naming,) = namings()["unet"].values()
    flat = {name: tensor for name, tensor in stored.items() if name.startswith(_EMA_PREFIX)}
    if not flat:
        return None
    names, places = {}, _places(naming, flat)
    for place in places.values():
        inner = f"{naming.prefix.removeprefix('model.')}{place.name}".replace(".", "")
        names[place.name] = f"{_EMA_PREFIX}{inner}"
    found = {place: stored[name] for place, name in names.items() if name in stored}
    fit = _placed(naming, "", places, found)
    return replace(fit, spelled={t: names[place.name] for t, place in places.items()}) if fit.named else None


def _fit(naming: Naming, prefix: str, stored: Mapping[str, Tensor]) -> _Fit:
    """The tensors of a component under a prefix, in the original layout."""
    inner = {name[len(prefix) :]: tensor for name, tensor in stored.items() if name.startswith(prefix)}
    inner = {naming.renamed(name): tensor for name, tensor in inner.items()}
    return _placed(naming, prefix, _places(naming, inner), inner)


def _in_diffusers(table: Table, naming: Naming, stored: Mapping[str, Tensor]) -> _Fit:
    """The tensors of a component in a file with diffusers' names and no other component."""
    renamed = {new: tensor for name, tensor in stored.items() if (new := table.rename(name)) is not None}
    targets = _targets(table, renamed)
    named = {target: renamed[target] for target in targets if target in renamed}
    return _Fit(naming, "", named, {}, {tensor.name: tensor for tensor in named.values()})


def _placed(naming: Naming, prefix: str, places: Mapping[str, Place], inner: Mapping[str, Tensor]) -> _Fit:
    named, used = {}, {}
    for target, place in places.items():
        if tensor := inner.get(place.name):
            named[target] = _piece(tensor, place)
            used[tensor.name] = tensor
    return _Fit(naming, prefix, named, {t: prefix + place.name for t, place in places.items()}, used)


def _places(naming: Naming, inner: Mapping[str, Tensor]) -> dict[str, Place]:
    """The place of each tensor that the component may have, for the number of layers in the file."""
    table = tables()[naming.component]

    def has(target: str) -> bool:
        place = naming.place(target)
        return place is not None and place.name in inner and not naming.ignores(place.name)

    found: dict[str, Place] = {}
    for spec in _specs(table, naming):
        for slot in spec.slots(_layers(spec, has)):
            if place := naming.place(slot.target):
                found[slot.target] = place
    return found


def _targets(table: Table, names: Mapping[str, Tensor]) -> list[str]:
    """The diffusers tensors that a component may have, for the number of layers in the file."""
    return [
        slot.target
        for spec in specs()
        if spec.table is table
        for slot in spec.slots(_layers(spec, names.__contains__))
    ]


def _specs(table: Table, naming: Naming) -> list[Spec]:
    """The specs of a component in the versions that a naming applies to."""
    return [s for s in specs() if s.table is table and naming.version in ("any", "sd1", s.version)]


def _layers(spec: Spec, has: Callable[[str], bool]) -> int:
    """The number of layers in the repeated row; `has` returns whether a diffusers tensor exists."""
    row = next((row for row in spec.rows if row.repeated), None)
    count = 0
    if row is not None:
        module = spec.block(row, 0, 0)[0].target
        while count < _MAX_LAYERS and has(module.replace(".0.", f".{count}.", 1)):
            count += 1
    return count


def _piece(tensor: Tensor, place: Place) -> Tensor:
    """The share of a tensor that a place refers to, without trailing axes of size one.

    If the shape does not allow it, the tensor is returned unchanged, and its shape is reported later.
    """
    shape = tensor.shape
    if place.ones and set(shape[2:]) <= {1}:  # files of 2022 have one such axis, others two or none
        shape = shape[:2]
    if place.pieces == 1:
        return tensor if shape == tensor.shape else replace(tensor, shape=shape)
    if not shape or shape[0] % place.pieces:
        return tensor
    share = shape[0] // place.pieces
    return rows(tensor, place.piece * share, share)


def _of_part(fit: _Fit, part: str) -> dict[str, Tensor]:
    """The tensors of one part of a component, by their names in diffusers."""
    table = tables()[fit.naming.component]
    if len(table.parts) == 1:
        return fit.named
    targets = {slot.target for spec in specs() if spec.part == part for slot in spec.slots(0)}
    return {target: tensor for target, tensor in fit.named.items() if target in targets}


def _rest(
    stored: Mapping[str, Tensor], fits: Iterable[_Fit], average: _Fit | None
) -> tuple[dict[str, list[Tensor]], list[Tensor]]:
    """The tensors that belong to no model: those that may be left out, by kind, and the strangers in a model.

    `average` is the moving average among the models, if it is used.
    """
    found = list(fits)
    used = {name for fit in found for name in fit.stored}
    leftovers: dict[str, list[Tensor]] = {}
    strangers = []
    for name, tensor in stored.items():
        if name in used:
            continue
        inside = next((fit for fit in found if fit.prefix and name.startswith(fit.prefix)), None)
        alone = found[0] if len(found) == 1 and not found[0].prefix else None
        if name.startswith(_EMA_PREFIX):
            kind: str | None = EMA if tensor.shape else COUNTERS
        elif average and name.startswith(average.naming.prefix):
            kind = "the UNet beside its EMA copy"
        elif _SCHEDULE.fullmatch(name):
            kind = "noise schedule"
        elif holder := inside or alone:
            kind = _UNUSED if holder.naming.ignores(name[len(holder.prefix) :]) else None
        else:
            kind = _BESIDE
        if kind:
            leftovers.setdefault(kind, []).append(tensor)
        else:
            strangers.append(tensor)
    return leftovers, strangers
