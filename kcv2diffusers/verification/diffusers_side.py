"""The diffusers side: the stock parts on the same inputs, as users run them and with Keras' numerics.

    python -m kcv2diffusers.verification.diffusers_side FOLDER

It runs after the Keras side. Each block receives the Keras side's output of the preceding blocks as input, so
its error is its own. A wrong block is reported; errors that it propagates are not.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import ExitStack
from itertools import product
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch
import transformers

from kcv2diffusers.diffusion import Array
from kcv2diffusers.maps.parts import family_of
from kcv2diffusers.progress import StageProgress
from kcv2diffusers.verification import stock_flow, stock_pipeline
from kcv2diffusers.verification.attribution import numerics
from kcv2diffusers.verification.blocks import Module, modules_of
from kcv2diffusers.verification.exchange import Arrays, side_main
from kcv2diffusers.verification.images import SIDES
from kcv2diffusers.verification.inputs import batches, block_inputs
from kcv2diffusers.verification.metrics import relative_error
from kcv2diffusers.verification.parts import Inputs, known, outputs_of
from kcv2diffusers.verification.request import Request
from kcv2diffusers.verification.sides import Side, open_sides
from kcv2diffusers.verification.torch_arrays import first, last

PIPELINES = {"StableDiffusionPipeline": stock_pipeline, "StableDiffusion3Pipeline": stock_flow}
"""How each class of pipelines is loaded and draws."""


def run(folder: Path, request: Request, progress: StageProgress) -> None:
    """Write this side's outputs into FOLDER/diffusers, with the error of each block against FOLDER/keras."""
    diffusers.utils.logging.disable_progress_bar()
    sides = open_sides(request)
    told = json.loads((folder / "plan.json").read_text())
    drawn = told["draw"]
    stock: Any = PIPELINES[family_of(sides).index["_class_name"]]
    pipe = stock.load(request.pipeline, _variant(sides)) if drawn else None
    blocks: dict[str, dict[str, float]] = {}
    with torch.no_grad():
        for done, (part, names) in enumerate(told["modules"].items()):
            side = sides[part]
            component = side.source.spec.table.folder
            progress("diffusers side: parts", done, len(told["modules"]), side.name)
            model = getattr(pipe, component) if pipe else _load(side)
            given = {name: Arrays(folder / "inputs").load(part, name) for name in names}
            crop = request.reference == "builtin"
            blocks[part] = modules(folder, side, request, model.eval(), given, crop=crop)
            del model
        progress("diffusers side: parts", len(told["modules"]), len(told["modules"]), "")
        if pipe is not None:
            _images(folder, request, sides, stock, pipe, told["size"], progress)
    versions = {library.__name__: library.__version__ for library in (diffusers, transformers, torch)}
    results = {"blocks": blocks, "versions": versions}
    (folder / "diffusers" / "results.json").write_text(json.dumps(results))


def _variant(sides: dict[str, Side]) -> str | None:
    """The variant in the names of the weight files, such as fp16; None if there is none."""
    for side in sides.values():
        if side.own is not None:
            stem = side.source.spec.table.weights.rsplit(".", 1)[0]
            middle = side.own.source.path.name.removeprefix(stem).removesuffix(".safetensors")
            if middle:
                return middle.removeprefix(".")
    return None


def _load(side: Side) -> Any:
    """Load a single component."""
    table = side.source.spec.table
    library, name = table.diffusers.split(".")
    cls: Any = getattr({"diffusers": diffusers, "transformers": transformers}[library], name)
    model = cls.from_pretrained(
        side.component.path,
        variant=_variant({side.part: side}),
        local_files_only=True,
        use_safetensors=True,
    )
    return stock_pipeline.in_float32(model)


