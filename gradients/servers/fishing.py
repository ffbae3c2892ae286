"""A last layer that lets few images through (fishing)."""

from __future__ import annotations

import torch
from torch import nn

from core.errors import InputError
from core.models.building import last_linear
from core.models.malicious import Malice
from gradients.servers.base import MaliciousServer, Means, register_server

# Logit of all classes but the fished one: their probability of the latter is e^-100.
DROWNING_LOGIT = 100.0
# Logits per standard deviation of the feature that is fished by: how steep the cut is.
STEEPNESS = 300.0


@register_server
class Fishing(MaliciousServer):
    """Silence all classes but one: `--malicious fishing:CLASS`.

    Read by `--attack fishing`.

    Source: Wen et al., "Fishing for User Data in Large-Batch Federated Learning via Gradient
        Magnification", ICML 2022, https://arxiv.org/abs/2202.00580.
    """

    name = "fishing"

    @torch.no_grad()
    def send(self, model: nn.Module, means: Means) -> nn.Module:
        """See `MaliciousServer.send`."""
        _fish(model, means.malice.number)
        return model


@register_server
class FeatureFishing(MaliciousServer):
    """Let one image of a class through: `--malicious fishing-feature:CLASS[:FEATURE[:CUT]]`.

    Read by `--attack fishing`.

    Source: Wen et al., "Fishing for User Data in Large-Batch Federated Learning via Gradient
        Magnification", ICML 2022, https://arxiv.org/abs/2202.00580.
    """

    name = "fishing-feature"

    @torch.no_grad()
    def send(self, model: nn.Module, means: Means) -> nn.Module:
        """See `MaliciousServer.send`."""
        malice = means.malice
        values = _public_values(model, malice, means.inputs, means.labels)
        _fish_by_feature(model, malice, values, means.batch_size)
        return model


def _fish(model: nn.Module, label: int) -> None:
    """Silence all classes but one: only its images move the features.

    Source: Wen et al., "Fishing for User Data in Large-Batch Federated Learning via
        Gradient Magnification", ICML 2022, class fishing, https://arxiv.org/abs/2202.00580.
    """
    _, layer = last_linear(model)
    kept = layer.weight[label].clone()
    layer.weight.zero_()
    layer.weight[label] = kept
    if layer.bias is not None:
        layer.bias.fill_(DROWNING_LOGIT)
        layer.bias[label] = 0


def _fish_by_feature(
    model: nn.Module, malice: Malice, values: torch.Tensor, batch_size: int
) -> None:
    """Silence a class's images above a cut as well: the model is sure of them already.

    The class's logit climbs steeply where the feature passes the cut, all others are flat.
    Images of the class below the cut are classified wrongly and move the features, those
    above it are classified with certainty and move nothing. For the other classes it is
    the reverse: their images must stay below the cut, or they pass. So the feature should
    be one that is large for this class, as its logit is in a trained network. Without a
    given cut, it lies where one of `batch_size` images of the class is expected below.

    Args:
        model: The model; the function changes its last layer in place.
        malice: Class, feature and cut.
        values: The feature of public images, taken for normally distributed.
        batch_size: Images of the client.

    Source: Wen et al. 2022, feature fishing in one shot, https://arxiv.org/abs/2202.00580;
        there the feature is a single one; a logit sees all that the last layer does.
    """
    _, layer = last_linear(model)
    direction = _direction(layer, malice)
    mean, spread = float(values.mean()), max(float(values.std()), 1e-12)
    share = torch.tensor(min(1 / batch_size, 0.9))
    below = float(torch.distributions.Normal(mean, spread).icdf(share))
    cut = below if malice.cut is None else malice.cut
    layer.weight.zero_()
    layer.weight[malice.number] = STEEPNESS / spread * direction
    layer.bias.zero_()
    layer.bias[malice.number] = -STEEPNESS / spread * cut


def _direction(layer: nn.Linear, malice: Malice) -> torch.Tensor:
    """The feature as a direction in the last layer's inputs."""
    if malice.feature is None:
        return layer.weight[malice.number] - layer.weight.mean(0)
    if malice.feature >= layer.in_features:
        raise InputError(
            f"--malicious: the last layer has no feature {malice.feature}, "
            f"only 0..{layer.in_features - 1}"
        )
    return torch.eye(layer.in_features).to(layer.weight)[malice.feature]


def _public_values(
    model: nn.Module, malice: Malice, inputs: torch.Tensor, labels: torch.Tensor | None
) -> torch.Tensor:
    """The feature of public images, of the class if there are two of it.

    Raises:
        InputError: The last layer has no bias to put the cut into.
    """
    _, layer = last_linear(model)
    if layer.bias is None:
        raise InputError("--malicious: the last layer has no bias to put the cut into")
    if labels is not None and int((labels == malice.number).sum()) > 1:
        inputs = inputs[labels.to(inputs.device) == malice.number]
    seen: list[torch.Tensor] = []
    handle = layer.register_forward_hook(lambda module, args, output: seen.append(args[0]))
    was_training = model.training
    try:
        model.eval()(inputs.to(layer.weight))
    finally:
        handle.remove()
        model.train(was_training)
    return seen[0] @ _direction(layer, malice)
