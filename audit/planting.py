"""Power: what the attack finds of known images that were planted in an update of the same model.

A planted update is of images of the site that were not in the training, as many of each class as
there are members, and is judged against all others: by as many images as the site's own update.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from audit.data import chosen
from audit.local import ToldTraining
from audit.request import AuditRequest
from core.data.data_sets import derived_seed
from core.local_training import LocalTraining
from core.target import Target
from gradients.client import ClientSettings, share_update
from gradients.defenses import Defense, Gaussian, Sign, TopK
from gradients.local_update import images_of_steps
from gradients.update_traces import Finding, Trace

_DRAW, _NOISE, _MASKS = 41, 43, 47


@dataclass(frozen=True)
class PlantSetting:
    """How images are planted.

    Attributes:
        images: How many; one, or as many as the site has members.
        training: The local training on them.
    """

    images: int
    training: ToldTraining


@dataclass(frozen=True, eq=False)
class Planted:
    """An update of planted images.

    Attributes:
        target: What an attack sees of it.
        is_planted: Per image of the site, members first, whether it is in the update.
        labels: Of the planted images, in the order of training.
    """

    target: Target
    is_planted: np.ndarray
    labels: torch.Tensor


def plant_settings(request: AuditRequest) -> tuple[PlantSetting, ...]:
    """One image in one step, then the site's own batch size and steps."""
    n, told = len(request.data.members.labels), request.local
    one = dataclasses.replace(
        told.training, epochs=1, batches=1, accumulate=1, order=None, rates=None
    )
    single = PlantSetting(1, dataclasses.replace(told, training=one))
    if n == 1 and told.training.steps == 1:
        return (single,)
    return single, PlantSetting(n, told)


def plant(request: AuditRequest, setting: PlantSetting, number: int) -> Planted:
    """An update of planted images, filtered as the site's own was seen to be.

    Args:
        request: The site's audit.
        setting: How many, and how they are trained on.
        number: Of the plant; each draws other images.
    """
    seed = request.settings.seed
    rng = np.random.default_rng((seed, _DRAW, setting.images, number))
    places = _drawn(request, setting.images, rng)
    samples = chosen(request.data.everyone, places)
    training = _shuffled(setting.training, len(places), rng)
    model = request.trains.build()
    settings = ClientSettings(
        local=training,
        train_mode=model.training,
        defenses=filters_seen(request.update.findings, request.local.training),
        seed=derived_seed(seed, _NOISE, number) % 2**31,
        dropout_seed=derived_seed(seed, _MASKS, number) % 2**31,
        loss=request.client.loss,
        share_running=request.target.running_after is not None,
    )
    target = share_update(
        model, request.trains, request.data.spec, samples.images, samples.labels, settings
    )
    assert target is not None
    # Whoever reads the site's update is told of neither its filters nor its masks.
    target = dataclasses.replace(
        target,
        model=request.client.architecture,
        defenses=(),
        dropout_seed=None,
        bn_statistics=target.bn_statistics if target.running_after is not None else None,
    )
    is_planted = np.isin(np.arange(len(request.groups)), places)
    return Planted(target, is_planted, samples.labels)


def _drawn(request: AuditRequest, images: int, rng: np.random.Generator) -> np.ndarray:
    """Places of the plants: non-members where a class has enough of them, else any images."""
    groups, members = request.groups, request.is_member
    wanted = groups[members] if images > 1 else groups[members][rng.integers(members.sum())][None]
    places: list[int] = []
    for group in np.unique(wanted):
        held_out, count = np.flatnonzero((groups == group) & ~members), int((wanted == group).sum())
        pool = held_out if len(held_out) >= count else np.flatnonzero(groups == group)
        places += rng.choice(pool, count, replace=False).tolist()
    return rng.permutation(places)


def _shuffled(told: ToldTraining, n: int, rng: np.random.Generator) -> LocalTraining:
    """The training in the order that was told, else with the images mixed in every epoch."""
    training = told.training
    if told.order_told or training.epochs == 1 or training.batches == 1:
        return training
    sizes = [len(np.arange(n)[step[0]]) for step in images_of_steps(n, training)][
        : training.batches
    ]
    ends = np.cumsum(sizes)[:-1]
    epochs = [np.split(rng.permutation(n), ends) for _ in range(training.epochs)]
    order = tuple(tuple(step.tolist()) for epoch in epochs for step in epoch)
    return dataclasses.replace(training, order=order, order_known=False)


def filters_seen(findings: Sequence[Finding], training: LocalTraining) -> tuple[Defense, ...]:
    """What was certainly done to an update, as defenses of the gradient that it stands for."""
    seen = {f.trace: f.value for f in findings if f.certain and f.value}
    found: list[Defense] = []
    if Trace.SPARSE in seen:
        found.append(TopK(1 - seen[Trace.SPARSE]))
    if Trace.SIGNS in seen:
        found.append(Sign())
    if Trace.NOISE in seen:
        found.append(Gaussian(seen[Trace.NOISE] / (training.lr * training.updates)))
    return tuple(found)
