"""Which images every process sees at every step, and the loaders that bring them.

Batch sizes are totals over all processes. What one step of training sees depends on
the seed and the epoch only; how many processes share it does not matter.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, cast

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from core.data.data_sets import ClientSamples
from core.errors import InputError
from core.processes.distributed import Process, derived_seed, shard_sizes, shard_slice

SHUFFLE, POISSON = 0, 1  # domains of derived seeds
Key = tuple[int, int]


def shuffled_batches(n: int, batch_size: int, seed: int, epoch: int) -> list[np.ndarray]:
    """All images of one epoch in random order, in batches of nearly equal size.

    Where the batch size does not divide the number of images, all batches shrink by a
    few images: none is dropped, and no tiny last batch upsets BatchNorm.

    Args:
        n: Number of images.
        batch_size: Upper limit of a batch.
        seed: Seed of the run.
        epoch: Counted from 0.

    Returns:
        Indices of images, one array per step.
    """
    order = np.random.default_rng(derived_seed(seed, SHUFFLE, epoch)).permutation(n)
    sizes = shard_sizes(n, math.ceil(n / batch_size))
    return [order[shard_slice(sizes, step)] for step in range(len(sizes))]


def poisson_batches(n: int, batch_size: int, seed: int, epoch: int) -> list[np.ndarray]:
    """Batches that take every image independently with probability batch_size / n.

    This is the sampling that accountants of DP-SGD assume; batches vary in size and
    may be empty.

    Args:
        n: Number of images.
        batch_size: Expected number of samples in a batch.
        seed: Seed of the run.
        epoch: Counted from 0.
    """
    generator = np.random.default_rng(derived_seed(seed, POISSON, epoch))
    rate = min(1.0, batch_size / n)
    steps = math.ceil(n / batch_size)
    return [np.flatnonzero(generator.random(n) < rate) for _ in range(steps)]


class ShardedBatches(Sampler[list[Key]]):
    """This process's share of every batch of an epoch.

    Args:
        n: Number of images.
        batch_size: Over all processes; expected size where `poisson`.
        process: The process whose share is returned.
        seed: Seed of the run.
        poisson: Sample independently instead of shuffling.
    """

    def __init__(
        self, n: int, batch_size: int, process: Process, seed: int, poisson: bool = False
    ) -> None:
        self.n, self.batch_size, self.seed, self.poisson = n, min(batch_size, n), seed, poisson
        self.process = process
        self.set_epoch(0)

    def set_epoch(self, epoch: int) -> None:
        """Plan an epoch, counted from 0."""
        make = poisson_batches if self.poisson else shuffled_batches
        self.epoch = epoch
        self.batches = make(self.n, self.batch_size, self.seed, epoch)

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[list[Key]]:
        for batch in self.batches:
            sizes = shard_sizes(len(batch), self.process.world_size)
            mine = batch[shard_slice(sizes, self.process.rank)]
            yield [(self.epoch, int(index)) for index in mine]


class ValidationShard(Sampler[list[int]]):
    """This process's share of all images, each image on exactly one process."""

    def __init__(self, n: int, batch_size: int, process: Process) -> None:
        self.indices = list(range(n))[process.rank :: process.world_size]
        self.batch_size = max(1, batch_size // process.world_size)

    def __len__(self) -> int:
        return math.ceil(len(self.indices) / self.batch_size)

    def __iter__(self) -> Iterator[list[int]]:
        for start in range(0, len(self.indices), self.batch_size):
            yield self.indices[start : start + self.batch_size]


class Collate:
    """Stack inputs and targets; an empty shard becomes tensors of no rows.

    Args:
        shape: Of one input.
        like: A target, for the shape and the type of those of an empty shard; None: a class.
    """

    def __init__(self, shape: tuple[int, ...], like: torch.Tensor | None = None) -> None:
        self.shape = shape
        self.like = torch.empty((), dtype=torch.long) if like is None else like

    def __call__(
        self, items: list[tuple[torch.Tensor, int | torch.Tensor]]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Items to N x C x ... and N x ..."""
        if not items:
            return torch.empty(0, *self.shape), self.like.new_empty((0, *self.like.shape))
        return (
            torch.stack([given for given, _ in items]),
            torch.stack([torch.as_tensor(target) for _, target in items]),
        )


def make_loader(
    dataset: ClientSamples,
    batches: Sampler[list[Key]] | Sampler[list[int]],
    shape: tuple[int, ...],
    process: Process,
    workers: int,
) -> DataLoader[Any]:
    """A loader for one process.

    Args:
        dataset: The labelled images, or the user's own samples.
        batches: Yields lists of keys of `dataset`.
        shape: Of one image, for empty shards.
        process: Whose share it loads.
        workers: Loading processes over all processes; images in memory need none.
    """
    local = 0 if dataset.in_memory else math.ceil(workers / process.world_size)
    return DataLoader(
        cast("Dataset[Any]", dataset),
        batch_sampler=batches,
        num_workers=local,
        collate_fn=Collate(shape, dataset.target_like()),
        pin_memory=process.device.type == "cuda",
        persistent_workers=local > 0,
        # Its own generator: the loader would draw from the global one otherwise.
        generator=torch.Generator(),
    )


def check_batches(n: int, batch_size: int, parts: int, poisson: bool) -> None:
    """Refuse batches that leave a process without images.

    Args:
        n: Number of training images.
        batch_size: Over all processes.
        parts: Processes times accumulation steps.
        poisson: Empty shards are harmless under Poisson sampling.

    Raises:
        InputError: Names `--batch-size`.
    """
    if poisson:
        return
    smallest = n // math.ceil(n / min(batch_size, n))
    if smallest < parts:
        raise InputError(
            f"--batch-size {batch_size}: batches of {smallest} of the {n} training images "
            f"cannot be divided into {parts} parts (processes x accumulation steps)"
        )
