"""The conversion as the former Space did it, for comparison: both frameworks, every weight through both.

    python benchmarks/space_way.py UNET.h5 TEXT_ENCODER.h5 OUT

Builds the KerasCV models, loads the weights, copies them into torch modules by name, saves with diffusers.
Written for this benchmark from the description of the Space, whose code no longer runs.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
sys.path.insert(0, str(Path(__file__).parent.parent / "tests" / "support" / "kerascv"))

import expected
import stack
import torch
from diffusers import UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel


def main(unet_file: str, text_file: str, out: Path) -> None:
    unet = stack.full("unet", 1, 512)
    unet.load_weights(unet_file)
    module = UNet2DConditionModel(cross_attention_dim=768)
    state = {k: torch.from_numpy(v) for k, v in expected.state_dict("unet", unet).items()}
    module.load_state_dict(state)
    module.save_pretrained(out / "unet")
    text = stack.full("text_encoder", 1, 512)
    text.load_weights(text_file)
    encoder = CLIPTextModel(CLIPTextConfig(hidden_size=768, intermediate_size=3072, num_attention_heads=12))
    wanted = encoder.state_dict()
    weights = {k: torch.from_numpy(v) for k, v in expected.state_dict("text_encoder", text).items()}
    encoder.load_state_dict(
        {k if k in wanted else k.removeprefix("text_model."): v for k, v in weights.items()}
    )
    encoder.save_pretrained(out / "text_encoder")


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], Path(sys.argv[3]))
