"""From files and options to the loss: each option alone and each pair, beside NumPy.

The networks are given: the reference calls the same UNet, text encoder and VAE encoder. All else is computed
again: prompts, masks, noise, noised latents, targets, weights and means.
"""

from __future__ import annotations

import itertools
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import keras
import numpy as np
import pytest
from PIL import Image
from support.models.backend_run import TEXT

from kcv2diffusers import models
from kcv2diffusers.diffusion import LATENT_SCALE, SD, timestep_embedding
from kcv2diffusers.dreambooth import train
from kcv2diffusers.dreambooth.batches import Batches
from kcv2diffusers.dreambooth.config import Config, make_config
from kcv2diffusers.dreambooth.examples import (
    class_photos,
    encode,
    held_photos,
    make_examples,
    subject_photos,
)
from kcv2diffusers.dreambooth.model import DreamBooth
from kcv2diffusers.dreambooth.ranks import Group
from kcv2diffusers.dreambooth.validation import Validation
from kcv2diffusers.progress import silent_stages

SIDE, SEED, BATCH, STEPS, LENGTH = 64, 7, 2, 2, 9
CAPTION, PROMPT, OTHER, CLASS = "a sks car at night", "a sks car", "a zwx mug", "a car"
# Each folder's pictures: the caption of each, and whether it has a mask.
FOLDERS = {
    "photos": [(CAPTION, True), ("", False)],
    "others": [("", True)],
    "held": [("a sks car by day", True)],
    "class": [("a caption that is not used", True), ("", False)],
}
V = {"prediction_type": "v_prediction"}
OPTIONS: dict[str, dict[str, Any]] = {
    "captions": {"captions": True},
    "caption dropout": {"caption_dropout": 0.5},
    "masks": {"masks": True},
    "subjects": {"subjects": [{"instance_images": "others", "instance_prompt": OTHER}]},
    "prior": {"class_prompt": CLASS, "class_images": "class", "num_class_images": 2, "prior_weight": 0.3},
    "validation": {"validation_images": "held"},
    "min-SNR": {"snr_gamma": 2.0},
    "offset noise": {"offset_noise": 0.2},
    "v": V,
    "zero terminal SNR": {"zero_terminal_snr": True, **V},
    "flip": {"flip": True},
    "no cache": {"cache": False},
    "text encoder": {"train_text_encoder": True},
}
CHOICES = [chosen for count in range(3) for chosen in itertools.combinations(OPTIONS, count)]


def numbers_of(prompt: str) -> np.random.Generator:
    return np.random.default_rng(list(prompt.encode()))


def tokens_of(prompt: str) -> np.ndarray:
    return numbers_of(prompt).integers(0, TEXT.vocabulary, LENGTH).astype("int32")


def embedding_of(prompt: str) -> np.ndarray:
    return numbers_of(prompt).standard_normal((LENGTH, TEXT.width), dtype="float32")


