"""The models that are measured, by the group that they belong to."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

from torch import nn


class Case(NamedTuple):
    """A model to be measured, see `benchmarks.models.measure.agreements`.

    Attributes:
        group: Of `benchmarks.models.record.GROUPS`.
        name: In the table.
        build: Builds it from torch's random numbers.
        shape: Of one input.
        n_classes: Number of outputs.
    """

    group: str
    name: str
    build: Callable[[], nn.Module]
    shape: tuple[int, ...]
    n_classes: int


def cases() -> Iterator[Case]:
    """All of them, in the order of the table; timm's where that is installed."""
    from benchmarks.models import own_modules, published

    shape = (own_modules.CHANNELS, own_modules.SIDE, own_modules.SIDE)
    for name, build in own_modules.OWN_MODULES.items():
        yield Case("own", name, build, shape, own_modules.N_CLASSES)
    libraries = {
        "torchvision": published.torchvision_classifiers(),
        "timm": published.timm_classifiers(),
    }
    for group, models in libraries.items():
        for model in models:
            shape = (3, model.side, model.side)
            yield Case(group, model.name, model.build, shape, published.N_CLASSES)
