"""A site's images for an audit: those of its training, and others of the same kind.

They are only ever opened for reading.
"""

from __future__ import annotations

import gzip
import io
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from audit.sentences_and_records import (
    MEMBERS,
    NON_MEMBERS,
    is_such,
    read_records,
    read_sentences,
)
from core.array_files import MAX_ARRAY_BYTES, MAX_RATIO, read_array
from core.data.data_sets import ClientSamples, take_samples
from core.data.given import GivenData, given_data, given_data_sets
from core.data.image_files import IMAGE_SUFFIXES, read_image
from core.data.list_files import MAX_CLASSES
from core.data.specs import DataSpec, per_channel
from core.errors import InputError, first_line
from core.losses import Loss, Targets
from core.named_objects import called, is_object_name, named_object
from core.reading import read_bytes
from core.target import Truth

FLAG = "--data"
NIFTI_SUFFIXES = (".nii", ".nii.gz")
SUFFIXES = (*IMAGE_SUFFIXES, ".npy", *NIFTI_SUFFIXES)
# An array of three axes has channels first where there are at most so many.
_MOST_CHANNELS = 4
# A gzipped volume may inflate to so many bytes, however small the file.
_SMALL = 2**24


@dataclass(frozen=True)
class SiteData:
    """What a site brings to its audit.

    Attributes:
        members: In the training that the update is of.
        non_members: Held out: of the same site and prepared alike, not in the training.
        spec: Shape and normalisation.
    """

    members: Truth
    non_members: Truth
    spec: DataSpec

    @property
    def everyone(self) -> Truth:
        """Members first, then non-members."""
        return joined(self.members, self.non_members)

    def groups(self, loss: Loss) -> np.ndarray:
        """Per image, members first, the class within which membership is permuted."""
        labels = self.everyone.labels
        if loss.targets is not Targets.CLASSES or labels.dim() != 1 or labels.is_floating_point():
            return np.zeros(len(labels), dtype=int)
        return labels.numpy().astype(int)

    def as_grey(self) -> SiteData | None:
        """The same with one channel; None where the channels differ."""
        parts = [self.members, self.non_members]
        if len(self.spec.shape) < 2 or any(_differs(part.images) for part in parts):
            return None
        members, non_members = (Truth(p.images[:, :1].clone(), p.labels) for p in parts)
        mean, std = self.spec.mean[:1], self.spec.std[:1]
        spec = replace(self.spec, shape=(1, *self.spec.shape[1:]), mean=mean, std=std)
        return SiteData(members, non_members, spec)


def chosen(samples: Truth, places: Sequence[int] | np.ndarray) -> Truth:
    """Some of the samples, in the order of their places."""
    index = torch.as_tensor(np.asarray(places, dtype=np.int64))
    return Truth(samples.images[index], samples.labels[index])


def joined(first: Truth, second: Truth) -> Truth:
    """The samples of both, in order."""
    images = torch.cat([first.images, second.images])
    return Truth(images, torch.cat([first.labels, second.labels]))


def _differs(inputs: torch.Tensor) -> bool:
    return not bool((inputs == inputs[:, :1]).all())


def site_data(found: object, seed: int = 0, place: str = FLAG) -> SiteData:
    """Members and non-members from what somebody gave.

    Args:
        found: `GivenData`, its training part the members and its validation part the
            non-members; or a pair (members, non-members) of samples.
        seed: Seed of random numbers that the user's code draws.
        place: Where it is from, for messages.

    Raises:
        InputError: It cannot be read as such.
    """
    given = given_data(found, place)
    if given.validation is None:
        raise InputError(
            f"{place}: gives one set of samples; give two, the members of the training and "
            "non-members, as a pair or as GivenData(train, validation)"
        )
    sets = given_data_sets(given, seed, place)
    members, others = (_taken(part, sets.spec) for part in (sets.train_plain, sets.val))
    return SiteData(members, others, sets.spec)


