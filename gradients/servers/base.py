"""What a malicious server is: makes a model that leaks; and the registry behind `--malicious`."""

from __future__ import annotations

import abc
from dataclasses import dataclass
from typing import ClassVar, TypeVar

import torch
from torch import nn

from core.models.building import ModelSpec
from core.models.malicious import Malice, parse_malice
from core.registry import Registry

# So far below the darkest image that none falls out of the first bin.
MARGIN = 10.0


@dataclass(frozen=True)
class Means:
    """What a server has to make its model with.

    Attributes:
        spec: `spec.malicious` says what to do.
        inputs: N x C x H x W, normalised: public images, from which it learns what the clients'
            look like.
        labels: N class indices of them; None where the server does not know them.
        batch_size: Of all clients that it is made for.
    """

    spec: ModelSpec
    inputs: torch.Tensor
    labels: torch.Tensor | None = None
    batch_size: int = 1

    @property
    def malice(self) -> Malice:
        """What to do, read."""
        return parse_malice(self.spec.malicious, self.spec.n_classes)


class MaliciousServer(abc.ABC):
    """Sends a model that was made to leak.

    Attributes:
        name: The kind in `--malicious KIND:NUMBER`, one of `core.models.malicious.KINDS`.
        tells_clients_apart: Whether every client gets a model of its own.
    """

    name: ClassVar[str]
    tells_clients_apart: ClassVar[bool] = False

    @abc.abstractmethod
    def send(self, model: nn.Module, means: Means) -> nn.Module:
        """The model to send instead of `model`, which may be changed.

        Args:
            model: The honest model.
            means: What it is made with.

        Raises:
            InputError: It cannot be done to this model.
        """

    def send_to(self, model: nn.Module, number: int) -> nn.Module:
        """The model of one of several clients.

        Args:
            model: What `send` gave; left as it is.
            number: Of the client, from 0.

        Raises:
            InputError: The model was made for fewer clients.
        """
        return model


_SERVERS = Registry[type[MaliciousServer]]("server")
S = TypeVar("S", bound=type[MaliciousServer])


def register_server(server: S) -> S:
    """Class decorator: make a server known by its kind.

    Raises:
        ValueError: The kind is taken.
    """
    _SERVERS.add(server.name, server)
    return server


def server_names() -> list[str]:
    """Kinds of all registered servers."""
    return _SERVERS.names()


def get_server(name: str) -> type[MaliciousServer]:
    """The server of that kind.

    Raises:
        KeyError: There is none.
    """
    return _SERVERS[name]


def spread_ties(thresholds: torch.Tensor) -> torch.Tensor:
    """Strictly growing thresholds: few public images share quantiles."""
    least = 1e-6 * torch.arange(len(thresholds), dtype=thresholds.dtype, device=thresholds.device)
    return thresholds.cummax(0).values + least


def quantiles(values: torch.Tensor, bins: int) -> torch.Tensor:
    """Lower ends of bins that as many of the values fall into, the first far below them."""
    levels = torch.arange(bins, dtype=torch.float64) / bins
    thresholds = spread_ties(values.double().quantile(levels.to(values.device)))
    thresholds[0] = values.min() - MARGIN
    return thresholds
