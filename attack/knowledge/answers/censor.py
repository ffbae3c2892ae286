"""Against CENSOR: what an orthogonal direction says, and what a constant seed gives away."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch

from attack.knowledge.known_defenses import Adaptation, HoldsTensors, register_adaptation
from attack.matching.objectives import Tensors
from core.target import Target
from gradients.defenses.base import stated
from gradients.defenses.censor import ORTHOGONAL, Censor

# Cosine from which on a shared tensor is a trial's random vector without its small part along g.
SAME_DIRECTION = 0.9


@register_adaptation("censor")
def _censor(adaptation: Adaptation, target: Target, values: list[float]) -> None:
    """Undo the projection where the random vectors are known; else compare what is left.

    A shared tensor p lies in the plane of a random r and the gradient g, orthogonal to g and as
    long as it: r = <r, p> p / |p|^2 + <r, g> g / |g|^2. With r known this is g but for its
    sign. Without r, p gives two numbers per tensor: |g| = |p| and <g, p> = 0. Over many rounds
    nothing is added: the mean of p over secret directions is 0. The choice among trials depends
    on the second derivative of the loss along p, not on g.
    """
    shared = list(target.gradient.values())
    defense = stated(target.defenses, Censor)
    found = None
    if defense.seed >= 0 and defense.projection == ORTHOGONAL:
        found = gradient_behind(shared, defense)
    if found is None:
        adaptation.through = NormAndOrthogonality(shared)
        adaptation.notes.append(
            "censor: of each tensor the norm and one direction that it does not have are compared"
        )
        return
    adaptation.restored = dict(zip(target.gradient, found, strict=True))
    adaptation.through = SignsOf(found)
    adaptation.notes.append(
        "censor: the random vectors follow from the seed; the gradient is computed but for the "
        "sign of each tensor, which is the candidate's"
    )


def gradient_behind(shared: Tensors, defense: Censor) -> Tensors | None:
    """The gradient, each tensor up to its sign; None where no trial's vectors fit.

    Args:
        shared: What the client shared.
        defense: With a constant seed, and projections as in the paper.
    """
    # Tensors of one element are shared as zero, and say nothing.
    telling = [index for index, p in enumerate(shared) if p.numel() > 1 and bool(p.any())]
    unused = torch.Generator()
    like = [p.cpu() for p in shared]
    trials = list(defense.directions(like, unused))
    if not telling or not trials:
        return None

    def fit(trial: Tensors) -> float:
        cosines = [_cosine(trial[index], like[index]) * like[index].numel() for index in telling]
        return sum(cosines) / sum(like[index].numel() for index in telling)

    best = max(trials, key=fit)
    if fit(best) < SAME_DIRECTION:
        return None
    return [
        _along(r, p).to(s) if index in telling else torch.zeros_like(s)
        for index, (r, p, s) in enumerate(zip(best, like, shared, strict=True))
    ]


def _cosine(a: torch.Tensor, b: torch.Tensor) -> float:
    a, b = a.double(), b.double()
    return float((a * b).sum() / (a.norm() * b.norm()).clamp_min(1e-300))


def _along(direction: torch.Tensor, shared: torch.Tensor) -> torch.Tensor:
    """What the random vector has beside p, as long as p: plus or minus the gradient."""
    r, p = direction.double(), shared.double()
    beside = r - (r * p).sum() / p.square().sum() * p
    return beside * (p.norm() / beside.norm().clamp_min(1e-300))


@dataclass
class SignsOf(HoldsTensors):
    """Turn every tensor of a candidate's gradient to the side of a known one.

    Attributes:
        known: Tensors whose signs as a whole are not known.
    """

    known: Tensors

    def __call__(self, gradient: Tensors) -> Tensors:
        """Apply it to a candidate's gradient."""
        self.known = [k.to(g) for k, g in zip(self.known, gradient, strict=True)]
        pairs = zip(gradient, self.known, strict=True)
        return [torch.where((g.detach() * k).sum() < 0, -g, g) for g, k in pairs]

    def tensors(self) -> Tensors:
        """See `HoldsTensors.tensors`."""
        return self.known

    def holding(self, tensors: Tensors) -> SignsOf:
        """See `HoldsTensors.holding`."""
        return SignsOf(tensors)


class NormAndOrthogonality(HoldsTensors):
    """Of a candidate's gradient g per tensor: |g| along p, and <g, p> / |p| beside it.

    The distance to p is that of |g| to |p| and of <g, p> to 0, which is all that p says.

    Args:
        shared: The tensors p.
    """

    def __init__(self, shared: Tensors) -> None:
        numbers = torch.Generator().manual_seed(0)
        self.units, self.beside = [], []
        for p in shared:
            unit = p / p.norm().clamp_min(1e-30)
            other = torch.empty(p.shape, dtype=p.dtype).normal_(generator=numbers).to(p.device)
            other = other - (other * unit).sum() * unit
            self.units.append(unit)
            self.beside.append(other / other.norm().clamp_min(1e-30))

    def __call__(self, gradient: Tensors) -> Tensors:
        """Apply it to a candidate's gradient."""
        self.units = [u.to(g) for u, g in zip(self.units, gradient, strict=True)]
        self.beside = [b.to(g) for b, g in zip(self.beside, gradient, strict=True)]
        tiny = [torch.finfo(g.dtype).tiny for g in gradient]
        return [
            unit * (g.square().sum() + small).sqrt() + beside * (g * unit).sum()
            for g, unit, beside, small in zip(gradient, self.units, self.beside, tiny, strict=True)
        ]

    def tensors(self) -> Tensors:
        """See `HoldsTensors.tensors`."""
        return [*self.units, *self.beside]

    def holding(self, tensors: Tensors) -> NormAndOrthogonality:
        """See `HoldsTensors.holding`."""
        other, n = copy.copy(self), len(self.units)
        other.units, other.beside = tensors[:n], tensors[n:]
        return other
