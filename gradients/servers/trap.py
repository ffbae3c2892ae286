"""A first layer that waits for few records (trap weights)."""

from __future__ import annotations

import torch
from torch import nn

from core.errors import InputError
from gradients.servers.base import MaliciousServer, Means, register_server

# Public inputs per feature, below which directions fit the inputs that they are made from.
FEW = 2


@register_server
class Trap(MaliciousServer):
    """Make the first layer's neurons wait for few records: `--malicious trap:RECORDS`.

    Read by `--attack trap-weights`.

    Source: Boenisch et al., "When the Curious Abandon Honesty: Federated Learning Is Not Private",
        EuroS&P 2023, https://arxiv.org/abs/2112.02918.
    """

    name = "trap"

    def send(self, model: nn.Module, means: Means) -> nn.Module:
        """See `MaliciousServer.send`."""
        set_traps(first_linear(model), means.inputs, means.malice.number, means.batch_size)
        return model


def first_linear(model: nn.Module) -> nn.Linear:
    """The layer that traps are set in; the attack refuses one that does not see the input."""
    found = next((m for m in model.modules() if isinstance(m, nn.Linear)), None)
    if found is None or found.bias is None:
        raise InputError("--malicious trap: the model has no fully connected layer with bias")
    return found


@torch.no_grad()
def set_traps(
    layer: nn.Linear, public_inputs: torch.Tensor, records: float, batch_size: int, seed: int = 0
) -> None:
    """Weights under which few samples of a batch activate a neuron.

    A neuron looks in the direction in which one of the public inputs lies furthest out, in units
    of how the inputs spread, and its bias is a quantile of what they give there. Some neurons wait
    for less than half of `records` samples of a batch, some for six times as many: the rare ones
    are read off first, and make the others readable.

    Args:
        layer: Sees the flattened input; changed in place.
        public_inputs: Inputs (N x ...) as the client's model gets them.
        records: Samples of a batch that activate a neuron, about.
        batch_size: Of the client.
        seed: Of the choice of public inputs.

    Source: Boenisch et al. 2023, section 4, https://arxiv.org/abs/2112.02918; there random weights
        of one sign are scaled instead.
    """
    generator = torch.Generator().manual_seed(seed)
    inputs = public_inputs.flatten(1).double()
    kept = inputs
    if len(inputs) < FEW * inputs.shape[1]:
        inputs, kept = inputs[::2], inputs[1::2]
    centered = inputs - inputs.mean(0)
    spread = centered.T @ centered / len(inputs)
    # Features that depend on each other leave directions without spread.
    spread.diagonal().add_(1e-3 * spread.diagonal().mean())
    chosen = torch.randint(len(inputs), (layer.out_features,), generator=generator)
    weight = torch.linalg.solve(spread, centered[chosen.to(inputs.device)].T).T
    weight = weight / (kept @ weight.T).std(0).clamp_min(1e-9)[:, None]
    waited = torch.logspace(-1.4, 2.6, layer.out_features, base=2, dtype=torch.float64)
    shares = (records * waited / batch_size).clamp(max=0.5).to(inputs)
    values = kept @ weight.T
    thresholds = [v.quantile(1 - share) for v, share in zip(values.T, shares, strict=True)]
    layer.weight.copy_(weight)
    layer.bias.copy_(-torch.stack(thresholds))
