"""The blocks of a part: each row of its table pairs a Keras layer with a torch module."""

from __future__ import annotations

import json
from dataclasses import dataclass

from kcv2diffusers.maps.tables import REPEAT
from kcv2diffusers.sources.recognise import Match


@dataclass(frozen=True)
class Module:
    """The table row of one layer.

    `name` is the diffusers module, `layer` the Keras layer, `kind` its class in snake case, and `path` its
    path in a `.weights.h5` file. `row` is the text of the row.
    """

    name: str
    layer: str
    row: str
    kind: str
    path: str


def modules_of(match: Match) -> list[Module]:
    """The blocks of a part in the order of the Keras model's layers."""
    modules = []
    table, group = match.spec.table.name, match.spec.table.groups[match.part]
    for row, number, i in match.spec.layers(match.dims.get(REPEAT, 0)):
        text = json.dumps([row.layer, row.module, " ".join(map(str, row.sizes))])
        layer = f"{row.layer}_{number}" if number else row.layer
        modules.append(
            Module(
                row.module.replace("{i}", str(i)),
                layer,
                f"{table}.toml: {text}",
                row.block,
                f"{group}/{layer}" if group else layer,
            )
        )
    return modules
