"""Products on PyTorch and their gradients, beside its own in float64."""

from __future__ import annotations

from pathlib import Path

import pytest

torch = pytest.importorskip("torch", reason="PyTorch is not installed")

from kcv2diffusers.models import torch_product  # noqa: E402


def tensors(shape: tuple[int, ...], outputs: int, bias: bool) -> list:
    generator = torch.Generator().manual_seed(0)
    shapes = [shape, (shape[-1], outputs), *([(outputs,)] if bias else [])]
    return [torch.randn(s, generator=generator).requires_grad_() for s in shapes]


@pytest.fixture(params=["oneDNN", "PyTorch"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "oneDNN" and not torch_product.has_onednn():
        pytest.skip("this processor has no AVX-512")
    monkeypatch.setattr(torch_product, "prefers_onednn", lambda: request.param == "oneDNN")
    return request.param


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(5, 24), (2, 7, 24), (1, 4, 4, 33)])
@pytest.mark.parametrize("sliced", [False, True])
def test_like_pytorch(way: str, shape: tuple[int, ...], bias: bool, sliced: bool) -> None:
    """Also of inputs and gradients that are slices, as around a concatenation."""
    given = tensors(shape, 40, bias)
    exact = [t.detach().double().requires_grad_() for t in given]
    results = []
    for values in (given, exact):
        x, kernel, *rest = values
        wide = torch.cat([x, x], -1) if sliced else x
        part = wide[..., 3 : 3 + shape[-1]] if sliced else wide
        result = (
            torch_product.product(part, kernel, rest[0] if rest else None)
            if values is given
            else part @ kernel + (rest[0] if rest else 0)
        )
        seen = torch.cat([result, result * 2], -1)
        (seen * torch.cos(torch.arange(seen.shape[-1]))).sum().backward()
        results.append([result.detach(), *(t.grad for t in values)])
    for ours, reference in zip(*results, strict=True):
        assert ours.shape == reference.shape
        assert (ours - reference).abs().max() < 1e-6 * reference.abs().max() * shape[-1]


def test_which_way(way: str) -> None:
    """float32 goes to oneDNN where it is faster, other dtypes to PyTorch, which has all of them."""
    x, kernel = tensors((5, 24), 40, bias=False)
    name = torch_product.product(x, kernel, None).grad_fn.name()
    assert ("_Product" in name) is (way == "oneDNN")
    low = torch_product.product(x.bfloat16(), kernel.bfloat16(), None)
    assert low.dtype == torch.bfloat16
    assert "_Product" not in low.grad_fn.name()


@pytest.mark.parametrize("vendor, preferred", [("AuthenticAMD", True), ("GenuineIntel", False), (None, True)])
def test_whose_products_are_faster(
    monkeypatch: pytest.MonkeyPatch, vendor: str | None, preferred: bool
) -> None:
    """By the processor's maker, where the system tells it; nobody's where oneDNN has no AVX-512."""

    def read(path: Path) -> str:
        assert path == Path("/proc/cpuinfo")
        if vendor is None:
            raise FileNotFoundError(path)
        return f"processor\t: 0\nvendor_id\t: {vendor}\n"

    monkeypatch.setattr(Path, "read_text", read)
    for there in (True, False):
        monkeypatch.setattr(torch_product, "has_onednn", lambda there=there: there)
        assert torch_product.prefers_onednn.__wrapped__() is (preferred and there)
