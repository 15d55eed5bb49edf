"""Identify the parts in a checkpoint: fit its tensors to the tables and report everything that does not fit.

Every part in every version is tried, and the best match is used. Sizes are solved from the shapes by
majority, so that a single wrong tensor is reported against the rest.

A checkpoint may hold several models, copies of them and training state. `recognise_all` classifies each
tensor: it belongs to a part, is of a known kind that no pipeline has (`leftovers`), or is a stranger.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from kcv2diffusers.errors import PlanError, SourceError, plain
from kcv2diffusers.hub.address import shown
from kcv2diffusers.maps.leaves import Share
from kcv2diffusers.maps.parts import families, label, parts
from kcv2diffusers.maps.sizes import solved
from kcv2diffusers.maps.tables import REPEAT, Slot, Spec, specs
from kcv2diffusers.sources.leftovers import EMA, described, is_average, kind_of
from kcv2diffusers.sources.pieces import pieces_of
from kcv2diffusers.sources.source import KEYS, Source, StoredLayer, Style
from kcv2diffusers.sources.tensor import Tensor, columns, rows

_LISTED = 8
# Other families of Keras models: a pattern that some tensor's path matches, and the name for messages.
_OTHERS = ((re.compile(r"(^|/)(double|single)_stream_block(_\d+)?/"), "Flux"),)
_MAX_REPEAT = 1000  # layers of one kind; the limit guards against a layer named NAME_999999999


@dataclass(frozen=True)
class Match:
    """A source fitted to a part.

    - `dims`: the solved sizes by symbol of the table
    - `found`: the tensors by slot, in Keras' weight order; for a piece of a stored tensor that piece
    - `stored`: the tensors of the source that these are or are taken from
    - `missing`, `unexpected`, `mismatched`: descriptions of the tensors that do not fit
    - `keras`: whether the tensors have Keras' layout; False means that of diffusers
    - `leftovers`: the tensors of the checkpoint that belong to no part but are of a known kind, by kind
    - `strangers`: descriptions of the tensors of the checkpoint that are of no known kind

    All matches of a checkpoint have the same `leftovers`.
    """

    spec: Spec
    source: Source
    dims: dict[str, int]
    found: dict[Slot, Tensor]
    missing: list[str] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)
    mismatched: list[str] = field(default_factory=list)
    keras: bool = True
    leftovers: dict[str, list[Tensor]] = field(default_factory=dict)
    strangers: list[str] = field(default_factory=list)
    stored: list[Tensor] = field(default_factory=list)

    @property
    def part(self) -> str:
        """The name of the part."""
        return self.spec.part

    @property
    def label(self) -> str:
        """The label of the part for messages."""
        return label(self.part)

    @property
    def version(self) -> str:
        """The version: "sd1", "sd2", or "any" for a part that the versions share."""
        return self.spec.version

    @property
    def of_pipeline(self) -> bool:
        """Whether the source is a diffusers pipeline, which also has config.json and a scheduler."""
        return not self.keras and self.source.style is not Style.NAMED

    @property
    def known(self) -> bool:
        """Whether the sizes are those of a released model."""
        nominal = self.spec.table.versions[self.version].dims
        return all(self.dims.get(name) == value for name, value in nominal.items() if name != "latent")

    @property
    def named(self) -> bool:
        """Whether the name of the file is one that people give to the part."""
        hint = parts()[self.part].hint
        return hint is not None and hint.search(self.source.path.name) is not None

    @property
    def likeness(self) -> int:
        """The number of sizes that are those of the released model of this version."""
        return sum(self.dims.get(name) == value for name, value in self.spec.nominal.items())

    @property
    def problems(self) -> int:
        """The number of tensors that are missing, unexpected or of another shape."""
        return len(self.missing) + len(self.unexpected) + len(self.mismatched)

    @property
    def place(self) -> str:
        """The path of the source and the place of the model in it, for messages."""
        inside = self.source.inside
        return f"{shown(self.source.path)}{f' ({plain(inside)})' if inside else ''}"

    @property
    def dtypes(self) -> list[str]:
        """The names of the dtypes of the tensors, sorted."""
        return sorted({tensor.dtype.name for tensor in self.found.values()})

    def slots(self) -> Iterator[tuple[Slot, Tensor]]:
        """Slot and tensor in Keras' weight order."""
        return iter(self.found.items())

    def report(self) -> str:
        """A report of everything that does not fit, grouped by kind."""
        if not self.problems:
            lines = [f"{self.place}: has tensors that belong to no part of Stable Diffusion:"]
        else:
            whose = "Keras " if self.keras else ""
            lines = [f"{self.place}: not a complete {whose}{self.label}:"]
        for title, entries in (
            ("missing", self.missing),
            ("unexpected", self.unexpected),
            ("mismatched", self.mismatched),
            ("belong to no part", self.strangers),
        ):
            if entries:
                lines.append(f"  {title} ({len(entries)}):")
                lines += [f"    {entry}" for entry in entries[:_LISTED]]
                if len(entries) > _LISTED:
                    lines.append(f"    and {len(entries) - _LISTED} more")
        return "\n".join(lines)

    def require_complete(self) -> Match:
        """Return this match. Raises PlanError with the report if anything does not fit."""
        if self.problems:
            whose = "unchanged Keras models" if self.keras else "Stable Diffusion's models"
            raise PlanError(f"{self.report()}\nGive all weights of {whose} in each file.")
        if self.strangers:
            raise PlanError(f"{self.report()}\nSave the models of Stable Diffusion without them.")
        return self


