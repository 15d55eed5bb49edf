"""Captions of photos: NAME.txt beside the photo, or the folder's metadata.jsonl as `datasets` reads it."""

from __future__ import annotations

import json
from pathlib import Path

from kcv2diffusers.errors import Error, is_unicode, plain

METADATA = "metadata.jsonl"
_MOST_BYTES = 1 << 16  # of a caption; the text encoder takes 77 tokens
_MOST_LISTED = 1 << 28


def caption_beside(photo: Path) -> str:
    """The text of the .txt file beside a photo, in one line; empty if there is none.

    Raises Error for a file that is not text.
    """
    path = photo.with_suffix(".txt")
    return _one_line(_read(path, _MOST_BYTES)) if path.is_file() else ""


def listed_captions(folder: Path) -> dict[str, str]:
    """The captions in the metadata.jsonl of a folder, by file name; empty if there is none.

    Each line is a JSON object with `file_name`, a path below the folder, and `text`. Raises Error for another
    line.
    """
    path = folder / METADATA
    found = {}
    for number, line in enumerate(_read(path, _MOST_LISTED).split("\n") if path.is_file() else (), 1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
            name, text = entry["file_name"], entry.get("text", "")
            if not isinstance(name, str) or not isinstance(text, str) or not is_unicode(text):
                raise TypeError
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            raise Error(
                f"{plain(path)}: line {number} is not the caption of a photo.\n"
                'A line is: {"file_name": "dog.png", "text": "a sks dog on a beach"}'
            ) from error
        found[name] = _one_line(text)
    return found


def _read(path: Path, most: int) -> str:
    try:
        with path.open("rb") as file:
            content = file.read(most + 1)
        if len(content) > most:
            raise ValueError(f"larger than {most} bytes")
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise Error(f"{plain(path)}: a caption that is not UTF-8.\nSave it as UTF-8.") from error
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise Error(f"{plain(path)}: this caption cannot be read: {reason}.\nCorrect it.") from error


def _one_line(text: str) -> str:
    return " ".join(text.split())
