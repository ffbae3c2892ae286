"""Values on a grid: quantised updates and signs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from gradients.update_traces import Finding, Moved, Trace

# Fewer values than this may lie on a grid by chance.
_ENOUGH = 32
# Elements per level, and the finest grid that is looked for.
_PER_LEVEL, _MOST_LEVELS = 8, 4096
# Of the multiples up to the largest at least this share is there: any two levels are multiples
# of some number.
_USED = 1 / 16
# A value lies on the grid when it is this near, in units of the grid.
_NEAR = 1 / 16
# Signs of a gradient are zero where it is; more zeros than this are a level of their own.
_MOSTLY_ZERO = 0.5


@dataclass(frozen=True)
class Grid:
    """A tensor whose elements are multiples of one number.

    Attributes:
        name: Of the tensor, in the state.
        step: Distance of two neighbouring levels.
        most: The largest multiple.
        used: How many different multiples there are, zero left out.
    """

    name: str
    step: float
    most: int
    used: int


def grid(tensor: Moved) -> Grid | None:
    """The grid on which a tensor's elements lie; None where they lie on none.

    32 continuous values all lie within 1/16 of a grid by chance with probability 8^-32.
    """
    values = tensor.magnitudes
    if len(values) < _ENOUGH:
        return None
    centres = _levels(values, 4 * tensor.error)
    if len(centres) > min(_MOST_LEVELS, len(values) // _PER_LEVEL):
        return None
    step = float(torch.diff(centres, prepend=centres.new_zeros(1)).min())
    if step < 4 * tensor.error / _NEAR:
        # The number format makes such a grid by itself.
        return None
    step = _refined(centres, step)
    multiples = (values / step).round()
    if float((values / step - multiples).abs().max()) > _NEAR or multiples[-1] > _MOST_LEVELS:
        return None
    used, most = len(multiples.unique()), int(multiples[-1])
    return Grid(tensor.name, step, most, used) if used >= _USED * most else None


def _levels(values: torch.Tensor, error: float) -> torch.Tensor:
    """Centres of the groups of ascending values that differ by rounding only."""
    new = torch.diff(values) > error + 1e-6 * values[1:]
    group = torch.cat([new.new_zeros(1), new]).cumsum(0)
    sums = values.new_zeros(int(group[-1]) + 1).index_add_(0, group, values)
    return sums / group.bincount()


def _refined(centres: torch.Tensor, step: float) -> float:
    """Least-squares step, from small multiples on, whose rounding cannot hide the multiple."""
    reach = 8.0
    while True:
        some = centres[centres <= reach * step]
        multiples = (some / step).round()
        if len(some):
            step = float((some * multiples).sum() / multiples.square().sum().clamp(min=1))
        if len(some) == len(centres):
            return step
        reach *= 8


def quantised_finding(grids: Sequence[Grid], n_tensors: int) -> Finding:
    """Quantised, with the tensor that has most levels as the example.

    Args:
        grids: Of the tensors that have one; at least one.
        n_tensors: How many tensors changed.
    """
    finest = max(grids, key=lambda g: g.used)
    evidence = (
        f"{len(grids)} of {n_tensors} tensors hold multiples of one number each, at most "
        f"{finest.used} different ones ({finest.name}: multiples of {finest.step:.4g}, "
        f"up to {finest.most})"
    )
    names = tuple(g.name for g in grids)
    return Finding(Trace.QUANTISED, len(grids) > 1, evidence, finest.step, names)


def sign_finding(grids: Sequence[Grid], n_tensors: int, zeros: float) -> Finding:
    """Tensors of one magnitude each: signs, or three levels where most elements are zero.

    Signs are certain where tensors have magnitudes of their own.

    Args:
        grids: Of the tensors that have one, of one level each; at least one.
        n_tensors: How many tensors changed.
        zeros: Share of zeros in these tensors, rows and columns of zeros left out.
    """
    steps = [g.step for g in grids]
    one = max(steps) <= 1.01 * min(steps)
    evidence = (
        f"{len(grids)} of {n_tensors} tensors hold one magnitude each beside {zeros:.1%} zeros "
        "that no dead unit explains"
    )
    names = tuple(g.name for g in grids)
    value = steps[0] if one else None
    if zeros > _MOSTLY_ZERO:
        return Finding(Trace.QUANTISED, False, f"{evidence}: three levels", value, names)
    return Finding(Trace.SIGNS, not one, evidence, value, names)
