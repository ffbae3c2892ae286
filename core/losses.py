"""What a client's outputs cost: the losses that a model may be trained with.

A `Loss` maps outputs and targets to a scalar. It also says what its targets are, because
label rules, metrics and several processes depend on that, and what may be optimised in
their place where an attacker does not know them.

>>> loss = as_loss("mse")
>>> loss_from(loss.describe())(outputs, targets)  # the same number
"""

from __future__ import annotations

import abc
import enum
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import nn

from core.errors import InputError
from core.registry import Registry

# What a model gives: a tensor, or several of them in a tuple, a dictionary or an object.
Outputs = torch.Tensor | Sequence[torch.Tensor] | Mapping[str, torch.Tensor] | object
# Plain values, as a record or a checkpoint holds them.
Plain = str | float | bool | None | list[float] | list[str] | dict[str, "Plain"]
Description = dict[str, Plain]
# A function that somebody else wrote.
Function = Callable[..., torch.Tensor]
# Where the main output stands in dictionaries and objects of common libraries.
MAIN_OUTPUTS = ("logits", "out", "output", "prediction")
# Of Dice: keeps classes that are neither there nor predicted from 0/0.
DICE_SMOOTHING = 1.0


class Targets(enum.Enum):
    """What a loss compares the outputs with."""

    CLASSES = "classes"  # N class indices, or N x n probabilities.
    LABELS = "labels"  # N x n numbers in [0, 1]: several findings per sample.
    VALUES = "values"  # Numbers of the outputs' shape.
    PIXEL_CLASSES = "pixel classes"  # N x spatial class indices.
    TOKENS = "tokens"  # N x T token ids, those of the inputs.
    OTHER = "other"  # Whatever a given function takes.


class Loss(abc.ABC):
    """What a client minimises.

    Attributes:
        name: Word for messages, tables and files.
        targets: What it compares the outputs with.
        mean_over_samples: Whether the loss of a batch is the mean of its samples' losses, so
            that a batch may be spread over processes and samples be clipped one by one.
        batchable: Whether `torch.func.vmap` may run it over several batches at once.
    """

    name: str = ""
    targets: Targets = Targets.OTHER
    mean_over_samples: bool = True
    batchable: bool = True

    @abc.abstractmethod
    def __call__(self, outputs: Outputs, targets: torch.Tensor) -> torch.Tensor:
        """The loss of a batch, a scalar.

        Args:
            outputs: What the model gives for N samples.
            targets: What belongs to them; the first dimension is N.
        """

    def total(self, outputs: Outputs, targets: torch.Tensor) -> torch.Tensor:
        """The sum over the samples, where the loss is their mean."""
        return self(outputs, targets) * len(targets)

    def describe(self) -> Description:
        """Plain values from which `loss_from` makes it again; `loss` is among them."""
        return {"loss": self.name}

    def fitted(self, outputs: Outputs, targets: torch.Tensor) -> torch.Tensor:
        """The targets in the shape and type that the loss takes.

        Args:
            outputs: What the model gives for N samples, or for the first of them only.
            targets: As somebody gave them; the first dimension is N.

        Raises:
            InputError: They do not fit the outputs.
        """
        return targets

    def relaxed(self, variables: torch.Tensor) -> torch.Tensor:
        """Targets from free variables that are optimised in their place, differentiable.

        Args:
            variables: Real numbers: for classes N x n, for all others of the outputs' shape.

        Raises:
            InputError: Nobody knows what stands for the targets of a given function.
        """
        if self.targets is Targets.OTHER:
            raise InputError(
                f"the targets of the loss {self.name} cannot be optimised, because nothing says "
                "what they are; give them, or wrap the loss as GivenLoss(function, targets=...)"
            )
        return _RELAXED[self.targets](variables)

    def decided(self, variables: torch.Tensor) -> torch.Tensor:
        """The targets that optimised variables stand for in the end."""
        if self.targets in (Targets.CLASSES, Targets.TOKENS):
            return variables.argmax(-1)
        if self.targets is Targets.PIXEL_CLASSES:
            return variables.argmax(1)
        return self.relaxed(variables)

    def __repr__(self) -> str:
        values = [f"{k}={v!r}" for k, v in self.describe().items() if k != "loss" and v]
        return f"{type(self).__name__}({', '.join(values)})"


