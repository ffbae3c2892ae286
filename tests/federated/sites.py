"""Sites with real local training for the tests of the federated stage."""

from __future__ import annotations

import functools

import torch

from attack.matching.replica import Replica
from audit.update_matcher import average_of_steps
from audit.updates import LocalUpdate, target_from_update
from core.target import BatchStatistics
from federated.experiment.method_comparison import Case, Victims, train_locally
from federated.flare.images import chest_spec
from federated.phantoms.anatomy import chest_radiograph
from gradients.batch_statistics import observe_passes


@functools.cache
def victims(size: int = 24, n: int = 8, n_public: int = 60) -> Victims:
    """Phantoms of both classes in turn, and public ones."""
    import numpy as np

    pictures = [
        chest_radiograph(size, bool(k % 2), np.random.default_rng([7, k]))
        for k in range(n + n_public)
    ]
    grey = torch.from_numpy(np.stack(pictures)).float().div(255)
    images = grey[:, None].repeat(1, 3, 1, 1)
    labels = torch.arange(n) % 2
    return Victims(chest_spec(size), images[:n], labels, images[n:])


def update_of(
    n_images: int, batch_size: int, epochs: int = 1, *, size: int = 24, **training: object
) -> LocalUpdate:
    case = Case(n_images, batch_size, epochs)
    return train_locally(victims(size), case, **training)  # type: ignore[arg-type]


def simulate(
    update: LocalUpdate,
    inputs: torch.Tensor,
    labels: torch.Tensor,
    dtype: torch.dtype = torch.float32,
) -> tuple[list[torch.Tensor], BatchStatistics]:
    """What the site would send for these images: its update, and the average statistics."""
    replica = Replica(target_from_update(update), torch.device("cpu"), dtype)
    passes, close = observe_passes(replica.model, unbiased=True)
    found = replica.update(inputs, labels, create_graph=False)
    close()
    detached = [{n: (m.detach(), v.detach()) for n, (m, v) in one.items()} for one in passes]
    return found, average_of_steps(detached, update.bn_momentum)
