"""The third level: images of both sides from the same noise, and their latents after each step."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from kcv2diffusers.diffusion import Array
from kcv2diffusers.verification.exchange import Arrays
from kcv2diffusers.verification.metrics import relative_error
from kcv2diffusers.verification.request import Request
from kcv2diffusers.verification.tolerances import PSNR, PSNR_ATTRIBUTED

SIDES = ("stock", "attributed")


@dataclass(frozen=True)
class Likeness:
    """The similarity of an image to that of the Keras side.

    `psnr` is in dB (infinite if equal). `largest` is the largest difference of a colour value (0 to 255).
    `steps` holds, for the latents after each step, largest absolute error / largest absolute value.
    """

    psnr: float
    ssim: float
    largest: int
    steps: list[float]


@dataclass
class Run:
    """One prompt and seed; `stock` is unchanged diffusers, `attributed` has KerasCV's GELU and epsilon."""

    prompt: str
    seed: int
    stock: Likeness
    attributed: Likeness


@dataclass
class Images:
    """All runs, the PSNR limits in dB, other differences (`problems`), and the Keras `library`."""

    runs: list[Run]
    bar: float
    bar_attributed: float
    problems: list[str] = field(default_factory=list)
    library: str = "KerasCV"

    def worst(self, side: str) -> Run:
        """The run whose images are least similar."""
        return min(self.runs, key=lambda run: getattr(run, side).psnr)

    def failures(self) -> list[str]:
        """The PSNR values below their limit, each at the worst run, and other problems."""
        found = list(self.problems)
        if not self.runs:
            return found
        for side, bar, how in (
            ("stock", self.bar, ""),
            ("attributed", self.bar_attributed, f" with {self.library}'s GELU and epsilon"),
        ):
            run = self.worst(side)
            least = getattr(run, side).psnr
            if not least >= bar:
                where = f"prompt {run.prompt!r}, seed {run.seed}"
                found.append(f"pictures: PSNR {least:.1f} dB{how} (limit {bar:g} dB), {where}")
        return found


def measure(folder: Path, request: Request, library: str, *, exact: bool) -> Images:
    """Compare the arrays that both sides wrote to `folder`. `exact` says that both have the same GELU."""
    keras, torch = Arrays(folder / "keras"), Arrays(folder / "diffusers")
    runs = []
    for number in range(len(request.prompts) * request.seeds):
        prompt, seed = request.prompts[number // request.seeds], number % request.seeds
        stock, attributed = (_likeness(keras, torch, side, number) for side in SIDES)
        runs.append(Run(prompt, seed, stock, attributed))
    bar = PSNR_ATTRIBUTED if exact else PSNR
    problems = _tokens(keras.load("tokens"), torch.load("tokens"), ["", *request.prompts])
    return Images(runs, bar, PSNR_ATTRIBUTED, problems, library)


def _likeness(keras: Arrays, torch: Arrays, side: str, number: int) -> Likeness:
    from skimage.metrics import structural_similarity

    from kcv2diffusers.pictures import psnr

    wanted, got = keras.load("picture", number), torch.load("picture", side, number)
    way, other = keras.load("latents", number), torch.load("latents", side, number)
    likeness: Any = structural_similarity
    ssim = likeness(wanted[0], got[0], channel_axis=2, data_range=255)
    return Likeness(
        psnr=float(psnr(wanted, got)[0]),
        ssim=float(ssim) if math.isfinite(ssim) else 0.0,
        largest=int(np.abs(wanted.astype(int) - got).max()),
        steps=[relative_error(b, a)[1] for a, b in zip(way, other, strict=True)],
    )


def _tokens(wanted: Array, got: Array, prompts: Sequence[str]) -> list[str]:
    """The first prompt whose token ids differ, as a list of at most one problem."""
    problems = []
    for prompt, one, other in zip(prompts, wanted, got, strict=True):
        if len(one) != len(other):
            problems.append(f"tokens: {len(other)} for a prompt, not {len(one)}")
        elif (one != other).any():
            at = int(np.argmax(one != other))
            problems.append(f"tokens: number {at} of {prompt!r} is {other[at]}, not {one[at]}")
    return problems[:1]
