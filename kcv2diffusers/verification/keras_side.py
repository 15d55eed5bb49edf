"""The Keras side: our models or KerasCV's on the inputs of each level; every array is kept for comparison.

python -m kcv2diffusers.verification.keras_side FOLDER
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import keras
import numpy as np

from kcv2diffusers.diffusion import Array
from kcv2diffusers.models.base import load_weights
from kcv2diffusers.models.layers import zeros
from kcv2diffusers.models.sampler import TextToImage
from kcv2diffusers.models.tokenizer import Tokenizer
from kcv2diffusers.pipeline.tokenizer_files import find_tokenizer
from kcv2diffusers.pipeline_files import TOKENIZER
from kcv2diffusers.progress import StageProgress
from kcv2diffusers.verification.blocks import modules_of
from kcv2diffusers.verification.exchange import Arrays, side_main
from kcv2diffusers.verification.inputs import batches, block_inputs
from kcv2diffusers.verification.parts import Inputs, known
from kcv2diffusers.verification.request import Request
from kcv2diffusers.verification.sides import Side, noise_of, open_sides

Draw = Callable[[Sequence[str], Array, Callable[[Array], None]], Array]
"""Prompts and noise to images (prompts, height, width, 3) uint8.

The third argument is called with the latents after each step.
"""


def run(folder: Path, request: Request, progress: StageProgress) -> None:
    """Compute the Keras side from FOLDER/inputs and write the results into FOLDER/keras."""
    inputs, outputs = Arrays(folder / "inputs"), Arrays(folder / "keras")
    sides = open_sides(request)
    told = json.loads((folder / "plan.json").read_text())
    wanted: dict[str, list[str]] = told["modules"]
    drawn = request.reaches("images")
    kept: dict[str, keras.Model] = {}
    count = len(sides) if drawn else len(wanted)
    for part, side in sides.items():
        if part not in wanted and not drawn:
            continue
        progress("Keras side: parts", len(kept), count, side.name)
        model = _build(side, request, told["size"])
        if part in wanted:
            given = {name: inputs.load(part, name) for name in wanted[part]}
            _modules(side, model, given, outputs, crop=request.reference == "builtin")
        kept[part] = model if drawn and known(part).DRAWS else None
        del model
    progress("Keras side: parts", count, count, "")
    if drawn:
        _images(folder, request, sides, kept, told["size"], progress)
    versions = {"keras": keras.__version__, "Keras backend": keras.backend.backend()}
    if request.reference == "keras-cv":
        from importlib.metadata import version

        versions["keras-cv"] = version("keras-cv")
    (folder / "keras" / "versions.json").write_text(json.dumps(versions))


def _build(side: Side, request: Request, size: int) -> keras.Model:
    """The part's Keras model with its source's weights, rounded to the dtype that the pipeline stores."""
    source = side.source
    with zeros():
        if request.reference == "keras-cv":
            from kcv2diffusers.verification.kerascv import build

            model = build(side, size)
        else:
            model = known(side.part).build(side, request)
    load_weights(model, source)
    if side.stored != np.dtype("float32"):
        for variable in model.weights:
            values = keras.ops.convert_to_numpy(variable)
            with np.errstate(over="ignore"):
                variable.assign(values.astype(side.stored).astype("float32"))
    return model


def _forward(side: Side, model: keras.Model, given: Inputs) -> Any:
    """One forward pass on one set of inputs."""
    return model.predict_on_batch(known(side.part).keras_inputs(side, given))


def _modules(side: Side, model: keras.Model, given: Inputs, outputs: Arrays, *, crop: bool) -> None:
    for number in range(len(next(iter(given.values())))):
        one = {name: values[number : number + 1] for name, values in given.items()}
        outputs.save(_forward(side, model, one), side.part, number)
    layers = [layer for layer in model.layers if layer.weights]
    blocks = keras.Model(model.inputs, [layer.output for layer in layers])
    found = _forward(side, blocks, block_inputs(given, crop=crop))
    for module, values in zip(modules_of(side.source), found, strict=True):
        outputs.save(values, side.part, "block", module.name, 0)


def _images(
    folder: Path,
    request: Request,
    sides: dict[str, Side],
    models: dict[str, Any],
    size: int,
    progress: StageProgress,
) -> None:
    inputs, outputs = Arrays(folder / "inputs"), Arrays(folder / "keras")
    tokenizer = Tokenizer.of_files(find_tokenizer(Path(request.pipeline) / TOKENIZER))
    sampler = TextToImage(
        models["text_encoder"],
        models["unet"],
        models["vae_decoder"],
        tokenizer,
        *noise_of(request, sides),
        sides["text_encoder"].source.dims["length"],
    )
    pictures: Draw
    if request.reference == "keras-cv":
        from kcv2diffusers.verification.kerascv import drawing

        pictures = drawing(sampler, sides["unet"].source.version, size, request.steps, request.guidance)
    else:

        def pictures(prompts: Sequence[str], noise: Array, observe: Callable[[Array], None]) -> Array:
            context = sampler.encode_prompts([*[""] * len(prompts), *prompts])
            latents = sampler.denoise(
                context, noise, steps=request.steps, guidance_scale=request.guidance, observe=observe
            )
            return sampler.decode(latents)

    outputs.save(sampler.tokens(["", *request.prompts]), "tokens")
    todo = batches(request, size)
    total = len(todo) * request.steps
    for done, batch in enumerate(todo):
        latents: list[Array] = []

        def observe(values: Array, done: int = done, latents: list[Array] = latents) -> None:
            latents.append(values)
            progress("Keras side: steps", done * request.steps + len(latents), total, "")

        noise = np.concatenate([inputs.load("noise", seed) for _, _, seed in batch])
        drawn = pictures([prompt for _, prompt, _ in batch], noise, observe)
        for n, (number, _, _) in enumerate(batch):
            outputs.save(drawn[n : n + 1], "picture", number)
            outputs.save(np.stack(latents)[:, n : n + 1], "latents", number)


if __name__ == "__main__":
    side_main(run)