def recognise(source: Source) -> Match:
    """The part that matches the source best, with its problems.

    Raises SourceError if no part has more matching tensors than problems.
    """
    best = _best(source)
    if best is None:
        raise _unknown(source.path, source.tensors)
    return best


def _best(source: Source) -> Match | None:
    matches = [fit(source, spec) for spec in specs() if _may_be(source, spec)]
    best = max(matches, key=lambda m: (len(m.found) - m.problems, m.known, m.named, m.likeness))
    return best if len(best.found) > best.problems else None


def _may_be(source: Source, spec: Spec) -> bool:
    """Whether the part and version that the reader of a source has determined, if any, allow `spec`.

    So must its place in the checkpoint, if that is the place of some part in a whole model.
    """
    if source.part not in (None, spec.part) or source.version not in (None, spec.version):
        return False
    stands = any(_is_at(source, other) for other in specs())
    return _is_at(source, spec) if stands else bool(spec.table.groups[spec.part])


def _is_at(source: Source, spec: Spec) -> bool:
    return bool(spec.place) and f"/{source.inside}".endswith(f"/{spec.place}")


def _unknown(path: Path, tensors: Iterable[Tensor], whose: str = "Keras ") -> SourceError:
    names = [tensor.name for tensor in tensors]
    read = " and ".join(family.label for family in families())
    known = f"Models of {read} are read, KerasHub's as .weights.h5, .keras or a preset."
    for pattern, what in _OTHERS:
        if any(pattern.search(name) for name in names):
            return SourceError(path, f"of {what}, which is not read here.", known)
    return SourceError(
        path, f"its {len(names)} tensors are not those of a {whose}Stable Diffusion model.", known
    )


def recognise_all(sources: Iterable[Source]) -> list[Match]:
    """The parts in the checkpoints of `sources`, with their problems and each checkpoint's other tensors.

    Raises SourceError for a checkpoint that holds no part.
    """
    checkpoints: dict[Path, list[Source]] = {}
    for source in sources:
        checkpoints.setdefault(source.path, []).append(source)
    return [match for path, models in checkpoints.items() for match in _checkpoint(path, models)]


