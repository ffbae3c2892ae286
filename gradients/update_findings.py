"""What was done to an update, and what it says of the training: told from its values alone.

Every trace is stated with its evidence, and with `certain` only where a plain update of
training does not look like it. What each detector says of plain updates by mistake:

- sparse: a gap below the smallest magnitude that plain values leave with probability below 1e-9.
  Zeros of dead units, unused classes and black pixels fill whole rows and columns and are left
  out. A mask drawn at random leaves no gap and is not told.
- quantised, signs: see `gradients.update_levels`. A model that starts from zero weights and takes
  inputs of few levels may look so; with one tensor it therefore only "may be". Signs of one
  magnitude in all tensors only "may be": Adam's first step is the same.
- clipped values: at least eight elements at both ends of the range, in several rows. Plain
  elements are equal only where inputs are, which is inside one row.
- clipped norm: a norm of one or two digits "may be" one; plain updates have it in 1 of 1,000
  cases. It is certain only where the norm is that which was stated.
- half precision: every element is a number of that format, 2^-13 each by chance.
- noise: see `gradients.update_noise`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from gradients.update_levels import Grid, grid, quantised_finding, sign_finding
from gradients.update_noise import floor, noise_finding, rank_finding
from gradients.update_traces import Finding, Moved, Trace

# A number format's errors hide what is smaller than this many of them.
_ABOVE_ROUNDING = 16
_CHANCE = 1e-9
# Of a tensor's elements that must be zero without a dead unit, and at the ends of its range.
_FEWEST_ZEROS, _FEWEST_ENDS = 8, 8
_ZERO_SHARE = 0.005
_ENOUGH = 64
# Of all elements, so many within a tenth of the largest are signs.
_MOST, _NEARLY = 0.5, 0.9


def processing(
    tensors: Sequence[Moved], unchanged: int = 0, max_norm: float | None = None
) -> list[Finding]:
    """What was done to the values of an update.

    Args:
        tensors: The parameters that were sent and changed.
        unchanged: Elements of the parameters that were sent and did not change.
        max_norm: The clipping norm that is stated, if one is.
    """
    half = _half_precision(tensors)
    if half is not None:
        tensors = [t.sent_in(half) for t in tensors]
    grids = [levels for t in tensors if (levels := grid(t)) is not None]
    shape = _levels(tensors, grids)
    floors = [] if shape else [noise for t in tensors if (noise := floor(t)) is not None]
    findings = [
        shape,
        # Beside levels the other tensors are those with too few elements to show theirs.
        None if shape else _sparse(tensors, unchanged),
        None if shape else _clipped_values(tensors),
        _clipped_norm(tensors, max_norm),
        None if half is None or shape else _in_half_precision(half),
        noise_finding(tensors, floors),
        rank_finding(tensors, floors),
    ]
    return [finding for finding in findings if finding is not None]


def _levels(tensors: Sequence[Moved], grids: Sequence[Grid]) -> Finding | None:
    """Quantised where a tensor has several levels, signs where all that have any have one."""
    if any(g.most > 1 for g in grids):
        return quantised_finding(grids, len(tensors))
    one = _one_magnitude(tensors)
    if one is not None and all(g.step >= _NEARLY * (one.value or 0) for g in grids):
        return one
    if not grids:
        return None
    names = {g.name for g in grids}
    zero = [_zeros_of_units_alive(t) for t in tensors if t.name in names]
    share = sum(int(z.sum()) for z in zero) / sum(z.numel() for z in zero)
    return sign_finding(grids, len(tensors), share)


def _one_magnitude(tensors: Sequence[Moved]) -> Finding | None:
    """Most elements of all tensors near one magnitude: signs, or Adam's first step.

    Adam's first step is lr g / (|g| + eps): below lr by little, and nothing but signs of g.
    """
    changed = [t for t in tensors if len(t.magnitudes)]
    magnitudes = torch.cat([t.magnitudes for t in changed]) if changed else torch.zeros(0)
    if len(changed) < 2 or len(magnitudes) < _ENOUGH:
        return None
    largest = float(magnitudes.max())
    share = float((magnitudes >= _NEARLY * largest).double().mean())
    if share < _MOST:
        return None
    evidence = (
        f"{share:.0%} of what changed has one magnitude in all tensors, {largest:.4g}: signs of "
        "the gradient, as signSGD sends them and Adam's first step does"
    )
    return Finding(Trace.SIGNS, False, evidence, largest)


def _sparse(tensors: Sequence[Moved], unchanged: int) -> Finding | None:
    """Zeros that no dead unit explains, and nothing between them and a threshold.

    With T the smallest magnitude of a tensor and a density that does not rise near zero, the
    number of magnitudes in (T, 2T] has a geometric distribution of mean at most 1.
    """
    from scipy.special import betainc

    told = [t for t in tensors if _unexplained_zeros(t) and _above_rounding(t)]
    behind = sum(int((t.magnitudes <= 2 * t.magnitudes[0]).sum()) - 1 for t in told)
    if not behind or float(betainc(behind, len(told), 0.5)) > _CHANCE:
        return None
    zeros = sum(int((t.change == 0).sum()) for t in tensors) + unchanged
    total = sum(t.change.numel() for t in tensors) + unchanged
    shares = [float((t.change == 0).double().mean()) for t in told]
    smallest = [float(t.magnitudes[0]) for t in told]
    evidence = (
        f"{zeros / total:.1%} of all elements are exactly zero, more than dead units explain in "
        f"{len(told)} of {len(tensors)} tensors ({min(shares):.1%} to {max(shares):.1%} each); "
        f"the smallest of the others are {min(smallest):.3g} to {max(smallest):.3g}, "
        f"with {behind} within twice that"
    )
    return Finding(Trace.SPARSE, True, evidence, zeros / total, tuple(t.name for t in told))


def _unexplained_zeros(tensor: Moved) -> bool:
    """Whether there are zeros outside rows and columns that are zero as a whole."""
    zero = _zeros_of_units_alive(tensor)
    return int(zero.sum()) >= max(_FEWEST_ZEROS, _ZERO_SHARE * zero.numel())


def _zeros_of_units_alive(tensor: Moved) -> torch.Tensor:
    zero = tensor.matrix == 0
    return zero[~zero.all(1)][:, ~zero.all(0)]


def _above_rounding(tensor: Moved) -> bool:
    return float(tensor.magnitudes[0]) > _ABOVE_ROUNDING * tensor.error


def _clipped_values(tensors: Sequence[Moved]) -> Finding | None:
    """Many elements at both ends of the range."""
    ends = {t.name: end for t in tensors if (end := _ends(t)) is not None}
    if not ends:
        return None
    bounds = [bound for bound, _ in ends.values()]
    one = max(bounds) <= 1.001 * min(bounds)
    count = sum(n for _, n in ends.values())
    evidence = (
        f"{count} elements lie at the ends of the range of {len(ends)} of {len(tensors)} tensors"
    )
    if one:
        evidence += f", which is {bounds[0]:.4g} in each"
    value = bounds[0] if one else None
    return Finding(Trace.CLIPPED_VALUES, True, evidence, value, tuple(ends))


def _ends(tensor: Moved) -> tuple[float, int] | None:
    """The largest magnitude of a tensor and how often it stands there, if that says clipping."""
    change = tensor.matrix
    if int((change != 0).sum()) < _ENOUGH:
        return None
    bound = float(change.abs().max())
    error = 4 * tensor.error + 1e-6 * bound
    at = change.abs() >= bound - error
    both = bool((at & (change > 0)).any()) and bool((at & (change < 0)).any())
    several = int(at.any(1).sum()) >= 3 and int(at.sum()) >= _FEWEST_ENDS
    # Where rounding is coarse, values near the bound are no longer apart from it.
    near = int((change.abs() >= bound - 8 * error).sum())
    apart = bound > _ABOVE_ROUNDING * error and int(at.sum()) > 0.5 * near
    return (bound, int(at.sum())) if both and several and apart else None


def _clipped_norm(tensors: Sequence[Moved], max_norm: float | None) -> Finding | None:
    """A norm that is the stated one, or a round number."""
    norm = math.hypot(*(float(t.change.norm()) for t in tensors), 0.0)
    error = 1e-6 * norm
    if any(t.sent is not t.change for t in tensors):
        # Weights: their rounding is as often for the norm as against it, its square for it.
        error += 6 * max(t.error for t in tensors)
        error += sum(float(t.rounding.square().sum()) for t in tensors) / max(norm, 1e-300)
    if norm == 0 or error > 2e-5 * norm:
        return None
    if max_norm is not None:
        if abs(norm - max_norm) > error:
            return None
        return Finding(Trace.CLIPPED_NORM, True, f"the norm is {norm:.6g}, as stated", norm)
    if abs(norm - float(f"{norm:.1e}")) > error:
        return None
    return Finding(Trace.CLIPPED_NORM, False, f"the norm is {norm:.6g}, a round number", norm)


def _half_precision(tensors: Sequence[Moved]) -> torch.dtype | None:
    """The format of which every element that was sent is a number."""
    if sum(len(t.magnitudes) for t in tensors) < _ENOUGH:
        return None
    formats = (torch.float16, torch.bfloat16)
    return next((f for f in formats if all(_is_in(t, f) for t in tensors)), None)


def _in_half_precision(dtype: torch.dtype) -> Finding:
    name = str(dtype).removeprefix("torch.")
    return Finding(Trace.HALF_PRECISION, True, f"every element that was sent is a number of {name}")


def _is_in(tensor: Moved, dtype: torch.dtype) -> bool:
    """Whether what was sent is of that format, but for the error of adding the change again."""
    off = (tensor.sent.to(dtype).double() - tensor.sent).abs()
    return bool((off <= 1e-7 * tensor.change.abs()).all())


def statistics(
    before: Sequence[str], sent: Sequence[str], counters: Sequence[float]
) -> list[Finding]:
    """What is known of BatchNorm, and the steps that it counted.

    Args:
        before: Names of the running statistics that the client received.
        sent: Those that it sent back.
        counters: By how much each `num_batches_tracked` that was sent has grown.
    """
    if not before:
        return []
    what = "none" if not sent else ("all" if len(sent) == len(before) else f"{len(sent)}")
    evidence = f"{what} of {len(before)} running means and variances were sent"
    found = [Finding(Trace.STATISTICS, True, evidence, None, tuple(sent))]
    steps = max(counters, default=0.0)
    if steps >= 1:
        evidence = f"{steps:.0f} batches were counted by BatchNorm"
        found.append(Finding(Trace.STEPS, True, evidence, steps))
    return found
