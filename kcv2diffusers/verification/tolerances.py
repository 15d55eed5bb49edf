"""Limits of likeness for pictures. Those of parts and blocks stand in the weight maps, with each part.

Errors of parts and blocks are largest absolute difference / largest absolute value. The benchmarks have what
is measured at full size; float32 sums in another order give 1e-6 to 1e-5. The wrong GELU in a UNet is 5e-5 in
a block of the tiny base and more in random weights.
"""

from __future__ import annotations

PSNR = 40.0
"""The least peak signal-to-noise ratio of a picture in dB, with diffusers as users run it."""
PSNR_ATTRIBUTED = 55.0
"""The same with KerasCV's GELU and epsilon in the torch models."""
