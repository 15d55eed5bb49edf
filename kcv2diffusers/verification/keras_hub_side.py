"""The Keras side of a family of KerasHub: its own classes on the inputs of each level.

    python -m kcv2diffusers.verification.keras_hub_side FOLDER

FOLDER/preset is a preset with the weights of the sources, which KerasHub's `from_preset` loads.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib import import_module
from importlib.metadata import version
from operator import attrgetter
from pathlib import Path
from typing import Any

import keras
import numpy as np

from kcv2diffusers.diffusion import Array
from kcv2diffusers.maps.parts import Family, family_of
from kcv2diffusers.pipeline.tokenizer_files import find_tokenizer
from kcv2diffusers.progress import StageProgress
from kcv2diffusers.verification.blocks import modules_of
from kcv2diffusers.verification.exchange import Arrays, side_main
from kcv2diffusers.verification.inputs import batches
from kcv2diffusers.verification.parts import known, outputs_of
from kcv2diffusers.verification.request import Request
from kcv2diffusers.verification.sides import Side, open_sides
from kcv2diffusers.verification.stock_flow import T5_TOKENS, TOKENS


def run(folder: Path, request: Request, progress: StageProgress) -> None:
    """Compute the Keras side from FOLDER/inputs and write the results into FOLDER/keras."""
    sides = open_sides(request)
    told = json.loads((folder / "plan.json").read_text())
    wanted: dict[str, list[str]] = told["modules"]
    progress("Keras side: parts", 0, len(wanted), "loading")
    family = family_of(sides)
    model = _load(folder / "preset", family)
    _round(model, family, sides)
    inputs, outputs = Arrays(folder / "inputs"), Arrays(folder / "keras")
    with _no_gradients():
        for done, (part, names) in enumerate(wanted.items()):
            progress("Keras side: parts", done, len(wanted), sides[part].name)
            given = {name: inputs.load(part, name) for name in names}
            _modules(sides[part], model, _model_of(model, family, part), given, outputs)
        progress("Keras side: parts", len(wanted), len(wanted), "")
        if told["draw"]:
            _images(folder, request, sides, model, told["size"], progress)
    versions = {"keras": keras.__version__, "Keras backend": keras.backend.backend()}
    versions["keras-hub"] = version("keras-hub")
    (folder / "keras" / "versions.json").write_text(json.dumps(versions))


def _load(preset: Path, family: Family) -> Any:
    assert family.preset is not None  # as is tested
    home, _, name = str(family.preset.model["class"]).split()[0].partition(":")
    if keras.backend.backend() == "torch":
        from keras_hub.src.models.stable_diffusion_3 import t5_encoder

        t5_encoder.T5Encoder.__setattr__ = _set
    return getattr(import_module(home), name).from_preset(str(preset))


def _set(self: Any, name: str, value: Any) -> None:
    """Set an attribute of a model. On PyTorch KerasHub's T5 sets layers before the module is initialised."""
    (keras.Model if hasattr(self, "_layers") else object).__setattr__(self, name, value)


@contextmanager
def _no_gradients() -> Iterator[None]:
    if keras.backend.backend() != "torch":
        yield
        return
    import torch

    with torch.no_grad():
        yield


def _model_of(model: Any, family: Family, part: str) -> Any:
    assert family.preset is not None
    return attrgetter(family.preset.attributes[part])(model)


def _round(model: Any, family: Family, sides: Mapping[str, Side]) -> None:
    """Round the weights as the pipeline stores them."""
    for part, side in sides.items():
        if side.stored == np.dtype("float32"):
            continue
        for variable in _model_of(model, family, part).weights:
            values = keras.ops.convert_to_numpy(variable)
            with np.errstate(over="ignore"):
                variable.assign(values.astype(side.stored).astype("float32"))


def _modules(side: Side, model: Any, mine: Any, given: Mapping[str, Array], outputs: Arrays) -> None:
    """Write the outputs of a part, and those of its blocks in the first pass."""
    layers = {module.name: layer_at(mine, module.path) for module in modules_of(side.source)}
    for number in range(len(next(iter(given.values())))):
        one = {name: values[number : number + 1] for name, values in given.items()}
        with _watched(layers if number == 0 else {}) as found:
            made = known(side.part).keras_hub(model, mine, one)
        outputs.save(keras.ops.convert_to_numpy(made), side.part, number)
        for module in modules_of(side.source) if number == 0 else ():
            values = found[module.name]
            for place in range(len(outputs_of(side.part, module.kind))):
                if place in values:  # the last block of an MMDiT has no context
                    outputs.save(values[place], side.part, "block", module.name, place)


