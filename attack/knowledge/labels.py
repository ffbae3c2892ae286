"""Label recovery: which classes, and how often each, are behind a shared gradient.

With cross-entropy, class i's row of the last layer's weight gradient is the mean over
samples of (p_i - [y = i]) times the embedding, and its bias gradient the mean of
(p_i - [y = i]): negative rows give classes away, their size how often they occur.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from attack.knowledge.clients import require_classes
from attack.knowledge.threat_models import Capability
from core.errors import InputError
from core.models.building import last_linear
from core.target import Target

# Below this, a bias gradient is rounding and no divisor.
_NO_GRADIENT = 1e-12


@dataclass(frozen=True)
class LastLayer:
    """What was shared of the classification layer, and the layer itself.

    Attributes:
        weight_gradient: n_classes x features.
        bias_gradient: n_classes; None where the layer has no bias or keeps it private.
        layer: The layer with the parameters the client started from.
        batch_size: Number of samples K behind the gradient.
    """

    weight_gradient: torch.Tensor
    bias_gradient: torch.Tensor | None
    layer: nn.Linear
    batch_size: int

    @property
    def n_classes(self) -> int:
        """Number of classes n."""
        return len(self.weight_gradient)

    def row_sums(self) -> torch.Tensor:
        """g_i, the sum of every class's row; negative for a class in the batch (ReLU features)."""
        return self.weight_gradient.sum(1)

    def require_bias(self, rule: str) -> torch.Tensor:
        """The bias gradient, or an `InputError` that names the rule."""
        if self.bias_gradient is None:
            raise InputError(
                f"label recovery {rule} needs the bias gradient of the last layer, which is not "
                "among what was shared; use llg"
            )
        return self.bias_gradient


# A rule maps target, model and last layer to K labels.
Rule = Callable[[Target, nn.Module, LastLayer], torch.Tensor]
_RULES: dict[str, Rule] = {}
_REQUIRES: dict[str, frozenset[Capability]] = {
    "known": frozenset({Capability.LABELS}),
}


def register_rule(name: str, *requires: Capability) -> Callable[[Rule], Rule]:
    """Make `--pseudo-label-init name` recover labels by the decorated function.

    Args:
        name: Must not be taken.
        requires: Beside the batch size, what the threat model must grant.

    Raises:
        ValueError: The name is registered already.
    """

    def register(rule: Rule) -> Rule:
        if name in _RULES:
            raise ValueError(f"label rule {name} is registered already")
        _RULES[name] = rule
        _REQUIRES[name] = frozenset({Capability.BATCH_SIZE, *requires})
        return rule

    return register


def rule_names() -> list[str]:
    """Every rule of `recover_labels`."""
    return ["known", *_RULES]


def rule_requires(rule: str) -> frozenset[Capability]:
    """What the threat model must grant for a rule."""
    _check_rule(rule)
    return _REQUIRES[rule]


def recover_labels(
    rule: str,
    target: Target,
    model: nn.Module | None = None,
    *,
    truth_labels: torch.Tensor | None = None,
) -> torch.Tensor:
    """Recover the labels of a batch from its shared gradient.

    Args:
        rule: A name in `rule_names()`.
        target: What the client shared.
        model: `target.build_model()`, if it is at hand already; left as it was.
        truth_labels: The labels, where the threat model grants them (rule "known").

    Returns:
        K class indices (int64, CPU), sorted unless they are the granted ones.

    Raises:
        InputError: Unknown rule, labels not granted, or a gradient without what the
            rule reads.
    """
    _check_rule(rule)
    if rule == "known":
        return _known(target, truth_labels)
    require_classes(f"label recovery {rule}", target.loss)
    model = target.build_model() if model is None else model
    labels = _RULES[rule](target, model, _last_layer(target, model))
    return labels.long().cpu().sort().values


def rules_by_exactness(target: Target) -> tuple[str, ...]:
    """The rules for a model that nothing is known of, the most exact first.

    The sign of the bias gradient is exact for one sample whatever the features are, and
    iLRG counts repeated labels; LLG, which trusts the signs of weights, assumes features
    that are not negative (after a ReLU).
    """
    if target.local.steps > 1:
        return ("fedavg", "llg")
    counting = "from_grads" if target.batch_size == 1 else "ilrg-robust"
    return (counting, "llg")


