"""The local training that an audit reckons with: as it was told, and the rest estimated.

What is not told is found by simulating: the members' update under each candidate is compared
with what was sent, and the candidate of largest cosine is taken. The site knows its members, so
it may; an attacker would search.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from audit.record import LocalSection
from core.data.specs import DataSpec
from core.errors import InputError
from core.local_training import ADAM, SGD, LocalTraining
from core.losses import Loss
from core.models.architecture import Architecture
from core.target import Truth
from gradients.client import ClientSettings, share_update
from gradients.shared_update import SharedUpdate
from gradients.update_target import gradient_of
from gradients.update_traces import Trace

State = Mapping[str, torch.Tensor]
OPTIMISER, RATE, STEPS, BATCH = "optimiser", "learning_rate", "steps", "batch_size"
ASPECTS = (OPTIMISER, RATE, STEPS, BATCH)
# By how much more steps or another optimiser must explain the update better.
_BETTER = 1e-3
# Words of local training, and what they tell.
_TELLS = {"lr": RATE, "rates": RATE, "batch_size": BATCH, "batches": BATCH, "steps": STEPS,
          "epochs": STEPS}  # fmt: skip


@dataclass(frozen=True)
class ToldTraining:
    """Local training, and how it is known.

    Attributes:
        training: All of it.
        told: Names of `ASPECTS` that the site stated.
        order_told: Whether it said which images shared which steps.
    """

    training: LocalTraining
    told: tuple[str, ...]
    order_told: bool = False

    @property
    def estimated(self) -> tuple[str, ...]:
        """Those that it did not state."""
        return tuple(name for name in ASPECTS if name not in self.told)

    def section(self, n_images: int) -> LocalSection:
        """For the record."""
        training = self.training
        return LocalSection(
            optimiser=training.optimizer,
            learning_rate=training.lr,
            steps=training.steps,
            batch_size=batch_size_of(training, n_images),
            told=self.told,
            estimated=self.estimated,
        )


def batch_size_of(training: LocalTraining, n_images: int) -> int:
    """Images of the largest step."""
    if training.order is not None:
        return max(map(len, training.order))
    return math.ceil(n_images / training.batches)


def told_training(given: LocalTraining | str | None, n_images: int) -> ToldTraining:
    """What a site says of its local training.

    Args:
        given: Words such as "sgd lr=0.1 batch-size=8" (see `LocalTraining.parse`), all of it, or
            None for nothing.
        n_images: Of the site.

    Raises:
        InputError: One sentence on the word that is wrong.
    """
    if given is None:
        return ToldTraining(LocalTraining(), ())
    if isinstance(given, LocalTraining):
        return ToldTraining(given, ASPECTS, given.order is not None)
    first, *words = given.split() or [""]
    names = {w.partition("=")[0].replace("-", "_") for w in ([first, *words])}
    told = {aspect for word, aspect in _TELLS.items() if word in names}
    if "=" not in first:
        told.add(OPTIMISER)
    if BATCH not in told:
        # Epochs of batches of unknown size are steps of unknown number.
        told.discard(STEPS)
    elif "batch_size" in names or "batches" in names:
        told.add(STEPS)
    training = LocalTraining.parse(given, n_images)
    in_order = tuple(name for name in ASPECTS if name in told)
    return ToldTraining(training, in_order, bool(names & {"order", "shuffle"}))


@dataclass(frozen=True)
class Client:
    """What computes an update of some images: everything but the images.

    Attributes:
        architecture: With the parameters that the client received; those that are not shared
            are frozen.
        data: Normalisation.
        loss: What it minimises.
        seed: Of its random numbers.
    """

    architecture: Architecture
    data: DataSpec
    loss: Loss
    seed: int = 0

    def update_of(self, samples: Truth, training: LocalTraining) -> State:
        """(theta_0 - theta_K) / (lr K) of a training on the samples."""
        model = self.architecture.build()
        settings = ClientSettings(
            local=training, train_mode=model.training, seed=self.seed, loss=self.loss
        )
        target = share_update(
            model, self.architecture, self.data, samples.images, samples.labels, settings
        )
        assert target is not None
        return target.gradient


def completed(
    told: ToldTraining, update: SharedUpdate, client: Client, members: Truth
) -> ToldTraining:
    """The training with what was not told estimated from the update and the members.

    Raises:
        InputError: The steps that the site tells are not those that the update's counters say.
    """
    n = len(members.labels)
    counted = _counted_steps(update)
    if counted is not None and STEPS in told.told and counted != told.training.steps:
        raise InputError(
            f"--local: {told.training.steps} steps are told and BatchNorm's counters say {counted}"
        )
    if set(told.told) == set(ASPECTS):
        return told
    change = gradient_of(update, client.architecture.build(), LocalTraining(lr=1.0))
    best, best_cosine = told.training, -math.inf
    for candidate in _candidates(told, n, counted):
        fitted, reached = _fitted(candidate, told, client, members, change)
        if reached > best_cosine + _BETTER:
            best, best_cosine = fitted, reached
    return dataclasses.replace(told, training=best)


def _counted_steps(update: SharedUpdate) -> int | None:
    found = [f.value for f in update.findings if f.trace is Trace.STEPS and f.certain and f.value]
    return int(found[0]) if found else None


def _candidates(told: ToldTraining, n: int, counted: int | None) -> Iterator[LocalTraining]:
    """Fewest steps first."""
    stated = told.training
    # Momentum is nothing of Adam's.
    free = OPTIMISER not in told.told and not stated.momentum
    for batching in _batchings(told, n, counted):
        for optimiser in [SGD, ADAM] if free else [stated.optimizer]:
            yield dataclasses.replace(stated, optimizer=optimiser, **batching)


def _batchings(told: ToldTraining, n: int, counted: int | None) -> Iterator[dict[str, Any]]:
    """Epochs, batches and their images as they may be; nothing where they were told."""
    epochs = told.training.epochs
    if BATCH in told.told:
        yield {}
    elif counted is not None:
        epochs = epochs if counted % epochs == 0 else counted
        yield _batching(n, epochs, math.ceil(n / min(n, counted // epochs)))
    else:
        for power in range(n.bit_length()):
            yield _batching(n, epochs, n >> power)


def _batching(n: int, epochs: int, size: int) -> dict[str, Any]:
    found = LocalTraining.parse(f"sgd epochs={epochs} batch-size={size}", n)
    return {name: getattr(found, name) for name in ("epochs", "batches", "order")}


def _fitted(
    candidate: LocalTraining, told: ToldTraining, client: Client, members: Truth, change: State
) -> tuple[LocalTraining, float]:
    """The candidate at the learning rate that explains the update best, and its cosine.

    Args:
        candidate: All but the learning rate.
        told: Whether the rate is known.
        client: Simulates the local training.
        members: What it trains on.
        change: theta_0 - theta_K that was sent.
    """
    if RATE not in told.told:
        candidate = dataclasses.replace(
            candidate, lr=_first_rate(candidate, client, members, change)
        )
    made = client.update_of(members, candidate)
    dot, squares, length = products(made, change)
    if RATE not in told.told and dot > 0:
        scale = candidate.lr * candidate.updates
        candidate = dataclasses.replace(candidate, lr=candidate.lr * dot / (scale * squares))
    return candidate, dot / max(math.sqrt(squares * length), 1e-30)


def _first_rate(candidate: LocalTraining, client: Client, members: Truth, change: State) -> float:
    """A learning rate of the right size: of Adam the largest element's, else the norms'."""
    if candidate.optimizer != SGD:
        return max(float(v.abs().max()) for v in change.values()) / candidate.updates
    gradient = client.update_of(members, LocalTraining())
    _, squares, length = products(gradient, change)
    return math.sqrt(length / max(squares, 1e-30)) / candidate.updates


def products(one: State, other: State) -> tuple[float, float, float]:
    """Inner product of two updates, and of each with itself, over what both have."""
    pairs = [(one[n].double(), other[n].double()) for n in one if n in other]
    dot = sum(float((a * b).sum()) for a, b in pairs)
    return (
        dot,
        sum(float(a.square().sum()) for a, _ in pairs),
        sum(float(b.square().sum()) for _, b in pairs),
    )


def cosine(one: State, other: State) -> float:
    """Of the angle between two updates, over what both have."""
    dot, first, second = products(one, other)
    return dot / max(math.sqrt(first * second), 1e-30)
