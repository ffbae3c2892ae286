"""Where the images and sentences of a trial come from: folders of the user, or what is embedded.

A row asks for CIFAR-10 or ImageNet. Who has them gives their folders; without them embedded
photographs stand in, and the record says so. Trial number n always gets the same samples.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import torch

from core.data.data_sets import DataSets, load_data, take_samples
from core.errors import InputError

CIFAR10, IMAGENET, TEXT, TABLE = "cifar10", "imagenet", "text", "table"
KINDS = (CIFAR10, IMAGENET)
# What stands in for a folder of images.
EMBEDDED = {CIFAR10: "photo-patches", IMAGENET: "photo-patches-64"}
# Tokens beyond which few sentences are as long, and pieces of running text are taken.
RUNNING = 64
# Of the order in which images are taken.
ORDER_SEED = 0


@dataclass(frozen=True)
class Images:
    """A batch.

    Attributes:
        images: N x 3 x S x S in [0, 1].
        labels: N class indices.
        n_classes: Of the data set.
    """

    images: torch.Tensor
    labels: torch.Tensor
    n_classes: int


@dataclass(frozen=True)
class Samples:
    """Images and sentences by kind.

    Attributes:
        folders: A folder of class folders by kind, or a built-in name.
    """

    folders: Mapping[str, str] = field(default_factory=dict)

    def source(self, kind: str) -> str:
        """What the record calls it: the kind itself, or what stands in for images of it."""
        return EMBEDDED[kind] if kind in KINDS and kind not in self.folders else kind

    def images(self, kind: str, number: int, n: int, side: int) -> Images:
        """The images of a trial: of every class in turn, in a fixed random order of each.

        Args:
            kind: One of `KINDS`.
            number: Of the trial.
            n: Of images; no trial has an image twice.
            side: Of the images in pixels.

        Raises:
            InputError: There are fewer.
        """
        data, taken = self._loaded(kind, side), self._taken(kind, number, n, side)
        images, labels = take_samples(data.train_plain, taken.tolist(), data.spec)
        return Images(images, labels, data.spec.n_classes)

    def _taken(self, kind: str, number: int, n: int, side: int) -> np.ndarray:
        """Indices of a trial's images."""
        order = self._order(kind, side)
        if len(order) < n:
            raise InputError(f"--data {kind}: has {len(order)} images and a row needs {n}")
        taken: np.ndarray = order[(np.arange(n) + number * n) % len(order)]
        return taken

    def public(self, kind: str, number: int, batch: int, side: int, most: int) -> Images:
        """Images that are not a trial's: what a malicious server has of its own.

        Args:
            kind: One of `KINDS`.
            number: Of the trial.
            batch: Images of the trial.
            side: Of the images in pixels.
            most: So many at most.
        """
        data = self._loaded(kind, side)
        others = np.setdiff1d(
            np.arange(len(data.train_plain)), self._taken(kind, number, batch, side)
        )
        drawn = np.random.default_rng(ORDER_SEED).permutation(others)[:most]
        images, labels = take_samples(data.train_plain, drawn.tolist(), data.spec)
        return Images(images, labels, data.spec.n_classes)

    def sentences(self, number: int, n: int, length: int) -> torch.Tensor:
        """Sentences of a trial as token ids: n x length."""
        ids = self._text[length]
        taken = (torch.arange(n) + number * n) % len(ids)
        return ids[taken]

    def public_sentences(self, number: int, n: int, length: int, most: int) -> torch.Tensor:
        """Sentences that are not a trial's, as a malicious server has them; so many at most."""
        ids = self._text[length]
        return ids[(torch.arange(min(most, len(ids) - n)) + (number + 1) * n) % len(ids)]

    def _loaded(self, kind: str, side: int) -> DataSets:
        if (kind, side) not in self._cache:
            source = self.folders.get(kind, EMBEDDED[kind])
            self._cache[kind, side] = load_data(source, image_size=side, training=False)
        return self._cache[kind, side]

    def _order(self, kind: str, side: int) -> np.ndarray:
        """Indices of the training images, one of each class after another."""
        labels = np.asarray(self._loaded(kind, side).train_plain.labels)
        drawn = np.random.default_rng(ORDER_SEED).permutation(len(labels))
        rank = np.zeros(len(labels), dtype=int)
        for label in np.unique(labels):
            members = drawn[labels[drawn] == label]
            rank[members] = np.arange(len(members))
        return np.lexsort((labels, rank))

    @cached_property
    def _cache(self) -> dict[tuple[str, int], DataSets]:
        return {}

    @cached_property
    def _text(self) -> _Sentences:
        return _Sentences()


class _Sentences(dict[int, torch.Tensor]):
    """Embedded sentences by their length, in a fixed random order."""

    def __missing__(self, length: int) -> torch.Tensor:
        ids = _running(length) if length > RUNNING else _whole(length)
        drawn = np.random.default_rng(ORDER_SEED).permutation(len(ids))
        self[length] = ids[torch.from_numpy(drawn)]
        return self[length]


def _whole(length: int) -> torch.Tensor:
    """Sentences of at least so many tokens, cut: N x length."""
    from core.data.text import text_data

    given = text_data(length=length).train
    assert isinstance(given, tuple)
    return given[0]


def _running(length: int) -> torch.Tensor:
    """Pieces of so many tokens of the text, whatever sentences end in them: N x length."""
    from core.data.text import token_stream

    ids = token_stream()
    return ids[: len(ids) // length * length].view(-1, length)