def recover_most_exactly(target: Target) -> torch.Tensor:
    """Recover labels by the most exact rule that applies, see `rules_by_exactness`.

    Returns:
        N class indices, sorted.

    Raises:
        InputError: No rule applies.
    """
    model = target.build_model()
    *earlier, last = rules_by_exactness(target)
    for rule in earlier:
        with contextlib.suppress(InputError):
            return recover_labels(rule, target, model)
    return recover_labels(last, target, model)


def _check_rule(rule: str) -> None:
    if rule not in _REQUIRES:
        raise InputError(
            f"--pseudo-label-init {rule}: unknown rule; known are {', '.join(rule_names())}"
        )


def _known(target: Target, labels: torch.Tensor | None) -> torch.Tensor:
    if labels is None:
        raise InputError(
            "--pseudo-label-init known: the labels are not granted (the checkpoint is stripped of "
            "its truth, or the threat model withholds them)"
        )
    if len(labels) != target.batch_size:
        raise InputError(f"{len(labels)} known labels for a batch of {target.batch_size}")
    # Soft labels and values of other losses are no indices.
    labels = labels if labels.is_floating_point() else labels.long()
    return labels.detach().cpu().clone()


def _last_layer(target: Target, model: nn.Module) -> LastLayer:
    name, layer = last_linear(model)
    weight = target.gradient.get(f"{name}.weight")
    if weight is None:
        raise InputError(
            f"label recovery reads the gradient of {name}.weight, which the client did not share"
        )
    bias = target.gradient.get(f"{name}.bias")
    bias = None if bias is None else bias.detach().double().cpu()
    return LastLayer(weight.detach().double().cpu(), bias, layer, target.batch_size)


@register_rule("llg")
def _llg(target: Target, model: nn.Module, last: LastLayer) -> torch.Tensor:
    """Label Leakage from Gradients: every negative class once, then the lowest again and again.

    Source: Wainakh et al., User-Level Label Leakage from Gradients in Federated Learning,
    PoPETs 2022, https://arxiv.org/abs/2105.09369.
    """
    labels, sums, impact = _llg_first_pass(last)
    while len(labels) < last.batch_size:
        lowest = int(sums.argmin())
        sums[lowest] -= impact
        labels.append(lowest)
    return torch.tensor(labels)


@register_rule("llg-stale")
def _llg_stale(target: Target, model: nn.Module, last: LastLayer) -> torch.Tensor:
    """LLG as a widespread implementation has it, for comparison with published numbers.

    In its second pass the impact is subtracted from the class emitted last in the first
    pass, not from the class just chosen, so that the choice hardly ever changes.
    """
    labels, sums, impact = _llg_first_pass(last)
    stale = labels[-1] if labels else 0
    while len(labels) < last.batch_size:
        labels.append(int(sums.argmin()))
        sums[stale] -= impact
    return torch.tensor(labels)


def _llg_first_pass(last: LastLayer) -> tuple[list[int], torch.Tensor, float]:
    """Labels certain from their sign, what is left of the row sums, and one sample's impact."""
    sums = last.row_sums()
    negative = (sums < 0).nonzero().flatten()
    impact = float(sums[negative].sum()) / last.batch_size * (1 + 1 / last.n_classes)
    # Noise can make more classes negative than there are samples: the lowest are kept.
    kept = negative[sums[negative].argsort()][: last.batch_size].sort().values
    sums = sums.clone()
    sums[kept] -= impact
    return kept.tolist(), sums, impact


@register_rule("from_grads")
def _from_grads(target: Target, model: nn.Module, last: LastLayer) -> torch.Tensor:
    """The classes of negative bias gradient (of negative row sum, where there is no bias).

    What the sign proves and no more: the rule cannot count, so labels still missing are
    filled with the found classes in turn, the most negative first.
    """
    signal = last.row_sums() if last.bias_gradient is None else last.bias_gradient
    order = signal.argsort()
    present = max(1, int((signal < 0).sum()))
    return order[torch.arange(last.batch_size) % present]


