"""Embeddings of new tokens are computed with as rows of a larger table, and are all that has gradients."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import keras
import numpy as np
import pytest
from support.models.backend_run import TEXT, UNET, gradients, randomise

from kcv2diffusers import models
from kcv2diffusers.diffusion import SD
from kcv2diffusers.dreambooth.lora import add_lora
from kcv2diffusers.dreambooth.model import DreamBooth
from kcv2diffusers.dreambooth.tokens import add_tokens, added_tokens
from kcv2diffusers.errors import Error
from kcv2diffusers.models.tokenizer import Tokenizer

NEW = ("<one>", "<two>")


def tokenizer() -> Tokenizer:
    """26 letters, with and without the end of a word, as in the 50 tokens of TEXT."""
    letters = "abcdefghijklmnopqrstuvw"
    vocabulary = {token: n for n, token in enumerate([*letters, *(letter + "</w>" for letter in letters)])}
    ends = {"<|startoftext|>": len(vocabulary), "<|endoftext|>": len(vocabulary) + 1}
    filling = {f"filling{n}": len(vocabulary) + 2 + n for n in range(TEXT.vocabulary - len(vocabulary) - 2)}
    return Tokenizer(vocabulary | ends | filling, [], NEW)


def with_new_tokens(text_encoder: keras.Model, start: str = "ab") -> np.ndarray:
    """The table of embeddings with those of the new tokens, which are changed a little."""
    add_tokens(text_encoder, tokenizer(), NEW, start)
    added = added_tokens(text_encoder)
    assert added is not None
    table = text_encoder.layers[2].token_embedding.embeddings
    first = keras.ops.convert_to_numpy(added)
    added.assign(first + np.arange(first.size).reshape(first.shape) / first.size)
    return np.concatenate([keras.ops.convert_to_numpy(each) for each in (table, added)])


def test_they_start_as_the_mean_of_words() -> None:
    text_encoder = models.build_text_encoder(TEXT)
    randomise(text_encoder)
    made = tokenizer()
    add_tokens(text_encoder, made, NEW, "ab c")
    table = keras.ops.convert_to_numpy(text_encoder.layers[2].token_embedding.embeddings)
    ids = [made.vocabulary[token] for token in ("a", "b</w>", "c</w>")]
    found = keras.ops.convert_to_numpy(added_tokens(text_encoder))
    np.testing.assert_allclose(found, np.tile(table[ids].mean(0), (2, 1)), atol=1e-6)


def test_they_are_rows_of_a_larger_table() -> None:
    """What a checkpoint holds: the same output, and the gradient of those rows alone."""
    text_encoder, larger = (
        models.build_text_encoder(replace(TEXT, vocabulary=TEXT.vocabulary + more)) for more in (0, len(NEW))
    )
    randomise(text_encoder)
    for one, other in zip(larger.weights[1:], text_encoder.weights[1:], strict=True):
        one.assign(other)
    larger.layers[2].token_embedding.embeddings.assign(with_new_tokens(text_encoder))
    tokens = np.array([[3, 50, 49, 51, 50, 0, 1]], "int32")
    given = {"tokens": tokens, "positions": np.arange(7, dtype="int32")[None]}
    expected = larger.predict_on_batch(given)
    np.testing.assert_allclose(text_encoder.predict_on_batch(given), expected, atol=1e-6)
    wanted = [v for v in text_encoder.variables if v.trainable]
    assert wanted == [added_tokens(text_encoder)]
    for variable in larger.weights:
        variable.trainable = variable is larger.weights[0]
    (of_table,) = gradients(larger, given)
    model = Trained(text_encoder)
    (found,) = gradients(model, given)
    np.testing.assert_allclose(
        keras.ops.convert_to_numpy(found), keras.ops.convert_to_numpy(of_table)[-2:], atol=1e-6
    )
    assert np.abs(keras.ops.convert_to_numpy(found)).max() > 1e-3


class Trained(keras.Model):
    """A model whose trainable weights Keras finds, though what it holds is frozen as a whole."""

    def __init__(self, inner: keras.Model) -> None:
        super().__init__()
        self.inner = inner
        self.built = True

    def call(self, inputs: Any) -> Any:
        return self.inner(inputs)


def test_all_that_is_trained() -> None:
    unet, text_encoder = models.build_unet(UNET), models.build_text_encoder(TEXT)
    with_new_tokens(text_encoder)
    unet.trainable = False
    trained = DreamBooth(unet, text_encoder).trainable_variables
    assert [tuple(variable.shape) for variable in trained] == [(2, TEXT.width)]


def test_a_lora_of_the_text_encoder_has_its_own_learning_rate(monkeypatch: pytest.MonkeyPatch) -> None:
    """The variables that a LoRA adds are those with the rate and the steps of the text encoder."""
    from kcv2diffusers.dreambooth import train
    from kcv2diffusers.dreambooth.config import Config

    text_encoder = models.build_text_encoder(TEXT)
    add_lora(text_encoder, 2, 2)
    slower: list[Any] = []
    monkeypatch.setattr(train, "make_optimizer", lambda config, given: slower.extend(given) or 1 / 0)
    base: Any = SimpleNamespace(
        unet=models.build_unet(UNET), text_encoder=text_encoder, prediction_type="epsilon", schedule=SD
    )
    with pytest.raises(ZeroDivisionError):
        train._trainer(Config(train_text_encoder=True, lora_rank=2, precision="float32"), base)
    assert len(slower) == 16 and all("lora_kernel" in variable.path for variable in slower)


def test_an_invalid_token() -> None:
    from kcv2diffusers.dreambooth.tokens import name_tokens

    files: Any = SimpleNamespace(
        tokenizer=Tokenizer(tokenizer().vocabulary, []),
        config=SimpleNamespace(text_encoder=SimpleNamespace(vocabulary=52)),
    )
    with pytest.raises(Error, match="the base has 52 token embeddings and its tokenizer 50 tokens"):
        name_tokens(files, ["<one>"], ["a <one>"])
    files.config.text_encoder.vocabulary = 50
    name_tokens(files, ["<one>"], ["a <one>"])
    assert files.tokenizer.encode("<one>")[1] == 50
