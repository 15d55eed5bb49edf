"""Classify the tensors of a checkpoint that belong to no model, such as optimizer state, by their names."""

from __future__ import annotations

import math
import re

from kcv2diffusers.errors import plain
from kcv2diffusers.sources.tensor import Tensor

EMA = "EMA copies"
COUNTERS = "counters"
# Each pattern matches one step of a tensor's path. The first kind that matches any step is used.
_KINDS = {
    "optimizer state": r"_?(\w+_)?optimi[sz]ers?(_weights|_state|_\d+)?|\.OPTIMIZER_SLOT|opt|adam\w*|sgd"
    r"|rmsprop|\w*loss_scale\w*|_?learning_rate",
    EMA: r"_?(\w+_)?(ema|averages?|averaged|moving_average|shadow|polyak)(_\w+)?",
    "metrics": r"_?(\w+_)?(metrics?|tracker)(_\d+)?|keras_api",
    "random seeds": r"_?(\w+_)?(seed|random)(_generators?)?(_\w+)?|rng|seed_generator_\d+",
    COUNTERS: r"_?(\w+_)?(counter|step|steps|epoch|epochs|iter|iterations?)",
}
_PATTERNS = {kind: re.compile(f"(?:{pattern})", re.I) for kind, pattern in _KINDS.items()}


def kind_of(tensor: Tensor, above: str = "") -> str | None:
    """The kind of a tensor that belongs to no part; None if it is unknown.

    The prefix `above` of the tensor's name is ignored.
    """
    words = tensor.name.removeprefix(above).split("/")
    for kind, pattern in _PATTERNS.items():
        if any(pattern.fullmatch(word.removesuffix(":0")) for word in words):
            return kind
    if tensor.dtype.kind in "iub" and math.prod(tensor.shape) <= 4:  # no weights but a generator's state
        return COUNTERS
    return None


def is_average(inside: str) -> bool:
    """Whether `inside`, a path in a checkpoint, is that of a moving average."""
    return any(_PATTERNS[EMA].fullmatch(word) for word in inside.split("/"))


def described(tensor: Tensor) -> str:
    """The name and shape of a tensor for messages."""
    return f"{plain(tensor.name)} {list(tensor.shape)}"


def summary(leftovers: dict[str, list[Tensor]]) -> str:
    """The kinds with the number of tensors and their size in MB, for messages."""
    return ", ".join(
        f"{kind} ({len(tensors)} tensor{'s' if len(tensors) > 1 else ''}, "
        f"{sum(tensor.nbytes for tensor in tensors) / 1e6:.2f} MB)"
        for kind, tensors in leftovers.items()
    )
