"""A genuine full-size KerasCV SD1 checkpoint through the converter, and what both sides compute.

    python tools/demo_full.py FOLDER

Writes KerasCV's own models with random weights (no download), converts them with the command line, loads
the result with StableDiffusionPipeline.from_pretrained, runs every part on the same inputs. About 6 GB of
memory, 9 GB of disk and a few minutes; FOLDER/pipeline stays.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent
PARTS = {
    "unet": "UNet",
    "text_encoder": "text encoder",
    "vae_decoder": "VAE decoder",
    "vae_encoder": "VAE encoder",
}
SIZE = 128


def run(*command: str | Path, quiet: bool = False) -> None:
    environment = {**os.environ, "TF_CPP_MIN_LOG_LEVEL": "3", "HF_HUB_OFFLINE": "1"}
    if quiet:
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        if done.returncode:
            sys.exit(done.stderr[-3000:])
    else:
        subprocess.run(command, env=environment, check=True)


def main(folder: Path) -> None:
    keras, pipeline = folder / "kerascv", folder / "pipeline"
    keras.mkdir(parents=True, exist_ok=True)
    for part, name in PARTS.items():
        started = time.monotonic()
        print(f"KerasCV {name}: building, saving, running ... ", end="", flush=True)
        script = ROOT / "tests" / "support" / "kerascv" / "forward.py"
        run(sys.executable, script, keras, part, "1", "--kind", "full", "--size", str(SIZE), quiet=True)
        print(f"{time.monotonic() - started:.0f} s")
    print("\n$ kcv2diffusers convert", keras, "--out", pipeline, flush=True)
    shutil.rmtree(pipeline, ignore_errors=True)
    run(sys.executable, "-m", "kcv2diffusers", "convert", keras, "--out", pipeline)
    compare(keras, pipeline)
    for part in PARTS:
        (keras / f"{part}.weights.h5").unlink()


def compare(keras: Path, pipeline: Path) -> None:
    """Load the pipeline as a user would and print each part's error against KerasCV."""
    import numpy as np
    import torch
    import torch.nn.functional as F
    from diffusers import StableDiffusionPipeline
    from diffusers.models.activations import GEGLU
    from diffusers.utils import logging

    logging.disable_progress_bar()
    print("\nStableDiffusionPipeline.from_pretrained ...", flush=True)
    pipe = StableDiffusionPipeline.from_pretrained(pipeline)
    arrays = {part: dict(np.load(keras / f"{part}.npz")) for part in PARTS}

    def first(values: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(np.ascontiguousarray(np.moveaxis(values, -1, 1)))

    def unet() -> torch.Tensor:
        given = arrays["unet"]
        timesteps, context = torch.from_numpy(given["timesteps"]), torch.from_numpy(given["context"])
        return pipe.unet(first(given["latent"]), timesteps, context).sample

    def report(name: str, part: str, output: torch.Tensor) -> None:
        wanted, got = arrays[part]["output"], output.numpy()
        got = np.moveaxis(got, 1, -1) if got.ndim == 4 else got
        error = np.abs(got - wanted).max() / np.abs(wanted).max()
        print(f"  {name:38} {error:.1e}")

    scale = pipe.vae.config.scaling_factor
    print("largest error / largest value, diffusers against KerasCV on the same inputs:")
    with torch.no_grad():
        tokens = torch.from_numpy(arrays["text_encoder"]["tokens"]).long()
        report("text encoder", "text_encoder", pipe.text_encoder(tokens)[0])
        report("UNet (erf GELU of diffusers)", "unet", unet())
        GEGLU.gelu = lambda self, gate: F.gelu(gate, approximate="tanh")
        report("UNet (KerasCV's tanh GELU on both sides)", "unet", unet())
        image = pipe.vae.decode(first(arrays["vae_decoder"]["latent"]) / scale).sample
        report("VAE decoder", "vae_decoder", image)
        mean = pipe.vae.encode(first(arrays["vae_encoder"]["image"])).latent_dist.mean * scale
        report("VAE encoder", "vae_encoder", mean)
    print(f"\nThe pipeline is in {pipeline}.")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
