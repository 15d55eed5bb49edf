"""The blocks of a part: each row of its table pairs a Keras layer with a torch module."""

from __future__ import annotations

import json
from dataclasses import dataclass

from kcv2diffusers.maps.tables import REPEAT
from kcv2diffusers.sources.recognise import Match


@dataclass(frozen=True)
class Module:
    """The table row of one layer: the diffusers module, the Keras layer, and the text of the row."""

    name: str
    layer: str
    row: str


def modules_of(match: Match) -> list[Module]:
    """The blocks of a part in the order of the Keras model's layers."""
    modules = []
    table = match.spec.table.name
    for row, number, i in match.spec.layers(match.dims.get(REPEAT, 0)):
        text = json.dumps([row.layer, row.module, " ".join(map(str, row.sizes))])
        modules.append(
            Module(
                row.module.replace("{i}", str(i)),
                f"{row.layer}_{number}" if number else row.layer,
                f"{table}.toml: {text}",
            )
        )
    return modules
