"""Lists of labelled images in the format of the Medical Segmentation Decathlon.

A list is a JSON file with the sections "training", "validation" and "testing" (or "test"),
each a list of `{"image": PATH, "label": LABEL}`; paths are relative to a data folder that
the reader names. A label is a class index, a list of one class index as published lists
have it, or a one-hot list. "labels" may name the classes: `{"0": "no finding", ...}`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from core.errors import InputError
from core.reading import read_json
from core.storage import write_text

SECTIONS = ("training", "validation", "testing")
# What else the sections are called.
_OTHER_NAMES = {"testing": "test"}
LIST_FLAG = "dataset_json"
# A label decides how many outputs a model gets.
MAX_CLASSES = 100_000
_DIGITS = 12


@dataclass(frozen=True)
class Sample:
    """One labelled image.

    Attributes:
        image: Path, relative to the data folder.
        label: Index of the class.
    """

    image: str
    label: int


@dataclass(frozen=True)
class DataList:
    """An opened list; its sections are read when they are asked for.

    Attributes:
        path: The JSON file.
        content: What it holds.
        flag: The flag or setting that named it, for messages.
    """

    path: Path
    content: Mapping[str, Any]
    flag: str = LIST_FLAG

    def samples(self, section: str, key: str = "image") -> list[Sample]:
        """The images of one section.

        Args:
            section: "training", "validation" or "testing".
            key: What the list calls the path of an image.

        Raises:
            InputError: The section is missing, or an entry of it is broken.
        """
        entries = self._entries(section)
        if not isinstance(entries, list):
            has = ", ".join(self.content) or "none"
            raise InputError(f'{self.flag}: {self.path} has no "{section}" list; it has {has}')
        where = f"{self.flag}: {self.path}: entry"
        return [_sample(entry, f"{where} {i} of {section}", key) for i, entry in enumerate(entries)]

    def has(self, section: str) -> bool:
        """Whether there is such a section with anything in it."""
        return bool(self._entries(section))

    def class_names(self, n_classes: int) -> tuple[str, ...]:
        """A name for every class: that of the file, else the class index.

        Args:
            n_classes: Classes that occur; the file may name more.
        """
        labels = self.content.get("labels")
        named = labels if isinstance(labels, dict) else {}
        numbers = [_class_index(key) for key in named]
        if any(number is not None and number >= MAX_CLASSES for number in numbers):
            raise InputError(f"{self.flag}: {self.path} names a class above {MAX_CLASSES - 1}")
        n_classes = max([n_classes, *(number + 1 for number in numbers if number is not None)])
        return tuple(str(named.get(str(index), index)) for index in range(n_classes))

    def _entries(self, section: str) -> Any:
        names = (section, _OTHER_NAMES.get(section, section))
        return next((self.content[name] for name in names if name in self.content), None)


def open_datalist(path: str | Path, flag: str = LIST_FLAG) -> DataList:
    """Open a list.

    Args:
        path: The JSON file.
        flag: The flag or setting that named it, for messages.

    Raises:
        InputError: The file is missing or no JSON object.
    """
    path = Path(path)
    content = read_json(path, flag, "JSON list")
    if not isinstance(content, dict):
        kind = type(content).__name__
        raise InputError(f"{flag}: {path} is a JSON {kind}, not an object with sections")
    return DataList(path, content, flag)


def load_datalist(
    path: str | Path, section: str, flag: str = LIST_FLAG, key: str = "image"
) -> list[Sample]:
    """Read one section of a list.

    Args:
        path: The JSON file.
        section: "training", "validation" or "testing".
        flag: The flag or setting that named it, for messages.
        key: What the list calls the path of an image.

    Raises:
        InputError: The file is missing or no JSON object, it lacks the section, or an
            entry of it is broken; the message names the file and the entry.
    """
    return open_datalist(path, flag).samples(section, key)


def write_datalist(path: str | Path, sections: Mapping[str, Sequence[Sample]]) -> None:
    """Write a list, atomically.

    Args:
        path: The JSON file.
        sections: Samples by section name.
    """
    content = {
        name: [{"image": sample.image, "label": sample.label} for sample in samples]
        for name, samples in sections.items()
    }
    write_text(path, json.dumps(content, indent=1) + "\n")


def _sample(entry: Any, where: str, key: str) -> Sample:
    if not isinstance(entry, dict) or not isinstance(entry.get(key), str):
        raise InputError(f"{where} has no {key} path")
    label = _class_index(entry.get("label"))
    if label is None or label >= MAX_CLASSES:
        raise InputError(
            f"{where} has the label {entry.get('label')!r:.60}, which is no class index below "
            f"{MAX_CLASSES}"
        )
    return Sample(entry[key], label)


def _class_index(label: Any) -> int | None:
    """A class index, also from a list of one, or from a one-hot list; None where it is none."""
    if isinstance(label, list) and len(label) == 1 and not isinstance(label[0], list):
        return _class_index(label[0])
    if isinstance(label, list):
        return _position_of_the_one(label)
    if isinstance(label, str) and label.isascii() and label.isdigit():
        return int(label[:_DIGITS])
    whole = isinstance(label, int) or (isinstance(label, float) and label.is_integer())
    return int(label) if whole and not isinstance(label, bool) and label >= 0 else None


def _position_of_the_one(values: list[Any]) -> int | None:
    """The class of a one-hot list; None where there is not exactly one 1 among zeros."""
    is_one_hot = all(value in (0, 1) for value in values) and values.count(1) == 1
    return values.index(1) if is_one_hot else None