_RELAXED: dict[Targets, Callable[[torch.Tensor], torch.Tensor]] = {
    Targets.CLASSES: lambda variables: variables.softmax(-1),
    Targets.LABELS: torch.sigmoid,
    Targets.VALUES: lambda variables: variables,
    Targets.PIXEL_CLASSES: lambda variables: variables.softmax(1),
    Targets.TOKENS: lambda variables: variables.softmax(-1),
}


def main_output(outputs: Outputs) -> torch.Tensor:
    """The tensor that a loss without a word about heads compares with its targets.

    Args:
        outputs: A tensor, a sequence whose first tensor counts, or a dictionary or object with
            an entry `logits`, `out`, `output` or `prediction`.

    Raises:
        InputError: None of these.
    """
    if isinstance(outputs, torch.Tensor):
        return outputs
    for name in MAIN_OUTPUTS:
        value = outputs.get(name) if isinstance(outputs, Mapping) else getattr(outputs, name, None)
        if isinstance(value, torch.Tensor):
            return value
    if isinstance(outputs, Sequence) and outputs and isinstance(outputs[0], torch.Tensor):
        return outputs[0]
    raise InputError(
        f"the model gives a {type(outputs).__name__}, in which no tensor is the main output "
        f"({', '.join(MAIN_OUTPUTS)}); give a loss that takes it as it is"
    )


_LOSSES = Registry[type[Loss]]("loss")
L = TypeVar("L", bound=type[Loss])


def register_loss(kind: L) -> L:
    """Class decorator: make a loss known by its name.

    The fields of its description, less `loss`, are the arguments that make it again.

    Raises:
        ValueError: The name is taken.
    """
    _LOSSES.add(kind.name, kind)
    return kind


def loss_names() -> list[str]:
    """Names of all registered losses."""
    return _LOSSES.names()


def loss_class(name: str) -> type[Loss]:
    """The loss of that name.

    Raises:
        InputError: There is none.
    """
    return _LOSSES.find(name, f"the loss {name} is unknown")


def loss_from(description: Mapping[str, object]) -> Loss:
    """The loss that describes itself so.

    Args:
        description: What `Loss.describe` gave, perhaps read from a file.

    Raises:
        InputError: No such loss, or values that it does not take.
    """
    kind = loss_class(str(description.get("loss")))
    arguments = {str(key): value for key, value in description.items() if key != "loss"}
    try:
        return kind(**arguments)
    except (TypeError, ValueError, AttributeError) as error:
        raise InputError(f"the description of the loss {kind.name} is broken: {error}") from None


def as_loss(given: str | Function | Loss | None) -> Loss:
    """The loss that a user means.

    Args:
        given: A name in `loss_names()`; None for cross-entropy; a `Loss`; or any function of
            (outputs, targets) to a scalar, such as an `nn.Module`. Torch's own losses become
            the ready ones of the same meaning.

    Raises:
        InputError: No such name, or nothing that can be called.
    """
    if given is None:
        return CrossEntropy()
    if isinstance(given, Loss):
        return given
    if isinstance(given, str):
        return _named(given)
    if not callable(given):
        raise InputError(f"loss: a {type(given).__name__} is no function of outputs and targets")
    return _of_torch(given) or GivenLoss(given)


