"""The classification layer: what was shared of it, and what reaches it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import nn

from core.errors import InputError
from core.local_training import SGD
from core.losses import CrossEntropy, main_output
from core.models.head import example_for, find_linear_head
from core.models.unchanged import in_mode, unchanged
from core.target import Target

# Below this share of the largest feature, a negative one is rounding.
_ROUNDING = 1e-6
# A norm below this share of a clipping norm was not clipped to it.
_UNREACHED = 1 - 1e-4


@dataclass(frozen=True)
class LastLayer:
    """What was shared of the classification layer, and the layer itself.

    Attributes:
        weight_gradient: n_classes x features; zeros where the layer keeps its weight private.
        bias_gradient: n_classes; None where the layer has no bias or keeps it private.
        layer: The layer with the parameters the client started from.
        batch_size: Number of samples K behind the gradient.
        label_smoothing: Share of the target that is spread over all classes.
        class_weights: n_classes; None where all samples weigh the same.
    """

    weight_gradient: torch.Tensor
    bias_gradient: torch.Tensor | None
    layer: nn.Linear
    batch_size: int
    label_smoothing: float = 0.0
    class_weights: torch.Tensor | None = None

    @property
    def n_classes(self) -> int:
        """Number of classes n."""
        return len(self.weight_gradient)

    def row_sums(self) -> torch.Tensor:
        """g_i, the sum of every class's row; negative for a class in the batch (ReLU features)."""
        return self.weight_gradient.sum(1)

    def outputs(self, features: torch.Tensor) -> torch.Tensor:
        """What the layer gives for N x features, in float64."""
        weight, bias = self.layer.weight, self.layer.bias
        outputs = features @ weight.detach().double().cpu().T
        return outputs if bias is None else outputs + bias.detach().double().cpu()

    def targets(self, labels: torch.Tensor) -> torch.Tensor:
        """What cross-entropy compares K samples' probabilities with.

        With class weights w a sample of class y counts w_y of the batch's sum of them, and the
        smoothed share of class c counts w_c, as in `torch.nn.functional.cross_entropy`.

        Args:
            labels: K class indices.

        Returns:
            K x n_classes targets t, of mean weight 1: the gradient in the outputs is the mean of
            (sum of t) p - t.
        """
        hard = torch.eye(self.n_classes, dtype=torch.float64)[labels]
        smoothed = self.label_smoothing / self.n_classes
        if self.class_weights is None:
            return (1 - self.label_smoothing) * hard + smoothed
        weights = self.class_weights[labels]
        targets = (1 - self.label_smoothing) * weights[:, None] * hard
        return (targets + smoothed * self.class_weights) / weights.mean()

    def unweighted(self, shares: torch.Tensor) -> torch.Tensor:
        """Counts of samples from what the classes weigh in the batch, of the same sum."""
        if self.class_weights is None:
            return shares
        counts = shares.clamp_min(0) / self.class_weights
        return counts * (self.batch_size / counts.sum().clamp_min(1e-30))

    def require_bias(self, rule: str) -> torch.Tensor:
        """The bias gradient, or an `InputError` that names the rule."""
        if self.bias_gradient is None:
            raise InputError(
                f"label recovery {rule} needs the bias gradient of the last layer, which is not "
                "among what was shared; use exact"
            )
        return self.bias_gradient


def head_of(target: Target, model: nn.Module) -> tuple[str, nn.Linear]:
    """Name and module of the classification layer, found from the model's computation."""
    return find_linear_head(model, example_for(model, target.data))


def last_layer_of(target: Target, model: nn.Module, bias_alone: bool = False) -> LastLayer:
    """What a target shares of the classification layer.

    Args:
        target: What the client shared.
        model: `target.build_model()`.
        bias_alone: Whether the bias gradient of one sample is enough.

    Raises:
        InputError: The layer's weight was not shared, or its gradient says nothing.
    """
    name, layer = head_of(target, model)
    place = f"{name}." if name else ""
    weight = target.gradient.get(f"{place}weight")
    bias = target.gradient.get(f"{place}bias")
    if weight is None and bias is not None and bias_alone and target.batch_size == 1:
        weight = torch.zeros(len(bias), layer.in_features)
    if weight is None:
        raise InputError(
            f"label recovery reads the gradient of {place}weight, which the client did not share: "
            "give the labels, or optimise them with the inputs (targets='optimise', --joint-labels)"
        )
    for tensor in (weight, bias):
        if tensor is not None and not tensor.isfinite().all():
            raise InputError(f"the shared gradient of the last layer {name} is not finite")
    if not weight.any() and (bias is None or not bias.any()):
        raise InputError(
            f"the shared gradient of the last layer {name} is zero everywhere, which says nothing "
            "about labels"
        )
    bias = None if bias is None else step_undone(target, bias, layer.bias)
    smoothing, weights = 0.0, None
    if isinstance(target.loss, CrossEntropy):
        smoothing = target.loss.label_smoothing
        if target.loss.weights is not None:
            weights = torch.tensor(target.loss.weights, dtype=torch.float64)
    weight = step_undone(target, weight, layer.weight)
    return LastLayer(weight, bias, layer, target.batch_size, smoothing, weights)


