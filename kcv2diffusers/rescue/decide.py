"""What a repository holds, by the names and sizes of its files. Nothing is downloaded for that."""

from __future__ import annotations

import re
from dataclasses import dataclass

from kcv2diffusers.errors import Error, one_line, plain
from kcv2diffusers.hub.address import Address
from kcv2diffusers.hub.listing import Listing, candidates, chosen, is_pipeline

PIPELINE = "a diffusers pipeline already"
# What repositories without a readable checkpoint hold, by file name; the first that applies is told.
_INSTEAD = (
    (
        r"(^|/)(pytorch_lora_weights\.(safetensors|bin)|[^/]*\.lora\.h5)$",
        "a LoRA, not a model (convert-lora)",
    ),
    (r"(^|/)learned_embeds[^/]*$", "a textual inversion, not a model"),
    (r"(^|/)(tf_model[^/]*\.h5|model(-\d+-of-\d+)?\.safetensors)$", "a model of transformers"),
    (r"\.(bin|ckpt|pt|pth|pkl|pickle)$", "pickled weights, which are not opened"),
    (r"\.safetensors$", "several .safetensors files, of which none is named"),
    (r"\.(onnx|tflite|gguf|msgpack|mlmodel|npz|npy)$", "weights in a format that is not read"),
    (r"\.(zip|tar|gz|7z|rar|xz)$", "an archive, which is not opened"),
    (r"\.(pb|index)$|\.data-\d+-of-\d+$", "part of a TensorFlow checkpoint, without the rest"),
)
_DESCRIBING = re.compile(r"(^|/)(\.gitattributes|\.gitignore|README\.md|LICENSE[^/]*)$")
_NO_CHECKPOINT = re.compile(r"(^|/)(tf_model[^/]*|[^/]*\.lora)\.h5$")  # .h5 by name, but not of a whole model


@dataclass(frozen=True)
class Decision:
    """What to do with a repository.

    `path` is the path in it to convert, "" for all of it. `bytes` is the size of the files to download.
    `text_encoder` says whether one seems to be among them. `reason` says why nothing is to be done; it is ""
    if something is.
    """

    path: str = ""
    bytes: int = 0
    text_encoder: bool = False
    reason: str = ""


def decide(repository: str, listing: Listing) -> Decision:
    """Decide by the files of a repository and their sizes in bytes."""
    if is_pipeline(listing):
        return Decision(reason=PIPELINE)
    found = [c for c in candidates(listing, repository) if not _NO_CHECKPOINT.search(c.path)]
    if not found:
        return _single_file(repository, listing) or Decision(reason=_instead(listing))
    address = Address(repository)
    try:
        picked = chosen(found, None, address)
    except Error as error:
        return Decision(reason=one_line(error).removeprefix(f"{address}: "))
    only = picked[0].name if len(picked) == 1 < len(candidates(listing, repository)) else ""
    text_encoder = any(c.part == "text_encoder" for c in picked)
    return Decision(only, sum(c.size for c in picked), text_encoder)


def _single_file(repository: str, listing: Listing) -> Decision | None:
    """The one .safetensors file of a repository that does not look like one of another library."""
    files = [name for name in listing if name.endswith(".safetensors")]
    if len(files) != 1 or "config.json" in listing or re.search(_INSTEAD[0][0], files[0]):
        return None
    return Decision(files[0], listing[files[0]], text_encoder=True)


def _instead(listing: Listing) -> str:
    """What a repository holds that has no readable checkpoint."""
    names = [name for name in listing if not _DESCRIBING.search(name)]
    if not names:
        return "empty"
    for pattern, words in _INSTEAD:
        if any(re.search(pattern, name, re.I) for name in names):
            return words
    return f"no weights among its {len(names)} files, such as {plain(sorted(names)[0])[:60]}"
