"""PSNR limits for images. The tolerances of parts and blocks are in the weight maps, with each part.

Errors of parts and blocks are largest absolute difference / largest absolute value. The benchmarks list the
errors measured at full size. Summing float32 in another order gives 1e-6 to 1e-5. The wrong GELU in a UNet
gives 5e-5 in a block of the tiny base, and more with random weights.
"""

from __future__ import annotations

PSNR = 40.0
"""Minimum peak signal-to-noise ratio of an image in dB, with diffusers as users run it."""
PSNR_ATTRIBUTED = 55.0
"""The same in dB, with KerasCV's GELU and epsilon in the torch models."""
