"""The numerics of a Keras library in diffusers' models, to attribute differences to them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from kcv2diffusers.maps.tables import Table
from kcv2diffusers.verification import stock_pipeline

_KERASCV = {"gelu": stock_pipeline.kerascv_gelu, "epsilon": stock_pipeline.kerascv_epsilon}


@contextmanager
def numerics(table: Table, model: Any, kind: str) -> Iterator[None]:
    """Within this block, the torch `model` of a table computes as the Keras library in what `kind` names.

    `kind` contains "gelu", "epsilon" or both; "stock" changes nothing. A table states what its library does
    otherwise; KerasCV's numerics are the default.
    """
    with ExitStack() as stack:
        for name in kind.split(", "):
            if name in table.numerics:
                stack.enter_context(_changed(model, **table.numerics[name]))
            elif name in _KERASCV:
                stack.enter_context(_KERASCV[name](model))
        yield


@contextmanager
def _changed(model: Any, modules: str, attribute: str, value: Any) -> Iterator[None]:
    """Set an attribute of the modules whose names end in `modules`; a text is the name of an activation."""
    from transformers.activations import ACT2FN

    found = [module for name, module in model.named_modules() if name.endswith(modules)]
    before = [getattr(module, attribute) for module in found]
    for module in found:
        setattr(module, attribute, ACT2FN[value] if isinstance(value, str) else value)
    try:
        yield
    finally:
        for module, earlier in zip(found, before, strict=True):
            setattr(module, attribute, earlier)