def _checkpoint(path: Path, models: list[Source]) -> list[Match]:
    """The parts among the models of one checkpoint, with its other tensors classified."""
    matches = [match for model in models for match in _parts(model)]
    if not matches:
        whose = "" if all(model.style is Style.NAMED for model in models) else "Keras "
        raise _unknown(path, (tensor for model in models for tensor in model.tensors), whose)
    kept = [match for match in matches if not _is_copy(match, matches)]
    used = {id(tensor) for match in kept for tensor in match.stored}
    stored = {(t.crc32c, t.shape) for match in kept for t in match.stored if t.crc32c is not None}
    leftovers: dict[str, list[Tensor]] = {}
    strangers: list[Tensor] = []
    for model in models:
        for known, held in model.leftovers.items():
            leftovers.setdefault(known, []).extend(held)
        # In a model that is kept, the name of the model does not make its tensors EMA copies.
        is_kept = any(id(tensor) in used for tensor in model.tensors)
        above = model.inside if is_kept else ""
        # The names of a SavedModel's variables may be only numbers, so the model's name decides.
        average = EMA if not is_kept and is_average(model.inside) else None
        inside = {id(tensor) for tensor in model.tensors}
        for tensor in (*model.tensors, *model.others):
            if id(tensor) in used:
                continue
            if kind := kind_of(tensor, above) or (average if id(tensor) in inside else None):
                leftovers.setdefault(kind, []).append(tensor)
            elif (tensor.crc32c, tensor.shape) not in stored:  # Keras 3 exports some tensors twice
                strangers.append(tensor)
    return [_without(match, leftovers, strangers) for match in kept]


def _parts(model: Source) -> list[Match]:
    """The part that a model is, or the parts that it lists one after the other."""
    whole = _best(model)
    if whole is not None and not whole.problems:
        return [whole]
    pieces = [match for piece in pieces_of(model) if (match := _best(piece)) and not match.problems]
    if whole is not None and len(pieces) < 2 and not (whole.missing or whole.mismatched):
        return [whole]
    return pieces or ([whole] if whole else [])


def _is_copy(match: Match, matches: list[Match]) -> bool:
    """Whether a match is, by its name, the moving average of another model in the checkpoint."""
    others = [m for m in matches if m.part == match.part and m is not match]
    return is_average(match.source.inside) and any(not is_average(m.source.inside) for m in others)


def _without(match: Match, leftovers: dict[str, list[Tensor]], strangers: list[Tensor]) -> Match:
    """The match with `leftovers` and `strangers`, without the unexpected tensors that are of a known kind."""
    known = {described(tensor) for tensors in leftovers.values() for tensor in tensors}
    unexpected = [entry for entry in match.unexpected if entry not in known]
    rest = [entry for t in strangers if (entry := described(t)) not in unexpected]
    return replace(match, unexpected=unexpected, leftovers=leftovers, strangers=rest)


def fit(source: Source, spec: Spec) -> Match:
    """Fit the source's tensors to the slots of one part."""
    if source.style is Style.NAMED:
        return fit_diffusers(source, spec)
    if source.style in (Style.FLAT, Style.ANCESTRAL):
        source = _split(source, spec)
    layers = _classified(source, spec)
    layers |= {(spec.table.names.get(name, name), number): layer for (name, number), layer in layers.items()}
    repeat = max((o + 1 for name, o in layers if name == spec.repeated_layer and o < _MAX_REPEAT), default=0)
    key = KEYS[source.style]
    found: dict[Slot, Tensor] = {}
    for slot in spec.slots(repeat):
        layer = layers.get((slot.layer, slot.ordinal))
        tensor = layer.tensors.get(key(slot)) if layer else None
        if tensor is not None:
            found[slot] = tensor
    match, expected = _matched(
        spec, source, found, repeat, lambda slot: (slot.layer, slot.ordinal, key(slot)), keras=True
    )
    short = _short_layers(source, layers, expected, match)
    _check(match, [slot for slot in expected if slot.layer not in short])
    used = {id(tensor) for tensor in match.stored}
    match.unexpected.extend(described(t) for t in source.tensors if id(t) not in used)
    return match


