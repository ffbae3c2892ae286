"""What a site sends after its local training, and what is known about that training."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import torch

from core.data.specs import DataSpec
from core.errors import InputError
from core.models.architecture import Architecture
from core.processes.distributed import shard_sizes
from core.target import BatchStatistics, LocalTraining, Target
from gradients.batch_statistics import statistics_from_running, values_per_channel


@dataclass(frozen=True)
class LocalUpdate:
    """One site's weight difference of one round.

    Attributes:
        model: The architecture.
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
        """The local SGD in the terms of stage 2."""
        return LocalTraining(
            epochs=self.local_epochs,
            batches=math.ceil(self.n_images / self.batch_size),
            lr=self.learning_rate,
            momentum=self.momentum,
            weight_decay=self.weight_decay,
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
        """(theta_0 - theta_K) / (lr K) by parameter name.

        Raises:
            InputError: The difference lacks a parameter, or is not finite.
        """
        scale = -1 / (self.learning_rate * len(self.steps))
        named = dict(self.model.skeleton().named_parameters())
        return {name: scale * self._difference(name, p.shape) for name, p in named.items()}

    def _difference(self, name: str, shape: torch.Size) -> torch.Tensor:
        value = self.weight_diff.get(name)
        if value is None:
            raise InputError(f"the update does not hold the parameter {name}")
        if tuple(value.shape) != tuple(shape) or not torch.isfinite(value).all():
            raise InputError(f"the update of {name} is not finite or has shape {value.shape}")
        return value.detach().float()

    @cached_property
    def running_change(self) -> BatchStatistics | None:
        """The batches' mean and unbiased variance per BatchNorm layer, from the update.

        After K steps the running value is (1 - m)^K r + sum_k m (1 - m)^(K-1-k) b_k: what
        can be recovered is that weighted mean of the batches' statistics b_k. None if the
        network has no BatchNorm, or its buffers were not sent.
        """
        momentum = 1 - (1 - self.bn_momentum) ** len(self.steps)
        names = [name for name in self.global_weights if _is_running(name)]
        if not names or any(name not in self.weight_diff for name in names):
            return None
        old = {name: self.global_weights[name].double() for name in names}
        new = {name: old[name] + self.weight_diff[name].double() for name in names}
        found = statistics_from_running(old, new, momentum)
        if not all(torch.isfinite(m).all() and torch.isfinite(v).all() for m, v in found.values()):
            raise InputError("the update's BatchNorm statistics are not finite")
        # Noise on the update can push a variance below zero.
        return {name: (m.float(), v.clamp_min(0).float()) for name, (m, v) in found.items()}


def _is_running(name: str) -> bool:
    return name.endswith(("running_mean", "running_var"))


def target_from_update(update: LocalUpdate) -> Target:
    """A target of stage 2 for the attacks of stage 3.

    The batch statistics of a single local step are recovered from the update; those of
    several steps cannot be told apart and are left out.

    Raises:
        InputError: Local training that stage 2 has no words for: batches of unequal
            size other than its own split, FedProx over several steps, or another order in
            every epoch.
    """
    local = update.local
    sizes = [len(step) for step in update.steps]
    if sizes != shard_sizes(update.n_images, local.batches) * local.epochs:
        raise InputError(
            f"{update.n_images} images in batches of {update.batch_size}: the attacks of stage 3 "
            "split them evenly; choose method full, or a batch size that divides them"
        )
    if update.proximal and local.steps > 1:
        raise InputError(
            "the attacks of stage 3 do not know FedProx's proximal term, which counts from the "
            "second local step on; choose method full"
        )
    if len(set(update.batch_order or ())) > 1:
        raise InputError(
            "the attacks of stage 3 know one order of the batches for all local epochs; "
            "choose method full"
        )
    return Target(
        model=update.model,
        data=update.data,
        state_dict={name: value.clone() for name, value in update.global_weights.items()},
        gradient=update.gradient,
        train_mode=True,
        batch_size=update.n_images,
        local=local,
        bn_statistics=_whole_batch_statistics(update),
    )


def _whole_batch_statistics(update: LocalUpdate) -> tuple[BatchStatistics, ...] | None:
    """Exact mean and biased variance of the only batch, as BatchNorm normalised with."""
    change = update.running_change
    if change is None or len(update.steps) > 1:
        return None
    model = update.model.skeleton().train()
    with torch.device("meta"):
        images = torch.zeros(update.n_images, *update.data.shape)
    counts = values_per_channel(model, images)
    return ({name: (m, v * (counts[name] - 1) / counts[name]) for name, (m, v) in change.items()},)
