"""Ids of the written folder against KerasCV's own tokenizer, in transformers 5 and (if present) 4."""

from __future__ import annotations

import gzip
import importlib.machinery
import importlib.util
import json
import os
import subprocess
import sys
import unicodedata
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.checkpoints import ROOT

from kcv2diffusers.errors import Error, SourceError, TargetError
from kcv2diffusers.pipeline.tokenizer_files import (
    BOS,
    BPE_NAME,
    EOS,
    LIMIT,
    TokenizerFiles,
    find_tokenizer,
    write_tokenizer,
)

PLACEHOLDERS = ["<my-cat>", "<dog>", "sks"]

PLAIN = [
    "",
    " ",
    "a photo of an astronaut riding a horse on mars",
    "Don't they'LL we've I'm you'd it's 'TIS the '90s",
    "1234 3.14 8k uhd, (masterpiece:1.2), [wide|narrow] -- 50% off!!! #1 @home",
    "x_y-z/@#$%^&*()[]{}|\\`~+= salt & pepper",
    "\t tabs\n\nnew  lines\r nbsp\u00a0and\u3000wide ",
    "crème brûlée à la naïve Ünïcödé, ß STRASSE ẞ İstanbul",
    "“curly” ‘quotes’ … — don’t ﬁne ＡＢ ½ ² \u2167",  # noqa: RUF001
    "русский ТЕКСТ Ёж, ελληνικά",  # noqa: RUF001
    "한국어 텍스트, ひらがな カタカナ",
    "हिन्दी ไทย عربي עברית",
    "😀 emoji 🇫🇷 👍🏽 \u2764\ufe0f",
    "a <|endoftext|> b <|startoftext|> <|ENDOFTEXT|> </w> a</w>",
    "a" * 60,
]
# What transformers 4's slow tokenizer splits or drops without ftfy.
JOINED = [
    "猫が好き 犬 中文提示词",
    "👩\u200d👩\u200d👧 family, zero\u200bwidth",
    "A <MY-CAT> in capitals",
]
PLACED = ["a photo of <my-cat>", "<my-cat>, <dog>; sks, oil", "a<my-cat>b <dog><dog>.", "sks", "sks person"]


def genuine() -> Path:
    spec = importlib.util.find_spec("open_clip")
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("open_clip, which ships CLIP's vocabulary, is not installed")
    return Path(spec.submodule_search_locations[0], BPE_NAME)


@pytest.fixture(scope="module")
def simple() -> Callable[..., Any]:
    pytest.importorskip("keras_cv")
    from keras_cv.src.models.stable_diffusion.clip_tokenizer import SimpleTokenizer

    factory: Callable[..., Any] = SimpleTokenizer
    return factory


@pytest.fixture(scope="module")
def files() -> TokenizerFiles:
    return find_tokenizer(genuine())