def share_right(
    loss: Loss, outputs: Outputs, targets: torch.Tensor, guesses: int = 1
) -> torch.Tensor | None:
    """How right the outputs are, per sample: 1 for a class that is met.

    Args:
        loss: Says what the targets are.
        outputs: What the model gives for N samples.
        targets: What belongs to them.
        guesses: A class is met by so many of the largest outputs, or by all if there are fewer.

    Returns:
        N numbers from 0 to 1 (of several labels or pixels the share that is met); None where
        targets are no classes or labels, or no classes to be guessed several times.
    """
    if loss.targets is Targets.CLASSES:
        classes = targets.argmax(1) if targets.dim() > 1 else targets
        logits = main_output(outputs)
        if guesses == 1:
            return (logits.argmax(1) == classes).double()
        largest = logits.topk(min(guesses, logits.shape[1]), dim=1).indices
        return (largest == classes[:, None]).any(1).double()
    if guesses > 1:
        return None
    if loss.targets is Targets.LABELS:
        met = (main_output(outputs) > 0) == (targets > 0.5)
        return met.double().flatten(1).mean(1)
    if loss.targets is Targets.PIXEL_CLASSES:
        met = main_output(outputs).argmax(1) == targets
        return met.double().flatten(1).mean(1)
    if loss.targets is Targets.TOKENS:
        met = main_output(outputs)[:, :-1].argmax(-1) == targets[:, 1:]
        counts = counted(loss, targets[:, 1:])
        return (met & counts).double().sum(1) / counts.sum(1).clamp_min(1)
    return None


def as_function(given: object, flag: str) -> Function | Loss:
    """An object of the user's own code as a loss.

    Args:
        given: A `Loss`, or a function of (outputs, targets).
        flag: The flag that the user gave it with, for messages.

    Raises:
        InputError: It cannot be called.
    """
    if not callable(given):
        raise InputError(f"{flag}: a {type(given).__name__} is no function of outputs and targets")
    return given


def _named(name: str) -> Loss:
    try:
        return loss_class(name)()
    except TypeError as error:
        raise InputError(f"the loss {name} needs arguments: {error}") from None


def _of_torch(given: Function) -> Loss | None:
    """The ready loss that torch's own one is, if it is one."""
    for function, kind in ((F.cross_entropy, CrossEntropy), (F.mse_loss, MeanSquaredError),
                           (F.l1_loss, MeanAbsoluteError),
                           (F.binary_cross_entropy_with_logits, BinaryCrossEntropy)):  # fmt: skip
        if given is function:
            return kind()
    if getattr(given, "reduction", None) != "mean":
        return None
    if type(given) is nn.CrossEntropyLoss and given.ignore_index == -100:
        return CrossEntropy(given.label_smoothing, _numbers(given.weight))
    if type(given) is nn.MSELoss:
        return MeanSquaredError()
    if type(given) is nn.L1Loss:
        return MeanAbsoluteError()
    if type(given) is nn.BCEWithLogitsLoss and given.weight is None:
        return BinaryCrossEntropy(_numbers(given.pos_weight))
    return None


def _numbers(values: torch.Tensor | Sequence[float] | None) -> list[float] | None:
    if values is None:
        return None
    return [float(value) for value in torch.as_tensor(values).flatten().tolist()]


def _checked_weights(name: str, values: Sequence[float] | None) -> tuple[float, ...] | None:
    numbers = _numbers(values)
    if numbers is None:
        return None
    if not numbers or not all(0 <= number < float("inf") for number in numbers):
        raise InputError(f"{name} must be finite and not negative, not {numbers}")
    return tuple(numbers)


def _tensor_like(values: tuple[float, ...] | None, like: torch.Tensor) -> torch.Tensor | None:
    return None if values is None else like.new_tensor(values)


