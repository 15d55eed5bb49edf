"""A tiny genuine Flux model of KerasHub, a family that is not converted.

    python make_flux.py OUT

Writes OUT/flux.weights.h5, OUT/flux.h5 and OUT/preset.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

os.environ.setdefault("KERAS_BACKEND", "torch")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

from keras_hub.src.models.flux.flux_model import FluxBackbone


def main(out: Path) -> None:
    backbone = FluxBackbone(
        input_channels=16,
        hidden_size=32,
        mlp_ratio=2.0,
        num_heads=2,
        depth=2,
        depth_single_blocks=2,
        axes_dim=[4, 6, 6],
        theta=10_000,
        use_bias=True,
        guidance_embed=True,
        image_shape=(24, 16),
        text_shape=(8, 16),
        image_ids_shape=(24, 3),
        text_ids_shape=(8, 3),
        y_shape=(16,),
    )
    backbone.save_weights(out / "flux.weights.h5")
    backbone.save(out / "flux.h5")
    backbone.save_to_preset(out / "preset")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
