"""What an inversion's loop asks of the part that compares gradients."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import nn

Tensors = list[torch.Tensor]
# A penalty on what the forward pass shows beside the logits (BatchNorm statistics).
Penalty = Callable[[], torch.Tensor]


@dataclass
class Match:
    """One evaluation of the objective.

    Attributes:
        value: The number by which candidates are compared, a scalar in float64.
        input_gradient: Derivative of `weight * objective + penalty` in this
            process's network inputs.
        label_gradient: The same in the variables of the labels, where they are optimised.
        penalty: Value of the penalty; None without one.
        penalty_gradient: The penalty's own part, where it was asked for apart; then it
            is not in `input_gradient`.
    """

    value: torch.Tensor
    input_gradient: torch.Tensor
    label_gradient: torch.Tensor | None = None
    penalty: torch.Tensor | None = None
    penalty_gradient: torch.Tensor | None = None


class Matcher(Protocol):
    """Compares candidates with what was shared, and differentiates the comparison."""

    def __call__(
        self,
        inputs: torch.Tensor,
        labels: torch.Tensor,
        *,
        weight: float = 1.0,
        penalty: Callable[[nn.Module], Penalty] | None = None,
        apart: bool = False,
    ) -> Match:
        """Evaluate the objective and its gradient.

        Args:
            inputs: n x C x H x W, normalised; this process's images.
            labels: n labels (n x ... where the client's loss takes others than classes), or
                variables that are optimised in their place, see `Replica.optimises`.
            weight: Factor of the objective in the gradients.
            penalty: Called with the model before a forward pass; what it returns is
                called after it for a differentiable scalar.
            apart: Keep the penalty's gradient apart.
        """

    def several(self, inputs: torch.Tensor, labels: torch.Tensor) -> list[Match]:
        """Evaluate several restarts (R x n x C x H x W) in one call."""

    def value(self, inputs: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """The objective alone, a scalar in float64."""

    def at(self, iteration: int, iterations: int) -> bool:
        """Take note of how far the inversion is; called before every iteration.

        Args:
            iteration: The one that begins, from 0.
            iterations: Of the whole inversion.

        Returns:
            Whether the objective is another one from here on, so that earlier values are
            no measure.
        """

    def exact(self) -> Matcher:
        """A matcher of the same objective whose derivatives are exact."""

    def details(self) -> dict[str, Any]:
        """What a record says of how the gradient was computed, as plain values."""

    def state_dict(self) -> dict[str, Any]:
        """What a resumed inversion needs to go on to the bit, as plain values."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The inverse of `state_dict`."""


def fresh_variables(inputs: torch.Tensor, labels: torch.Tensor, joint: bool) -> Tensors:
    """Fresh leaves of what is optimised: the inputs, and with `joint` what labels come from."""
    wanted = [inputs, labels] if joint else [inputs]
    return [w.detach().requires_grad_() for w in wanted]


def filled(variables: Tensors, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Inputs and labels of a pass over these variables: labels that are none stay as they are."""
    return variables[0], variables[1] if len(variables) == 2 else labels


def pulled_back(outputs: Tensors, cotangents: Tensors, variables: Tensors) -> Tensors:
    """The outputs' derivatives in the variables, summed with these factors."""
    # Parameters without influence on the images' gradient (a last bias) have no graph.
    pairs = [(o, c) for o, c in zip(outputs, cotangents, strict=True) if o.requires_grad]
    found = torch.autograd.grad(
        [o for o, _ in pairs], variables, [c for _, c in pairs], allow_unused=True
    )
    return [torch.zeros_like(v) if g is None else g for g, v in zip(found, variables, strict=True)]


def penalty_gradient(penalty: torch.Tensor | None, inputs: torch.Tensor) -> torch.Tensor | None:
    """The penalty's own derivative in the inputs; its graph is kept."""
    if penalty is None:
        return None
    return torch.autograd.grad(penalty, inputs, retain_graph=True)[0]


def match_of(
    value: torch.Tensor,
    gradients: Sequence[torch.Tensor],
    penalty: torch.Tensor | None,
    alone: torch.Tensor | None,
) -> Match:
    """A match from the gradients in the variables.

    Args:
        value: See `Match`.
        gradients: In the inputs, then in the label logits, where they are optimised.
        penalty: Value of the penalty.
        alone: The penalty's own gradient in the inputs.
    """
    return Match(
        value=value,
        input_gradient=gradients[0],
        label_gradient=gradients[1] if len(gradients) == 2 else None,
        penalty=None if penalty is None else penalty.detach(),
        penalty_gradient=alone,
    )
