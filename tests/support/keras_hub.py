"""Genuine KerasHub models in every container, made once per version of the code that makes them."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest

from support.checkpoints import ROOT, kept
from support.random_pipelines import TOKENIZER

MAKER = Path(__file__).parent / "kerashub"
KINDS = ("sd3", "sd35m", "sd35l")
SIZE = 64  # pixels, as in kerashub/tiny.py
COMPONENTS = ("transformer", "text_encoder", "text_encoder_2", "vae")
FILES = {
    "diffuser": "transformer",
    "clip_l": "text_encoder",
    "clip_g": "text_encoder_2",
    "t5": "text_encoder_3",
    "vae": "vae",
}
"""The component that a file of one part becomes."""


def components(kind: str) -> tuple[str, ...]:
    """The components of a kind; only one kind has a T5."""
    return (*COMPONENTS, "text_encoder_3") if kind == "sd35m" else COMPONENTS


def run(script: str, *arguments: str | Path, backend: str = "torch") -> str:
    """What a script of support/kerashub prints. On PyTorch models are built in a third of JAX's time."""
    if find_spec("keras_hub") is None:
        pytest.skip("needs keras-hub (make venv)")
    environment = {**os.environ, "KERAS_BACKEND": backend}
    done = subprocess.run(
        [sys.executable, MAKER / script, *arguments], env=environment, capture_output=True, text=True
    )
    if done.returncode:
        raise RuntimeError(f"{script} {arguments}:\n{done.stderr[-3000:]}")
    return done.stdout


def models() -> Path:
    """The folder with a folder of each kind; see support/kerashub/make_models.py and make_lora.py."""

    def make(folder: Path) -> None:
        run("make_models.py", folder, TOKENIZER)
        run("make_lora.py", folder, TOKENIZER, backend="tensorflow")

    scripts = ("make_models.py", "make_lora.py", "tiny.py", "expected.py")
    makers = [*(MAKER / script for script in scripts), ROOT / "constraints" / "dev.txt"]
    return kept("kerashub", makers, make)


def trained() -> Path:
    """The folder of a small model that was trained; see support/kerashub/make_trained.py."""
    makers = [MAKER / "make_trained.py", MAKER / "make_models.py", MAKER / "tiny.py"]
    makers.append(ROOT / "constraints" / "dev.txt")
    return kept("kerashub-trained", makers, lambda folder: run("make_trained.py", folder, TOKENIZER))


def tensors(kind: str, component: str, which: str = "expected") -> dict[str, np.ndarray]:
    """What diffusers' tensors must be: of the model as it is saved, or with its LoRA `merged`."""
    with np.load(models() / kind / which / f"{component}.npz") as held:
        return dict(held)


def arrays(kind: str, name: str) -> dict[str, np.ndarray]:
    """`forward` or `sample` of a kind."""
    with np.load(models() / kind / f"{name}.npz") as held:
        return dict(held)
