"""What is measured of a cell: the measures of the DreamBooth paper, and the judge of the tiny base.

Ruiz et al. 2023, arXiv:2208.12242, section 4.1 and the appendix. DIV there is a distance by LPIPS; here it is
one of DINO's embeddings, so its values cannot be compared with the paper's.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kcv2diffusers.errors import Error, meant, plain
from kcv2diffusers.study.settings import CLASS, KINDS, OTHER, SUBJECT, Measure, Sample

if TYPE_CHECKING:
    import numpy as np

    from kcv2diffusers.diffusion import Array
    from kcv2diffusers.study.features import Clip, Dino
    from kcv2diffusers.study.judge import Judge


@dataclass(frozen=True)
class Kind:
    """A measure: the model it needs, its label, whether more is better, and what it is."""

    model: str
    label: str
    more: bool
    what: str


MEASURES: Mapping[str, Kind] = {
    "subject": Kind("judge", "Subject", True, "probability of the subject in pictures of it"),
    "class": Kind("judge", "Class", True, "probability of the thing in pictures of the class"),
    "other": Kind("judge", "Others", True, "probability of the thing in other pictures"),
    "dino": Kind("dino", "DINO", True, "likeness of pictures of the subject to its photos, by DINO"),
    "clip_i": Kind("clip", "CLIP-I", True, "likeness of pictures of the subject to its photos, by CLIP"),
    "clip_t": Kind("clip", "CLIP-T", True, "likeness of pictures of the subject to their prompts, by CLIP"),
    "pres": Kind("dino", "PRES", False, "likeness of pictures of the class to the photos, by DINO"),
    "div": Kind("dino", "DIV", True, "distance of pictures of the same prompt to each other, by DINO"),
}


@dataclass(frozen=True)
class Models:
    """The models that measure, the embeddings of the photos by them, and what is to be seen."""

    judge: Judge | None = None
    thing: str = ""
    dino: Dino | None = None
    clip: Clip | None = None
    photos: Mapping[str, Array] | None = None
    identifier: str = ""

    @property
    def names(self) -> dict[str, str]:
        """The name of each model that is used."""
        named = {"dino": self.dino, "clip": self.clip}
        found = {role: model.name for role, model in named.items() if model is not None}
        return {**({"judge": "tiny"} if self.judge else {}), **found}


def measured(measure: Measure, sample: Sample) -> list[str]:
    """The names of the measures of a study, in order. Raises Error for settings that do not go together."""
    has = {"judge": bool(measure.judge), "dino": bool(measure.dino), "clip": bool(measure.clip)}
    needs: dict[str, bool] = {
        "class": bool(sample.class_prompts),
        "pres": bool(sample.class_prompts),
        "other": bool(sample.other_prompts),
        "div": len(sample.seeds) > 1,
    }
    found = [name for name, kind in MEASURES.items() if has[kind.model] and needs.get(name, True)]
    for name in measure.best:
        if name not in found:
            known = f"Measured are {', '.join(found)}." if found else "Nothing is measured."
            raise Error(f"[measure] best: {plain(name)} is not measured.{meant(name, found)}\n{known}")
    if measure.judge:
        from kcv2diffusers.study.judge import check_thing, load_judge, thing_in

        things = load_judge().things
        check_thing(measure.thing, things)
        for prompt in (*sample.class_prompts, *sample.other_prompts):
            thing_in(prompt, things)
    return found


def open_measures(measure: Mapping[str, Any], photos: str | Path) -> Models:
    """Load the models that the settings name. `photos` is the folder with photos of the subject."""
    judge = dino = clip = None
    embedded: dict[str, Array] = {}
    if measure["judge"]:
        from kcv2diffusers.study.judge import load_judge

        judge = load_judge()
    if measure["dino"] or measure["clip"]:
        from kcv2diffusers.study.features import Clip, Dino

        seen = _photos(Path(photos))
        if measure["dino"]:
            dino = Dino(measure["dino"])
            embedded["dino"] = dino.images(seen)
        if measure["clip"]:
            clip = Clip(measure["clip"])
            embedded["clip"] = clip.images(seen)
    return Models(judge, measure["thing"], dino, clip, embedded, measure["identifier"])


def _photos(folder: Path) -> list[Array]:
    """The photos of a folder, cropped to squares: (side, side, 3) uint8."""
    from kcv2diffusers.dreambooth.photos import find_photos, read_photo

    found = []
    for photo in find_photos(folder).found:
        side = min(512, *photo.size)
        found.append(((read_photo(photo, (side, side)) + 1) * 127.5).round().astype("uint8"))
    return found


def measure_cell(
    models: Models, told: Sequence[Mapping[str, Any]], images: Sequence[Array]
) -> dict[str, float]:
    """The measures of a cell, by name. `told` has the kind, prompt and seed of each of `images`."""
    by_kind = {kind: [n for n, each in enumerate(told) if each["kind"] == kind] for kind in KINDS}
    prompts = [each["prompt"] for each in told]
    found: dict[str, float] = {}
    if models.judge:
        found |= _judged(models.judge, models.thing, by_kind, prompts, images)
    if models.dino:
        assert models.photos is not None
        seen = models.dino.images(images)
        subject, others = seen[by_kind[SUBJECT]], seen[by_kind[CLASS]]
        found["dino"] = float((subject @ models.photos["dino"].T).mean())
        if len(others):
            found["pres"] = float((others @ models.photos["dino"].T).mean())
        if apart := _distances(subject, [prompts[n] for n in by_kind[SUBJECT]]):
            found["div"] = sum(apart) / len(apart)
    if models.clip:
        assert models.photos is not None
        seen = models.clip.images([images[n] for n in by_kind[SUBJECT]])
        texts = models.clip.texts([_without(prompts[n], models.identifier) for n in by_kind[SUBJECT]])
        found["clip_i"] = float((seen @ models.photos["clip"].T).mean())
        found["clip_t"] = float((seen * texts).sum(1).mean())
    return {name: round(found[name], 4) for name in MEASURES if name in found}


def _judged(
    judge: Judge,
    thing: str,
    by_kind: Mapping[str, list[int]],
    prompts: Sequence[str],
    images: Sequence[Array],
) -> dict[str, float]:
    """The mean probability of what was asked for, by kind of prompt."""
    import numpy as np
    from PIL import Image

    from kcv2diffusers.study.judge import SIZE, thing_in

    def fitted(image: Array) -> Array:
        if image.shape[:2] == (SIZE, SIZE):
            return image
        return np.asarray(Image.fromarray(image).resize((SIZE, SIZE), Image.Resampling.LANCZOS))

    probable: np.ndarray[Any, Any] = judge.probabilities(np.stack([fitted(image) for image in images]))
    found = {}
    for kind in (SUBJECT, CLASS, OTHER):
        asked = [(n, thing if kind == SUBJECT else thing_in(prompts[n], judge.things)) for n in by_kind[kind]]
        if asked:
            found[kind] = float(np.mean([probable[n, judge.things.index(name)] for n, name in asked]))
    return found


def _distances(seen: Array, prompts: Sequence[str]) -> list[float]:
    """1 - cosine of each pair of embeddings with the same prompt."""
    pairs = itertools.combinations(range(len(prompts)), 2)
    return [float(1 - seen[i] @ seen[j]) for i, j in pairs if prompts[i] == prompts[j]]


def _without(prompt: str, identifier: str) -> str:
    """The prompt without the identifier, a word that CLIP does not know."""
    if not identifier:
        return prompt
    return " ".join(re.sub(rf"(?<!\w){re.escape(identifier)}(?!\w)", " ", prompt).split())
