"""The subjects of a run: the one in its options, and those of `[[subjects]]` in the file for `--config`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

from kcv2diffusers.errors import Error, is_unicode, meant, plain
from kcv2diffusers.system.home import expanded


@dataclass(frozen=True, kw_only=True)
class Subject:
    """What is learnt: photos with their prompt, and a class with its own. The names are those of options."""

    instance_images: str = ""
    instance_prompt: str = ""
    class_prompt: str = ""
    class_images: str = ""
    validation_images: str = ""

    def __str__(self) -> str:
        return f"{self.instance_prompt} ({self.class_prompt})" if self.class_prompt else self.instance_prompt

    @property
    def public(self) -> Subject:
        """The subject without its folders, which are those of this machine."""
        return replace(self, instance_images="", class_images="", validation_images="")


def read_subjects(value: Any, where: str) -> list[Subject]:
    """The subjects of a list of tables. Raises Error, which begins with `where`, for anything else."""
    if not isinstance(value, list) or not all(isinstance(each, (Mapping, Subject)) for each in value):
        raise Error(f"{where}: subjects is {value!r}.\nGive each subject as a table [[subjects]].")
    return [each if isinstance(each, Subject) else _read(each, where) for each in value]


def _read(table: Mapping[str, Any], where: str) -> Subject:
    names = [f.name for f in fields(Subject)]
    for name, text in table.items():
        if name not in names:
            raise Error(
                f"{where}: unknown entry {plain(name)} of a subject.\n"
                f"Known are {', '.join(names)}.{meant(name, names)}"
            )
        if not isinstance(text, str) or not is_unicode(text):
            raise Error(f"{where}: {name} of a subject is {text!r}.\nGive a text.")
    folders = {name: expanded(text) for name, text in table.items() if name.endswith("_images")}
    return Subject(**{**table, **folders})


def check_subjects(subjects: list[Subject]) -> None:
    """Raise Error for a subject without photos or prompt, or with class images and no class prompt."""
    for number, subject in enumerate(subjects, start=1):
        for name in ("instance_images", "instance_prompt"):
            if not getattr(subject, name):
                raise Error(f"Subject {number} has no {name}.\nPut {name} into its [[subjects]] table.")
        if subject.class_images and not subject.class_prompt:
            raise Error(
                f"Subject {number} has class_images and no class_prompt.\nGive the text that describes them."
            )