@pytest.fixture(scope="module")
def plain(files: TokenizerFiles, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("plain") / "tokenizer"
    write_tokenizer(files, folder)
    return folder


@pytest.fixture(scope="module")
def placed(files: TokenizerFiles, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("placed") / "tokenizer"
    write_tokenizer(files, folder, PLACEHOLDERS)
    return folder


@pytest.fixture(scope="module")
def load() -> Callable[[Path], Any]:
    load: Callable[[Path], Any] = pytest.importorskip("transformers").CLIPTokenizer.from_pretrained
    return load


@pytest.fixture(scope="module")
def reference(simple: Callable[..., Any]) -> Any:
    return simple(bpe_path=str(genuine()))


@pytest.fixture(scope="module")
def placed_reference(simple: Callable[..., Any]) -> Any:
    tokenizer = simple(bpe_path=str(genuine()))
    assert tokenizer.add_tokens(PLACEHOLDERS) == len(PLACEHOLDERS)
    return tokenizer


@pytest.fixture(scope="module")
def loaded(load: Callable[[Path], Any], plain: Path) -> Any:
    return load(plain)


# Ids


def test_vocabulary_is_kerascv_s(reference: Any, files: TokenizerFiles) -> None:
    assert len(files.vocab) == 49408 and files.vocab == reference.encoder
    assert files.vocab[EOS] == 49407 and files.placeholder_tokens == ()


@pytest.mark.parametrize("prompt", PLAIN + JOINED[:2])
def test_ids_and_padding(reference: Any, loaded: Any, prompt: str) -> None:
    ids = reference.encode(prompt)
    batch = loaded(prompt, padding="max_length", truncation=True, max_length=loaded.model_max_length)
    assert batch.input_ids == ids + [49407] * (77 - len(ids))


ALPHABET = st.one_of(
    st.sampled_from("abcdefghijklmnopqrstuvwxyzABCXYZ0123456789 '''.,:;!?()[]<>|/\\-_+*#@\"\n\t"),
    st.characters(min_codepoint=0xA1, max_codepoint=0x17E, exclude_characters="\u00ad"),
    st.characters(min_codepoint=0x391, max_codepoint=0x3CE, exclude_characters="\u03a2\u03a3"),
    st.characters(min_codepoint=0x400, max_codepoint=0x45F),
    st.characters(min_codepoint=0x3042, max_codepoint=0x30FA, exclude_categories=["Cn"]),
    st.characters(min_codepoint=0x4E00, max_codepoint=0x9F00),
    st.characters(min_codepoint=0xAC00, max_codepoint=0xD700),
    st.characters(min_codepoint=0x1F300, max_codepoint=0x1F64F),
    st.sampled_from(["'s", "'LL ", "\u200d", "\u2019", "\u2014", "\ufe0f", "masterpiece, ", "8k ", "Don't "]),
)
PROMPTS = (
    st.lists(ALPHABET, max_size=30).map("".join).filter(lambda text: unicodedata.is_normalized("NFC", text))
)


@settings(max_examples=400, deadline=None)
@given(prompt=PROMPTS)
def test_ids_of_any_prompt(reference: Any, loaded: Any, prompt: str) -> None:
    assert loaded(prompt).input_ids == reference.encode(prompt)


@pytest.mark.parametrize("prompt", PLACED + PLAIN + JOINED)
def test_placeholders(placed_reference: Any, load: Callable[[Path], Any], placed: Path, prompt: str) -> None:
    tokenizer = load(placed)
    assert tokenizer(prompt).input_ids == placed_reference.encode(prompt)
    assert tokenizer.convert_tokens_to_ids(PLACEHOLDERS) == [49408, 49409, 49410]
    assert len(tokenizer) == 49411 and tokenizer.pad_token_id == 49407


def test_documented_differences(placed_reference: Any, load: Callable[[Path], Any], placed: Path) -> None:
    """Fails when a version stops differing, so that the module's docstring can be corrected."""
    tokenizer = load(placed)
    for prompt in ["a &amp; b", "e\u0301", "\u039f\u03a3", "'\u017f", "(<my-cat>)", "!<|endoftext|>", "asks"]:
        assert tokenizer(prompt).input_ids != placed_reference.encode(prompt), prompt


SCRIPT = """
import json, sys
import transformers
folder, prompts = json.load(sys.stdin)
result = {"version": transformers.__version__}
for name in ("CLIPTokenizer", "CLIPTokenizerFast"):
    tokenizer = getattr(transformers, name).from_pretrained(folder)
    result[name] = [tokenizer(prompt, padding="max_length", max_length=77).input_ids for prompt in prompts]
print(json.dumps(result))
"""


@pytest.mark.slow
def test_transformers_4(placed_reference: Any, placed: Path) -> None:
    default = ROOT / ".venv" / "transformers4"
    where = Path(os.environ.get("KCV_TRANSFORMERS4") or default)
    if not where.is_dir():
        pytest.skip(f"transformers 4 is not at $KCV_TRANSFORMERS4 or {default}")
    prompts = PLACED + PLAIN + JOINED
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT],
        input=json.dumps([str(placed), prompts]),
        env={**os.environ, "PYTHONPATH": str(where)},
        capture_output=True,
        text=True,
        check=True,
    )
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["version"].startswith("4.")
    expected = [placed_reference.encode(prompt) for prompt in prompts]
    expected = [ids + [49407] * (77 - len(ids)) for ids in expected]
    assert result["CLIPTokenizerFast"] == expected
    same = len(prompts) - len(JOINED)
    if importlib.util.find_spec("ftfy"):  # It rewrites typographic characters before tokenizing.
        same = len(PLACED) + 6
    assert result["CLIPTokenizer"][:same] == expected[:same]