@register_loss
class CrossEntropy(Loss):
    """Cross-entropy of one class per sample, the default.

    Args:
        label_smoothing: Share of the target that is spread over all classes.
        weights: One per class; the loss is then divided by the weights of the samples'
            classes, as torch does, and is no mean over samples.
    """

    name = "cross-entropy"
    targets = Targets.CLASSES

    def __init__(
        self, label_smoothing: float = 0.0, weights: Sequence[float] | None = None
    ) -> None:
        if not 0 <= label_smoothing < 1:
            raise InputError(f"label_smoothing must lie in [0, 1), not {label_smoothing:g}")
        self.label_smoothing = label_smoothing
        self.weights = _checked_weights("weights", weights)
        self.mean_over_samples = weights is None

    def __call__(self, outputs: Outputs, targets: torch.Tensor) -> torch.Tensor:
        """See `Loss`."""
        return self._reduced(outputs, targets, "mean")

    def total(self, outputs: Outputs, targets: torch.Tensor) -> torch.Tensor:
        """See `Loss`."""
        return self._reduced(outputs, targets, "sum")

    def _reduced(self, outputs: Outputs, targets: torch.Tensor, reduction: str) -> torch.Tensor:
        logits = main_output(outputs)
        return F.cross_entropy(
            logits,
            targets,
            _tensor_like(self.weights, logits),
            label_smoothing=self.label_smoothing,
            reduction=reduction,
        )

    def describe(self) -> Description:
        """See `Loss`."""
        weights = None if self.weights is None else list(self.weights)
        return {"loss": self.name, "label_smoothing": self.label_smoothing, "weights": weights}

    def fitted(self, outputs: Outputs, targets: torch.Tensor) -> torch.Tensor:
        """See `Loss`; indices and N x n whole numbers with a single one become N int64 indices.

        N x n probabilities stay what they are.
        """
        logits = main_output(outputs)
        if logits.dim() != 2 or logits.shape[1] < 2:
            raise InputError(
                "the model must give one row of logits per image, of two classes or more, not "
                f"{type(logits).__name__} of shape {tuple(logits.shape)}; another loss may fit it"
            )
        n_classes = logits.shape[1]
        _check_class_weights(self.weights, n_classes)
        if targets.is_floating_point() and targets.dim() == 2:
            return _checked_probabilities(targets, n_classes, 1)
        if targets.dim() == 2 and targets.shape[1] == n_classes and _has_single_ones(targets):
            return targets.long().argmax(1)
        if targets.dim() != 1 or targets.is_floating_point():
            raise InputError(
                f"labels must be one class index for each of the {len(targets)} images (or N x "
                f"{n_classes} probabilities), not {targets.dtype} of shape {tuple(targets.shape)}"
            )
        return _checked_indices(targets, n_classes)


def _check_class_weights(weights: tuple[float, ...] | None, n_classes: int) -> None:
    if weights is not None and len(weights) != n_classes:
        raise InputError(f"the loss has {len(weights)} class weights for {n_classes} classes")


def _has_single_ones(targets: torch.Tensor) -> bool:
    """Whether every row of whole numbers is zero but for a single one."""
    ones = targets == 1
    return bool(((targets == 0) | ones).all() and (ones.sum(1) == 1).all())


def _checked_indices(targets: torch.Tensor, n_classes: int) -> torch.Tensor:
    low, high = int(targets.min()), int(targets.max())
    if low < 0 or high >= n_classes:
        raise InputError(
            f"labels must lie in 0..{n_classes - 1}, the classes of the model, and one is "
            f"{low if low < 0 else high}"
        )
    return targets.long()


def _checked_probabilities(targets: torch.Tensor, n_classes: int, dim: int) -> torch.Tensor:
    sums = targets.double().sum(dim)
    sum_to_one = torch.allclose(sums, torch.ones_like(sums), atol=1e-3, rtol=0)
    if targets.shape[dim] != n_classes or not sum_to_one or float(targets.min()) < 0:
        raise InputError(
            f"soft labels must be N x {n_classes} probabilities that sum to 1, not numbers from "
            f"{float(targets.min()):g} of shape {tuple(targets.shape)} with sums "
            f"{float(sums.min()):g} to {float(sums.max()):g}"
        )
    return targets