def _matched(
    spec: Spec,
    source: Source,
    found: Mapping[Slot, Tensor],
    repeat: int,
    place: Callable[[Slot], object],
    *,
    keras: bool,
    stated: Mapping[str, int] | None = None,
) -> tuple[Match, list[Slot]]:
    """The match of the stored tensors `found`, not yet checked, and the slots that it should have.

    `place` identifies the stored tensor of a slot. `stated` are sizes that the shapes do not determine.
    """
    # A block has a property if it has a tensor that only blocks with this property have.
    slots, flags = spec.slots(repeat), dict[str, int]()
    without = {place(slot) for slot in slots for _, wanted in slot.flags if not wanted}
    for slot in slots:
        for name, wanted in slot.flags:
            flags[name] = flags.get(name, 0) | int(wanted and slot in found and place(slot) not in without)
    expected = [slot for slot in slots if slot.has(flags)]
    mine = {slot: found[slot] for slot in expected if slot in found}
    dims = _dims(mine, spec, repeat, stated or {}, keras=keras) | flags
    whole = list({id(tensor): tensor for tensor in mine.values()}.values())
    return Match(spec, source, dims, mine, keras=keras, stored=whole), expected


def fit_diffusers(source: Source, spec: Spec, stated: Mapping[str, int] | None = None) -> Match:
    """Fit the tensors of a diffusers file (`source.flat`) or a NAMED source to the slots of a part, by name.

    Tensors that belong to other parts are ignored. `stated` are sizes that config.json states.
    """
    by_name: Mapping[str | None, Tensor] = {spec.table.rename(tensor.name): tensor for tensor in source.flat}
    if source.style is Style.NAMED:
        by_name = dict(source.named.items())
    repeat = 0
    if spec.repeated_layer:
        row = next(row for row in spec.rows if row.repeated)
        first = spec.block(row, 0, 0)[0].target
        while first.replace(".0.", f".{repeat}.", 1) in by_name:
            repeat += 1
    found = {slot: by_name[slot.target] for slot in spec.slots(repeat) if slot.target in by_name}
    match, expected = _matched(
        spec, source, found, repeat, lambda slot: slot.target, keras=False, stated=stated
    )
    _check(match, expected)
    return match


def _dims(
    found: dict[Slot, Tensor], spec: Spec, repeat: int, stated: Mapping[str, int], *, keras: bool
) -> dict[str, int]:
    """The value of each symbol, by majority over the axes whose size is that symbol times a factor."""
    votes: dict[str, Counter[int]] = {}
    for slot, tensor in found.items():
        shape = slot.shape if keras else slot.diffusers_shape
        if len(shape) == len(tensor.shape):
            for size, value in zip(shape, tensor.shape, strict=True):
                vote = size.solve(value)
                if vote and vote[1]:  # a model has no size of 0
                    votes.setdefault(vote[0], Counter())[vote[1]] += 1
    dims = {symbol: counter.most_common(1)[0][0] for symbol, counter in votes.items()}
    return solved({**stated, **dims}, spec.table.equal) | ({REPEAT: repeat} if spec.repeated_layer else {})


def _check(match: Match, expected: Iterable[Slot]) -> None:
    """Add missing, unexpected and mismatched tensors to the match."""
    dims = match.dims
    for slot in expected:
        tensor = match.found.get(slot)
        shape = slot.shape if match.keras else slot.diffusers_shape
        wanted = "[" + ", ".join(str(v) if (v := size.value(dims)) else "?" for size in shape) + "]"
        other = f" (for {slot.target})" if match.keras else ""
        if tensor is None:
            if slot.exists(dims):
                name = slot.keras_name if match.keras else match.source.spelled.get(slot.target, slot.target)
                match.missing.append(f"{name} {wanted}{other}")
        elif not slot.exists(dims):
            match.unexpected.append(described(tensor))
        elif tensor.shape != tuple(size.value(dims) for size in shape):
            match.mismatched.append(f"{described(tensor)}, expected {wanted}{other}")
        else:
            match.found[slot] = _piece(tensor, slot.columns if match.keras else slot.rows, match)


