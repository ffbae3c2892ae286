"""What a server sees under secure aggregation: the mean of several clients' updates.

Secure aggregation shows the server the sum of the updates of a round and no single one. All
clients hold as many images here, so that the sum is the mean times their number; the mean is
what is written (FedAvg's weights are then equal). Of FedSGD it is the gradient of all their
images as one batch, if no layer mixes the images of a batch.

Source: Bonawitz et al., "Practical Secure Aggregation for Privacy-Preserving Machine Learning",
    CCS 2017, https://eprint.iacr.org/2017/281.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from core.data.data_sets import derived_seed
from core.data.specs import DataSpec
from core.errors import InputError
from core.models.architecture import Architecture
from core.processes.distributed import Process
from core.target import Target
from gradients.client import ClientSettings, share_update
from gradients.local_update import Parameters

# A stream of random numbers of its own for every client.
_CLIENT = 3
# Between the dropout seeds of two clients: as between the processes of one client.
_MASKS = 7_919
# What the server sends to a client, by the client's number.
Models = Callable[[int], nn.Module]


@dataclass(frozen=True)
class Aggregation:
    """Whose updates are summed.

    Attributes:
        clients: All clients there are, K.
        participants: Numbers of those that take part in the round, from 0; empty: all.
        reveal_from: Elements that fewer clients contribute to are not revealed: the server sees
            zero there. 1: everything is revealed, as by plain secure aggregation.

    Raises:
        InputError: A number is out of range; names the flag.

    Source: `reveal_from` is the threshold t of Suimon, Koizumi, Takemasa, Hasegawa, "Per-element
        Secure Aggregation against Data Reconstruction Attacks in Federated Learning",
        https://arxiv.org/abs/2508.04285; only what it reveals is simulated, no cryptography.
    """

    clients: int = 1
    participants: tuple[int, ...] = ()
    reveal_from: int = 1

    def __post_init__(self) -> None:
        if self.clients < 1:
            raise InputError("--aggregate must be at least 1")
        numbers = self.participants
        if len(set(numbers)) != len(numbers) or any(not 0 <= n < self.clients for n in numbers):
            raise InputError(
                f"--participants {','.join(map(str, numbers))}: give each client once, of 0 to "
                f"{self.clients - 1}"
            )
        if not 1 <= self.reveal_from <= len(self.present):
            raise InputError(
                f"--reveal-from {self.reveal_from}: {len(self.present)} clients take part"
            )

    @property
    def present(self) -> tuple[int, ...]:
        """The clients that take part."""
        return self.participants or tuple(range(self.clients))

    @property
    def sums(self) -> bool:
        """Whether there is anything to sum."""
        return self.clients > 1

    def places(self, images_per_client: int) -> list[int]:
        """Places of the participants' images among those of all clients."""
        size = images_per_client
        return [place for n in self.present for place in range(n * size, (n + 1) * size)]


def share_sum(
    model: nn.Module | Models,
    architecture: Architecture,
    data_spec: DataSpec,
    images: torch.Tensor,
    labels: torch.Tensor,
    settings: ClientSettings,
    aggregation: Aggregation,
    process: Process | None = None,
    measured: dict[str, Any] | None = None,
) -> Target:
    """Compute the mean of what several clients share.

    Every client trains by itself from the same parameters and applies its defenses to its own
    update, with random numbers of its own. What a client does not share counts as zero. Their
    BatchNorm statistics are not in the sum.

    Args:
        model: theta_0; or what the server sends to each client, by its number.
        architecture: How an attacker rebuilds it.
        data_spec: Normalisation of the images.
        images: The participants' images in their order, as many of each (n B x C x H x W in
            [0, 1], or what else the model takes).
        labels: n B x ..., as the loss takes them.
        settings: What every client computes, and what it does to its update.
        aggregation: Who takes part.
        process: Device of the computation.
        measured: Takes `lone_elements`, see `gradients.record.Measured`.

    Returns:
        What the server sees, on the CPU.

    Raises:
        InputError: See `share_update`; or the images are not as many of each client.
    """
    n = len(aggregation.present)
    if len(images) % n:
        raise InputError(f"{len(images)} images are not as many for each of {n} clients")
    check_alone(settings, 1 if process is None else process.world_size)
    models = model if not isinstance(model, nn.Module) else _copies_of(model)
    size = len(images) // n
    batches = zip(aggregation.present, images.split(size), labels.split(size), strict=True)
    parts = (
        _share(models(c), architecture, data_spec, x, y, client_settings(settings, c), process)
        for c, x, y in batches
    )
    first, mean, lone = _mean(parts, aggregation)
    if measured is not None and n > 1:
        measured["lone_elements"] = lone
    return _seen_by_server(first, mean, aggregation)


