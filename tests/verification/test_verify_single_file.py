"""`verify` of a single file, which diffusers' `from_single_file` reads."""

from __future__ import annotations

from pathlib import Path

import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

import kcv2diffusers
from kcv2diffusers import convert, verify
from kcv2diffusers.errors import Error

pytestmark = pytest.mark.slow

TINY = Path(kcv2diffusers.__file__).parent / "tiny"


@pytest.fixture(scope="module")
def single(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny base without its VAE, in float16. Tests do not change it."""
    file = tmp_path_factory.mktemp("single") / "tiny.safetensors"
    convert("tiny://", out=file, vae="none", dtype="float16")
    return file


def changed(single: Path, out: Path, name: str, factor: float) -> Path:
    """A copy of the file with one tensor multiplied."""
    tensors = load_file(single)
    tensors[name] = tensors[name] * tensors[name].dtype.type(factor)
    with safe_open(single, framework="numpy") as opened:
        save_file(tensors, out, metadata=opened.metadata())
    return out


def test_a_changed_tensor_is_found_and_the_others_are_equal(single: Path, tmp_path: Path) -> None:
    """One run for both: each loads diffusers, which takes seconds."""
    name = "model.diffusion_model.input_blocks.1.0.in_layers.0.weight"
    wrong = changed(single, tmp_path / "wrong.safetensors", name, 1.5)
    result = verify(
        wrong, *(TINY / f"{part}.weights.h5" for part in ("unet", "text_encoder")), level="weights"
    )
    assert not result.passed
    assert result.weights.tensors == {"unet": 688, "text_encoder": 36}
    differing = result.weights.differences.items()
    found = {part: [one.name for one in some] for part, some in differing if some}
    assert found == {"unet": ["unet: down_blocks.0.resnets.0.norm1.weight"]}


def test_a_damaged_file_is_refused(single: Path, tmp_path: Path) -> None:
    cut = tmp_path / "cut.safetensors"
    cut.write_bytes(single.read_bytes()[:100_000])
    with pytest.raises(Error, match=r"damaged \.safetensors file"):
        verify(cut, "tiny://", level="weights")
