"""A site with one seeded update, for whatever audits it: files, NVFlare's filter, Flower's mod."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
from torch import nn

import gradinvbench as gib
from federated.gate import site_audit

SETTINGS = replace(site_audit.SETTINGS, iterations=20, plants=1)
LOCAL = "sgd lr=0.1 batch-size=8"
SHAPE, N_CLASSES, HELD_OUT = (3, 8, 8), 2, 60

Pictures = tuple[torch.Tensor, torch.Tensor]


def build() -> nn.Module:
    """The site's model."""
    hidden = nn.Linear(int(np.prod(SHAPE)), 16)
    return nn.Sequential(nn.Flatten(), hidden, nn.ReLU(), nn.Linear(16, N_CLASSES))


def pictures(n: int, seed: int) -> Pictures:
    """Smooth ones of both classes in turn."""
    coarse = torch.rand(n, 3, 4, 4, generator=torch.Generator().manual_seed(seed))
    return nn.functional.interpolate(coarse, SHAPE[1:], mode="bilinear"), torch.arange(n) % 2


def one_picture() -> gib.GivenData:
    """A site whose update gives its only picture away."""
    return gib.GivenData(pictures(1, 2), pictures(HELD_OUT, 3))


def many_pictures() -> gib.GivenData:
    """A site whose update so short an attack makes nothing of."""
    return gib.GivenData(pictures(32, 2), pictures(HELD_OUT, 3))


def received() -> dict[str, np.ndarray]:
    """The global model."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return arrays(build())


def made_to_leak() -> dict[str, np.ndarray]:
    """A global model whose neurons all measure the brightness: a block of bins."""
    found = received()
    rows, columns = found["1.weight"].shape
    found["1.weight"] = np.full((rows, columns), 1 / columns, np.float32)
    found["1.bias"] = -np.linspace(0.2, 0.8, rows, dtype=np.float32)
    return found


def sent(data: gib.GivenData) -> dict[str, np.ndarray]:
    """The model after one local epoch."""
    model = build()
    model.load_state_dict({name: torch.tensor(value) for name, value in received().items()})
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for inputs, targets in zip(*(part.split(8) for part in data.train), strict=True):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(inputs), targets).backward()
        optimizer.step()
    return arrays(model)


def arrays(model: nn.Module) -> dict[str, np.ndarray]:
    """A model's state."""
    return {name: value.detach().numpy().copy() for name, value in model.state_dict().items()}
