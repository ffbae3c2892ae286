"""The default: labels by whatever is exact for what was shared, tried against the model.

- One sample: p - y has exactly one negative entry. The bias gradient shows it; without one, the
  weight gradient is an outer product whose left factor shows it up to a sign.
- Fewer samples than classes: counts by several estimates, and by exchanging labels; the hypothesis
  that explains the last layer's gradient is right (`attack.knowledge.labels.fit`).
- More samples: counts by the model's mean probabilities, which nothing verifies.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import nn

from attack.knowledge.labels.counts import NO_GRADIENT, robust_counts, whole_counts
from attack.knowledge.labels.fit import EXPLAINED, Equations, misfit
from attack.knowledge.labels.last_layer import LastLayer, random_features
from attack.knowledge.labels.other_losses import binary, features_of_one, regression
from attack.knowledge.labels.registry import Rule, find_rule, register_rule
from attack.knowledge.threat_models import Capability
from core.errors import InputError
from core.losses import Targets
from core.target import Target

# Hypotheses that differ in one label from the best one: so many classes are tried, so many rounds.
_TRIED_CLASSES = 8
_ROUNDS = 3
# Where the best hypothesis leaves more than this unexplained, none was tried well.
_HOPELESS = 0.5
# Sine of the angle below which a class passes for one of the batch.
_IN_SPAN = 0.3
_TINY = 1e-30


@register_rule(
    "exact",
    over_steps=frozenset({Capability.LOCAL_TRAINING}),
    targets=frozenset({Targets.CLASSES, Targets.LABELS, Targets.VALUES}),
    bias_alone=True,
    class_weights=True,
)
def _exact(target: Target, model: nn.Module, last: LastLayer) -> torch.Tensor:
    """What is exact for what was shared: bias signs, a rank-one factor, or verified counts.

    For one sample exact whatever the features are; for fewer samples than classes exact
    wherever a hypothesis explains the gradient, under an unknown common factor (clipping), too;
    for more samples as good as the model's probabilities on noise. Under binary cross-entropy
    it is the rule "binary", under squared error "regression".
    """
    return _BY_TARGETS[target.loss.targets](target, model, last)


def _classes(target: Target, model: nn.Module, last: LastLayer) -> torch.Tensor:
    """K class indices."""
    if last.batch_size == 1:
        return _one_label(target, model, last).view(1)
    if target.local.steps > 1:
        return find_rule("fedavg").recover(target, model, last)
    return _Batch(last, random_features(target, model)).labels()


_BY_TARGETS: dict[Targets, Rule] = {
    Targets.CLASSES: _classes,
    Targets.LABELS: binary,
    Targets.VALUES: regression,
}


def _one_label(target: Target, model: nn.Module, last: LastLayer) -> torch.Tensor:
    """The label of one sample."""
    gradient = last.bias_gradient
    if gradient is not None and not last.weight_gradient.any() and last.label_smoothing > 0:
        raise InputError(
            "label recovery exact: with label smoothing the last layer's bias gradient alone has "
            "no sign that tells the label: give it, or optimise it with the inputs"
        )
    features = None if gradient is None else features_of_one(last.weight_gradient, gradient)
    if gradient is not None and features is not None:
        return _smoothed_label(last, features) if last.label_smoothing > 0 else gradient.argmin()
    if gradient is not None and target.local.steps > 1:
        return gradient.argmin()
    everything = last.weight_gradient
    if gradient is not None:
        everything = torch.cat([everything, gradient[:, None]], dim=1)
    left = torch.linalg.svd(everything, full_matrices=False).U[:, 0]
    if last.n_classes > 2:
        # The entry of y is minus the sum of all others, whatever the sign of the whole.
        return left.abs().argmax()
    direction = random_features(target, model).mean(0)
    if gradient is not None:
        direction = torch.cat([direction, torch.ones(1)])
    return (everything @ direction).argmin()


def _smoothed_label(last: LastLayer, features: torch.Tensor) -> torch.Tensor:
    """The label whose excess at these features has the direction of the bias gradient.

    Smoothed targets have no sign of their own.
    """
    assert last.bias_gradient is not None
    probabilities = last.outputs(features).softmax(0)
    targets = torch.cat([last.targets(torch.tensor([label])) for label in range(last.n_classes)])
    excess = targets.sum(1, keepdim=True) * probabilities - targets
    return (excess @ last.bias_gradient / excess.norm(dim=1).clamp_min(_TINY)).argmax()


@dataclass(frozen=True)
class _Trial:
    """A hypothesis that was tried.

    Attributes:
        misfit: The share of the gradient that it leaves unexplained.
        labels: K class indices, sorted.
        factor: What the client may have multiplied its gradient by; None: nothing.
    """

    misfit: float
    labels: torch.Tensor
    factor: float | None


class _Batch:
    """Hypotheses about a batch's labels, and the one that explains the gradient.

    Args:
        last: What was shared.
        features: Rows x features that noise causes at the layer's input.
    """

    def __init__(self, last: LastLayer, features: torch.Tensor) -> None:
        self.last = last
        self.centre = features.mean(0)
        self.radius = (features - self.centre).norm(dim=1).max()
        self.probabilities = last.outputs(features).softmax(1).mean(0)
        if last.bias_gradient is not None:
            self.gradient = last.bias_gradient
        else:
            # The rows over the mean features: exact, were all features these.
            self.gradient = last.weight_gradient @ self.centre / self.centre.square().sum()

    def labels(self) -> torch.Tensor:
        """The labels that explain the gradient, else the most plausible ones."""
        equations = Equations.of(self.last)
        if equations is None:
            return self._by_mean_outputs(1.0)
        trials = []
        for trial in self._trials(equations):
            trials.append(trial)
            if trial.misfit < EXPLAINED:
                return trial.labels
        best = min(trials, key=_doubt)
        return best.labels if best.misfit < _HOPELESS else trials[0].labels

    def _trials(self, equations: Equations) -> Iterator[_Trial]:
        """Estimates first, as shared and rescaled; then what differs from the best in a label."""
        rescaled = self._common_factor()
        first = []
        for factor in (None, rescaled):
            for labels in self._hypotheses(1.0 if factor is None else factor):
                first.append(self._try(equations, labels, factor))
                yield first[-1]
        for is_free in (False, True):
            best = min((t for t in first if (t.factor is not None) == is_free), key=_doubt)
            yield from self._exchanges(equations, best)

    def _exchanges(self, equations: Equations, best: _Trial) -> Iterator[_Trial]:
        """Hypotheses that differ from the best one in a label, as long as that helps."""
        certainty = self._distances() if self.last.bias_gradient is None else self.gradient
        classes = certainty.argsort()[:_TRIED_CLASSES].tolist()
        for _ in range(_ROUNDS):
            tried = [best]
            for place, label in itertools.product(range(len(best.labels)), classes):
                repeated = place and best.labels[place] == best.labels[place - 1]
                if repeated or best.labels[place] == label:
                    continue
                labels = best.labels.clone()
                labels[place] = label
                tried.append(self._try(equations, labels.sort().values, best.factor))
                yield tried[-1]
            winner = min(tried, key=_doubt)
            if winner is best:
                return
            best = winner

    def _try(self, equations: Equations, labels: torch.Tensor, factor: float | None) -> _Trial:
        start = self._embeddings()[labels]
        return _Trial(misfit(equations, labels, start, factor=factor), labels, factor)

    def _hypotheses(self, factor: float) -> list[torch.Tensor]:
        """Estimates of the labels, the most trusted first, each once.

        Args:
            factor: What the shared gradient is to be multiplied by.
        """
        found = [self._by_quotients(factor), self._by_mean_outputs(factor)]
        if factor == 1:
            found += [self._by_span(), self._by_signs()]
            if self.last.bias_gradient is not None:
                with contextlib.suppress(InputError):
                    found.append(robust_counts(self.last))
        return list({tuple(labels.tolist()): labels for labels in found}.values())

    def _common_factor(self) -> float:
        """What clipping may have divided the gradient by, from the classes that do not occur.

        Their bias gradient is their mean probability.
        """
        absent = self.gradient > 0
        gradient, probabilities = self.gradient[absent], self.probabilities[absent]
        return float((gradient * probabilities).sum() / gradient.square().sum().clamp_min(_TINY))

    def _by_mean_outputs(self, factor: float) -> torch.Tensor:
        """Counts by the mean probabilities on noise: K (p - g)."""
        return self._whole(self.last.batch_size * (self.probabilities - factor * self.gradient))

    def _by_quotients(self, factor: float) -> torch.Tensor:
        """Counts by every class's probabilities at its mean features, as iLRG has them."""
        k, n, smoothing = self.last.batch_size, self.last.n_classes, self.last.label_smoothing
        probabilities = self.last.outputs(self._embeddings()).softmax(1)
        identity = (1 - smoothing) * torch.eye(n, dtype=torch.float64)
        system = torch.cat([(probabilities - identity).T, torch.ones(1, n, dtype=torch.float64)])
        right = torch.cat([factor * self.gradient + smoothing / n, torch.ones(1)]) * k
        counts = torch.linalg.lstsq(system, right[:, None], driver="gelsd").solution.flatten()
        return self._whole(counts * (1 - smoothing) + k * smoothing / n)

    def _by_span(self) -> torch.Tensor:
        """The classes whose excess lies in the span of the gradient's columns, filled up in turn.

        Neither a factor, nor signs, nor the bias matter to it.
        """
        k, distances = self.last.batch_size, self._distances()
        order = distances.argsort()
        present = min(k, max(1, int((distances < _IN_SPAN).sum())))
        return order[torch.arange(k) % present].sort().values

    def _distances(self) -> torch.Tensor:
        """n sines of the angle between a sample's excess p - [y = i] and the gradient's columns."""
        rank = min(self.last.batch_size, self.last.n_classes - 1)
        columns = torch.linalg.svd(self.last.weight_gradient, full_matrices=False).U[:, :rank]
        excess = self.probabilities - torch.eye(self.last.n_classes, dtype=torch.float64)
        outside = excess - (excess @ columns) @ columns.T
        return outside.norm(dim=1) / excess.norm(dim=1).clamp_min(_TINY)

    def _by_signs(self) -> torch.Tensor:
        """The classes of negative gradient, filled up in turn."""
        k, order = self.last.batch_size, self.gradient.argsort()
        present = max(1, int((self.gradient < 0).sum()))
        return order[torch.arange(k) % present].sort().values

    def _whole(self, counts: torch.Tensor) -> torch.Tensor:
        """Labels from the sums of targets over the batch."""
        k, n, smoothing = self.last.batch_size, self.last.n_classes, self.last.label_smoothing
        weights = self.last.class_weights
        # What an absent class has of smoothed targets alone, at most.
        spread = 1 if weights is None else weights / weights.min()
        certain = self.gradient < -smoothing / n * spread
        shares = (counts - k * smoothing / n) / (1 - smoothing)
        return whole_counts(self.last.unweighted(shares), k, certain)

    def _embeddings(self) -> torch.Tensor:
        """n x features, every class's mean features: quotients, no further off than noise's are.

        A class that is hardly in the gradient has no quotient to trust; it gets the mean.
        """
        gradient = self.gradient
        safe = torch.where(gradient.abs() < NO_GRADIENT, NO_GRADIENT, gradient)
        away = self.last.weight_gradient / safe[:, None] - self.centre
        shrink = (self.radius / away.norm(dim=1).clamp_min(_TINY)).clamp_max(1)
        lowest = float(gradient.min())
        # Full trust from half the most negative gradient on.
        trust = (2 * gradient / lowest).clamp(0, 1) if lowest < 0 else torch.zeros_like(gradient)
        return self.centre + (trust * shrink)[:, None] * away


def _doubt(trial: _Trial) -> float:
    """What a free factor explains counts half."""
    return trial.misfit * (1 if trial.factor is None else 2)
