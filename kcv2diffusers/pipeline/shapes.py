"""What weights do not tell of a model of unusual widths, from another model of the same shape."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import Any

from kcv2diffusers.pipeline.configs import untold, user_config
from kcv2diffusers.sources.gather import gather
from kcv2diffusers.sources.locate import TINY, locate_all
from kcv2diffusers.sources.recognise import Match


def stated_beside(match: Match, base_states: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """The entries of config.json that the `kcv2diffusers.json` beside a checkpoint states, before those that
    its base states; where neither states any for an unusual model, those of the base that ships with the
    package if its shape is the same.
    """
    table = match.spec.table
    stated = {**(base_states or {}), **user_config(match.source.path, table)}
    if stated or match.known or not same_shape(match, base := shipped().get(match.part)):
        return stated
    assert base is not None
    return untold(table, user_config(base.source.path, table))


def same_shape(match: Match, other: Match | None) -> bool:
    """Whether two parts have the same sizes; the number of tokens plays no role."""
    return other is not None and all(
        other.dims.get(name) == size for name, size in match.dims.items() if name != "vocabulary"
    )


@cache
def shipped() -> Mapping[str, Match]:
    """The parts of the base that ships with the package."""
    return gather(locate_all(TINY))
