"""The sampler against the real `keras_cv.models.StableDiffusion`, with small models put in its places."""

from __future__ import annotations

import dataclasses
import functools
import gzip
import itertools
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from support.models.small import TEXT1, UNET1, VAE, relative_error

from kcv2diffusers import diffusion as schedule
from kcv2diffusers import models
from kcv2diffusers.errors import Error
from kcv2diffusers.models import sampler
from kcv2diffusers.models.tokenizer import BYTES, Tokenizer
from kcv2diffusers.pipeline.tokenizer_files import find_tokenizer, write_tokenizer

pytestmark = pytest.mark.slow

VOCABULARY = 49408
STEPS = 5  # a schedule of 25 and others are compared by their numbers


@pytest.fixture(scope="module")
def kerascv_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """KerasCV's tokenizer with as many merges as the real one has, made up, so that its ids have the real
    range.
    """
    from keras_cv.src.models.stable_diffusion.clip_tokenizer import SimpleTokenizer

    letters = [chr(code) for code in range(ord("a"), ord("z") + 1)]
    pairs = [
        " ".join(pair) for pair in itertools.product(letters, [*letters, *(x + "</w>" for x in letters)])
    ]
    double = ["".join(pair) for pair in itertools.product(letters, letters)]
    pairs += [" ".join(pair) for pair in itertools.product(double, [*double, *(x + "</w>" for x in letters)])]
    path = tmp_path_factory.mktemp("bpe") / "merges.txt.gz"
    path.write_bytes(gzip.compress("\n".join(["#version: 0.2", *pairs]).encode()))
    tokenizer = SimpleTokenizer(str(path))
    assert len(tokenizer.vocab) == VOCABULARY
    return tokenizer


@pytest.fixture(scope="module")
def tokenizer(kerascv_tokenizer: Any) -> Tokenizer:
    return Tokenizer(kerascv_tokenizer.encoder, list(kerascv_tokenizer.bpe_ranks))


@pytest.fixture(scope="module")
def pair(kerascv_tokenizer: Any, tokenizer: Tokenizer) -> tuple[Any, sampler.TextToImage]:
    """KerasCV's class and ours around the same random weights."""
    import keras_cv
    from support.kerascv import stack

    theirs = keras_cv.models.StableDiffusion(128, 128, jit_compile=False)
    theirs._tokenizer = kerascv_tokenizer
    theirs._text_encoder = stack.build("text_encoder", 1, vocabulary=VOCABULARY)
    theirs._diffusion_model = stack.build("unet", 1, size=128)
    theirs._decoder = stack.build("vae_decoder", 1, size=128)
    theirs._get_timestep_embedding = functools.partial(theirs._get_timestep_embedding, dim=32)
    ours = sampler.TextToImage(
        models.build_text_encoder(dataclasses.replace(TEXT1, vocabulary=VOCABULARY)),
        models.build_unet(UNET1),
        models.build_decoder(VAE),
        tokenizer,
    )
    for mine, their in (
        (ours.text_encoder, theirs._text_encoder),
        (ours.unet, theirs._diffusion_model),
        (ours.decoder, theirs._decoder),
    ):
        mine.set_weights(their.get_weights())
    return theirs, ours


@pytest.mark.parametrize("negative", [None, "blurry, ugly"])
def test_latents_and_pictures_equal_kerascvs(pair: Any, negative: str | None) -> None:
    theirs, ours = pair
    noise = sampler.initial_noise(2, 128, 128, seed=5)
    seen: list[Any] = []
    decoder = theirs._decoder

    def decode(latents: Any) -> Any:
        seen.append(np.asarray(latents))
        return decoder.predict_on_batch(latents)

    theirs._decoder = SimpleNamespace(predict_on_batch=decode)
    try:
        pictures = theirs.generate_image(
            theirs.encode_text("a red car"),
            negative_prompt=negative,
            batch_size=2,
            num_steps=STEPS,
            diffusion_noise=noise,
        )
    finally:
        theirs._decoder = decoder
    steps: list[int] = []
    latents = ours.sample(
        ["a red car"] * 2,
        noise,
        negative_prompt=negative or "",
        steps=STEPS,
        progress=lambda done, total: steps.append(done),
    )
    assert relative_error(latents, seen[0]) < 1e-4
    assert relative_error(latents, noise) > 0.1
    assert np.abs(ours.decode(latents).astype(int) - pictures.astype(int)).max() <= 1
    assert steps == list(range(1, STEPS + 1))