def modules(
    folder: Path, side: Side, request: Request, model: Any, given: Inputs, *, crop: bool
) -> dict[str, float]:
    """Write the part's outputs for each kind of numerics.

    Returns the relative error of each block when it receives the Keras side's output as input.
    """
    outputs = Arrays(folder / "diffusers")
    adapted = known(side.part)
    kinds = adapted.kinds(side, request)
    for kind in kinds:
        with numerics(side.source.spec.table, model, kind):
            for number in range(len(next(iter(given.values())))):
                one = {name: values[number : number + 1] for name, values in given.items()}
                outputs.save(last(adapted.forward(model, one)), side.part, kind, number)
    with numerics(side.source.spec.table, model, kinds[-1]):
        return _blocks(side, model, block_inputs(given, crop=crop), Arrays(folder / "keras"))


def _blocks(side: Side, model: Any, given: Inputs, expected: Arrays) -> dict[str, float]:
    rename = side.source.spec.table.rename
    torch_modules = {str(rename(f"{name}.")).removesuffix("."): m for name, m in model.named_modules()}
    tensors = {str(rename(name)) for name in model.state_dict()}
    errors: dict[str, float] = {}

    def compare(module: Module) -> Callable[[Any, Any, Any], Any]:
        def hook(_: Any, __: Any, output: Any) -> Any:
            """Measure the block's error, then replace its output with that of the Keras side."""
            several = [output] if isinstance(output, torch.Tensor) else list(output[:])
            errors[module.name] = 0.0
            for number, place in enumerate(outputs_of(side.part, module.kind)):
                if (side.part, "block", module.name, number) not in expected:
                    continue
                wanted, got = expected.load(side.part, "block", module.name, number), several[place]
                error = relative_error(_as(wanted, last(got)), wanted)[1]
                errors[module.name] = max(errors[module.name], error)
                several[place] = first(_as(last(got), wanted)).reshape(got.shape)
            if isinstance(output, torch.Tensor):
                return several[0]
            return tuple(several) if isinstance(output, tuple) else type(output)(several[0])

        return hook

    with ExitStack() as stack:
        for module in modules_of(side.source):
            if module.name in tensors:  # a tensor of a module that has other rows
                continue
            if module.name not in torch_modules:
                errors[module.name] = float("inf")
                continue
            handle = torch_modules[module.name].register_forward_hook(compare(module))
            stack.callback(handle.remove)
        known(side.part).forward(model, given)
    return errors


def _as(like: Array, values: Array) -> Array:
    """An image or feature map as a sequence of its pixels, or back, if `like` is one."""
    if {like.ndim, values.ndim} == {3, 4}:
        return values.reshape(like.shape)
    return values


def _images(
    folder: Path,
    request: Request,
    sides: dict[str, Side],
    stock: Any,
    pipe: Any,
    size: int,
    progress: StageProgress,
) -> None:
    inputs, outputs = Arrays(folder / "inputs"), Arrays(folder / "diffusers")
    outputs.save(stock.tokens(pipe, ["", *request.prompts]), "tokens")
    todo = batches(request, size)
    total, done = 2 * len(todo) * request.steps, 0
    for name, batch in product(SIDES, todo):
        latents: list[Array] = []

        def observe(values: Array, done: int = done, latents: list[Array] = latents) -> None:
            latents.append(values)
            progress("diffusers side: steps", done + len(latents), total, "")

        with ExitStack() as stack:
            if name == "attributed":
                for side in sides.values():
                    table, kind = side.source.spec.table, known(side.part).kinds(side, request)[-1]
                    stack.enter_context(numerics(table, getattr(pipe, table.folder), kind))
            drawn = stock.draw(
                pipe,
                [prompt for _, prompt, _ in batch],
                np.concatenate([inputs.load("noise", seed) for _, _, seed in batch]),
                steps=request.steps,
                guidance_scale=request.guidance,
                observe=observe,
            )
        done += request.steps
        for n, (number, _, _) in enumerate(batch):
            outputs.save(drawn[n : n + 1], "picture", name, number)
            outputs.save(np.stack(latents)[:, n : n + 1], "latents", name, number)


if __name__ == "__main__":
    side_main(run)