def step_undone(target: Target, shared: torch.Tensor, parameter: torch.Tensor) -> torch.Tensor:
    """The loss's gradient from what one step of SGD made of it, as far as that can be undone.

    A first step's direction is (1 + momentum, with Nesterov's) (g + weight decay theta). What
    clipped g, or a defense did to the direction, stays.

    Args:
        target: Says how the client trained.
        shared: The update of a parameter.
        parameter: Its value before.

    Returns:
        In float64 on the CPU; the update itself where it is no such step.
    """
    local, shared = target.local, shared.detach().double().cpu()
    if target.defenses or local.steps > 1 or local.optimizer != SGD:
        return shared
    rate = local.learning_rates()[0] / local.lr
    lookahead = 1 + local.momentum if local.nesterov else 1.0
    if not rate:
        return shared
    return shared / (rate * lookahead) - local.weight_decay * parameter.detach().double().cpu()


def common_factor(target: Target) -> str:
    """What may have multiplied one step's whole gradient by an unknown factor, in words.

    Clipping to a norm that what was shared does not reach has left it as it was.

    Returns:
        Empty where nothing has.
    """
    if target.local.steps > 1 or target.local.optimizer != SGD:
        return f"local training {target.local.word}"
    found = {name: value.double() for name, value in target.gradient.items()}
    for word in target.defenses:
        kind, _, value = word.partition(":")
        if kind != "clip" or not _norm(found) < float(value or 1) * _UNREACHED:
            return word
    norm = target.local.clip_norm
    if norm is None:
        return ""
    undone = {n: step_undone(target, v, target.state_dict[n]) for n, v in found.items()}
    return "" if _norm(undone) < norm * _UNREACHED else f"local training {target.local.word}"


def _norm(gradient: Mapping[str, torch.Tensor]) -> float:
    return float(torch.stack([g.square().sum() for g in gradient.values()]).sum().sqrt())


def require_plain_head(target: Target, model: nn.Module) -> None:
    """Refuse a model that does more to the last layer's output than to hand it on.

    Raises:
        InputError: The outputs are not those of the layer.
    """
    name, layer = head_of(target, model)
    outputs: list[torch.Tensor] = []
    handle = layer.register_forward_hook(lambda _, __, output: outputs.append(output.detach()))
    try:
        with torch.no_grad(), unchanged(model):
            given = main_output(in_mode(model, False)(example_for(model, target.data)))
    finally:
        handle.remove()
    if given.numel() != outputs[-1].numel() or not torch.equal(given.ravel(), outputs[-1].ravel()):
        raise InputError(
            f"the model changes the outputs of its last layer {name} (a sigmoid, a scale), so that "
            "no rule recovers its targets: give them, or optimise them with the inputs"
        )


def random_features(target: Target, model: nn.Module, n_inputs: int = 16) -> torch.Tensor:
    """What reaches the classification layer when the model reads noise.

    Args:
        target: Says the inputs' shape and the mode of the model.
        model: Left as it was.
        n_inputs: Each is noise of its own contrast around its own mean.

    Returns:
        Rows x features, float64, CPU; one row per input unless the layer reads several.
    """
    _, layer = head_of(target, model)
    generator = torch.Generator().manual_seed(0)
    channels, *sides = target.data.shape
    ones = [1] * len(sides)
    mean = torch.randn(n_inputs, channels, *ones, generator=generator)
    contrast = torch.rand(n_inputs, 1, *ones, generator=generator)
    noise = torch.randn(n_inputs, channels, *sides, generator=generator)
    inputs = (mean + contrast * noise).to(layer.weight.device, layer.weight.dtype)
    features: list[torch.Tensor] = []
    handle = layer.register_forward_pre_hook(lambda _, given: features.append(given[0].detach()))
    try:
        with torch.no_grad(), unchanged(model):
            torch.manual_seed(0)
            in_mode(model, target.train_mode)(inputs)
    finally:
        handle.remove()
    return torch.cat([each.flatten(0, -2) for each in features]).double().cpu()


def lowest_feature(target: Target, model: nn.Module) -> float | None:
    """The most negative value that noise causes at the classification layer's input.

    Returns:
        None where no feature is negative, as behind a ReLU, a sigmoid or their average.
    """
    features = random_features(target, model, n_inputs=4)
    lowest = float(features.min())
    return lowest if lowest < -_ROUNDING * float(features.abs().max()) else None
