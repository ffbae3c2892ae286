"""Rules that count: how often every class occurs, from equations with whole solutions.

With cross-entropy, the bias gradient g is the mean of p - [y = i] over the samples: K (mean p - g)
are the counts, as soon as the mean probabilities p are known.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import nn

from attack.knowledge.labels.last_layer import LastLayer, head_of
from attack.knowledge.labels.registry import SignedFeatures, register_rule
from attack.knowledge.threat_models import Capability
from core.errors import InputError
from core.losses import main_output
from core.target import Target

# Below this, a bias gradient is rounding and no divisor.
NO_GRADIENT = 1e-12


@register_rule("ilrg")
def _ilrg(target: Target, model: nn.Module, last: LastLayer) -> torch.Tensor:
    """Instance-wise batch label restoration: how often each class occurs, by linear equations.

    The quotient of a class's weight and bias gradient is (nearly) the mean embedding of
    its samples; the model's probabilities p_j there give K grad b = (P^T - I) counts.
    Exact while those probabilities are: less so the more confident the network is, and
    the more of all classes are in the batch.

    Source: Ma, Sun, Cui, Li, Guo, Liu, Instance-wise Batch Label Restoration via Gradients
    in Federated Learning, ICLR 2023 (restoring instance counts), https://openreview.net/forum?id=FIrQfNSOoTr.
    """
    bias_gradient = last.require_bias("ilrg")
    present = bias_gradient.abs() > NO_GRADIENT
    if not present.any():
        raise InputError("label recovery ilrg: the shared bias gradient is zero")
    embeddings = last.weight_gradient[present] / bias_gradient[present, None]
    return _solve_counts(last, bias_gradient, embeddings, present.nonzero().flatten())


@register_rule("ilrg-robust")
def _ilrg_robust(target: Target, model: nn.Module, last: LastLayer) -> torch.Tensor:
    """iLRG that trusts a class's embedding by how negative its bias gradient is.

    Where it is hardly or not negative, a class is absent or hidden under the other
    samples' probability of it, and the quotient extrapolates; such an embedding is drawn
    to the mean of the trusted ones. On trained networks far better than iLRG, elsewhere
    the same.
    """
    return robust_counts(last)


def robust_counts(last: LastLayer) -> torch.Tensor:
    """The labels of the rule "ilrg-robust".

    Raises:
        InputError: No bias gradient was shared, or no class has a negative one.
    """
    bias_gradient = last.require_bias("ilrg-robust")
    negative = bias_gradient.clamp_max(0)
    if negative.min() > -NO_GRADIENT:
        raise InputError("label recovery ilrg-robust: no class has a negative bias gradient")
    # Full trust from half the most negative gradient on.
    trust = (2 * negative / negative.min()).clamp_max(1)[:, None]
    mean = last.weight_gradient[negative < 0].sum(0) / negative.sum()
    quotient = last.weight_gradient / bias_gradient[:, None]
    embeddings = torch.where(trust > 0, trust * quotient + (1 - trust) * mean, mean)
    return _solve_counts(last, bias_gradient, embeddings, torch.arange(last.n_classes))


def _solve_counts(
    last: LastLayer, bias_gradient: torch.Tensor, embeddings: torch.Tensor, classes: torch.Tensor
) -> torch.Tensor:
    """Solve K grad b = (P^T - I) counts for the counts of `classes` with these embeddings."""
    probabilities = last.outputs(embeddings).softmax(1)
    identity = torch.eye(last.n_classes, dtype=torch.float64)[classes]
    # The columns sum to zero: the number of samples is the equation that is missing.
    system = torch.cat([(probabilities - identity).T, torch.ones(1, len(classes))])
    right = torch.cat([bias_gradient, torch.ones(1)]) * last.batch_size
    counts = torch.zeros(last.n_classes, dtype=torch.float64)
    counts[classes] = torch.linalg.lstsq(system, right[:, None], driver="gelsd").solution.flatten()
    return whole_counts(counts, last.batch_size, bias_gradient < 0)


@register_rule(
    "fedavg",
    Capability.LOCAL_TRAINING,
    signed_features=SignedFeatures.MISLEAD_WITHOUT_BIAS,
    class_weights=True,
)
def _fedavg(target: Target, model: nn.Module, last: LastLayer) -> torch.Tensor:
    """Counts from an update of several local steps, by the model's mean output on the way.

    K (mean p - g) are the counts, with g the averaged bias gradient (or the averaged row
    sum over the mean feature sum). Mean p and features are estimated with random inputs
    at the parameters on the straight line between the model sent and the one returned.

    Source: Geng et al., Towards General Deep Leakage in Federated Learning, 2021,
    https://arxiv.org/abs/2110.09074 (counts); Dimitrov et al., Data Leakage in Federated
    Averaging, TMLR 2022, https://openreview.net/forum?id=e7A0B99zJf
    (interpolated parameters).
    """
    probabilities, feature_sum = _mean_outputs(target, model)
    if last.bias_gradient is not None:
        signal = last.bias_gradient
    else:
        signal = last.row_sums() / max(feature_sum, NO_GRADIENT)
    counts = last.unweighted(last.batch_size * (probabilities - signal))
    return whole_counts(counts, last.batch_size, signal < 0)


def _mean_outputs(
    target: Target, model: nn.Module, n_inputs: int = 64
) -> tuple[torch.Tensor, float]:
    """Mean probabilities (n) and mean sum of features, over random inputs and local steps."""
    _, layer = head_of(target, model)
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(n_inputs, *target.data.shape, generator=generator)
    device, dtype = layer.weight.device, layer.weight.dtype
    inputs = inputs.to(device, dtype)
    features: list[torch.Tensor] = []
    handle = layer.register_forward_pre_hook(lambda _, given: features.append(given[0].detach()))
    outputs = []
    try:
        for state in _states_on_the_way(target, model):
            with torch.no_grad(), torch.random.fork_rng(devices=[]):
                outputs.append(main_output(torch.func.functional_call(model, state, (inputs,))))
    finally:
        handle.remove()
    mean = torch.cat(outputs).double().softmax(1).mean(0)
    return mean.cpu(), float(torch.cat(features).double().flatten(1).sum(1).mean())


def _states_on_the_way(target: Target, model: nn.Module) -> Iterator[dict[str, torch.Tensor]]:
    """Parameters (and copied buffers) before every local step, on the straight line."""
    for step in range(target.local.updates):
        state = {name: value.detach().clone() for name, value in model.state_dict().items()}
        for name, gradient in target.gradient.items():
            state[name] -= step * target.local.lr * gradient.to(state[name])
        yield state


def whole_counts(counts: torch.Tensor, total: int, certain: torch.Tensor) -> torch.Tensor:
    """Labels from real-valued counts: whole numbers, not negative, of the right sum.

    Args:
        counts: n estimates.
        total: Number of samples K.
        certain: n booleans, the classes that occur at least once.
    """
    floor = certain.double() if int(certain.sum()) <= total else torch.zeros_like(counts)
    counts = _project(counts.nan_to_num(), total, floor)
    # An estimate a rounding error below a whole number is that number.
    whole = (counts + 1e-6).floor()
    missing = int(total - whole.sum())
    whole[(counts - whole).argsort(descending=True)[:missing]] += 1
    return torch.repeat_interleave(torch.arange(len(whole)), whole.long())


def _project(counts: torch.Tensor, total: int, floor: torch.Tensor) -> torch.Tensor:
    """The nearest counts of sum `total` that are nowhere below `floor`: a common shift, cut off."""
    low, high = float(counts.min()) - total, float(counts.max())
    for _ in range(100):
        shift = (low + high) / 2
        too_many = float(torch.maximum(counts - shift, floor).sum()) > total
        low, high = (shift, high) if too_many else (low, shift)
    return torch.maximum(counts - high, floor)