def client_settings(settings: ClientSettings, number: int) -> ClientSettings:
    """What the client of that number computes: as all do, with random numbers of its own."""
    return dataclasses.replace(
        settings,
        seed=derived_seed(settings.seed, _CLIENT, number),
        dropout_seed=settings.dropout_seed + _MASKS * number,
    )


def _copies_of(model: nn.Module) -> Models:
    return lambda number: copy.deepcopy(model)


def check_alone(settings: ClientSettings, processes: int) -> None:
    """Refuse clients that are more than one process.

    Raises:
        InputError: Names the flag.
    """
    if processes > 1:
        raise InputError(f"--aggregate: every client is one process; {processes} are started")
    if len(settings.shards) > 1:
        raise InputError("--shards and --aggregate: every client is one process")


def _share(
    model: nn.Module,
    architecture: Architecture,
    data_spec: DataSpec,
    images: torch.Tensor,
    labels: torch.Tensor,
    settings: ClientSettings,
    process: Process | None,
) -> Target:
    target = share_update(model, architecture, data_spec, images, labels, settings, process)
    assert target is not None
    return target


def _mean(
    parts: Iterator[Target], aggregation: Aggregation
) -> tuple[Target, Parameters, float | None]:
    """The first client's target, the mean of all updates, and what one client alone gave to it."""
    first: Target | None = None
    sums: Parameters = {}
    counts: dict[str, torch.Tensor] = {}
    for part in parts:
        first = first or part
        for name, value in part.gradient.items():
            given = (value != 0).short()
            sums[name] = sums[name] + value.double() if name in sums else value.double()
            counts[name] = counts[name] + given if name in counts else given
    assert first is not None
    n = len(aggregation.present)
    names = [name for name in first.state_dict if name in sums]
    precision = next(iter(first.gradient.values())).dtype
    mean = {
        name: (sums[name] * (counts[name] >= aggregation.reveal_from) / n).to(precision)
        for name in names
    }
    return first, mean, lone_elements([counts[name] for name in names])


def lone_elements(counts: Sequence[torch.Tensor]) -> float | None:
    """The share of a sum's elements whose value one client alone contributed.

    Such a value is that client's own: the sum hides whose it is and nothing else of it. Sparse
    updates (pruning, a model that a server made for it) have many.

    Args:
        counts: Clients whose update is not zero, by element.

    Returns:
        Of the elements that any client contributed to; None where there are none.

    Source: Suimon et al., https://arxiv.org/abs/2508.04285, section I.
    """
    given = sum(int((count > 0).sum()) for count in counts)
    lone = sum(int((count == 1).sum()) for count in counts)
    return lone / given if given else None


def _seen_by_server(first: Target, mean: Parameters, aggregation: Aggregation) -> Target:
    """The first client's target as that of the mean.

    Under train-mode BatchNorm (or dropout) each client is a group of its own; else the mean of
    their gradients is the gradient of one batch.
    """
    n, size = len(aggregation.present), first.batch_size
    if n == 1:
        return dataclasses.replace(first, gradient=mean)
    return dataclasses.replace(
        first,
        gradient=mean,
        batch_size=n * size,
        clients=aggregation.present,
        shards=(size,) * n if first.train_mode else (n * size,),
        synchronized=not first.train_mode,
        bn_statistics=None,
        running_after=None,
        dropout_seed=None,
    )