def blocks(pixels: np.ndarray) -> np.ndarray:
    """The means of the blocks of 8 x 8 pixels."""
    return pixels.reshape(*pixels.shape[:-3], SIDE // 8, 8, SIDE // 8, 8, pixels.shape[-1]).mean((-4, -2))


def encoded(images: np.ndarray) -> np.ndarray:
    """What stands for the VAE encoder."""
    colours = blocks(images)
    four = np.concatenate([colours, colours[..., :1] - colours[..., 1:2]], axis=-1)
    return np.concatenate([four, four - 1], axis=-1)


def unet() -> keras.Model:
    """What stands for the UNet: its output depends on all inputs, and costs nothing."""
    latent = keras.Input((None, None, 4), name="latent")
    time = keras.Input((32,), name="timestep_embedding")
    context = keras.Input((None, TEXT.width), name="context")
    means = keras.layers.GlobalAveragePooling1D()(context)
    both = keras.layers.add([keras.layers.Dense(4)(time), keras.layers.Dense(4)(means)])
    output = keras.layers.Dense(4)(latent) + keras.layers.Reshape((1, 1, 4))(both)
    return keras.Model([latent, time, context], output)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root, rng = tmp_path_factory.mktemp("files"), np.random.default_rng(0)
    for folder, pictures in FOLDERS.items():
        (root / folder).mkdir()
        for number, (caption, masked) in enumerate(pictures):
            pixels = rng.integers(0, 255, (SIDE, SIDE, 3), "uint8")
            Image.fromarray(pixels).save(root / folder / f"{number}.png")
            if masked:
                Image.fromarray(pixels[..., 0].T).save(root / folder / f"{number}-mask.png")
            if caption:
                (root / folder / f"{number}.txt").write_text(caption)
    return root


@pytest.fixture(scope="module")
def base() -> Any:
    sampler = SimpleNamespace(encode_prompts=lambda prompts: np.stack(list(map(embedding_of, prompts))))
    return SimpleNamespace(
        unet=unet(),
        text_encoder=models.build_text_encoder(TEXT),
        image_encoder=SimpleNamespace(predict_on_batch=encoded),
        image_size=SIDE,
        tokenizer=SimpleNamespace(encode=lambda prompt, length: tokens_of(prompt).tolist()),
        sampler=lambda: sampler,
    )


class Picture:
    """A picture of a folder as the options say it is learnt from."""

    def __init__(self, root: Path, folder: str, number: int, config: Config) -> None:
        caption, masked = FOLDERS[folder][number]
        own = {"photos": PROMPT, "held": PROMPT, "others": OTHER, "class": CLASS}[folder]
        self.prior = float(folder == "class")
        self.prompt = caption if config.captions and caption and not self.prior else own
        path = root / folder / f"{number}.png"
        self.pixels = np.asarray(Image.open(path), "float32")
        self.mask = np.ones((SIDE, SIDE, 1), "float32")
        if config.masks and masked and not self.prior:
            self.mask = np.asarray(Image.open(path.with_name(f"{number}-mask.png")), "float32")[..., None]

    def moments(self, flip: bool) -> np.ndarray:
        return encoded((self.pixels[:, ::-1] if flip else self.pixels) / 127.5 - 1)

    def weight(self, flip: bool) -> np.ndarray:
        return blocks(self.mask[:, ::-1] if flip else self.mask).astype("float64")


def drawn(moments: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    draw = rng.standard_normal(moments[..., :4].shape, dtype="float32")
    return LATENT_SCALE * (moments[..., :4] + np.exp(moments[..., 4:] / 2) * draw)


def error(
    base: Any, config: Config, latents: np.ndarray, noise: np.ndarray, t: int, prompt: str, weight: np.ndarray
) -> float:
    """The weighted squared error of one picture."""
    signal = np.cumprod(1 - np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2)
    if config.zero_terminal_snr:
        root = np.sqrt(signal)
        signal = ((root - root[-1]) * root[0] / (root[0] - root[-1])) ** 2
    a = signal[t]
    context = embedding_of(prompt)[None]
    if config.train_text_encoder:
        positions = np.arange(LENGTH, dtype="int32")[None]
        given = {"tokens": tokens_of(prompt)[None], "positions": positions}
        context = keras.ops.convert_to_numpy(base.text_encoder(given))
    given = {
        "latent": (a**0.5 * latents + (1 - a) ** 0.5 * noise)[None].astype("float32"),
        "timestep_embedding": timestep_embedding(np.array([t]), 32),
        "context": context,
    }
    predicted = keras.ops.convert_to_numpy(base.unet(given))[0]
    v = config.prediction_type == "v_prediction"
    target = a**0.5 * noise - (1 - a) ** 0.5 * latents if v else noise
    found = (weight * (predicted - target) ** 2).sum() / (4 * weight.sum())
    if config.snr_gamma:
        ratio = a / (1 - a)
        found *= min(ratio, config.snr_gamma) / (ratio + 1 if v else ratio)
    return float(found)


def loss_of_step(base: Any, config: Config, batches: Batches, files: Path, number: int) -> float:
    """Which pictures a step has is tested elsewhere (test_batches.py)."""
    photos = [Picture(files, "photos", n, config) for n in range(2)]
    photos += [Picture(files, "others", 0, config)] if config.subjects else []
    shown = [
        photos[n] for n in batches._epoch(number // batches.epoch_length)[number % batches.epoch_length][1]
    ]
    if config.class_prompt:
        shown += [Picture(files, "class", n, config) for n in batches._classes(number)]
    rng = np.random.default_rng((SEED, 1, number))
    flips = []
    for _ in shown:
        flips.append(config.flip and rng.random() < 0.5)
        rng.random(2)  # where it would be cropped
    latents = [drawn(each.moments(flip), rng) for each, flip in zip(shown, flips, strict=True)]
    noise = rng.standard_normal((len(shown), SIDE // 8, SIDE // 8, 4), dtype="float32")
    if config.offset_noise:
        noise += config.offset_noise * rng.standard_normal((len(shown), 1, 1, 4), dtype="float32")
    timesteps = rng.integers(0, 1000, len(shown))
    dropped = np.random.default_rng((SEED, 4, number)).random(len(shown)) < config.caption_dropout
    total = 0.0
    for n, each in enumerate(shown):
        prompt = "" if dropped[n] else each.prompt
        found = error(base, config, latents[n], noise[n], timesteps[n], prompt, each.weight(flips[n]))
        total += found * (config.prior_weight if each.prior else 1.0) / BATCH
    return total


def loss_of_validation(base: Any, config: Config, files: Path) -> float:
    held, rng = Picture(files, "held", 0, config), np.random.default_rng((SEED, 5, 0))
    errors = []
    for t in (62, 187, 312, 437, 562, 687, 812, 937):
        latents = drawn(held.moments(flip=False), rng)
        noise = rng.standard_normal(latents.shape, dtype="float32")
        errors.append(error(base, config, latents, noise, t, held.prompt, held.weight(flip=False)))
    return float(np.mean(errors))


def loss_of(model: DreamBooth, batch: dict[str, Any], predicted: np.ndarray) -> float:
    """On tensors, as `fit` hands them over."""
    given = {name: keras.ops.convert_to_tensor(value) for name, value in batch.items()}
    return float(model.loss_of(given, keras.ops.convert_to_tensor(predicted)))


@pytest.mark.parametrize("chosen", CHOICES, ids=" + ".join)
def test_the_loss_is_that_of_numpy(
    base: Any, files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chosen: tuple[str, ...]
) -> None:
    """Of whole steps, of steps divided among two processes, and of what is held out."""
    monkeypatch.chdir(files)
    monkeypatch.setattr(train, "make_optimizer", lambda *_: keras.optimizers.SGD())
    given = {"instance_images": "photos", "instance_prompt": PROMPT, "base": ["tiny"], "out": str(tmp_path)}
    given |= {"captions": False, "batch_size": BATCH, "seed": SEED, "precision": "float32"}
    for name in chosen:
        given |= OPTIONS[name]
    config = make_config(given)
    kind = "epsilon" if config.prediction_type == "auto" else config.prediction_type
    schedule = train._zero_terminal_snr(SD, kind) if config.zero_terminal_snr else SD
    own = SimpleNamespace(**vars(base), prediction_type=kind, schedule=schedule)
    photos, held = subject_photos(config, []), held_photos(config, [])
    classes = class_photos(config, own, [], silent_stages) if config.prior_preservation else None
    instance, prior, kept = make_examples(config, own, photos, classes, held)
    if config.cache:
        encode(instance, prior, kept, silent_stages)
        for each in (instance, prior, kept):
            if each is not None:
                each.encode = None
    batches = Batches(
        instance, prior, batch_size=BATCH, steps=STEPS, seed=SEED, offset_noise=config.offset_noise,
        caption_dropout=config.caption_dropout,
    )  # fmt: skip
    model = train._trainer(config, own)
    for number in range(STEPS):
        (batch,) = batches[number]
        predicted = keras.ops.convert_to_numpy(model(batch))
        found = loss_of(model, batch, predicted)
        assert found == pytest.approx(loss_of_step(base, config, batches, files, number), rel=2e-5)
        model.photos = BATCH
        shares = [Group(rank, 2).part(batch) for rank in range(2)]
        sums = map(loss_of, [model] * 2, shares, np.split(predicted, 2))
        assert sum(sums) == pytest.approx(found, rel=1e-6)
        model.photos = 0
    if kept is not None:
        validation = Validation(kept, tmp_path, batch_size=3, timesteps=1000, seed=SEED)
        assert validation.loss(model) == pytest.approx(loss_of_validation(base, config, files), rel=2e-5)