def _taken(part: ClientSamples, spec: DataSpec) -> Truth:
    return Truth(*take_samples(part, range(len(part)), spec))


def open_data(
    text: str,
    *,
    size: int | None = None,
    class_names: Sequence[str] = (),
    mean: float | Sequence[float] = 0.0,
    std: float | Sequence[float] = 1.0,
    seed: int = 0,
) -> SiteData:
    """What `--data` names.

    Args:
        text: `module:name`, an object or a function without arguments that gives what
            `site_data` takes; or a folder with `members/` and `non_members/`, each with a folder
            of files per class: pictures, `.npy` arrays, or NIfTI volumes; or a folder with
            sentences or records, see `audit.sentences_and_records`.
        size: Side in pixels that pictures are resized to, or tokens of a sentence; None: as they
            are, or 16.
        class_names: Folders in the order of the model's outputs; default: numbers where all
            names are numbers, else in alphabetical order.
        mean: Of the normalisation that the model expects, of a folder's files.
        std: Its standard deviation.
        seed: See `site_data`.

    Raises:
        InputError: It cannot be read.
    """
    if is_object_name(text):
        return site_data(_object(text), seed, f"{FLAG} {text}")
    if is_such(Path(text), ".csv"):
        return SiteData(*read_records(Path(text), FLAG))
    if is_such(Path(text), ".txt"):
        return SiteData(*read_sentences(Path(text), size, FLAG))
    given = _from_folder(Path(text), size, tuple(class_names))
    channels = int(given[0].images.shape[1])
    spec = DataSpec(
        name="own-data",
        shape=tuple(given[0].images.shape[1:]),
        mean=per_channel("mean", mean, channels),
        std=per_channel("std", std, channels),
        n_classes=0,
        bounded=all(_bounded(part.images) for part in given),
    )
    return SiteData(*given, spec)


def _object(text: str) -> object:
    found = named_object(text, FLAG)
    return found if isinstance(found, (GivenData, tuple)) else called(text, FLAG)


def _bounded(inputs: torch.Tensor) -> bool:
    return float(inputs.min()) >= 0 and float(inputs.max()) <= 1


# --- Folders ------------------------------------------------------------------------


def _from_folder(
    folder: Path, size: int | None, class_names: tuple[str, ...]
) -> tuple[Truth, Truth]:
    parts = [_files(folder / part) for part in (MEMBERS, NON_MEMBERS)]
    numbers = _class_numbers(sorted({name for part in parts for name in part}), class_names)
    read = [
        [(_read(path, size), numbers[name], path) for name in part for path in part[name]]
        for part in parts
    ]
    first = read[0][0][0].shape
    for values, _, path in (each for part in read for each in part):
        if values.shape != first:
            shapes = " and ".join("x".join(map(str, s)) for s in (values.shape, first))
            raise InputError(
                f"{FLAG}: {path} has another shape than the first file ({shapes}); "
                "--size N resizes pictures"
            )
    members, others = (
        Truth(torch.stack([v for v, _, _ in part]), torch.tensor([n for _, n, _ in part]))
        for part in read
    )
    return members, others


def _files(folder: Path) -> dict[str, list[Path]]:
    """The files of each class folder, in order."""
    try:
        if not folder.is_dir():
            raise InputError(
                f"{FLAG}: there is no folder {folder}; {FLAG} takes a folder with {MEMBERS}/ and "
                f"{NON_MEMBERS}/, or mymodule:dataset"
            )
        classes = sorted(e for e in folder.iterdir() if e.is_dir() and e.name[0] != ".")
        files = {
            entry.name: sorted(Path(at) / n for at, _, names in os.walk(entry, onerror=_refuse)
                               for n in names if n.lower().endswith(SUFFIXES) and n[0] != ".")
            for entry in classes
        }  # fmt: skip
    except OSError as error:
        raise InputError(f"{FLAG}: cannot read {error.filename} ({error.strerror})") from None
    files = {name: paths for name, paths in files.items() if paths}
    if not files:
        raise InputError(
            f"{FLAG}: {folder} holds no class folders with files that can be read "
            f"({', '.join(SUFFIXES)})"
        )
    return files


