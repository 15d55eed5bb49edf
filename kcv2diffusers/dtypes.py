"""The dtypes of weights, by the names of the command line and of `.safetensors` headers."""

from __future__ import annotations

import ml_dtypes
import numpy as np

DTYPES = {
    "float32": np.dtype("<f4"),
    "float16": np.dtype("<f2"),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
}
SAFETENSORS = {
    "F64": np.dtype("<f8"),
    "F32": DTYPES["float32"],
    "F16": DTYPES["float16"],
    "BF16": DTYPES["bfloat16"],
    "I64": np.dtype("<i8"),
    "I32": np.dtype("<i4"),
}