def layer_at(model: Any, path: str) -> Any:
    """The layer at a path of a `.weights.h5` file: attributes, and layers of a list numbered by class."""
    here = model
    for word in path.split("/"):
        here = _numbered(here)[word] if isinstance(here, list | tuple) else getattr(here, word)
    return here


def _numbered(layers: Sequence[Any]) -> dict[str, Any]:
    from keras.src.utils.naming import to_snake_case

    counts, found = Counter[str](), {}
    for layer in layers:
        kind = to_snake_case(type(layer).__name__)
        found[f"{kind}_{counts[kind]}" if counts[kind] else kind] = layer
        counts[kind] += 1
    return found


@contextmanager
def _watched(layers: Mapping[str, Any]) -> Iterator[dict[str, dict[int, Array]]]:
    """Within this block, keep the outputs of layers in their latest call, by name and place."""
    found: dict[str, dict[int, Array]] = {}

    def watch(name: str, layer: Any) -> None:
        inner = layer.call

        def call(*args: Any, **kwargs: Any) -> Any:
            made = inner(*args, **kwargs)
            several = made if isinstance(made, tuple) else (made,)
            found[name] = {
                place: keras.ops.convert_to_numpy(one) for place, one in enumerate(several) if one is not None
            }
            return made

        object.__setattr__(layer, "call", call)

    for name, layer in layers.items():
        watch(name, layer)
    try:
        yield found
    finally:
        for layer in layers.values():
            object.__delattr__(layer, "call")


def _images(
    folder: Path,
    request: Request,
    sides: Mapping[str, Side],
    model: Any,
    size: int,
    progress: StageProgress,
) -> None:
    inputs, outputs = Arrays(folder / "inputs"), Arrays(folder / "keras")
    pipeline = Path(request.pipeline)
    prompts = ["", *request.prompts]
    ids = {
        name: _clip_tokens(pipeline / tokenizer.name, prompts, ends=tokenizer.pad is None)
        for tokenizer in family_of(sides).tokenizers
        if not tokenizer.copied
        for name in [tokenizer.part]
    }
    outputs.save(np.concatenate(list(ids.values()), axis=1), "tokens")
    ids |= {
        tokenizer.part: _t5_tokens(pipeline / tokenizer.name, prompts)
        for tokenizer in family_of(sides).tokenizers
        if tokenizer.copied and tokenizer.part in sides
    }
    todo = batches(request, size)
    total = len(todo) * request.steps
    model.configure_scheduler(request.steps)
    for done, batch in enumerate(todo):
        chosen = [1 + request.prompts.index(prompt) for _, prompt, _ in batch]
        embeddings = model.encode_text_step(
            *(
                {name: keras.ops.convert_to_tensor(values[rows]) for name, values in ids.items()}
                for rows in (chosen, [0] * len(batch))
            )
        )
        noise = np.concatenate([inputs.load("noise", seed) for _, _, seed in batch])
        values, latents = keras.ops.convert_to_tensor(noise), []
        for step in range(request.steps):
            values = model.denoise_step(values, embeddings, step, request.steps, request.guidance)
            latents.append(keras.ops.convert_to_numpy(values))
            progress("Keras side: steps", done * request.steps + step + 1, total, "")
        images = keras.ops.convert_to_numpy(model.decode_step(values))
        drawn = np.round(255 * np.clip((images + 1) / 2, 0, 1)).astype("uint8")
        for n, (number, _, _) in enumerate(batch):
            outputs.save(drawn[n : n + 1], "picture", number)
            outputs.save(np.stack(latents)[:, n : n + 1], "latents", number)


def _clip_tokens(folder: Path, prompts: Sequence[str], *, ends: bool) -> Array:
    """Ids by KerasHub's tokenizer; `ends`: padded with the end of the text, else with 0."""
    from keras_hub.models import CLIPPreprocessor, CLIPTokenizer

    files = find_tokenizer(folder)
    words = CLIPTokenizer(vocabulary=dict(files.vocab), merges=list(files.merges), pad_with_end_token=ends)
    made = CLIPPreprocessor(words, sequence_length=TOKENS)({"prompts": list(prompts), "images": None})
    return np.asarray(keras.ops.convert_to_numpy(made["token_ids"]), "int32")


def _t5_tokens(folder: Path, prompts: Sequence[str]) -> Array:
    from transformers import AutoTokenizer

    tokenizer: Any = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    made = tokenizer(
        list(prompts), padding="max_length", max_length=T5_TOKENS, truncation=True, return_tensors="np"
    )
    return np.asarray(made.input_ids, "int32")


if __name__ == "__main__":
    side_main(run)
