"""What a malicious server does to the parameters of the model that it sends."""

from __future__ import annotations

import torch
from torch import nn

from training.malicious import Imprinted, parse_malice
from training.models import ModelSpec, last_linear

# So far below the darkest image that none falls out of the first bin.
MARGIN = 10.0
# Logit of all classes but the fished one: their probability of the latter is e^-100.
DROWNING_LOGIT = 100.0


def tamper(model: nn.Module, spec: ModelSpec, public_inputs: torch.Tensor) -> nn.Module:
    """The model that a malicious server sends instead of `model`.

    Args:
        model: The honest model; its last layer is changed in place by fishing.
        spec: `spec.malicious` says what to do.
        public_inputs: N x C x H x W, normalised: images of the server's own, from which
            it learns how bright images are.

    Raises:
        InputError: `spec.malicious` makes no sense.
    """
    malice = parse_malice(spec.malicious, spec.n_classes)
    with torch.no_grad():
        if malice.kind == "imprint":
            dtype = next(model.parameters()).dtype
            model = Imprinted(model, spec.image_size, malice.number).to(dtype)
            _set_imprint(model, public_inputs)
        else:
            _fish(model, malice.number)
    return model


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
    levels = torch.arange(first.out_features, dtype=torch.float64) / first.out_features
    thresholds = _spread_ties(brightness.quantile(levels.to(brightness)))
    thresholds[0] = brightness.min() - MARGIN
    first.weight.fill_(1 / first.in_features)
    first.bias.copy_(-thresholds)
    direction = torch.randn(len(second.weight), generator=torch.Generator().manual_seed(0))
    second.weight.copy_(direction[:, None].expand_as(second.weight) / first.out_features)
    second.bias.zero_()


def _spread_ties(thresholds: torch.Tensor) -> torch.Tensor:
    """Strictly growing thresholds: few public images share quantiles."""
    least = 1e-6 * torch.arange(len(thresholds), dtype=thresholds.dtype, device=thresholds.device)
    return thresholds.cummax(0).values + least


def _fish(model: nn.Module, label: int) -> None:
    """Silence all classes but one: only its images move the features.

    Source: Wen et al., "Fishing for User Data in Large-Batch Federated Learning via
        Gradient Magnification", ICML 2022, section 3.1, https://arxiv.org/abs/2202.00580.
    """
    _, layer = last_linear(model)
    kept = layer.weight[label].clone()
    layer.weight.zero_()
    layer.weight[label] = kept
    if layer.bias is not None:
        layer.bias.fill_(DROWNING_LOGIT)
        layer.bias[label] = 0