def test_noise_of_a_seed_is_kerascvs(pair: Any) -> None:
    theirs, _ = pair
    expected = np.asarray(theirs._get_initial_diffusion_noise(3, seed=11))
    assert np.array_equal(sampler.initial_noise(3, 128, 128, seed=11), expected)


def test_prompts_guide_and_seeds_repeat(pair: Any) -> None:
    _, ours = pair
    options: dict[str, Any] = {"height": 64, "width": 128, "steps": 3}
    both = ours(["a red car", "the sea"], seed=1, **options)
    assert both.shape == (2, 64, 128, 3)
    assert both.dtype == np.uint8
    assert np.array_equal(both, ours(["a red car", "the sea"], seed=1, **options))
    assert not np.array_equal(both, ours(["a red car", "a tree"], seed=1, **options))
    assert not np.array_equal(both, ours(["a red car", "the sea"], seed=2, **options))


@pytest.mark.parametrize("steps", [1, 2, 25, 50, 1000])
def test_schedule_is_kerascvs(pair: Any, steps: int) -> None:
    theirs, _ = pair
    timesteps = schedule.sampling_timesteps(steps)
    alphas, _ = theirs._get_initial_alphas(timesteps)
    assert np.allclose(schedule.alphas_cumprod()[timesteps], alphas, rtol=1e-6)
    expected = np.asarray(theirs._get_timestep_embedding(int(timesteps[-1]), 2))
    assert np.abs(schedule.timestep_embedding(np.repeat(timesteps[-1:], 2), 32) - expected).max() < 1e-4


@pytest.mark.parametrize(
    "text",
    [
        "",
        "a photo of a red car",
        "It's 2024!  naïve ½ café",
        "<|endoftext|> don't",
        "日本 🚗 x_y it\u2019s",
        "&amp; B&amp;W",
    ],
)
def test_tokens_are_kerascvs(kerascv_tokenizer: Any, tokenizer: Tokenizer, text: str) -> None:
    assert tokenizer.encode(text) == kerascv_tokenizer.encode(text)


def test_tokens_are_transformers(tmp_path: Path, tokenizer: Tokenizer) -> None:
    transformers = pytest.importorskip("transformers")
    write_tokenizer(tokenizer.files, tmp_path)
    again = Tokenizer.of_files(find_tokenizer(tmp_path))
    theirs = transformers.CLIPTokenizer.from_pretrained(tmp_path)
    for text in ("", "a photo of a red car", "it's 2024! café", "one two three four five six seven"):
        assert again.encode(text) == theirs(text)["input_ids"]
        padded = theirs(text, padding="max_length", max_length=8, truncation=True)["input_ids"]
        assert again.encode(text, 8) == padded


def test_every_word_of_a_word_tokenizer_is_one_token() -> None:
    words = ["a", "an", "at", "boat", "cat", "orange", "range", "panda", "penguin", "pen", "tree"]
    tokenizer = Tokenizer.of_words(words)
    assert [len(tokenizer.encode(word)) for word in words] == [3] * len(words)
    assert tokenizer.decode(tokenizer.encode("an orange sks boat")) == "an orange sks boat"
    assert tokenizer.end == tokenizer.start + 1 == len(tokenizer.vocabulary) - 1
    assert set(BYTES.values()) <= set(tokenizer.vocabulary)


@pytest.mark.parametrize(
    ("call", "complaint"),
    [
        (lambda ours: ours(["word " * 90], height=64, width=64), "at most 77"),
        (lambda ours: ours(["word"], height=100, width=64), "multiples of 64"),
        (lambda ours: ours(["word"], height=64, width=64, steps=0), "at least 1"),
    ],
)
def test_what_cannot_be_done_is_refused(pair: Any, call: Any, complaint: str) -> None:
    with pytest.raises(Error, match=complaint):
        call(pair[1])
