"""From folders of photos to the examples of a run.

Missing class images are generated, and latents are encoded once.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from kcv2diffusers.dreambooth.batches import Examples
from kcv2diffusers.dreambooth.config import Config
from kcv2diffusers.dreambooth.memory import drawing_advice, memory_errors
from kcv2diffusers.dreambooth.photos import Photo, Size, bucket_of, check_masks, find_photos
from kcv2diffusers.dreambooth.ranks import ALONE, Group
from kcv2diffusers.errors import Error, plain
from kcv2diffusers.models.base import Base
from kcv2diffusers.models.sampler import PROMPT_LENGTH, initial_noise
from kcv2diffusers.progress import StageProgress
from kcv2diffusers.system.output import whole_file


def usable_photos(folder: Path, notes: list[str]) -> list[Photo]:
    """The photos in `folder`; files that are not images are named in `notes`.

    Raises Error if there is no image.
    """
    photos = find_photos(folder)
    repeated = Counter((photo.path.parent.name, photo.repeats) for photo in photos.found if photo.repeats > 1)
    for (name, times), n in repeated.items():
        notes.append(f"{plain(name)}: {n} photo{'s' if n > 1 else ''}, {times} times an epoch.")
    if photos.skipped:
        notes.append(f"Skipped in {plain(folder)}: {', '.join(photos.skipped)}.")
    if not photos.found:
        raise Error(f"{plain(folder)}: no picture in this folder.\n" + "\n".join(notes or ["It is empty."]))
    return photos.found


def subject_photos(config: Config, notes: list[str]) -> list[Photo]:
    """The photos of every subject. The prompt of each is its caption or else that of its subject.

    Raises Error for a folder without photos, a caption that cannot be read, and, with `config.masks`, a mask
    that cannot be used.
    """
    folders = [(each.instance_images, each.instance_prompt) for each in config.every_subject]
    return _described(config, folders, notes)


def held_photos(config: Config, notes: list[str]) -> list[Photo]:
    """The photos of every subject that are held out for validation, as `subject_photos`."""
    folders = [(each.validation_images, each.instance_prompt) for each in config.every_subject]
    return _described(config, [each for each in folders if each[0]], notes)


def _described(config: Config, folders: Iterable[tuple[str, str]], notes: list[str]) -> list[Photo]:
    """The photos of folders, each given with the prompt of the photos without captions."""
    photos: list[Photo] = []
    captioned = 0
    for folder, prompt in folders:
        for photo in usable_photos(Path(folder), notes):
            caption = photo.prompt if config.captions else ""
            photos.append(replace(photo, prompt=caption or prompt))
            captioned += bool(caption)
    if captioned:
        notes.append(f"{captioned} of {len(photos)} photos have captions.")
    masked = check_masks(photos) if config.masks else sum(photo.mask is not None for photo in photos)
    if masked:
        unused = "" if config.masks else ", which are not used without --masks"
        notes.append(f"{masked} of {len(photos)} photos have masks{unused}.")
    return photos


def class_photos(
    config: Config, base: Base, notes: list[str], progress: StageProgress, group: Group = ALONE
) -> list[Photo]:
    """The class images of every subject, each with its prompt.

    Each class has those in its folder, plus generated ones up to the configured number. Each process of
    `group` generates its share. Subjects with the same prompt and folder share a class.
    """
    wanted = [(subject.class_prompt, subject.class_images) for subject in config.every_subject]
    classes = [each for each in dict.fromkeys(wanted) if each[0]]
    photos: list[Photo] = []
    for number, (prompt, given) in enumerate(classes):
        folder = Path(given or Path(config.out) / f"class{f'-{number + 1}' if number else ''}")
        drawn = _of_class(config, prompt, folder, base, notes, progress, group)
        photos += [replace(photo, prompt=prompt, mask=None) for photo in drawn]
    return photos


def _of_class(
    config: Config,
    prompt: str,
    folder: Path,
    base: Base,
    notes: list[str],
    progress: StageProgress,
    group: Group,
) -> list[Photo]:
    folder.mkdir(parents=True, exist_ok=True)
    wanted = group.share(_missing(folder, config.num_class_images, group))
    sampler, size = base.sampler(), base.image_size
    at_once = config.sample_batch_size or config.batch_size
    for done in range(0, len(wanted), at_once):
        batch = wanted[done : done + at_once]
        noise = np.concatenate([initial_noise(1, size, size, config.seed + number) for number in batch])
        with memory_errors(lambda: drawing_advice(at_once)):
            latents = sampler.sample(
                [prompt] * len(batch),
                noise,
                steps=config.sample_steps,
                guidance_scale=config.guidance_scale,
            )
            images = sampler.decode(latents)
        for number, image in zip(batch, images, strict=True):
            path = _class_path(folder, number)
            with whole_file(path) as part:
                Image.fromarray(image).save(part, format="png")
        progress("Drawing the class", done + len(batch), len(wanted), "")
    group.wait()
    return usable_photos(folder, notes)[: config.num_class_images]


def _missing(folder: Path, count: int, group: Group) -> list[int]:
    """The numbers of the class images that a folder lacks, as rank 0 sees it."""
    found = np.zeros(count, "int32")
    if group.first:
        missing = max(0, count - len(find_photos(folder).found))
        numbers = (n for n in itertools.count() if not _class_path(folder, n).exists())
        found[:missing] = [n + 1 for n in islice(numbers, missing)]
    return [n - 1 for n in group.sum(found).tolist() if n]


def _class_path(folder: Path, number: int) -> Path:
    return folder / f"class-{number:04}.png"


def make_examples(
    config: Config,
    base: Base,
    photos: Sequence[Photo],
    classes: Sequence[Photo] | None,
    held: Sequence[Photo] = (),
) -> tuple[Examples, Examples | None, Examples | None]:
    """Examples of the subjects, of their classes (with prior preservation), and of what is held out."""
    encoder = base.image_encoder
    prompts = [photo.prompt for photo in (*photos, *(classes or ()), *held)]
    make = partial(
        Examples,
        conditions=_conditions(config, base, [*prompts, *([""] if config.caption_dropout else [])]),
        encode=lambda images: np.asarray(encoder.predict_on_batch(images), dtype="float32"),
        resolution=config.resolution or base.image_size,
        flip=config.flip,
        cache=config.cache,
    )
    return (
        make(photos, masked=config.masks),
        None if classes is None else make(classes),
        make(held, masked=config.masks) if held else None,
    )


def _conditions(config: Config, base: Base, prompts: Iterable[str]) -> dict[str, np.ndarray[Any, Any]]:
    """The conditioning of each prompt, as in Examples."""
    sampler = base.sampler()

    def condition(prompt: str) -> np.ndarray[Any, Any]:
        if "text_encoder" in config.trained_parts:
            return np.array(base.tokenizer.encode(prompt, PROMPT_LENGTH), dtype="int32")
        return np.asarray(sampler.encode_prompts([prompt])[0], dtype="float32")

    return {prompt: condition(prompt) for prompt in dict.fromkeys(prompts)}


def encode(
    instance: Examples,
    prior: Examples | None,
    held: Examples | None,
    progress: StageProgress,
    group: Group = ALONE,
) -> None:
    """Encode all that the steps need: each photo at its size, class images at every size of the photos.

    Each process of `group` encodes its share.
    """

    def fill(examples: Examples, wanted: Sequence[tuple[int, Size]], words: str) -> None:
        examples.fill(group.share(wanted), lambda done, total: progress(words, done, total, ""))
        examples.exchange(wanted, group)

    def own(examples: Examples) -> list[Size]:
        return [bucket_of(photo.size, examples.resolution) for photo in examples.photos]

    sizes = own(instance)
    fill(instance, list(enumerate(sizes)), "Encoding photos")
    if held is not None:
        fill(held, list(enumerate(own(held))), "Encoding held out")
    if prior is not None:
        wanted = [(number, size) for size in sorted(set(sizes)) for number in range(len(prior.photos))]
        fill(prior, wanted, "Encoding the class")