# Where tokenizers are found, and what they may look like


def small(extra: dict[str, int] | None = None) -> tuple[dict[str, int], list[str]]:
    """A tokenizer as tiny test models have: bytes, a few merges, the two specials last."""
    letters = [chr(code) for code in range(0x21, 0x7F)]
    merges = ["c a", "ca t</w>", "d o", "do g</w>"]
    joined = [merge.replace(" ", "") for merge in merges]
    tokens = [*letters, *(letter + "</w>" for letter in letters), *joined, BOS, EOS]
    return {token: n for n, token in enumerate(tokens)} | (extra or {}), merges


def save_small(folder: Path, **others: object) -> Path:
    vocab, merges = small()
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps(vocab), encoding="utf-8")
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges) + "\n", encoding="utf-8")
    for name, content in others.items():
        (folder / f"{name}.json").write_text(json.dumps(content), encoding="utf-8")
    return folder


def test_small_vocabulary(load: Callable[[Path], Any], tmp_path: Path) -> None:
    files = find_tokenizer(save_small(tmp_path / "small"))
    size = len(files.vocab)
    write_tokenizer(files, tmp_path / "out", ["<x>"], model_max_length=16)
    tokenizer = load(tmp_path / "out")
    ids = tokenizer("Cat <x> dog", padding="max_length").input_ids
    words = [files.vocab["cat</w>"], size, files.vocab["dog</w>"]]
    assert ids == [size - 2, *words, *[size - 1] * 12]


def test_base_with_other_padding_is_normalised(
    load: Callable[[Path], Any], files: TokenizerFiles, plain: Path, tmp_path: Path
) -> None:
    base = tmp_path / "base"
    write_tokenizer(files, base / "tokenizer")
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        path = base / "tokenizer" / name
        path.write_text(json.dumps(json.loads(path.read_text()) | {"pad_token": "!"}))
    assert load(base / "tokenizer").pad_token_id == 0
    found = find_tokenizer(None, [base])
    assert found.origin == base / "tokenizer"
    write_tokenizer(found, tmp_path / "out")
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == {
        path.name: path.read_bytes() for path in plain.iterdir()
    }


def test_round_trip_through_transformers(
    load: Callable[[Path], Any], files: TokenizerFiles, placed: Path, tmp_path: Path
) -> None:
    load(placed).save_pretrained(tmp_path)
    for folder in (placed, tmp_path):  # Version 5 leaves tokenizer.json without vocab.json.
        again = find_tokenizer(folder)
        assert (again.vocab, again.merges) == (files.vocab, files.merges)
        assert again.placeholder_tokens == tuple(PLACEHOLDERS)


def test_placeholders_of_the_source_come_first(tmp_path: Path) -> None:
    size = len(small()[0])
    found = find_tokenizer(
        save_small(tmp_path / "in", added_tokens={"<b>": size + 1, "<a>": size, EOS: size - 1})
    )
    assert found.placeholder_tokens == ("<a>", "<b>")
    write_tokenizer(found, tmp_path / "out", ["<c>"])
    expected = {"<a>": size, "<b>": size + 1, "<c>": size + 2}
    assert json.loads((tmp_path / "out" / "added_tokens.json").read_text()) == expected
    with pytest.raises(Error, match="twice"):
        write_tokenizer(found, tmp_path / "out", ["<a>"])


@pytest.mark.parametrize("form", ["gz", "txt", "crlf", "folder", "pipeline", "merges"])
def test_forms_of_source(files: TokenizerFiles, plain: Path, tmp_path: Path, form: str) -> None:
    text = gzip.decompress(genuine().read_bytes())
    source = tmp_path / "vocabulary.txt"
    match form:
        case "gz":
            source = genuine()
        case "txt":
            source.write_bytes(text)
        case "crlf":
            source.write_bytes(text.replace(b"\n", b"\r\n"))
        case "folder":
            source = plain
        case "pipeline":
            source = plain.parent
        case "merges":
            source = plain / "merges.txt"
    assert replace(find_tokenizer(source), origin=files.origin) == files


