"""LoRA files of KerasHub become LoRA files of diffusers. Their products are what KerasHub adds."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file
from support import keras_hub

from kcv2diffusers import convert_lora
from kcv2diffusers.errors import Error


@pytest.mark.parametrize("kind", keras_hub.KINDS)
def test_products_are_what_kerashub_adds(tmp_path: Path, kind: str) -> None:
    """Of a LoRA of the whole model, and of one of the MMDiT alone."""
    folder = keras_hub.models() / kind
    base = folder / ("diffuser.weights.h5" if kind == "sd3" else "backbone.weights.h5")
    done = convert_lora(folder / "adapter.lora.h5", base=base, out=tmp_path / "lora.safetensors")
    assert done.source_format == "keras-hub" and done.format == "diffusers"
    factors = load_file(done.out)
    changed = 0
    for component in keras_hub.components(kind):
        merged = keras_hub.tensors(kind, component, "merged")
        for name, weight in keras_hub.tensors(kind, component).items():
            module = f"{component}.{name.removesuffix('.weight')}"
            if (down := factors.pop(f"{module}.lora_A.weight", None)) is not None:
                weight = weight + (factors.pop(f"{module}.lora_B.weight") @ down).reshape(weight.shape)
                changed += 1
            np.testing.assert_allclose(weight, merged[name], rtol=0, atol=1e-5)
    assert not factors
    assert changed == sum(done.modules.values()) > 10


@pytest.mark.slow
def test_a_file_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    """Another model, no model of a released size, a changed file, and options of other files."""
    models, out = keras_hub.models(), tmp_path / "lora.safetensors"
    source = models / "sd35l" / "adapter.lora.h5"
    damaged = tmp_path / "dog.lora.h5"
    damaged.write_bytes(source.read_bytes()[:-100])
    for file, options, message in (
        (source, {"base": models / "sd3" / "diffuser.weights.h5"}, "fits no part of the model"),
        (source, {}, "fits no released model"),
        (source, {"base": models / "sd35l" / "backbone.weights.h5", "format": "kohya"}, "Omit --format"),
        (damaged, {}, "dog.lora.h5"),
        (models / "sd35l" / "vae.weights.h5", {"base": models / "sd35l"}, "--base is for KerasHub's"),
    ):
        with pytest.raises(Error, match=message) as caught:
            convert_lora(file, out=out, **options)
        assert len(str(caught.value).splitlines()) == 2
    assert [path.name for path in tmp_path.iterdir()] == ["dog.lora.h5"]
