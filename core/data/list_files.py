"""Lists of labelled images in the format of the Medical Segmentation Decathlon.

A list is a JSON file with the sections "training", "validation" and "testing", each a
list of `{"image": PATH, "label": NUMBER}`; paths are relative to a data folder that the
reader names. A label may also be a list of one number, as published lists have it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from core.errors import InputError
from core.storage import write_text

SECTIONS = ("training", "validation", "testing")


@dataclass(frozen=True)
class Sample:
    """One labelled image.

    Attributes:
        image: Path, relative to the data folder.
        label: Class index.
    """

    image: str
    label: int


def load_datalist(path: str | Path, section: str) -> list[Sample]:
    """Read one section of a list.

    Args:
        path: The JSON file.
        section: "training", "validation" or "testing".

    Raises:
        InputError: The file is missing or no JSON object, it lacks the section, or an
            entry of it is broken; the message names the file and the entry.
    """
    content = _read(Path(path))
    entries = content.get(section)
    if not isinstance(entries, list):
        raise InputError(
            f"{path}: there is no section {section!r}; it has {', '.join(content) or 'none'}"
        )
    return [_sample(entry, f"{path}: entry {i} of {section}") for i, entry in enumerate(entries)]


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


def _read(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"there is no data list {path}") from None
    except (OSError, ValueError) as error:
        raise InputError(f"the data list {path} cannot be read ({error})") from None
    if not isinstance(content, dict):
        raise InputError(f"the data list {path} is a JSON {type(content).__name__}, not an object")
    return content


def _sample(entry: Any, where: str) -> Sample:
    if not isinstance(entry, dict) or not isinstance(entry.get("image"), str):
        raise InputError(f"{where} has no image path")
    return Sample(entry["image"], _label(entry.get("label"), where))


def _label(label: Any, where: str) -> int:
    if isinstance(label, list) and len(label) == 1:
        label = label[0]
    whole = isinstance(label, int) or (isinstance(label, float) and label.is_integer())
    if isinstance(label, bool) or not whole or label < 0:
        raise InputError(f"{where} has the label {label!r}, which is no class index")
    return int(label)
