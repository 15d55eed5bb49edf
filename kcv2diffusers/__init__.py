"""Convert KerasCV Stable Diffusion checkpoints to diffusers pipelines, and back.

The modules, in the order a checkpoint passes them: `sources` (readers, one a container), `tables` and
`layouts` (the weight maps), `recognise` (what a checkpoint is), `plan` and `keras_files` (what goes where),
`stream` and `transfer` (the bytes), `pipeline` and `tokenizer` (what stands around the weights), `output`
(all or nothing). `to_diffusers` and `to_kerascv` put them together, `verification` compares the two sides.
`models` are the networks in Keras 3, `hub` reads from the Hugging Face Hub and publishes there.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kcv2diffusers.errors import Error
    from kcv2diffusers.fine_tuning import fine_tune
    from kcv2diffusers.hub.push import Pushed, push
    from kcv2diffusers.inspection import Inspected, inspect
    from kcv2diffusers.models.base import load_base
    from kcv2diffusers.sources.locate import locate
    from kcv2diffusers.stock_pipeline import replay
    from kcv2diffusers.to_diffusers import Converted, convert
    from kcv2diffusers.to_kerascv import ToKeras, to_keras
    from kcv2diffusers.to_pictures import generate
    from kcv2diffusers.verification.result import Verified
    from kcv2diffusers.verification.run import verify

__version__ = "0.1.0"
__all__ = [
    "Converted",
    "Error",
    "Inspected",
    "Pushed",
    "ToKeras",
    "Verified",
    "convert",
    "fine_tune",
    "generate",
    "inspect",
    "load_base",
    "locate",
    "push",
    "replay",
    "to_keras",
    "verify",
]

_HOME = {
    "Converted": "to_diffusers",
    "Error": "errors",
    "Inspected": "inspection",
    "Pushed": "hub.push",
    "ToKeras": "to_kerascv",
    "Verified": "verification.result",
    "convert": "to_diffusers",
    "fine_tune": "fine_tuning",
    "generate": "to_pictures",
    "inspect": "inspection",
    "load_base": "models.base",
    "locate": "sources.locate",
    "push": "hub.push",
    "replay": "stock_pipeline",
    "to_keras": "to_kerascv",
    "verify": "verification.run",
}


def __getattr__(name: str) -> Any:
    # Lazily, so that `kcv2diffusers --help` does not wait for NumPy and h5py.
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
