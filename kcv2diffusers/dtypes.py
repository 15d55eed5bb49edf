"""Dtypes of weights, by their names on the command line and in `.safetensors` headers."""

from __future__ import annotations

import ml_dtypes
import numpy as np

DTYPES = {
    "float32": np.dtype("<f4"),
    "float16": np.dtype("<f2"),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
}
ALIASES = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}
"""Short names of the dtypes, as used in variant file names."""
SAFETENSORS = {
    "F64": np.dtype("<f8"),
    "F32": DTYPES["float32"],
    "F16": DTYPES["float16"],
    "BF16": DTYPES["bfloat16"],
    "I64": np.dtype("<i8"),
    "I32": np.dtype("<i4"),
}


def full_name(name: str) -> str:
    """Return the full name of a dtype for a short name, any other name unchanged."""
    return ALIASES.get(name, name)
