"""Data sets: images with labels, transforms and the description of every checkpoint.

`load_data` turns a folder, a list of files or a built-in name into `DataSets`. A
random augmentation is a function of (seed, epoch, image) alone: neither the number
of processes nor that of workers nor an interruption changes what a model sees.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch.utils.data import Dataset

from core.data.sources import Source, Sources, load_sources
from core.data.specs import IMAGENET_MEAN, IMAGENET_STD, DataSpec
from core.data.transforms import (
    SMALL_SIDE,
    Transform,
    evaluation_transform,
    training_transform,
)
from core.errors import InputError
from core.processes.distributed import derived_seed

DEFAULT_VALIDATION_SHARE = 0.2


class ClientSamples(Protocol):
    """Inputs with targets, as training and extraction read them.

    Attributes:
        labels: The class of every sample, where targets are classes.
        in_memory: Whether a worker process would save no time.
    """

    @property
    def labels(self) -> Sequence[int]:
        """See above."""

    @property
    def in_memory(self) -> bool:
        """See above."""

    def target_like(self) -> torch.Tensor:
        """A target, for the shape and the type of those of an empty batch."""

    def __len__(self) -> int:
        """How many there are."""

    def __getitem__(self, key: int | tuple[int, int]) -> tuple[torch.Tensor, int | torch.Tensor]:
        """The normalised input of an index or (epoch, index), and its target."""


class LabelledImages(Dataset[tuple[torch.Tensor, int]]):
    """Normalised images with labels.

    Args:
        source: The images before any transform.
        transform: Image to normalised tensor C x H x W.
        seed: Seed of a random transform; None where the transform is fixed.
    """

    def __init__(self, source: Source, transform: Transform, seed: int | None = None) -> None:
        self.source = source
        self.transform = transform
        self.seed = seed

    @property
    def labels(self) -> Sequence[int]:
        """The label of every image, without decoding one."""
        return self.source.labels

    @property
    def in_memory(self) -> bool:
        """Whether no image has to be decoded."""
        return self.source.in_memory

    @staticmethod
    def target_like() -> torch.Tensor:
        """A label, for the type of an empty batch's."""
        return torch.empty((), dtype=torch.long)

    def __len__(self) -> int:
        return len(self.source.labels)

    def __getitem__(self, key: int | tuple[int, int]) -> tuple[torch.Tensor, int]:
        """The image of `key`: an index, or (epoch, index) where the transform is random."""
        epoch, index = key if isinstance(key, tuple) else (0, key)
        image, label = self.source.image(index), int(self.source.labels[index])
        if self.seed is None:
            return self.transform(image), label
        with torch.random.fork_rng(devices=[]):
            # Not torch.manual_seed: it seeds every kind of device, and for those that are not
            # there it keeps a trace of the stack each time, which takes longer than the image.
            torch.default_generator.manual_seed(derived_seed(self.seed, epoch, index))
            return self.transform(image), label


@dataclass(frozen=True)
class DataSets:
    """Everything that is loaded from one name or folder.

    Attributes:
        spec: The description that travels with checkpoints.
        train: Training images, randomly augmented.
        train_plain: The same images in the same order under the evaluation
            transform: what stage 2 takes a client's batch from.
        val: Validation images under the evaluation transform.
    """

    spec: DataSpec
    train: ClientSamples
    train_plain: ClientSamples
    val: ClientSamples


def take_samples(
    dataset: ClientSamples, indices: Sequence[int], spec: DataSpec
) -> tuple[torch.Tensor, torch.Tensor]:
    """Some images of a data set as one batch.

    Args:
        dataset: Usually `DataSets.train_plain`.
        indices: Which images, in order.
        spec: Undoes the normalisation.

    Returns:
        Images (N x C x H x W, in [0, 1]) and labels (N); of the user's own samples inputs and
        targets of any shape.

    Raises:
        InputError: An index lies outside the data set.
    """
    wrong = [i for i in indices if not 0 <= i < len(dataset)]
    if wrong:
        raise InputError(f"image {wrong[0]} does not exist: the data set has {len(dataset)} images")
    items = [dataset[i] for i in indices]
    inputs = torch.stack([image for image, _ in items])
    labels = torch.stack([torch.as_tensor(label) for _, label in items])
    return spec.clamp(spec.denormalize(inputs)), labels


