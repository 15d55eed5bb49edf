"""The judge of the tiny base: a small classifier of what a picture of 64 x 64 pixels shows.

tools/tiny_judge.py trains it on drawn pictures, never on generated ones, and writes `judge.safetensors`. Its
convolutions have their batch normalisation folded in. It runs in NumPy.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from kcv2diffusers.diffusion import Array
from kcv2diffusers.errors import Error, meant, plain

FILE = Path(__file__).with_name("judge.safetensors")
SIZE = 64
"""Height and width in pixels of the pictures it was trained on."""


@dataclass(frozen=True)
class Judge:
    """The names of what it tells apart, and its weights by name: `conv0` ... and `dense`, with biases."""

    things: tuple[str, ...]
    weights: dict[str, Array]

    def probabilities(self, images: Array) -> Array:
        """How probable each of `things` is: (n, things), of images (n, 64, 64, 3) uint8."""
        values = images.astype("float32") / 127.5 - 1
        for number in range(sum(name.startswith("conv") for name in self.weights) // 2):
            kernel, bias = self.weights[f"conv{number}.weight"], self.weights[f"conv{number}.bias"]
            values = np.maximum(_convolution(values, kernel) + bias, 0)
        flat = values.transpose(0, 3, 1, 2).reshape(len(values), -1)
        logits = flat @ self.weights["dense.weight"].T + self.weights["dense.bias"]
        powers = np.exp(logits - logits.max(1, keepdims=True))
        return np.asarray(powers / powers.sum(1, keepdims=True))


def _convolution(values: Array, kernel: Array) -> Array:
    """3 x 3, stride 2, padded by 1: (n, height, width, in) to (n, height / 2, width / 2, out).

    `kernel` is (out, in, 3, 3).
    """
    padded = np.pad(values, ((0, 0), (1, 1), (1, 1), (0, 0)))
    windows = np.lib.stride_tricks.sliding_window_view(padded, (3, 3), axis=(1, 2))[:, ::2, ::2]
    return np.asarray(np.tensordot(windows, kernel, axes=((3, 4, 5), (1, 2, 3))))


def load_judge(file: Path = FILE) -> Judge:
    """The judge in a file."""
    from safetensors import safe_open

    with safe_open(file, "numpy") as opened:
        weights = {name: opened.get_tensor(name).astype("float32") for name in opened.keys()}  # noqa: SIM118
        return Judge(tuple(opened.metadata()["things"].split()), weights)


def thing_in(prompt: str, things: Sequence[str]) -> str:
    """What a prompt asks for. Raises Error unless it names exactly one of `things`."""
    found = [thing for thing in things if re.search(rf"\b{re.escape(thing)}\b", prompt)]
    if len(found) != 1:
        raise Error(
            f"[sample] {plain(prompt)!r}: names {'none' if not found else ' and '.join(found)} of what the "
            f'judge knows.\nName one of {", ".join(things)}, or set [measure] judge = "".'
        )
    return found[0]


def check_thing(thing: str, things: Sequence[str]) -> None:
    """Raise Error for a subject that the judge does not know."""
    if thing not in things:
        raise Error(
            f"[measure] thing {plain(thing)}: not known to the judge.{meant(thing, things)}\n"
            f"Choose one of {', '.join(things)}."
        )
