"""Config entries that the weights do not determine, taken from another model of the same shape."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import Any

from kcv2diffusers.pipeline.configs import untold, user_config
from kcv2diffusers.sources.gather import gather
from kcv2diffusers.sources.locate import TINY, locate_all
from kcv2diffusers.sources.recognise import Match


def stated_beside(match: Match, base_states: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Return the entries of config.json that are stated for a checkpoint.

    Entries of the `kcv2diffusers.json` beside it take precedence over those of its base (`base_states`). If
    neither states any and the model has non-standard sizes, the entries are those of the base that ships with
    the package, provided that it has the same shape.
    """
    table = match.spec.table
    stated = {**(base_states or {}), **user_config(match.source.path, table)}
    if stated or match.known or not same_shape(match, base := shipped().get(match.part)):
        return stated
    assert base is not None
    return untold(table, user_config(base.source.path, table))


def same_shape(match: Match, other: Match | None) -> bool:
    """Return whether two parts have the same sizes, apart from the vocabulary size."""
    return other is not None and all(
        other.dims.get(name) == size
        for name, size in match.dims.items()
        if name != "vocabulary" and "*" not in name
    )


@cache
def shipped() -> Mapping[str, Match]:
    """Return the parts of the base that ships with the package."""
    return gather(locate_all(TINY))
