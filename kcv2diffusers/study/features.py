"""Embeddings of pictures and texts by DINO and CLIP, through transformers.

Pickled weights are never loaded.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from kcv2diffusers.diffusion import Array
from kcv2diffusers.errors import Error, MissingExtra, one_line, plain

_AT_ONCE = 32  # pictures


class Dino:
    """A vision transformer (DINO, DINOv2): the embedding of a picture is that of the class token.

    `model` is a folder or a name on the Hub.
    """

    def __init__(self, model: str) -> None:
        self._model, self._processor = _load("AutoModel", model), _load("AutoImageProcessor", model)
        self.name = _named(model, self._model)

    def images(self, images: Sequence[Array]) -> Array:
        """Unit embeddings (n, width) of images (height, width, 3) uint8."""
        return _embedded(
            images, self._processor, lambda pixels: self._model(pixel_values=pixels).last_hidden_state[:, 0]
        )


class Clip:
    """A CLIP model. `model` is a folder or a name on the Hub."""

    def __init__(self, model: str) -> None:
        self._model, self._processor = _load("CLIPModel", model), _load("AutoImageProcessor", model)
        self._tokenizer = _load("AutoTokenizer", model)
        self.name = _named(model, self._model)

    def images(self, images: Sequence[Array]) -> Array:
        """Unit embeddings (n, width) of images (height, width, 3) uint8."""

        def embed(pixels: Any) -> Any:
            return self._model.visual_projection(self._model.vision_model(pixel_values=pixels).pooler_output)

        return _embedded(images, self._processor, embed)

    def texts(self, texts: Sequence[str]) -> Array:
        """Unit embeddings (n, width) of texts."""
        import torch

        length = self._model.config.text_config.max_position_embeddings
        tokens = self._tokenizer(
            list(texts), padding=True, truncation=True, max_length=length, return_tensors="pt"
        )
        names = ("input_ids", "attention_mask")
        with torch.inference_mode():
            known = {name: tokens[name].to(self._model.device) for name in names}
            found = self._model.text_projection(self._model.text_model(**known).pooler_output)
        return _unit(found.float().cpu().numpy())


def _load(kind: str, model: str) -> Any:
    """A model or a processor of transformers, on a GPU if there is one. Raises Error if it is not there."""
    try:
        import torch
        import transformers
    except ModuleNotFoundError as error:
        raise MissingExtra(str(error.name), "diffusers") from error
    more = {"use_safetensors": True} if kind.endswith("Model") else {}
    try:
        loaded = getattr(transformers, kind).from_pretrained(model, trust_remote_code=False, **more)
    except (OSError, ValueError, ImportError) as error:
        raise Error(
            f"[measure] {plain(model)}: cannot be loaded: {plain(one_line(error))[:200]}\n"
            "Give a folder or a name on the Hub of a DINO or CLIP model with .safetensors weights."
        ) from None
    if kind.endswith("Model"):
        return loaded.eval().to("cuda" if torch.cuda.is_available() else "cpu")
    return loaded


def _named(model: str, loaded: Any) -> str:
    """A model's name, with its commit if it is from the Hub. No path reveals this machine."""
    commit = getattr(loaded.config, "_commit_hash", None)
    return f"{model}@{commit[:12]}" if commit else model.replace("\\", "/").rpartition("/")[2]


def _embedded(images: Sequence[Array], processor: Any, embed: Any) -> Array:
    import torch
    from PIL import Image

    found = []
    for first in range(0, len(images), _AT_ONCE):
        some = [Image.fromarray(image) for image in images[first : first + _AT_ONCE]]
        pixels = processor(images=some, return_tensors="pt")["pixel_values"]
        with torch.inference_mode():
            device = "cuda" if torch.cuda.is_available() else "cpu"
            found.append(embed(pixels.to(device)).float().cpu().numpy())
    return _unit(np.concatenate(found))


def _unit(values: Array) -> Array:
    return np.asarray(values / np.linalg.norm(values, axis=1, keepdims=True))