def _refuse(error: OSError) -> None:
    raise error


def _class_numbers(found: Sequence[str], class_names: tuple[str, ...]) -> dict[str, int]:
    if class_names:
        unknown = next((name for name in found if name not in class_names), None)
        if unknown is not None:
            raise InputError(f"{FLAG}: the class folder {unknown} is not among --classes")
        return {name: class_names.index(name) for name in found}
    if all(name.isdecimal() for name in found):
        numbers = {name: int(name) for name in found}
        largest = max(numbers, key=numbers.__getitem__)
        if numbers[largest] >= MAX_CLASSES:
            raise InputError(f"{FLAG}: the class folder {largest} is no class below {MAX_CLASSES}")
        return numbers
    return {name: number for number, name in enumerate(found)}


def _read(path: Path, size: int | None) -> torch.Tensor:
    """C x ... in float32."""
    name = path.name.lower()
    if name.endswith(".npy"):
        return _with_channels(read_array(path, FLAG), path)
    if name.endswith(NIFTI_SUFFIXES):
        return _with_channels(_nifti(path)[None], path)
    picture = read_image(path, FLAG)
    if size is not None:
        picture = picture.resize((size, size))
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1).float() / 255


def _with_channels(values: np.ndarray, path: Path) -> torch.Tensor:
    if values.dtype.kind not in "fiu":
        raise InputError(f"{FLAG}: {path} holds {values.dtype}, not real numbers")
    if values.dtype == np.uint8:
        values = values / 255
    with np.errstate(over="ignore"):
        found = torch.from_numpy(np.asarray(values, dtype=np.float32))
    if found.dim() == 2 or (found.dim() == 3 and len(found) > _MOST_CHANNELS):
        found = found[None]
    if not found.dim() or not found.numel() or not found.isfinite().all():
        raise InputError(f"{FLAG}: {path} is empty or not finite (NaN or infinity)")
    return found


def _nifti(path: Path) -> np.ndarray:
    """D x H x W, in the file's own order of axes."""
    try:
        import nibabel
    except ImportError:
        raise InputError(
            f"{FLAG}: reading {path} needs nibabel: pip install 'gradinvbench[medical]'"
        ) from None
    content = read_bytes(path, FLAG, "NIfTI volume", MAX_ARRAY_BYTES)
    try:
        if path.suffix == ".gz":
            content = _inflated(content)
        # One file of a stated format; nibabel's `load` would guess, and look for files beside it.
        second = nibabel.Nifti2Header.may_contain_header(content)
        volume = (nibabel.Nifti2Image if second else nibabel.Nifti1Image).from_bytes(content)
        claimed = math.prod(volume.shape) * volume.get_data_dtype().itemsize
        if not 0 < claimed <= len(content):
            raise ValueError(f"it claims {claimed} bytes of values")
        values = np.asarray(volume.dataobj, dtype=np.float32)
    except Exception as error:  # Its readers raise whatever a broken file leads them to.
        raise InputError(f"{FLAG}: {path} is no NIfTI volume ({first_line(error)})") from None
    # A header may state a fourth axis of one volume.
    while values.ndim > 3 and values.shape[-1] == 1:
        values = values[..., 0]
    if values.ndim != 3:
        raise InputError(f"{FLAG}: {path} is no single volume (axes: {values.shape})")
    return values


def _inflated(content: bytes) -> bytes:
    """The bytes of a gzipped file.

    Raises:
        ValueError: They are many times as many.
    """
    limit = min(MAX_ARRAY_BYTES, max(MAX_RATIO * len(content), _SMALL))
    with gzip.GzipFile(fileobj=io.BytesIO(content)) as file:
        inflated = file.read(limit + 1)
    if len(inflated) > limit:
        raise ValueError(f"it inflates to more than {limit / 2**20:.0f} MiB")
    return inflated
