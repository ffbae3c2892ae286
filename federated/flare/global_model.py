"""The network that a federation starts from, built from a job's JSON."""

from __future__ import annotations

import torch
from torch import nn

from core.models.own_model import model_builder
from federated.flare.networks import network_spec


def global_model(
    model_name: str = "cnn",
    num_class: int = 2,
    image_size: int = 32,
    seed: int = 0,
    model: str | None = None,
) -> nn.Module:
    """The server's first global model: the same weights for the same seed.

    Args:
        model_name: See `federated.flare.networks.network_spec`.
        num_class: Number of classes.
        image_size: Side of the images in pixels.
        seed: Seed of the initial weights.
        model: A module of the user's own, `module:function` of the job's custom folder, in
            place of `model_name`.

    Returns:
        The network; a torchvision network keeps torchvision's names.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if model:
            return model_builder(model, "model")()
        return network_spec(model_name, num_class, image_size).build()
