"""Random LoRA files for a pipeline folder."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from safetensors.numpy import load_file, save_file

Tensors = dict[str, np.ndarray]
WEIGHTS = {
    "unet": Path("unet", "diffusion_pytorch_model.safetensors"),
    "text_encoder": Path("text_encoder", "model.safetensors"),
}
KOHYA = {"unet": "lora_unet_", "text_encoder": "lora_te_"}


def kernels(pipeline: Path) -> dict[tuple[str, str], np.ndarray]:
    """The weights of all linear layers and convolutions of a pipeline, by component and module."""
    return {
        (component, name.removesuffix(".weight")): tensor
        for component, file in WEIGHTS.items()
        for name, tensor in load_file(pipeline / file).items()
        if name.endswith(".weight") and tensor.ndim in (2, 4) and "embeddings" not in name
    }


def kohya(
    pipeline: Path,
    rank: int = 4,
    alpha: float = 2,
    scale: float = 0.02,
    dtype: str = "float32",
    seed: int = 0,
) -> Tensors:
    """Random updates of all layers as kohya's scripts write them."""
    rng = np.random.default_rng(seed)
    tensors: Tensors = {}
    for (component, module), weight in kernels(pipeline).items():
        name = KOHYA[component] + module.replace(".", "_")
        outputs, inputs, *kernel = weight.shape
        tensors[f"{name}.alpha"] = np.array(alpha, dtype)
        tensors[f"{name}.lora_down.weight"] = scale * rng.standard_normal((rank, inputs, *kernel))
        tensors[f"{name}.lora_up.weight"] = scale * rng.standard_normal((outputs, rank, *[1] * len(kernel)))
    return {name: tensor.astype(dtype) for name, tensor in tensors.items()}


def save(tensors: Tensors, path: Path, metadata: dict[str, str] | None = None) -> Path:
    save_file(tensors, path, {"format": "pt", **(metadata or {})})
    return path
