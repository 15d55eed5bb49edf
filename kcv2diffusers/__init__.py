"""Convert KerasCV Stable Diffusion checkpoints to diffusers pipelines, and back.

The subpackages are layers. Each imports only from those before it in this list:
`system` (files, processes, signals), `maps` (weight maps), `hub` (downloads from the Hugging Face Hub),
`sources` (readers, and detection of what a checkpoint contains), `pipeline` (configs, scheduler, tokenizer),
`targets` (writers), `conversion` (both directions), `models` (the networks in Keras 3), `dreambooth` (the
trainer), `verification` (comparison of Keras and diffusers), `publish` (upload to the Hub), `rescue` (many
repositories), `cli` (the commands).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    __version__: str
    from kcv2diffusers.conversion.inspection import Inspected, inspect
    from kcv2diffusers.conversion.lora import ConvertedLora, convert_lora
    from kcv2diffusers.conversion.lora_extract import ExtractedLora, extract_lora
    from kcv2diffusers.conversion.result import Converted
    from kcv2diffusers.conversion.to_diffusers import convert
    from kcv2diffusers.conversion.to_kerascv import ToKeras, to_keras
    from kcv2diffusers.dreambooth.fine_tuning import fine_tune
    from kcv2diffusers.errors import Error
    from kcv2diffusers.generation import generate
    from kcv2diffusers.models.base import load_base
    from kcv2diffusers.publish.push import Pushed, push
    from kcv2diffusers.publish.space import space
    from kcv2diffusers.sources.locate import locate
    from kcv2diffusers.verification.result import Verified
    from kcv2diffusers.verification.run import verify
    from kcv2diffusers.verification.stock_pipeline import replay

__all__ = [
    "Converted",
    "ConvertedLora",
    "Error",
    "ExtractedLora",
    "Inspected",
    "Pushed",
    "ToKeras",
    "Verified",
    "convert",
    "convert_lora",
    "extract_lora",
    "fine_tune",
    "generate",
    "inspect",
    "load_base",
    "locate",
    "push",
    "replay",
    "space",
    "to_keras",
    "verify",
]

_HOME = {
    "Converted": "conversion.result",
    "ConvertedLora": "conversion.lora",
    "Error": "errors",
    "ExtractedLora": "conversion.lora_extract",
    "Inspected": "conversion.inspection",
    "Pushed": "publish.push",
    "ToKeras": "conversion.to_kerascv",
    "Verified": "verification.result",
    "convert": "conversion.to_diffusers",
    "convert_lora": "conversion.lora",
    "extract_lora": "conversion.lora_extract",
    "fine_tune": "dreambooth.fine_tuning",
    "generate": "generation",
    "inspect": "conversion.inspection",
    "load_base": "models.base",
    "locate": "sources.locate",
    "push": "publish.push",
    "replay": "verification.stock_pipeline",
    "space": "publish.space",
    "to_keras": "conversion.to_kerascv",
    "verify": "verification.run",
}


def __getattr__(name: str) -> Any:
    # Lazy imports: `kcv2diffusers --help` must not wait for NumPy and h5py.
    if name == "__version__":
        from kcv2diffusers.environment import own_version

        return own_version()
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
