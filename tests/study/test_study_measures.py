"""Measures against values computed by hand, with tiny random models of transformers; and the judge."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from kcv2diffusers import locate
from kcv2diffusers.errors import Error
from kcv2diffusers.study.judge import load_judge, thing_in
from kcv2diffusers.study.measures import measure_cell, open_measures
from kcv2diffusers.study.page import _json

NONE = {"judge": "", "thing": "tiger", "dino": "", "clip": "", "identifier": ""}
TOLD = [
    {"kind": kind, "prompt": prompt, "seed": seed}
    for kind, prompt in (("subject", "a sks cat"), ("subject", "sks cat at night"), ("class", "a cat"))
    for seed in (0, 1)
]


def test_the_judge() -> None:
    """It knows the tiger of the photos. Probabilities are of all things together."""
    judge = load_judge()
    photos = np.stack(
        [np.asarray(Image.open(locate("tiny") / "subject" / f"{n}.png").convert("RGB")) for n in range(5)]
    )
    found = judge.probabilities(photos)
    assert found.shape == (5, 25) and np.allclose(found.sum(1), 1, atol=1e-5)
    assert (found[:, judge.things.index("tiger")] > 0.95).all()
    large = [np.asarray(Image.fromarray(photo).resize((128, 96))) for photo in photos]
    cell = measure_cell(
        open_measures({**NONE, "judge": "tiny"}, locate("tiny")),
        [*({"kind": "subject", "prompt": "a sks cat", "seed": n} for n in range(2)),
         {"kind": "class", "prompt": "a cat", "seed": 0}],
        [photos[0], large[1], photos[2]],
    )  # fmt: skip
    assert cell["subject"] > 0.9 and cell["class"] < 0.05 and cell.keys() == {"subject", "class"}
    assert thing_in("a cat, in the snow", judge.things) == "cat"
    with pytest.raises(Error, match="names none"):
        thing_in("a caterpillar", judge.things)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders dino/ and clip/ with random models of one layer."""
    import torch
    import transformers as hf

    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("models")
    small: dict[str, Any] = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    seen = {**small, "intermediate_size": 16, "image_size": 32, "patch_size": 8}
    hf.ViTModel(hf.ViTConfig(**seen), add_pooling_layer=False).save_pretrained(folder / "dino")
    texts = {**small, "intermediate_size": 16, "vocab_size": 99, "max_position_embeddings": 8,
             "bos_token_id": 97, "eos_token_id": 98, "pad_token_id": 98}  # fmt: skip
    config = hf.CLIPConfig(text_config=texts, vision_config=seen, projection_dim=12)
    hf.CLIPModel(config).save_pretrained(folder / "clip")
    for name, kind in (("dino", "ViTImageProcessor"), ("clip", "CLIPImageProcessor")):
        told = {"image_processor_type": kind, "size": {"height": 32, "width": 32}, "do_center_crop": False,
                "image_mean": [0.5] * 3, "image_std": [0.5] * 3, "do_resize": True, "do_normalize": True,
                "do_rescale": True, "rescale_factor": 1 / 255, "resample": 2}  # fmt: skip
        (folder / name / "preprocessor_config.json").write_text(json.dumps(told))
    letters = "abcdefghijklmnopqrstuvwxyz"
    words = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    ids = {word: number for number, word in enumerate(words[:-2])} | {words[-2]: 97, words[-1]: 98}
    (folder / "clip" / "vocab.json").write_text(json.dumps(ids))
    (folder / "clip" / "merges.txt").write_text("#version: 0.2\n")
    (folder / "clip" / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "CLIPTokenizer"}))
    return folder


def unit(values: Any) -> Any:
    return values / np.linalg.norm(values, axis=-1, keepdims=True)


def test_by_hand(models: Path, tmp_path: Path) -> None:
    import torch
    import transformers as hf

    rng = np.random.default_rng(0)
    photos, images = (rng.integers(0, 256, (n, 32, 32, 3)).astype("uint8") for n in (3, len(TOLD)))
    for number, photo in enumerate(photos):
        Image.fromarray(photo).save(tmp_path / f"{number}.png")
    told = {**NONE, "dino": str(models / "dino"), "clip": str(models / "clip"), "identifier": "sks"}
    opened = open_measures(told, tmp_path)
    found = measure_cell(opened, TOLD, list(images))
    assert opened.names == {"dino": "dino", "clip": "clip"}  # no path of this machine

    pixels = [torch.from_numpy(x.astype("float32") / 127.5 - 1).permute(0, 3, 1, 2) for x in (photos, images)]
    vit = hf.ViTModel.from_pretrained(models / "dino", add_pooling_layer=False).eval()
    clip = hf.CLIPModel.from_pretrained(models / "clip").eval()
    with torch.no_grad():
        p, d = (unit(vit(x).last_hidden_state[:, 0].numpy()) for x in pixels)
        cp, ci = (unit(clip.visual_projection(clip.vision_model(x).pooler_output).numpy()) for x in pixels)
        # "a cat" and "cat at night", a letter a token; "</w>" ends a word
        spelt = ([97, 26, 2, 0, 45, 98], [97, 2, 0, 45, 0, 45, 13, 98])
        text = [
            unit(clip.text_projection(clip.text_model(torch.tensor([ids])).pooler_output).numpy()[0])
            for ids in spelt
        ]
    wanted = {
        "dino": np.mean([d[i] @ p[j] for i in range(4) for j in range(3)]),
        "pres": np.mean([d[i] @ p[j] for i in (4, 5) for j in range(3)]),
        "div": 1 - (d[0] @ d[1] + d[2] @ d[3]) / 2,
        "clip_i": np.mean([ci[i] @ cp[j] for i in range(4) for j in range(3)]),
        "clip_t": np.mean([ci[i] @ text[i // 2] for i in range(4)]),
    }
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        assert found[name] == pytest.approx(value, abs=2e-4), name


def test_models_that_are_not_there(tmp_path: Path, models: Path) -> None:
    Image.new("RGB", (32, 32)).save(tmp_path / "0.png")
    (tmp_path / "empty").mkdir()
    for name in (str(tmp_path / "empty"), "nobody/no-model"):
        with pytest.raises(Error, match="cannot be loaded") as refused:
            open_measures({**NONE, "dino": name}, tmp_path)
        assert len(str(refused.value).splitlines()) == 2


def test_json_ends_no_script() -> None:
    text = _json({"a": "</script><!--&"})
    assert "<" not in text and "&" not in text and json.loads(text) == {"a": "</script><!--&"}
