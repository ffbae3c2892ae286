"""What a malicious server does to the parameters of the model that it sends."""

from __future__ import annotations

import torch
from torch import nn

from core.errors import InputError
from core.models.building import ModelSpec, last_linear
from core.models.malicious import Imprinted, Malice, parse_malice

# So far below the darkest image that none falls out of the first bin.
MARGIN = 10.0
# Logit of all classes but the fished one: their probability of the latter is e^-100.
DROWNING_LOGIT = 100.0
# Logits per standard deviation of the feature that is fished by: how steep the cut is.
STEEPNESS = 300.0
# Public inputs per feature, below which directions fit the inputs that they are made from.
FEW = 2


def tamper(
    model: nn.Module,
    spec: ModelSpec,
    public_inputs: torch.Tensor,
    public_labels: torch.Tensor | None = None,
    batch_size: int = 1,
) -> nn.Module:
    """The model that a malicious server sends instead of `model`.

    Args:
        model: The honest model; its last layer is changed in place by fishing.
        spec: `spec.malicious` says what to do.
        public_inputs: N x C x H x W, normalised: images of the server's own, from which
            it learns how bright images are, or how their features spread.
        public_labels: N class indices of them; None where the server does not know them.
        batch_size: Of the clients, among whose images one is to be told apart.

    Raises:
        InputError: `spec.malicious` makes no sense.
    """
    malice = parse_malice(spec.malicious, spec.n_classes)
    with torch.no_grad():
        if malice.kind == "imprint":
            dtype = next(model.parameters()).dtype
            model = Imprinted(model, spec.image_size, malice.number).to(dtype)
            _set_imprint(model, public_inputs)
        elif malice.kind == "trap":
            set_traps(_first_linear(model), public_inputs, malice.number, batch_size)
        elif malice.kind == "fishing":
            _fish(model, malice.number)
        else:
            values = _public_values(model, malice, public_inputs, public_labels)
            _fish_by_feature(model, malice, values, batch_size)
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
    thresholds = spread_ties(brightness.quantile(levels.to(brightness)))
    thresholds[0] = brightness.min() - MARGIN
    first.weight.fill_(1 / first.in_features)
    first.bias.copy_(-thresholds)
    direction = torch.randn(len(second.weight), generator=torch.Generator().manual_seed(0))
    second.weight.copy_(direction[:, None].expand_as(second.weight) / first.out_features)
    second.bias.zero_()


def spread_ties(thresholds: torch.Tensor) -> torch.Tensor:
    """Strictly growing thresholds: few public images share quantiles."""
    least = 1e-6 * torch.arange(len(thresholds), dtype=thresholds.dtype, device=thresholds.device)
    return thresholds.cummax(0).values + least


def _first_linear(model: nn.Module) -> nn.Linear:
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