def _in_shape_of(
    name: str, outputs: Outputs, targets: torch.Tensor, float_like: torch.Tensor | None = None
) -> torch.Tensor:
    """Floating-point targets, one for each number that the model gives.

    A missing last dimension of size 1 is added: torch would spread N targets over N x N pairs.
    """
    given = main_output(outputs)
    if targets.dim() == given.dim() - 1 and given.shape[-1] == 1:
        targets = targets[..., None]
    if targets.shape[1:] != given.shape[1:]:
        raise InputError(
            f"the loss {name} takes one target for each number that the model gives: N x "
            f"{list(given.shape[1:])} in all, not {tuple(targets.shape)}"
        )
    targets = targets if targets.is_floating_point() else targets.to(torch.float32)
    if not targets.isfinite().all():
        raise InputError(f"a target of the loss {name} is not finite")
    return targets


@register_loss
class BinaryCrossEntropy(Loss):
    """Binary cross-entropy of several labels per sample, each present or not, from logits.

    Args:
        pos_weight: Factor of the loss where a label is present; one, or one per label.
    """

    name = "binary-cross-entropy"
    targets = Targets.LABELS

    def __init__(self, pos_weight: Sequence[float] | None = None) -> None:
        self.pos_weight = _checked_weights("pos_weight", pos_weight)

    def __call__(self, outputs: Outputs, targets: torch.Tensor) -> torch.Tensor:
        """See `Loss`."""
        logits = main_output(outputs)
        weight = _tensor_like(self.pos_weight, logits)
        return F.binary_cross_entropy_with_logits(logits, targets, pos_weight=weight)

    def describe(self) -> Description:
        """See `Loss`."""
        weight = None if self.pos_weight is None else list(self.pos_weight)
        return {"loss": self.name, "pos_weight": weight}

    def fitted(self, outputs: Outputs, targets: torch.Tensor) -> torch.Tensor:
        """See `Loss`."""
        targets = _in_shape_of(self.name, outputs, targets)
        if float(targets.min()) < 0 or float(targets.max()) > 1:
            raise InputError(f"targets of the loss {self.name} must lie in [0, 1]")
        if self.pos_weight is not None and len(self.pos_weight) not in (1, targets.shape[-1]):
            raise InputError(
                f"the loss has {len(self.pos_weight)} values of pos_weight for "
                f"{targets.shape[-1]} labels"
            )
        return targets


class _ValuesLoss(Loss):
    """A loss of numbers against numbers of the outputs' shape."""

    targets = Targets.VALUES

    def fitted(self, outputs: Outputs, targets: torch.Tensor) -> torch.Tensor:
        """See `Loss`."""
        return _in_shape_of(self.name, outputs, targets)


@register_loss
class MeanSquaredError(_ValuesLoss):
    """Mean squared error over all numbers that the model gives."""

    name = "mse"

    def __call__(self, outputs: Outputs, targets: torch.Tensor) -> torch.Tensor:
        """See `Loss`."""
        return F.mse_loss(main_output(outputs), targets)


@register_loss
class MeanAbsoluteError(_ValuesLoss):
    """Mean absolute error over all numbers that the model gives."""

    name = "mae"

    def __call__(self, outputs: Outputs, targets: torch.Tensor) -> torch.Tensor:
        """See `Loss`."""
        return F.l1_loss(main_output(outputs), targets)


class _PixelLoss(Loss):
    """A loss of one class per pixel, voxel or moment: N x C x spatial against N x spatial."""

    targets = Targets.PIXEL_CLASSES

    def fitted(self, outputs: Outputs, targets: torch.Tensor) -> torch.Tensor:
        """See `Loss`; N x C x spatial probabilities are taken as well."""
        given = main_output(outputs)
        if given.dim() < 3:
            raise InputError(
                f"the loss {self.name} is for models that give N x classes x spatial, not "
                f"{tuple(given.shape)}"
            )
        n_classes = given.shape[1]
        if targets.is_floating_point() and targets.shape[1:] == given.shape[1:]:
            return _checked_probabilities(targets, n_classes, 1) if n_classes > 1 else targets
        if targets.shape[1:] != given.shape[2:] or targets.is_floating_point():
            raise InputError(
                f"the loss {self.name} takes one class index for each of the model's "
                f"{list(given.shape[2:])} places, not {targets.dtype} of shape "
                f"{tuple(targets.shape)}"
            )
        return _checked_indices(targets, max(2, n_classes))