@dataclass(frozen=True)
class _BuiltIn:
    """What is fixed for a data set with a name."""

    image_size: int
    mean: tuple[float, ...] = IMAGENET_MEAN
    std: tuple[float, ...] = IMAGENET_STD
    flip: bool = True


BUILT_IN = {
    "photo-patches": _BuiltIn(32, (0.522, 0.419, 0.360), (0.264, 0.243, 0.254)),
    "photo-patches-64": _BuiltIn(64, (0.522, 0.419, 0.360), (0.264, 0.243, 0.254)),
    "cifar10": _BuiltIn(32, (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
    "cifar100": _BuiltIn(32, (0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)),
    # A mirrored digit is another sign.
    "svhn": _BuiltIn(32, (0.4377, 0.4438, 0.4728), (0.1980, 0.2010, 0.1970), flip=False),
    "fashionmnist": _BuiltIn(28, (0.2860,) * 3, (0.3530,) * 3),
    "celeba": _BuiltIn(128, (0.5063, 0.4258, 0.3832), (0.3107, 0.2904, 0.2897)),
    "imagenet": _BuiltIn(224),
}


def load_data(
    data: str | Path,
    *,
    image_size: int | None = None,
    seed: int = 0,
    root: str | Path | None = None,
    name: str | None = None,
    split_seed: int = 0,
    validation_share: float = DEFAULT_VALIDATION_SHARE,
    training: bool = True,
    class_names: tuple[str, ...] = (),
) -> DataSets:
    """Load a data set for training, validation and extraction of gradients.

    Args:
        data: A built-in name (`BUILT_IN`), a folder with `train/` and `val/`, a
            folder with one folder per class, or a decathlon-style `.json` list.
        image_size: Side of the images in pixels; None for the data set's own.
        seed: Seed of the random augmentation.
        root: Where the files of a torchvision data set lie, or where the paths of
            a `.json` list start.
        name: Name of the data set where `data` is a folder (`--data-name`). One of
            torchvision's is read from `data` in torchvision's own format, unless
            the folder holds class folders.
        split_seed: Seed of the held-out split of a folder without validation
            images. Stages that share a model must share it.
        validation_share: Share of such a split, per class.
        training: Whether a classifier is trained on it; if not, one class or one image of a
            class is enough.
        class_names: Of the model that the data are for, see `load_sources`.

    Raises:
        InputError: The folder is missing, empty, has a single class, ...
    """
    if str(data) in BUILT_IN:
        name, folder = str(data), None if root is None else Path(root)
    else:
        folder = Path(data).expanduser()
    _check_size(image_size)
    sources = load_sources(
        folder,
        name,
        list(BUILT_IN),
        root,
        split_seed,
        validation_share,
        training,
        class_names,
    )
    return _with_transforms(sources, image_size, seed)


def _check_size(image_size: int | None) -> None:
    if image_size is not None and not 8 <= image_size <= 1024:
        raise InputError(f"--image-size {image_size}: must lie between 8 and 1024 pixels")


def _with_transforms(sources: Sources, image_size: int | None, seed: int) -> DataSets:
    built_in = BUILT_IN.get(sources.name)
    native = _native_side(sources.train)
    usual = built_in.image_size if built_in else 224
    size = image_size or (native if native < SMALL_SIDE else usual)
    spec = DataSpec(
        name=sources.name,
        shape=(3, size, size),
        mean=built_in.mean if built_in else IMAGENET_MEAN,
        std=built_in.std if built_in else IMAGENET_STD,
        n_classes=len(sources.class_names),
        class_names=sources.class_names,
    )
    evaluation = evaluation_transform(spec, native)
    augmentation = training_transform(spec, native, flip=built_in.flip if built_in else True)
    return DataSets(
        spec=spec,
        train=LabelledImages(sources.train, augmentation, seed),
        train_plain=LabelledImages(sources.train, evaluation),
        val=LabelledImages(sources.val, evaluation),
    )


def _native_side(source: Source, looked_at: int = 16) -> int:
    """The median short side of a few images spread over the data set."""
    n = len(source.labels)
    sides = [min(_size(source.image(i))) for i in range(0, n, max(1, n // looked_at))]
    return int(np.median(sides))


def _size(image: Any) -> tuple[int, int]:
    if isinstance(image, torch.Tensor):
        return int(image.shape[-1]), int(image.shape[-2])
    return image.size
