"""The blocks of a part: rows of its table, each a Keras layer on one side, a torch module on the other."""

from __future__ import annotations

import json
from dataclasses import dataclass

from kcv2diffusers.maps.tables import REPEAT
from kcv2diffusers.sources.recognise import Match


@dataclass(frozen=True)
class Module:
    """A row for one layer: the diffusers module, the Keras layer, and the row as it stands in its table."""

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
