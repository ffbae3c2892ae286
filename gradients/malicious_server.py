"""What a malicious server sends instead of the honest model."""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from torch import nn

from core.models.building import ModelSpec
from core.models.malicious import parse_malice
from gradients.servers import MaliciousServer, Means, get_server


def tamper(
    model: nn.Module,
    spec: ModelSpec,
    public_inputs: torch.Tensor,
    public_labels: torch.Tensor | None = None,
    batch_size: int = 1,
) -> nn.Module:
    """The model that a malicious server sends instead of `model`.

    Args:
        model: The honest model; it may be changed in place.
        spec: `spec.malicious` says what to do.
        public_inputs: N x C x H x W, normalised: images of the server's own, from which
            it learns how bright images are, or how their features spread.
        public_labels: N class indices of them; None where the server does not know them.
        batch_size: Of the clients, among whose images one is to be told apart.

    Raises:
        InputError: `spec.malicious` makes no sense.
    """
    means = Means(spec, public_inputs, public_labels, batch_size)
    return _server(spec).send(model, means)


def sent_to_clients(model: nn.Module, spec: ModelSpec) -> Callable[[int], nn.Module]:
    """The model that each client gets, by its number, all of their own.

    Args:
        model: What `tamper` gave, or an honest model.
        spec: `spec.malicious` says what was done to it.
    """
    if not spec.malicious or not _server(spec).tells_clients_apart:
        return lambda number: copy.deepcopy(model)
    return lambda number: _server(spec).send_to(model, number)


def _server(spec: ModelSpec) -> MaliciousServer:
    return get_server(parse_malice(spec.malicious, spec.n_classes).kind)()
