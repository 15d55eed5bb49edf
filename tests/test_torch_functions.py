"""What is used of PyTorch without being public: PyTorch may take it away, and this test says so then."""

from __future__ import annotations

import re
from functools import reduce
from pathlib import Path

import pytest

torch = pytest.importorskip("torch", reason="PyTorch is not installed")

PACKAGE = Path(__file__).parents[1] / "kcv2diffusers"
USED = {
    name
    for file in PACKAGE.rglob("*.py")
    for name in re.findall(r"\btorch((?:\.[a-z]\w*)*\._\w+)\(", file.read_text(encoding="utf-8"))
}


def test_all_are_found() -> None:
    """So that the next test tests something; a new one is to be thought about, and added here."""
    assert {name.rpartition(".")[2] for name in USED} == {
        "_foreach_add_", "_foreach_addcmul_", "_foreach_copy_", "_foreach_div", "_foreach_div_",
        "_foreach_lerp", "_foreach_lerp_", "_foreach_mul", "_foreach_mul_", "_foreach_norm", "_foreach_sign_",
        "_foreach_sqrt", "_foreach_sqrt_", "_foreach_sub", "_foreach_zero_", "_linear_pointwise",
    }  # fmt: skip


@pytest.mark.parametrize("name", sorted(USED))
def test_pytorch_has_it(name: str) -> None:
    assert callable(reduce(getattr, name.removeprefix(".").split("."), torch))
