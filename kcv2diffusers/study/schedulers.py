"""The samplers of a study: that of `generate`, and schedulers of diffusers by their usual names."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

KERASCV = "kerascv"
"""KerasCV's sampler in Keras 3, as `generate` draws."""

# The class in diffusers, and the entries that differ from the scheduler config of the pipeline.
SCHEDULERS: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    "ddim": ("DDIMScheduler", {}),
    "ddpm": ("DDPMScheduler", {}),
    "deis": ("DEISMultistepScheduler", {}),
    "dpm++": ("DPMSolverMultistepScheduler", {}),
    "dpm++_karras": ("DPMSolverMultistepScheduler", {"use_karras_sigmas": True}),
    "dpm++_sde": ("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++"}),
    "euler": ("EulerDiscreteScheduler", {}),
    "euler_a": ("EulerAncestralDiscreteScheduler", {}),
    "heun": ("HeunDiscreteScheduler", {}),
    "pndm": ("PNDMScheduler", {}),
    "unipc": ("UniPCMultistepScheduler", {}),
}
NAMES = (KERASCV, *SCHEDULERS)