@register_loss
class PixelCrossEntropy(_PixelLoss):
    """Cross-entropy of one class per pixel or voxel, the mean over all of them (segmentation).

    Args:
        weights: One per class; the loss is then divided by the weights of the pixels'
            classes, and is no mean over samples.
    """

    name = "pixel-cross-entropy"

    def __init__(self, weights: Sequence[float] | None = None) -> None:
        self.weights = _checked_weights("weights", weights)
        self.mean_over_samples = weights is None

    def __call__(self, outputs: Outputs, targets: torch.Tensor) -> torch.Tensor:
        """See `Loss`."""
        logits = main_output(outputs)
        return F.cross_entropy(logits, targets, _tensor_like(self.weights, logits))

    def describe(self) -> Description:
        """See `Loss`."""
        weights = None if self.weights is None else list(self.weights)
        return {"loss": self.name, "weights": weights}

    def fitted(self, outputs: Outputs, targets: torch.Tensor) -> torch.Tensor:
        """See `Loss`."""
        targets = super().fitted(outputs, targets)
        n_classes = main_output(outputs).shape[1]
        if n_classes < 2:
            raise InputError(
                f"the loss {self.name} needs two classes or more, and the model gives {n_classes}"
            )
        _check_class_weights(self.weights, n_classes)
        return targets


@register_loss
class Dice(_PixelLoss):
    """One less the soft Dice coefficient, the mean over samples and classes (segmentation).

    Per sample and class (2 sum p t + 1) / (sum p + sum t + 1), where p is the softmax over the
    classes, or the sigmoid of the only one.

    Source: Milletari, Navab, Ahmadi, V-Net, 3DV 2016, https://arxiv.org/abs/1606.04797.
    """

    name = "dice"

    def __call__(self, outputs: Outputs, targets: torch.Tensor) -> torch.Tensor:
        """See `Loss`."""
        logits = main_output(outputs)
        one = logits.shape[1] == 1
        predicted = logits.sigmoid() if one else logits.softmax(1)
        true = _one_hot(targets, predicted)
        over = tuple(range(2, logits.dim()))
        common = (predicted * true).sum(over)
        sizes = predicted.sum(over) + true.sum(over)
        return 1 - ((2 * common + DICE_SMOOTHING) / (sizes + DICE_SMOOTHING)).mean()

    def relaxed(self, variables: torch.Tensor) -> torch.Tensor:
        """See `Loss`."""
        return variables.sigmoid() if variables.shape[1] == 1 else variables.softmax(1)

    def decided(self, variables: torch.Tensor) -> torch.Tensor:
        """See `Loss`."""
        one = variables.shape[1] == 1
        return (variables[:, 0] > 0).long() if one else variables.argmax(1)


