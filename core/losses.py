"""What a client's outputs cost: the losses that a model may be trained with.

A `Loss` maps outputs and targets to a scalar. It also says what its targets are, because
label rules, metrics and several processes depend on that.
"""

from __future__ import annotations

import abc
import enum
from collections.abc import Callable, Mapping, Sequence
from typing import TypeGuard

import torch
import torch.nn.functional as F

from core.errors import InputError

# What a model gives: a tensor, or several of them in a tuple, a dictionary or an object.
Outputs = torch.Tensor | Sequence[torch.Tensor] | Mapping[str, torch.Tensor] | object
# Plain values, as a record or a checkpoint holds them.
Description = dict[str, str | float | list[float] | None]
# Where the main output stands in dictionaries and objects of common libraries.
MAIN_OUTPUTS = ("logits", "out", "output", "prediction")


class Targets(enum.Enum):
    """What a loss compares the outputs with."""

    CLASSES = "classes"  # N class indices, or N x n probabilities.
    LABELS = "labels"  # N x n numbers in [0, 1]: several findings per sample.
    VALUES = "values"  # Numbers of the outputs' shape.
    PIXEL_CLASSES = "pixel classes"  # N x spatial class indices.
    OTHER = "other"  # Whatever a given function takes.


class Loss(abc.ABC):
    """What a client minimises.

    Attributes:
        name: Word for messages, tables and files.
        targets: What it compares the outputs with.
        mean_over_samples: Whether the loss of a batch is the mean of its samples' losses, so
            that a batch may be spread over processes and samples be clipped one by one.
    """

    name: str = ""
    targets: Targets = Targets.OTHER
    mean_over_samples: bool = True

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


def is_tensor(outputs: Outputs) -> TypeGuard[torch.Tensor]:
    """Whether a model gives a single tensor."""
    return isinstance(outputs, torch.Tensor)


def main_output(outputs: Outputs) -> torch.Tensor:
    """The tensor that a loss without a word about heads compares with its targets.

    Args:
        outputs: A tensor, a sequence whose first tensor counts, or a dictionary or object with
            an entry `logits`, `out`, `output` or `prediction`.

    Raises:
        InputError: None of these.
    """
    if is_tensor(outputs):
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


class CrossEntropy(Loss):
    """Cross-entropy of one class per sample, the default.

    Args:
        label_smoothing: Share of the target that is spread over all classes.
    """

    name = "cross-entropy"
    targets = Targets.CLASSES

    def __init__(self, label_smoothing: float = 0.0) -> None:
        if not 0 <= label_smoothing < 1:
            raise InputError(f"label_smoothing must lie in [0, 1), not {label_smoothing:g}")
        self.label_smoothing = label_smoothing

    def __call__(self, outputs: Outputs, targets: torch.Tensor) -> torch.Tensor:
        """See `Loss`."""
        logits = main_output(outputs)
        return F.cross_entropy(logits, targets, label_smoothing=self.label_smoothing)

    def total(self, outputs: Outputs, targets: torch.Tensor) -> torch.Tensor:
        """See `Loss`."""
        logits = main_output(outputs)
        return F.cross_entropy(
            logits, targets, label_smoothing=self.label_smoothing, reduction="sum"
        )


class GivenLoss(Loss):
    """A function that the user gave.

    Args:
        function: From outputs, as the model gives them, and targets to a scalar.
        source: Where a program that reads a file finds it, as `module:function`.
        mean_over_samples: See `Loss`; a function is not trusted to be one.
    """

    def __init__(
        self,
        function: Callable[[Outputs, torch.Tensor], torch.Tensor],
        source: str = "",
        mean_over_samples: bool = False,
    ) -> None:
        self._function = function
        self.name = source or getattr(function, "__name__", type(function).__name__)
        self.mean_over_samples = mean_over_samples

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