@register_rule("idlg")
def _idlg(target: Target, model: nn.Module, last: LastLayer) -> torch.Tensor:
    """The class of lowest row sum; exact for one sample with non-negative features.

    Source: Zhao, Mopuri, Bilen, iDLG: Improved Deep Leakage from Gradients, 2020,
    https://arxiv.org/abs/2001.02610.
    """
    if last.batch_size != 1:
        raise InputError(
            f"label recovery idlg is defined for one sample, not for a batch of {last.batch_size}"
        )
    return last.row_sums().argmin().view(1)


@register_rule("yin")
def _yin(target: Target, model: nn.Module, last: LastLayer) -> torch.Tensor:
    """The K classes of smallest row minimum, under the assumption that no label repeats.

    Source: Yin et al., See through Gradients: Image Batch Recovery via GradInversion,
    CVPR 2021 (label restoration), https://arxiv.org/abs/2104.07586.
    """
    if last.batch_size > last.n_classes:
        raise InputError(
            "label recovery yin assumes labels without repetition, which "
            f"{last.batch_size} samples of {last.n_classes} classes cannot have"
        )
    return last.weight_gradient.amin(1).argsort()[: last.batch_size]


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
    present = bias_gradient.abs() > _NO_GRADIENT
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
    bias_gradient = last.require_bias("ilrg-robust")
    negative = bias_gradient.clamp_max(0)
    if negative.min() > -_NO_GRADIENT:
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
    assert last.layer.bias is not None
    weight, bias = (p.detach().double().cpu() for p in (last.layer.weight, last.layer.bias))
    probabilities = (embeddings @ weight.T + bias).softmax(1)
    identity = torch.eye(last.n_classes, dtype=torch.float64)[classes]
    # The columns sum to zero: the number of samples is the equation that is missing.
    system = torch.cat([(probabilities - identity).T, torch.ones(1, len(classes))])
    right = torch.cat([bias_gradient, torch.ones(1)]) * last.batch_size
    counts = torch.zeros(last.n_classes, dtype=torch.float64)
    counts[classes] = torch.linalg.lstsq(system, right[:, None], driver="gelsd").solution.flatten()
    return _whole_counts(counts, last.batch_size, bias_gradient < 0)


@register_rule("fedavg", Capability.LOCAL_TRAINING)
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
        signal = last.row_sums() / max(feature_sum, _NO_GRADIENT)
    counts = last.batch_size * (probabilities - signal)
    return _whole_counts(counts, last.batch_size, signal < 0)


def _mean_outputs(
    target: Target, model: nn.Module, n_inputs: int = 64
) -> tuple[torch.Tensor, float]:
    """Mean probabilities (n) and mean sum of features, over random inputs and local steps."""
    _, layer = last_linear(model)
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
                outputs.append(torch.func.functional_call(model, state, (inputs,)))
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


def _whole_counts(counts: torch.Tensor, total: int, certain: torch.Tensor) -> torch.Tensor:
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


def label_accuracy(recovered: torch.Tensor, labels: torch.Tensor) -> float:
    """Share of labels recovered, as multisets: overlap / K, whatever their order."""
    overlap = Counter(recovered.tolist()) & Counter(labels.tolist())
    return overlap.total() / len(labels)


def accuracy_by_rule(target: Target, labels: torch.Tensor) -> dict[str, dict[str, Any]]:
    """Every rule but "known" on one target.

    Args:
        target: What the client shared.
        labels: The true labels, to compare with.

    Returns:
        By rule: labels and accuracy, or None for both and the reason why the rule does
        not apply.
    """
    model = target.build_model()
    return {r: _one_rule(r, target, model, labels) for r in rule_names() if r != "known"}


def _one_rule(rule: str, target: Target, model: nn.Module, labels: torch.Tensor) -> dict[str, Any]:
    try:
        found = recover_labels(rule, target, model)
    except InputError as error:
        return {"labels": None, "accuracy": None, "reason": str(error)}
    accuracy = label_accuracy(found, labels)
    return {"labels": found.tolist(), "accuracy": accuracy, "reason": None}