def _one_hot(targets: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """N x spatial class indices as N x C x spatial; probabilities as they are."""
    if targets.is_floating_point():
        return targets
    if like.shape[1] == 1:
        return targets[:, None].to(like.dtype)
    # Compared and not scattered, so that it runs batched as well.
    classes = torch.arange(like.shape[1], device=targets.device)
    classes = classes.view(1, -1, *[1] * (targets.dim() - 1))
    return (targets[:, None] == classes).to(like.dtype)


@register_loss
class NextToken(Loss):
    """Cross-entropy of every token given those before it: the mean over a sentence, then over all.

    For language models that give N x T x tokens logits; the targets are the token ids (N x T)
    that the model reads, or N x T x tokens probabilities.

    Args:
        pad: The token id that fills up sentences that are shorter than T, at their end; it counts
            in no mean. None: all sentences have T tokens.
    """

    name = "next-token"
    targets = Targets.TOKENS

    def __init__(self, pad: int | None = None) -> None:
        if pad is not None and not (isinstance(pad, int) and pad >= 0):
            raise InputError(f"the loss next-token takes a token id as pad, not {pad!r:.40}")
        self.pad = pad

    def __call__(self, outputs: Outputs, targets: torch.Tensor) -> torch.Tensor:
        """See `Loss`."""
        logits, wanted = main_output(outputs)[:, :-1], targets[:, 1:]
        if self.pad is None or wanted.dim() > 2:
            return F.cross_entropy(logits.flatten(0, 1), wanted.flatten(0, 1))
        each = F.cross_entropy(logits.mT, wanted, ignore_index=self.pad, reduction="none")
        return (each.sum(1) / (wanted != self.pad).sum(1).clamp_min(1)).mean()

    def describe(self) -> Description:
        """See `Loss`."""
        return super().describe() | ({} if self.pad is None else {"pad": self.pad})

    def fitted(self, outputs: Outputs, targets: torch.Tensor) -> torch.Tensor:
        """See `Loss`."""
        logits = main_output(outputs)
        if logits.dim() != 3 or logits.shape[1] < 2:
            raise InputError(
                f"the loss {self.name} is for models that give logits for every token of "
                f"sentences of two or more (N x T x tokens), not {tuple(logits.shape)}"
            )
        if targets.shape[1:] != logits.shape[1:2] or targets.is_floating_point():
            raise InputError(
                f"the loss {self.name} takes the N x {logits.shape[1]} token ids that the model "
                f"reads, not {targets.dtype} of shape {tuple(targets.shape)}"
            )
        return _checked_indices(targets, logits.shape[2])


def counted(loss: Loss, ids: torch.Tensor) -> torch.Tensor:
    """Which of these token ids (any shape) are no padding to a loss."""
    pad = loss.pad if isinstance(loss, NextToken) else None
    return torch.ones_like(ids, dtype=torch.bool) if pad is None else ids != pad


def ignoring(loss: Loss, pad: int | None) -> Loss:
    """The loss for sentences that this token id fills up."""
    return NextToken(pad) if isinstance(loss, NextToken) and pad is not None else loss


@register_loss
class SumOfHeads(Loss):
    """A weighted sum of one loss over several outputs of the model, with the same targets.

    A model that gives a single tensor, as those with auxiliary heads do in eval mode, has the
    first head only.

    Args:
        weights: Factor of every head, by its name in a dictionary or object of outputs, or by
            its number in a tuple; the first is the main one.
        of: The loss of every head.
    """

    name = "sum-of-heads"

    def __init__(
        self,
        weights: Mapping[str | int, float],
        of: str | Loss | Mapping[str, object] = "cross-entropy",
    ) -> None:
        if not weights or not all(0 <= float(w) < float("inf") for w in weights.values()):
            raise InputError("the loss sum-of-heads needs finite weights, by name or number")
        self.weights = {str(head): float(weight) for head, weight in weights.items()}
        self.of = loss_from(of) if isinstance(of, Mapping) else as_loss(of)
        self.targets, self.batchable = self.of.targets, self.of.batchable
        self.mean_over_samples = self.of.mean_over_samples

    def __call__(self, outputs: Outputs, targets: torch.Tensor) -> torch.Tensor:
        """See `Loss`."""
        return self._summed(self.of, outputs, targets)

    def total(self, outputs: Outputs, targets: torch.Tensor) -> torch.Tensor:
        """See `Loss`."""
        return self._summed(self.of.total, outputs, targets)

    def _summed(
        self,
        one: Callable[[Outputs, torch.Tensor], torch.Tensor],
        outputs: Outputs,
        targets: torch.Tensor,
    ) -> torch.Tensor:
        parts = [weight * one(head, targets) for weight, head in self._heads(outputs)]
        return torch.stack(parts).sum()

    def _heads(self, outputs: Outputs) -> list[tuple[float, torch.Tensor]]:
        if isinstance(outputs, torch.Tensor):
            return [(next(iter(self.weights.values())), outputs)]
        return [(weight, _head(outputs, name)) for name, weight in self.weights.items()]

    def describe(self) -> Description:
        """See `Loss`."""
        weights: dict[str, Plain] = dict(self.weights)
        return {"loss": self.name, "weights": weights, "of": self.of.describe()}

    def fitted(self, outputs: Outputs, targets: torch.Tensor) -> torch.Tensor:
        """See `Loss`."""
        fitted = targets
        for _, head in self._heads(outputs):
            fitted = self.of.fitted(head, targets)
        return fitted

    def relaxed(self, variables: torch.Tensor) -> torch.Tensor:
        """See `Loss`."""
        return self.of.relaxed(variables)

    def decided(self, variables: torch.Tensor) -> torch.Tensor:
        """See `Loss`."""
        return self.of.decided(variables)


def _head(outputs: Outputs, name: str) -> torch.Tensor:
    value: object = None
    if isinstance(outputs, Mapping):
        value = outputs.get(name)
    elif name.isdigit() and isinstance(outputs, Sequence) and int(name) < len(outputs):
        value = outputs[int(name)]
    else:
        value = getattr(outputs, name, None)
    if not isinstance(value, torch.Tensor):
        raise InputError(f"the model's {type(outputs).__name__} of outputs has no head {name}")
    return value


class GivenLoss(Loss):
    """A function that the user gave.

    Args:
        function: From outputs, as the model gives them, and targets to a scalar.
        source: Where a program that reads a file finds it, as `module:function`; by default
            where Python says that it is defined.
        mean_over_samples: See `Loss`; a function is not trusted to be one.
        targets: What it compares the outputs with, so that they can be optimised.
    """

    batchable = False

    def __init__(
        self,
        function: Function,
        source: str = "",
        mean_over_samples: bool = False,
        targets: Targets | str = Targets.OTHER,
    ) -> None:
        self._function = function
        self.source = source or _source_of(function)
        self.name = self.source or getattr(function, "__name__", type(function).__name__)
        self.mean_over_samples = mean_over_samples
        self.targets = Targets(targets)

    def __call__(self, outputs: Outputs, targets: torch.Tensor) -> torch.Tensor:
        """See `Loss`.

        Raises:
            InputError: The function gives no scalar.
        """
        value = self._function(outputs, targets)
        if not isinstance(value, torch.Tensor) or value.dim() != 0:
            shape = tuple(getattr(value, "shape", ()))
            raise InputError(
                f"the loss {self.name} must give a scalar tensor, not {type(value).__name__} of "
                f"shape {shape}"
            )
        return value

    def describe(self) -> Description:
        """See `Loss`; `given` says that a file needs the function to be read."""
        return {
            "loss": GIVEN,
            "source": self.source or None,
            "mean_over_samples": self.mean_over_samples,
            "targets": self.targets.value,
        }


# What a description calls a function that the user gave.
GIVEN = "given"
# The loss of all clients of which nothing is said.
DEFAULT_LOSS = CrossEntropy()


def is_default(loss: Loss) -> bool:
    """Whether it is plain cross-entropy."""
    return loss.describe() == DEFAULT_LOSS.describe()


def is_one_class_per_sample(loss: Loss) -> bool:
    """Whether it is a cross-entropy, of any weights, by which every sample has one class."""
    return isinstance(loss, CrossEntropy)


def _source_of(function: Function) -> str:
    """`module:function` of a function that can be imported; empty for any other."""
    module = getattr(function, "__module__", "")
    if not inspect.isfunction(function) or module == "__main__":
        return ""
    return f"{module}:{function.__name__}" if function.__qualname__.isidentifier() else ""
