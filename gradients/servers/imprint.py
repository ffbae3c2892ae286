"""An imprint block in front of the model (Robbing the Fed)."""

from __future__ import annotations

import torch
from torch import nn

from core.models.malicious import Imprinted
from gradients.servers.base import MaliciousServer, Means, quantiles, register_server


@register_server
class Imprint(MaliciousServer):
    """Put a block in front whose neurons measure brightness: `--malicious imprint:BINS`.

    Read by `--attack robbing-the-fed`.

    Source: Fowl et al., "Robbing the Fed: Directly Obtaining Private Data in Federated Learning
        with Modified Models", ICLR 2022, https://arxiv.org/abs/2110.13057.
    """

    name = "imprint"

    @torch.no_grad()
    def send(self, model: nn.Module, means: Means) -> nn.Module:
        """See `MaliciousServer.send`."""
        dtype = next(model.parameters()).dtype
        sent = Imprinted(model, means.spec.image_size, means.malice.number).to(dtype)
        _set_imprint(sent, means.inputs)
        return sent


def _set_imprint(model: Imprinted, public_inputs: torch.Tensor) -> None:
    """Every neuron measures the mean of the image against a threshold of its own.

    Neuron i is on for images brighter than the i-th quantile. All neurons feed the same
    vector into the model, so that they get the same gradient: the difference of two
    neighbours' weight gradients holds the images between their thresholds alone.

    Source: Fowl et al. 2022, section 3.1, https://arxiv.org/abs/2110.13057.
    """
    _, first, _, second, _ = model.imprint
    assert isinstance(first, nn.Linear)
    assert isinstance(second, nn.Linear)
    brightness = public_inputs.flatten(1).double().mean(1)
    thresholds = quantiles(brightness, first.out_features)
    first.weight.fill_(1 / first.in_features)
    first.bias.copy_(-thresholds)
    direction = torch.randn(len(second.weight), generator=torch.Generator().manual_seed(0))
    second.weight.copy_(direction[:, None].expand_as(second.weight) / first.out_features)
    second.bias.zero_()