def test_order_of_search(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def place(path: Path) -> Path:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(genuine_bytes)
        return path

    genuine_bytes = genuine().read_bytes()
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.delenv("KERAS_HOME", raising=False)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    base = tmp_path / "pipeline"
    base.mkdir()
    with pytest.raises(Error, match=r"(?s)--tokenizer.*--base.*open_clip_torch"):
        find_tokenizer(None, [base])

    spec = importlib.machinery.ModuleSpec("open_clip", None, is_package=True)
    spec.submodule_search_locations = [str(tmp_path / "site" / "open_clip")]
    monkeypatch.setattr(importlib.util, "find_spec", {"open_clip": spec, "clip": None}.get)
    package = place(tmp_path / "site" / "open_clip" / BPE_NAME)
    assert find_tokenizer(None, [base]).origin == package
    cached = place(tmp_path / "home" / ".keras" / "datasets" / BPE_NAME)
    assert find_tokenizer(None, [base]).origin == cached
    monkeypatch.setenv("KERAS_HOME", str(tmp_path / "keras"))
    assert find_tokenizer(None, [base]).origin == cached
    moved = place(tmp_path / "keras" / "datasets" / BPE_NAME)
    assert find_tokenizer(None, [base]).origin == moved
    save_small(base / "tokenizer")
    assert find_tokenizer(None, [base]).origin == base / "tokenizer"
    assert find_tokenizer(save_small(tmp_path / "mine"), [base]).origin == tmp_path / "mine"


def test_packages_are_not_imported(tmp_path: Path) -> None:
    genuine()
    code = (
        "import sys; from kcv2diffusers.pipeline.tokenizer_files import find_tokenizer as f; o = f().origin\n"
    )
    code += "print(o.parent.name, {'open_clip', 'torch', 'transformers', 'keras'} & set(sys.modules))"
    env = {**os.environ, "HOME": str(tmp_path), "KERAS_HOME": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True)
    assert done.stdout == "open_clip set()\n"


# Refusals


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        ([""], "empty"),
        (["<my cat>"], "white space"),
        (["<my\u00a0cat>"], "white space"),
        (["<a>", "<a>"], "twice"),
        (["cat</w>"], "already in the vocabulary, with id"),
        ([EOS], "already in the vocabulary, with id"),
        (["<caf\u00e9>"], "ASCII"),
        (["<a\x01>"], "ASCII"),
        (["<My-Cat>"], "Use '<my-cat>'"),
        (["<a&amp;b>"], "HTML"),
        (["<a", "<a>"], "starts with '<a'"),
        ([EOS + "x"], "starts with"),
    ],
)
def test_bad_placeholders(tmp_path: Path, tokens: list[str], message: str) -> None:
    vocab, merges = small()
    with pytest.raises(Error, match=message):
        write_tokenizer(TokenizerFiles(vocab, merges, (), tmp_path), tmp_path / "out", tokens)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("token", ["<My-Cat>", "<caf\u00e9>", "<a&amp;b>"])
def test_kerascv_never_matches_refused_placeholders(simple: Callable[..., Any], token: str) -> None:
    tokenizer = simple(bpe_path=str(genuine()))
    tokenizer.add_tokens([token])
    assert 49408 not in tokenizer.encode(f"a {token} b")


def test_longer_placeholder_first_is_fine(
    simple: Callable[..., Any], load: Callable[[Path], Any], files: TokenizerFiles, tmp_path: Path
) -> None:
    tokenizer = simple(bpe_path=str(genuine()))
    tokenizer.add_tokens(["<a>", "<a"])
    write_tokenizer(files, tmp_path, ["<a>", "<a"])
    assert load(tmp_path)("<a> or <a b").input_ids == tokenizer.encode("<a> or <a b")


BAD_VOCAB: dict[str, object] = {
    "list": [1, 2],
    "text id": small()[0] | {"x-": "1"},
    "bool id": small()[0] | {"#": True},
    "gap": small({"xx": 9999})[0],
    "twice": small({"xx": 5})[0],
    "negative": small({"xx": -1})[0],
    "no specials": {"a": 0, "b": 1},
    "surrogate": small({"\ud800": len(small()[0])})[0],
    "empty": {},
}


