"""The subspace that a batch's tokens span in front of a layer, read off its gradient.

The gradient of a linear layer's weight is a sum of outer products, one per token, of the output's
gradient and the layer's input: its rows lie in the span of the inputs, and fill it while there are
fewer tokens than the layer is wide.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from attack.attacks.text.parts.layers import TokenLayer
from core.errors import InputError

# Singular values of a float32 gradient below this share of the largest are rounding: a direction
# too many makes the span a little larger, one that is missing loses a token.
ROUNDING = 1e-7
# Of a float64 one, whose small directions would be lost in float32.
FILLED = 1e-5
# Relative distance of a row from a span that it lies in, at most, by rounding.
SHOWN = 1e-4


@dataclass(frozen=True)
class Span:
    """The span of the inputs of layers that read the same.

    Attributes:
        layer: One of them.
        basis: width x rank, orthonormal, float64.
        reached: T, the rows that the gradient shows; not those that the loss does not depend on.
    """

    layer: TokenLayer
    basis: torch.Tensor
    reached: torch.Tensor

    @property
    def is_full(self) -> bool:
        """Whether it is the whole space, which every token lies in."""
        return self.basis.shape[0] == self.basis.shape[1]

    def distances(self, inputs: torch.Tensor) -> torch.Tensor:
        """Relative distance of rows (... x width) from the span: 0 inside, 1 orthogonal to it."""
        basis = self.basis.to(inputs.dtype)
        outside = inputs - (inputs @ basis) @ basis.T
        return outside.norm(dim=-1) / inputs.norm(dim=-1).clamp_min(1e-30)


def span_of(
    layers: Sequence[TokenLayer],
    gradient: dict[str, torch.Tensor],
    noise: float,
    rounding: float = ROUNDING,
    pruned: bool = False,
) -> Span:
    """The span of what some layers read, all of them the same.

    Args:
        layers: At least one.
        gradient: What was shared, by parameter.
        noise: Standard deviation of what a defense added to every number.
        rounding: Singular values below this share of the largest are left out.
        pruned: Whether a defense set the smallest numbers to zero.

    Raises:
        InputError: Their gradient is zero.
    """
    rows = torch.cat([layer.rows(gradient[layer.parameter]).double() for layer in layers])
    if not rows.any():
        raise InputError(f"the gradient of {layers[0].parameter} is zero")
    if pruned:
        cut = [squares_cut(gradient[layer.parameter]) for layer in layers]
        noise = (noise**2 + sum(cut) / len(cut)) ** 0.5
    # The largest singular value of noise alone.
    floor = noise * (rows.shape[0] ** 0.5 + rows.shape[1] ** 0.5)
    return Span(layers[0], _row_space(rows, rounding, floor), shown_rows(layers))


def squares_cut(gradient: torch.Tensor) -> float:
    """Mean square, over a tensor, of what pruning took from it.

    Those that are zero were smaller than the smallest that is left, and are taken to be spread
    evenly below it; where most were taken and lay near zero, it is less.
    """
    sizes = gradient.double().abs()
    left = sizes[sizes > 0]
    share = 1 - left.numel() / sizes.numel()
    return share * float(left.min()) ** 2 / 3 if left.numel() else 0.0


def shown_rows(layers: Sequence[TokenLayer]) -> torch.Tensor:
    """T, the rows of a random sentence that lie in the row space of its own gradient."""
    trial = torch.cat([layer.slopes.T @ layer.inputs for layer in layers])
    inputs = layers[0].inputs
    span = Span(layers[0], _row_space(trial, FILLED, 0.0), torch.empty(0))
    return span.distances(inputs) < SHOWN


def _row_space(rows: torch.Tensor, share: float, floor: float) -> torch.Tensor:
    """Orthonormal columns; singular values below a share of the largest, or a floor, are noise."""
    _, values, right = torch.linalg.svd(rows, full_matrices=False)
    return right[values > max(share * float(values[0]), floor)].T
