"""Where labelled images come from: folders, lists of files, torchvision, wheels.

A source knows every label without decoding an image. What is done to the images is
decided in `core.data.data_sets`.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from PIL import Image

from core.array_files import read_idx
from core.data.image_files import IMAGE_SUFFIXES, read_image
from core.data.list_files import DataList, open_datalist
from core.errors import InputError
from core.processes.distributed import derived_seed

FLAG = "--data"
VALIDATION_FOLDERS = ("val", "valid", "validation", "test")
EMBEDDED = ("photo-patches", "photo-patches-64")


class Source(Protocol):
    """Labelled images before any transform."""

    labels: Sequence[int]
    in_memory: bool

    def image(self, index: int) -> Any:
        """A PIL image or a uint8 tensor (3 x H x W)."""


@dataclass
class ArraySource:
    """Images held in memory.

    Attributes:
        images: N x 3 x H x W, uint8.
        labels: N class indices.
    """

    images: torch.Tensor
    labels: Sequence[int]
    in_memory: bool = True

    def image(self, index: int) -> torch.Tensor:
        """The uint8 image at `index`."""
        return self.images[index]


@dataclass
class FileSource:
    """Images in files.

    Attributes:
        paths: One file per image.
        labels: One class index per image.
    """

    paths: Sequence[Path]
    labels: Sequence[int]
    in_memory: bool = False

    def image(self, index: int) -> Image.Image:
        """The decoded RGB image at `index`."""
        return read_image(self.paths[index], FLAG)


@dataclass(frozen=True)
class Sources:
    """Both parts of a data set before transforms.

    Attributes:
        name: Name of the data set.
        train: The images to train on.
        val: The images to validate on.
        class_names: Names of the classes, in the order of their indices.
    """

    name: str
    train: Source
    val: Source
    class_names: tuple[str, ...]


def load_sources(
    folder: Path | None,
    name: str | None,
    built_in: Sequence[str],
    root: str | Path | None,
    split_seed: int,
    validation_share: float,
    training: bool = True,
    class_names: tuple[str, ...] = (),
) -> Sources:
    """Find out what a name or a folder is, and open it.

    Args:
        folder: A folder or `.json` list; None where there is only a name.
        name: Name of the data set, if it has one.
        built_in: Names to suggest where the folder does not exist.
        root: Folder that the paths of a list are relative to.
        split_seed: Seed of a held-out split.
        validation_share: Share of such a split, per class.
        training: Whether a classifier is trained and validated on it. If not, a folder of
            class folders may have one class, and a class one image.
        class_names: Of a model that the data are for: a folder with some of these classes
            has their numbers.

    Raises:
        InputError: It is nothing that can be used.
    """
    split = _Split(split_seed, validation_share, training)
    if name in EMBEDDED:
        return _embedded(str(name))
    if folder is not None and folder.suffix == ".json":
        return _json_list(folder, root, name, split)
    if folder is not None and not folder.exists():
        known = ", ".join(built_in)
        raise InputError(f"--data: there is no folder {folder} (built-in names: {known})")
    if name in _TORCHVISION and not (folder is not None and _class_folders(folder)):
        return _torchvision(str(name), folder)
    if folder is None:
        raise InputError(f"--data {name}: give the folder that holds it with --data-root")
    return _folder(folder, name or folder.resolve().name, split, class_names)


def _embedded(name: str) -> Sources:
    from core.data.embedded import PHOTOGRAPHS, photo_patches

    made = photo_patches(name)
    images, labels = torch.from_numpy(made.images), torch.from_numpy(made.labels)
    val = torch.from_numpy(made.validation)
    return Sources(
        name,
        ArraySource(images[~val], labels[~val].tolist()),
        ArraySource(images[val], labels[val].tolist()),
        tuple(PHOTOGRAPHS),
    )


# --- folders ------------------------------------------------------------------


def _class_folders(folder: Path) -> list[Path]:
    """The class folders of a tree, or of its `train/`; empty where it is none."""
    inner = folder / "train" if (folder / "train").is_dir() else folder
    return [entry for entry in _subfolders(inner) if _image_files(entry)]


def _subfolders(folder: Path) -> list[Path]:
    if not folder.is_dir():
        raise InputError(f"--data: {folder} is not a folder")
    return sorted(e for e in folder.iterdir() if e.is_dir() and not e.name.startswith("."))


def _image_files(folder: Path) -> list[Path]:
    return sorted(
        Path(parent) / file
        for parent, _, files in os.walk(folder)
        for file in files
        if file.lower().endswith(IMAGE_SUFFIXES) and not file.startswith(".")
    )


@dataclass(frozen=True)
class _Split:
    """How images to validate on are held out.

    Attributes:
        seed: Of the draw.
        share: Of every class.
        needed: Whether there must be some of every class.
    """

    seed: int
    share: float
    needed: bool = True


def _folder(folder: Path, name: str, split: _Split, known: tuple[str, ...]) -> Sources:
    inside = (folder / "train").is_dir()
    train_folder = folder / "train" if inside else folder
    train, class_names = _class_tree(train_folder, known)
    if split.needed and len(class_names) < 2:
        raise InputError(
            f"--data: {train_folder} has {len(class_names)} class folders with images; "
            "a classifier needs at least two"
        )
    val_folder = _validation_folder(train_folder) if train_folder.name == "train" else None
    if val_folder is None:
        train, val = _held_out(train, split)
    else:
        val = _class_tree_like(val_folder, class_names)
    return Sources(name, train, val, class_names)


def _validation_folder(train_folder: Path) -> Path | None:
    candidates = (train_folder.parent / name for name in VALIDATION_FOLDERS)
    return next((folder for folder in candidates if folder.is_dir()), None)


def _class_tree(folder: Path, known: tuple[str, ...]) -> tuple[FileSource, tuple[str, ...]]:
    """The images of class folders; the numbers of `known` classes where all are among these."""
    files = {entry.name: _image_files(entry) for entry in _subfolders(folder)}
    files = {name: paths for name, paths in files.items() if paths}
    if not files:
        raise InputError(f"--data: {folder} holds no class folders with images")
    names = known if set(files) <= set(known) else tuple(files)
    return _file_source(files, names), names


def _class_tree_like(folder: Path, class_names: tuple[str, ...]) -> FileSource:
    files = {entry.name: _image_files(entry) for entry in _subfolders(folder)}
    unknown = sorted(set(files) - set(class_names))
    if unknown:
        raise InputError(f"--data: {folder} has a class {unknown[0]} that the training data lacks")
    source = _file_source(files, class_names)
    if not source.paths:
        raise InputError(f"--data: {folder} holds no images")
    return source


def _file_source(files: dict[str, list[Path]], class_names: tuple[str, ...]) -> FileSource:
    pairs = [
        (path, label) for label, name in enumerate(class_names) for path in files.get(name, [])
    ]
    return FileSource([path for path, _ in pairs], [label for _, label in pairs])


def _held_out(source: FileSource, split: _Split) -> tuple[FileSource, FileSource]:
    """Hold a share of every class out, at least one image of it."""
    if not 0 < split.share < 1:
        raise InputError(f"--validation-share {split.share}: must lie between 0 and 1")
    labels = np.asarray(source.labels)
    generator = np.random.default_rng(derived_seed(split.seed, 1))
    held_out = np.zeros(len(labels), dtype=bool)
    for label in np.unique(labels):
        members = np.flatnonzero(labels == label)
        if len(members) < 2:
            if not split.needed:
                continue
            raise InputError(
                f"--data: the class of {source.paths[members[0]]} has a single image; "
                "give at least two per class, or a val/ folder"
            )
        count = min(len(members) - 1, max(1, round(split.share * len(members))))
        held_out[generator.permutation(members)[:count]] = True
    return _subset(source, ~held_out), _subset(source, held_out)


def _subset(source: FileSource, keep: np.ndarray) -> FileSource:
    chosen = np.flatnonzero(keep).tolist()
    return FileSource([source.paths[i] for i in chosen], [source.labels[i] for i in chosen])


# --- decathlon-style lists ----------------------------------------------------


def _json_list(path: Path, root: str | Path | None, name: str | None, split: _Split) -> Sources:
    """A list of files, see `core.data.list_files`."""
    content = open_datalist(path, FLAG)
    folder = path.parent if root is None else Path(root)
    train = _listed(content, "training", folder)
    listed = next((part for part in ("validation", "testing") if content.has(part)), None)
    if listed is None:
        train, val = _held_out(train, split)
    else:
        val = _listed(content, listed, folder)
    names = content.class_names(max([*train.labels, *val.labels]) + 1)
    if split.needed and len(names) < 2:
        raise InputError(f"--data: {path} names one class; a classifier needs at least two")
    return Sources(name or path.stem, train, val, names)


def _listed(content: DataList, section: str, folder: Path) -> FileSource:
    samples = content.samples(section)
    if not samples:
        raise InputError(f'--data: {content.path} has an empty "{section}" list')
    paths = [folder / sample.image for sample in samples]
    missing = next((path for path in paths if not path.exists()), None)
    if missing is not None:
        raise InputError(
            f"--data: {content.path} names {missing}, which does not exist (see --data-root)"
        )
    return FileSource(paths, [sample.label for sample in samples])


# --- torchvision --------------------------------------------------------------


def _cifar(name: str, root: Path, train: bool) -> tuple[Source, tuple[str, ...]]:
    import torchvision

    kind = torchvision.datasets.CIFAR10 if name == "cifar10" else torchvision.datasets.CIFAR100
    data = kind(str(root), train=train, download=False)
    images = torch.from_numpy(data.data).permute(0, 3, 1, 2).contiguous()
    return ArraySource(images, list(data.targets)), tuple(data.classes)


def _svhn(name: str, root: Path, train: bool) -> tuple[Source, tuple[str, ...]]:
    import torchvision

    data = torchvision.datasets.SVHN(str(root), split="train" if train else "test", download=False)
    source = ArraySource(torch.from_numpy(data.data), data.labels.tolist())
    return source, tuple(str(digit) for digit in range(10))


def _fashionmnist(name: str, root: Path, train: bool) -> tuple[Source, tuple[str, ...]]:
    import torchvision

    # Not through torchvision, which believes headers, and checks no digest of these files.
    names = tuple(torchvision.datasets.FashionMNIST.classes)
    folder, part = root / "FashionMNIST" / "raw", "train" if train else "t10k"
    images = torch.from_numpy(read_idx(folder / f"{part}-images-idx3-ubyte"))
    labels = torch.from_numpy(read_idx(folder / f"{part}-labels-idx1-ubyte"))
    if images.dim() != 3 or labels.shape != images.shape[:1]:
        raise InputError(f"{folder} holds no {part} images with as many labels")
    if not len(labels) or int(labels.max()) >= len(names):
        raise InputError(f"{folder} holds labels that are none of the {len(names)} classes")
    return ArraySource(images[:, None].expand(-1, 3, -1, -1), labels.tolist()), names


def _celeba(name: str, root: Path, train: bool) -> tuple[Source, tuple[str, ...]]:
    """CelebA with the attribute `Male` as class: its identities do not recur in validation."""
    import torchvision

    split = "train" if train else "valid"
    data = torchvision.datasets.CelebA(str(root), split=split, target_type="attr", download=False)
    labels = data.attr[:, data.attr_names.index("Male")].tolist()
    folder = root / data.base_folder / "img_align_celeba"
    return FileSource([folder / name for name in data.filename], labels), ("female", "male")


_TORCHVISION: dict[str, Callable[[str, Path, bool], tuple[Source, tuple[str, ...]]]] = {
    "cifar10": _cifar,
    "cifar100": _cifar,
    "svhn": _svhn,
    "fashionmnist": _fashionmnist,
    "celeba": _celeba,
}


def _torchvision(name: str, root: Path | None) -> Sources:
    if root is None:
        raise InputError(f"--data {name}: give the folder that holds it with --data-root")
    try:
        train, class_names = _TORCHVISION[name](name, root, True)
        val, _ = _TORCHVISION[name](name, root, False)
    except (InputError, RuntimeError, OSError) as error:
        reason = str(error).splitlines()[0]
        raise InputError(
            f"--data {name}: {root} does not hold it in torchvision's format ({reason}); "
            "nothing is downloaded"
        ) from None
    return Sources(name, train, val, class_names)
