"""What the traces that are looked for in an update are made of, and how a finding reads."""

from __future__ import annotations

import dataclasses
import enum
from dataclasses import dataclass

import torch


class Trace(enum.Enum):
    """What may be found in an update; the value is its name in print."""

    SPARSE = "sparse"
    QUANTISED = "quantised"
    SIGNS = "signs only"
    CLIPPED_VALUES = "clipped values"
    CLIPPED_NORM = "clipped norm"
    HALF_PRECISION = "half precision"
    NOISE = "noise"
    STEPS = "local steps"
    STATISTICS = "BatchNorm statistics"

    @property
    def processing(self) -> bool:
        """Whether something was done to the update after the training made it."""
        return self not in (Trace.STEPS, Trace.STATISTICS)


@dataclass(frozen=True)
class Finding:
    """One thing that an update's values say.

    Attributes:
        trace: What it is.
        certain: Whether only this explains the values; else it only may be that.
        evidence: The numbers that say so, in a sentence.
        value: Its parameter, where the values tell it: the share of zeros (sparse), the distance
            of levels (quantised), the magnitude (signs, clipped values), the norm, the standard
            deviation (noise), the least number of images times steps, or the steps themselves.
        tensors: Where it was found; empty for the update as a whole.
    """

    trace: Trace
    certain: bool
    evidence: str
    value: float | None = None
    tensors: tuple[str, ...] = ()

    def __str__(self) -> str:
        doubt = "" if self.certain else " (not certain)"
        return f"{self.trace.value}{doubt}: {self.evidence}"


@dataclass(frozen=True)
class Moved:
    """How one parameter changed.

    Attributes:
        name: In the model's state.
        before: The parameter that the client received, float64.
        change: After minus before, float64.
        sent: What was sent of it, the change or the parameter after it, float64.
        rounding: Largest error that the number formats leave in each element of `change`.
    """

    name: str
    before: torch.Tensor
    change: torch.Tensor
    sent: torch.Tensor
    rounding: torch.Tensor

    @property
    def matrix(self) -> torch.Tensor:
        """Outputs x all the rest: one row per unit of a layer."""
        return as_matrix(self.change)

    @property
    def magnitudes(self) -> torch.Tensor:
        """|change| of the elements that changed, ascending."""
        return self.change[self.change != 0].abs().sort().values

    def sent_in(self, dtype: torch.dtype) -> Moved:
        """The same with the errors of a coarser number format in what was sent."""
        return dataclasses.replace(self, rounding=self.rounding + _unit(self.sent, dtype))

    @property
    def error(self) -> float:
        """The largest rounding error of the tensor."""
        return float(self.rounding.max()) if self.rounding.numel() else 0.0


def as_matrix(tensor: torch.Tensor) -> torch.Tensor:
    """Outputs x all the rest; a vector has one column, a scalar one element."""
    return tensor.reshape(len(tensor), -1) if tensor.dim() else tensor.reshape(1, 1)


def moved(
    name: str, before: torch.Tensor, change: torch.Tensor, sent_as: torch.dtype, weights: bool
) -> Moved:
    """One parameter's change with the errors of its number format.

    A difference may be one of weights, computed in the model's precision, before it was sent;
    the error of the weights is therefore counted whatever was sent.

    Args:
        name: In the model's state.
        before: The parameter that the client received.
        change: After minus before, same shape.
        sent_as: Number format of what was sent.
        weights: Whether the parameter itself was sent, and not its difference.
    """
    old, new = before.double(), change.double()
    sent = old + new if weights else new
    # Each of the two is off by half a unit in its last place at most; a unit each leaves room.
    return Moved(name, old, new, sent, _unit(sent, sent_as) + _unit(old, before.dtype))


def _unit(values: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """At least a unit in the last place of each value; whole numbers are not rounded."""
    if not dtype.is_floating_point:
        return torch.zeros_like(values)
    format_ = torch.finfo(dtype)
    return format_.eps * values.abs() + format_.smallest_normal * format_.eps
