"""Which images each client of a federation holds, and which it uses in which local step."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import numpy as np
from torch.utils.data import Sampler

from core.data.loaders import Key
from core.errors import InputError
from core.processes.distributed import derived_seed, shard_sizes, shard_slice
from training.settings import Federation

SPLIT, ORDER = 10, 11  # domains of derived seeds
# Draws of a split in which every client holds an image.
ATTEMPTS = 100


def split_images(
    n: int, federation: Federation, labels: Sequence[int], seed: int
) -> list[np.ndarray]:
    """The images of every client.

    Args:
        n: Number of training images.
        federation: The clients, and how the images are spread over them.
        labels: The class of every image; read by a Dirichlet split only.
        seed: Of the split.

    Returns:
        Indices of images, one array per client.

    Raises:
        InputError: Fewer images than clients.

    Source: Dirichlet splits: Hsu et al., "Measuring the Effects of Non-Identical Data
        Distribution for Federated Visual Classification", https://arxiv.org/abs/1909.06335.
    """
    if n < federation.clients:
        raise InputError(f"--clients {federation.clients}: there are {n} training images")
    generator = np.random.default_rng(derived_seed(seed, SPLIT))
    alpha = federation.alpha
    if alpha is None:
        order, sizes = generator.permutation(n), shard_sizes(n, federation.clients)
        return [np.sort(order[shard_slice(sizes, k)]) for k in range(federation.clients)]
    for _ in range(ATTEMPTS):
        shards = _dirichlet(np.asarray(labels), federation.clients, alpha, generator)
        if all(map(len, shards)):
            return shards
    raise InputError(
        f"--split {federation.split}: leaves clients without images; use a larger parameter or "
        "fewer clients"
    )


def _dirichlet(
    labels: np.ndarray, clients: int, alpha: float, generator: np.random.Generator
) -> list[np.ndarray]:
    """Every class is cut by shares over the clients that are Dirichlet-distributed."""
    held: list[list[np.ndarray]] = [[] for _ in range(clients)]
    for label in np.unique(labels):
        images = generator.permutation(np.flatnonzero(labels == label))
        shares = generator.dirichlet(np.full(clients, alpha))
        ends = (np.cumsum(shares)[:-1] * len(images)).round().astype(int)
        for mine, part in zip(held, np.split(images, ends), strict=True):
            mine.append(part)
    return [np.sort(np.concatenate(parts)) for parts in held]


class ClientBatches(Sampler[list[Key]]):
    """The batches of this process' clients: round by round, client by client, step by step.

    Within an epoch a client goes through its images in random order, and again in another one
    where its steps take more images than it has.

    Args:
        shards: Images of every client.
        batch_size: Of all clients together in one local step.
        federation: Clients, local steps and rounds.
        mine: The clients that this process computes.
        seed: Seed of the run.
        poisson: Take every image with the same probability instead, as accountants of
            DP-SGD assume.
    """

    def __init__(
        self,
        shards: Sequence[np.ndarray],
        batch_size: int,
        federation: Federation,
        mine: Sequence[int],
        seed: int,
        poisson: bool = False,
    ) -> None:
        self.shards, self.mine, self.seed, self.poisson = shards, mine, seed, poisson
        self.local_steps = federation.local_steps
        n = sum(map(len, shards))
        self.rounds = federation.rounds_per_epoch or math.ceil(
            n / (min(batch_size, n) * self.local_steps)
        )
        wanted = shard_sizes(batch_size, federation.clients)
        self.sizes = [min(size, len(held)) for size, held in zip(wanted, shards, strict=True)]
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Plan an epoch, counted from 0."""
        self.epoch = epoch

    def weight(self, client: int) -> float:
        """The client's share of all images."""
        return len(self.shards[client]) / sum(map(len, self.shards))

    @property
    def rate(self) -> float:
        """The largest probability of an image to be in a batch of its client."""
        return max(b / len(held) for b, held in zip(self.sizes, self.shards, strict=True))

    @property
    def images(self) -> int:
        """How many images the clients go through in an epoch."""
        return self.rounds * self.local_steps * sum(self.sizes)

    def batch(self, client: int, step: int) -> np.ndarray:
        """The images of a client's step, counted from 0 through the epoch."""
        held, size = self.shards[client], self.sizes[client]
        if self.poisson:
            drawn = self._generator(client, step).random(len(held))
            return held[drawn < size / len(held)]
        batches = math.ceil(len(held) / size)
        order = self._generator(client, step // batches).permutation(held)
        return order[shard_slice(shard_sizes(len(held), batches), step % batches)]

    def _generator(self, client: int, draw: int) -> np.random.Generator:
        return np.random.default_rng(derived_seed(self.seed, ORDER, self.epoch, client, draw))

    def __len__(self) -> int:
        return self.rounds * len(self.mine) * self.local_steps

    def __iter__(self) -> Iterator[list[Key]]:
        for number in range(self.rounds):
            for client in self.mine:
                for step in range(number * self.local_steps, (number + 1) * self.local_steps):
                    yield [(self.epoch, int(index)) for index in self.batch(client, step)]
