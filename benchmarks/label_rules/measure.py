"""Batches of photographs through a network, and what every rule makes of their gradients."""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import nn

import attack.knowledge.labels as rules
from attack.knowledge.labels.fit import Equations, misfit
from attack.knowledge.labels.last_layer import last_layer_of, random_features
from benchmarks.label_rules.networks import NETWORKS, network, trained
from core.data.data_sets import DataSets, load_data, take_samples
from core.data.specs import DataSpec
from core.models.architecture import GivenModel
from core.target import Target
from gradients.client import ClientSettings, share_update

INITIAL, TRAINED = "initial", "trained"
STATES = (INITIAL, TRAINED)
# Classes, and images of a batch; of two classes there is one image of each.
BATCHES = ((10, 1), (10, 2), (10, 4), (10, 8), (2, 2))


@dataclass(frozen=True)
class Setting:
    """What a cell of the tables is about.

    Attributes:
        network: A name in `NETWORKS`.
        state: One of `STATES`.
        classes: Number of classes.
        images: Of a batch.
    """

    network: str
    state: str
    classes: int
    images: int


@dataclass(frozen=True)
class Cell:
    """What the rules made of a setting's batches.

    Attributes:
        setting: See `Setting`.
        accuracy: Share of labels that each rule recovered, as a multiset, one number per batch.
        right: What the true labels leave of the gradient unexplained, per batch; empty for
            single images, which need no fit.
        wrong: The least that labels with one exchanged leave.
    """

    setting: Setting
    accuracy: dict[str, list[float]]
    right: list[float]
    wrong: list[float]


def settings() -> Iterator[Setting]:
    """All of them."""
    for state, name, (classes, images) in itertools.product(STATES, NETWORKS, BATCHES):
        yield Setting(name, state, classes, images)


@functools.cache
def _photos() -> DataSets:
    return load_data("photo-patches")


@functools.cache
def _samples(classes: int) -> tuple[torch.Tensor, torch.Tensor]:
    """All photographs of the first classes."""
    photos = _photos().train_plain
    chosen = [i for i, label in enumerate(photos.labels) if label < classes]
    return take_samples(photos, chosen, _photos().spec)


def _spec(classes: int) -> DataSpec:
    names = _photos().spec.class_names[:classes]
    return dataclasses.replace(_photos().spec, n_classes=classes, class_names=names)


@functools.lru_cache(maxsize=2)
def _model(name: str, state: str, classes: int, seed: int) -> nn.Module:
    model = network(name, classes, seed)
    if state == INITIAL:
        return model
    images, labels = _samples(classes)
    return trained(model, _spec(classes).normalize(images), labels, seed)


def measure(setting: Setting, batches: int) -> Cell:
    """Share so many batches of a setting, and recover their labels by every rule.

    Args:
        setting: See `Setting`. An initial network is another one for every batch.
        batches: How many.
    """
    cell = Cell(setting, {}, [], [])
    for number in range(batches):
        target, labels = _shared(setting, number)
        for rule, found in rules.accuracy_by_rule(target, labels).items():
            if found["accuracy"] is not None:
                cell.accuracy.setdefault(rule, []).append(float(found["accuracy"]))
        if setting.images > 1:
            _add_misfits(cell, target, labels)
    return cell


def _shared(setting: Setting, number: int) -> tuple[Target, torch.Tensor]:
    """What a client in train mode shares for the batch of a number."""
    seed = number if setting.state == INITIAL else 0
    model = _model(setting.network, setting.state, setting.classes, seed)
    images, labels = _samples(setting.classes)
    chosen = _chosen(labels, setting, torch.Generator().manual_seed(1000 + number))
    spec, architecture = _spec(setting.classes), GivenModel(model)
    settings = ClientSettings(train_mode=True, dropout_seed=number)
    batch = (images[chosen], labels[chosen])
    target = share_update(architecture.build(), architecture, spec, *batch, settings)
    assert target is not None
    return target, labels[chosen]


def _chosen(labels: torch.Tensor, setting: Setting, generator: torch.Generator) -> torch.Tensor:
    """Images at random, of random classes; of two classes one of each."""
    n = setting.images
    wanted = torch.randint(setting.classes, (n,), generator=generator)
    if setting.classes == n:
        wanted = torch.arange(n)
    each = []
    for label in wanted.tolist():
        places = (labels == label).nonzero().flatten()
        each.append(places[torch.randint(len(places), (1,), generator=generator)])
    return torch.cat(each)


def _add_misfits(cell: Cell, target: Target, labels: torch.Tensor) -> None:
    """What the true labels leave unexplained, and the least that wrong ones do."""
    model = target.build_model()
    last = last_layer_of(target, model)
    equations = Equations.of(last)
    if equations is None:
        return
    start = random_features(target, model).mean(0).expand(len(labels), -1)
    cell.right.append(misfit(equations, labels, start))
    wrong = []
    for place in range(len(labels)):
        other = labels.clone()
        other[place] = (other[place] + 1) % last.n_classes
        wrong.append(misfit(equations, other, start))
    cell.wrong.append(min(wrong))
