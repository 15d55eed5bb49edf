"""What visitors type becomes an address or a refusal, never a path."""

from __future__ import annotations

import pytest

from kcv2diffusers import Error
from kcv2diffusers.app import given


@pytest.mark.parametrize(
    ("text", "address"),
    [
        ("tiny", "tiny://"),
        (" Tiny ", "tiny://"),
        ("alice/dog", "hf://alice/dog"),
        ("hf://alice/dog", "hf://alice/dog"),
        ("alice/dog@main", "hf://alice/dog@main"),
        ("alice/dog/weights/unet 2.h5@epoch-2", "hf://alice/dog/weights/unet 2.h5@epoch-2"),
        ("https://huggingface.co/alice/dog", "hf://alice/dog"),
        ("https://huggingface.co/alice/dog/tree/v2", "hf://alice/dog@v2"),
    ],
)
def test_addresses(text: str, address: str) -> None:
    assert given.source(text) == address


@pytest.mark.parametrize(
    "text",
    [
        "", " ", "/etc/passwd", "//etc/passwd", "~/x", "~root/x", "./x/y", "../x", "a/../b", "a/b/../../c",
        "a/..", "a/b/..", "a/b/./c", "a/b//c", "file:///etc/passwd", "hf:///etc/passwd", "hf://../x", "hf://hf://a/b",
        "http://example.org/a", "https://huggingface.co/datasets/a/b/c/d", "C:\\x\\y", "a\\b", "x.h5", "-a/b",
        "--base/x", "a/b@../c", "a/b@", "a/b\0c", "a/b\nc", "a/b\u202ec", "s3://a/b", "a/b/~c", "tiny/",
        "a/b@c@d",
    ],
)  # fmt: skip
def test_nothing_else_is_a_source(text: str) -> None:
    with pytest.raises(Error, match=r"give an id on the Hub") as error:
        given.source(text)
    assert "\n" not in str(error.value)


def test_several_sources() -> None:
    assert given.sources(" alice/dog,\nalice/dog-text-encoder tiny ") == [
        "hf://alice/dog", "hf://alice/dog-text-encoder", "tiny://",
    ]  # fmt: skip
    assert given.sources(" ") == []


@pytest.mark.parametrize("text", ["", "-x", "--token", "a/b/c", "../a", "a b", "a/b\n--private", "/a"])
def test_hostile_repositories(text: str) -> None:
    with pytest.raises(Error):
        given.repository(text)
    assert given.repository(" alice/dog ") == "alice/dog"


def test_prompts() -> None:
    assert given.prompt("  a\nfox \t here", "Prompt") == "a fox here"
    assert given.prompt("--base /etc", "Prompt") == "--base /etc"  # it goes behind `--prompt=`
    for text in ("a\0b", "a\x1b[2Jb", "\ud800", "x" * 1001):
        with pytest.raises(Error, match=r"^Prompt: "):
            given.prompt(text, "Prompt")


@pytest.mark.parametrize("value", [None, float("nan"), float("inf"), "5", True, 0, 11, 2.5])
def test_numbers(value: float) -> None:
    with pytest.raises(Error, match=r"^Steps: "):
        given.whole(value, "Steps", 1, 10)
    assert given.whole(3.0, "Steps", 1, 10) == 3


@pytest.mark.parametrize(
    ("name", "harmless"),
    [
        ("unet.weights.h5", "unet.weights.h5"),
        ("../../etc/passwd", "passwd"),
        ("..\\..\\boot.ini", "boot.ini"),
        (".bashrc", "bashrc"),
        ("--out.h5", "out.h5"),
        ("", "file"),
        ("..", "file"),
        ("a\0b\n.h5", "a_b_.h5"),
        ("Füchse $(rm).jpg", "Füchse _(rm).jpg"),
        ("\ud800", "file"),
        ("variables.data-00000-of-00001", "variables.data-00000-of-00001"),
        ("x" * 500 + ".h5", "x" * 117 + ".h5"),
    ],
)
def test_names_of_uploads(name: str, harmless: str) -> None:
    assert given.file_name(name) == harmless


def test_names_differ() -> None:
    assert given.file_name("a.h5", ["A.h5", "a (2).h5"]) == "a (3).h5"