def _piece(tensor: Tensor, share: Share | None, match: Match) -> Tensor:
    """The share of a stored tensor that belongs to a slot."""
    if share is None:
        return tensor
    cut = columns if match.keras else rows
    return cut(tensor, share.first.value(match.dims) or 0, share.count.value(match.dims) or 0)


def _short_layers(
    source: Source, layers: dict[tuple[str, int], StoredLayer], expected: Iterable[Slot], match: Match
) -> set[str]:
    """The layer classes with too few layers, for containers that number layers only by order.

    The missing layer cannot be identified then. Without this, every later layer would be reported too.
    """
    if source.style is Style.PATH:
        return set()
    have = Counter(name for name, _ in layers)
    want: Counter[str] = Counter()
    for slot in expected:
        want[slot.layer] = max(want[slot.layer], slot.ordinal + 1)
    short = {name for name, count in want.items() if have[name] < count}
    for name in sorted(short):
        match.missing.append(f"{want[name] - have[name]} of {want[name]} {name} layers")
    return short


def _classified(source: Source, spec: Spec) -> dict[tuple[str, int], StoredLayer]:
    """Layers by (class, number); if the container has no class names, the variables determine the class."""
    if source.style is not Style.ATTRIBUTE:
        named = {(layer.name, 0): layer for layer in source.layers} if source.style is Style.PATH else {}
        return named | {(layer.layer or "", layer.ordinal or 0): layer for layer in source.layers}
    key = KEYS[source.style]
    keys = {row.layer: {key(slot) for slot in spec.block(row, 0, 0)} for row in spec.rows}
    counts: Counter[str] = Counter()
    layers = {}
    for layer in source.layers:
        have = set(layer.tensors)
        name = max(keys, key=lambda n: len(keys[n] & have) / len(keys[n] | have))
        if keys[name] & have:
            layers[name, counts[name]] = layer
            counts[name] += 1
    return layers


def _split(source: Source, spec: Spec) -> Source:
    """Split a flat list of variables into layers in the table's order, up to the first that does not fit.

    The rest become layers without a class.
    """
    fixed = sum(1 for row in spec.rows if not row.repeated for _ in spec.block(row, 0))
    each = sum(1 for row in spec.rows if row.repeated for _ in spec.block(row, 0))
    repeat = max(0, len(source.flat) - fixed) // each if each else 0
    tensors: dict[tuple[str, int], dict[str, Tensor]] = {}
    key, at = KEYS[Style.PATH], 0
    skipped: tuple[str, int, str] | None = None
    order = spec.slots(repeat) if source.style is Style.FLAT else spec.ancestral(repeat)
    for slot in order:
        leaf = (slot.layer, slot.ordinal, slot.path)
        if at < len(source.flat) and leaf != skipped and _could_be(slot, source.flat[at]):
            tensors.setdefault((slot.layer, slot.ordinal), {})[key(slot)] = source.flat[at]
            at += 1
        elif not slot.conditions:
            break
        else:
            skipped = leaf
    layers = [StoredLayer(f"{n}_{o}", n, o, inner) for (n, o), inner in tensors.items()]
    rest = [
        StoredLayer(tensor.name, None, index, {tensor.name: tensor})
        for index, tensor in enumerate(source.flat[at:])
    ]
    return replace(source, style=Style.PATH, layers=[*layers, *rest], flat=[])


def _could_be(slot: Slot, tensor: Tensor) -> bool:
    return len(slot.shape) == len(tensor.shape) and all(
        size.value({}) in (None, value) for size, value in zip(slot.shape, tensor.shape, strict=True)
    )