@pytest.mark.parametrize("kind", BAD_VOCAB)
def test_bad_vocabulary(tmp_path: Path, kind: str) -> None:
    folder = save_small(tmp_path, vocab=BAD_VOCAB[kind])
    with pytest.raises(SourceError, match=str(tmp_path)):
        find_tokenizer(folder)
    vocab_and_merges = {"model": {"vocab": BAD_VOCAB[kind], "merges": []}}
    with pytest.raises(SourceError, match=r"tokenizer\.json"):
        find_tokenizer(save_small(tmp_path / "five", tokenizer=vocab_and_merges) / "tokenizer.json")


@pytest.mark.parametrize(
    "text", [b"{", b"[" * 100_000, b"\xff\xfe", b"null", b'{"a": 1' + b"1" * 9999 + b"}"]
)
def test_bad_json(tmp_path: Path, text: bytes) -> None:
    folder = save_small(tmp_path)
    (folder / "vocab.json").write_bytes(text)
    with pytest.raises(SourceError, match=r"vocab\.json"):
        find_tokenizer(folder)


@pytest.mark.parametrize("merge", ["c", "c a t", "c  a", " ca", "ca ", "c zz", "a c"])
def test_bad_merges(tmp_path: Path, merge: str) -> None:
    folder = save_small(tmp_path)
    (folder / "merges.txt").write_text(f"#version: 0.2\nc a\n{merge}\n", encoding="utf-8")
    with pytest.raises(SourceError, match="merge 2"):
        find_tokenizer(folder)


@pytest.mark.parametrize(
    "added",
    [
        {"<a>": 9999},
        {"<a>": -1},
        {"<a>": "x"},
        {"<a>": [1]},
        {"<a>": 1e400},
        {"<a>": "1" * 9999},
        {"<a>": 3},
        [1],
    ],
)
def test_bad_added_tokens(tmp_path: Path, added: object) -> None:
    with pytest.raises(SourceError, match="added"):
        find_tokenizer(save_small(tmp_path, added_tokens=added))


@pytest.mark.parametrize(
    "data",
    [
        {},
        {"model": []},
        {"model": {"vocab": [["a", 0.1]]}},
        {"model": {"vocab": small()[0], "merges": [1, None]}},
    ],
)
def test_bad_tokenizer_json(tmp_path: Path, data: object) -> None:
    (tmp_path / "tokenizer.json").write_text(json.dumps(data), encoding="utf-8")
    with pytest.raises(SourceError, match=r"tokenizer\.json"):
        find_tokenizer(tmp_path)


def test_tokenizer_json_with_odd_added_tokens(tmp_path: Path) -> None:
    vocab, merges = small()
    model = {"vocab": vocab, "merges": [merge.split(" ") for merge in merges]}
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps({"model": model, "added_tokens": {"x": 1}}), encoding="utf-8")
    assert find_tokenizer(path).merges == merges
    path.write_text(json.dumps({"model": model, "added_tokens": [7]}), encoding="utf-8")
    with pytest.raises(SourceError, match="added token"):
        find_tokenizer(path)


def test_bad_files(tmp_path: Path) -> None:
    packed = genuine().read_bytes()
    flipped = bytearray(packed)
    flipped[len(packed) // 2] ^= 0xFF
    cases = {
        "cut.txt.gz": packed[: len(packed) // 2],
        "flipped.txt.gz": bytes(flipped),
        "header.gz": b"\x1f\x8b",
        "bomb.gz": gzip.compress(bytes(LIMIT + 1)),
        "empty.txt": b"",
        "weights.txt": bytes(range(256)),
        "prose.txt": b"#version: 0.2\nOnce upon a time\n",
        "vocab.json": b'{"a": 0}',
        "cut.txt": gzip.decompress(packed)[:100_003],
    }
    for name, content in cases.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(SourceError, match=name):
            find_tokenizer(tmp_path / name)
    for missing in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(SourceError, match="Give a tokenizer folder"):
            find_tokenizer(missing)


def test_cannot_write(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(TargetError, match="file"):
        write_tokenizer(TokenizerFiles(*small(), (), tmp_path), tmp_path / "file" / "tokenizer")


def test_a_prompt_that_is_not_unicode() -> None:
    """As Python keeps what a terminal in Latin-1 sends."""
    from kcv2diffusers.models.tokenizer import Tokenizer

    with pytest.raises(Error, match=r"a caf\\udce9: a prompt with bytes that are not UTF-8"):
        Tokenizer.of_words(["a"]).encode("a caf\udce9")
