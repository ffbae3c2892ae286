"""What a site sends after its local training, and what is known about that training."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import torch

from attack.priors.shared_statistics import recovered_statistics
from core.data.specs import DataSpec
from core.errors import InputError
from core.losses import DEFAULT_LOSS, Loss
from core.models.architecture import Architecture
from core.processes.distributed import shard_sizes
from core.target import RUNNING_STATISTICS, LocalTraining, Target


@dataclass(frozen=True)
class LocalUpdate:
    """One site's weight difference of one round.

    Attributes:
        model: How the client's model is built.
        data: Shape and normalisation of the images.
        global_weights: State dictionary before local training, buffers included.
        weight_diff: Local minus global state by the same names; the buffers (running
            statistics) may be absent.
        batch_size: Images per local step; the last step of an epoch may have fewer.
        n_images: Images of the site.
        local_epochs: Passes over them.
        learning_rate: Of the local SGD.
        momentum: Of the local SGD (not Nesterov).
        weight_decay: Of the local SGD.
        proximal: mu of FedProx: the local loss has mu/2 |theta - theta_0|^2 added.
        bn_momentum: Momentum of the BatchNorm layers' running statistics.
        batch_order: The images in the order the site went through them, one permutation
            of 0..n-1 per epoch. None: the same order in every epoch. After one epoch
            it says nothing but the numbering of the reconstructions; after several the
            attacker is granted which images shared which steps (`order_granted`).
        optimiser: What the local steps are beyond the attributes above, which it does not
            change: Adam, Nesterov's momentum, clipping. None: SGD.
        loss: What the client minimises.
        colour: Whether channels differ from each other; else an image is one grey value per
            pixel, in whichever number of channels.
    """

    model: Architecture
    data: DataSpec
    global_weights: Mapping[str, torch.Tensor]
    weight_diff: Mapping[str, torch.Tensor]
    batch_size: int
    n_images: int
    local_epochs: int = 1
    learning_rate: float = 0.01
    momentum: float = 0.0
    weight_decay: float = 0.0
    proximal: float = 0.0
    bn_momentum: float = 0.1
    batch_order: tuple[tuple[int, ...], ...] | None = None
    optimiser: LocalTraining | None = None
    loss: Loss = DEFAULT_LOSS
    colour: bool = False

    def __post_init__(self) -> None:
        if min(self.batch_size, self.n_images, self.local_epochs) < 1:
            raise InputError("batch size, number of images and local epochs must be at least 1")
        if not self.learning_rate > 0 or not 0 < self.bn_momentum <= 1:
            raise InputError("the learning rate must be positive and bn_momentum in (0, 1]")
        if not 0 <= self.proximal < math.inf:
            raise InputError("proximal, FedProx's mu, must be a number not below 0")
        if self.batch_order is not None:
            whole = list(range(self.n_images))
            if len(self.batch_order) != self.local_epochs or any(
                sorted(epoch) != whole for epoch in self.batch_order
            ):
                raise InputError(
                    f"batch_order must hold {self.local_epochs} permutations of "
                    f"0..{self.n_images - 1}, one per local epoch"
                )

    @property
    def local(self) -> LocalTraining:
        """The local training in the terms of stage 2, its images numbered as the site's are."""
        stated = self.optimiser or LocalTraining()
        return dataclasses.replace(
            stated,
            epochs=self.local_epochs,
            batches=math.ceil(self.n_images / self.batch_size),
            lr=self.learning_rate,
            momentum=self.momentum or stated.momentum,
            weight_decay=self.weight_decay or stated.weight_decay,
            proximal=self.proximal,
            bn_momentum=self.bn_momentum,
            order=tuple(map(tuple, self.steps)),
        )

    @cached_property
    def steps(self) -> list[list[int]]:
        """The images of every local step."""
        order = self.batch_order or (tuple(range(self.n_images)),) * self.local_epochs
        size = self.batch_size
        return [
            list(epoch[first : first + size])
            for epoch in order
            for first in range(0, self.n_images, size)
        ]

    @property
    def order_granted(self) -> bool:
        """Whether the attacker is told more than a server sees: how epochs mix the images.

        One batch per epoch has no order, one epoch's is the numbering of the results, and
        the same batches in every epoch could be numbered likewise.
        """
        sets = [frozenset(step) for step in self.steps]
        size = len(sets) // self.local_epochs
        epochs = {tuple(sets[i : i + size]) for i in range(0, len(sets), size)}
        return len(epochs) > 1

    @cached_property
    def gradient(self) -> dict[str, torch.Tensor]:
        """(theta_0 - theta_K) / (lr K) by the name of each parameter that is trained.

        Raises:
            InputError: The difference lacks a parameter, or is not finite.
        """
        scale = -1 / (self.learning_rate * self.local.updates)
        named = self.model.skeleton().named_parameters()
        trained = {name: p.shape for name, p in named if p.requires_grad}
        return {name: scale * self._difference(name, shape) for name, shape in trained.items()}

    def _difference(self, name: str, shape: torch.Size) -> torch.Tensor:
        value = self.weight_diff.get(name)
        if value is None:
            raise InputError(f"the update does not hold the parameter {name}")
        if tuple(value.shape) != tuple(shape) or not torch.isfinite(value).all():
            raise InputError(f"the update of {name} is not finite or has shape {value.shape}")
        return value.detach().float()

    @cached_property
    def running_after(self) -> dict[str, torch.Tensor] | None:
        """BatchNorm's running statistics after local training, in float64.

        None if the network has no BatchNorm, or its buffers were not sent.

        Raises:
            InputError: They are not finite.
        """
        names = [name for name in self.global_weights if name.endswith(RUNNING_STATISTICS)]
        if not names or any(name not in self.weight_diff for name in names):
            return None
        after = {n: self.global_weights[n].double() + self.weight_diff[n].double() for n in names}
        if not all(torch.isfinite(value).all() for value in after.values()):
            raise InputError("the update's BatchNorm statistics are not finite")
        return after


def target_from_update(update: LocalUpdate) -> Target:
    """The update as the target of an attack.

    The batch statistics of a single local step are recovered from the update; those of
    several steps cannot be told apart, and only their average is known.

    Raises:
        InputError: See `LocalUpdate.gradient` and `LocalUpdate.running_after`.
    """
    target = Target(
        model=update.model,
        data=update.data,
        state_dict={name: value.clone() for name, value in update.global_weights.items()},
        gradient=update.gradient,
        train_mode=True,
        batch_size=update.n_images,
        local=update.local,
        running_after=update.running_after,
        loss=update.loss,
    )
    if target.running_after is None or target.local.steps > 1:
        return target
    recovered = recovered_statistics(target)
    batch = {name: (mean.float(), variance.float()) for name, (mean, variance) in recovered.items()}
    return dataclasses.replace(target, bn_statistics=(batch,))


def numbered_by_place(target: Target) -> Target:
    """The same target, its images numbered by their places in the local batches.

    Where every epoch has the same even batches, that leaves no order to state: for attacks
    that look at even batches only.
    """
    local, n = target.local, target.batch_size
    steps = local.order or ()
    epoch = steps[: local.batches]
    even = [len(step) for step in epoch] == shard_sizes(n, local.batches)
    if not even or steps != epoch * local.epochs:
        return target
    return dataclasses.replace(target, local=dataclasses.replace(local, order=None))
