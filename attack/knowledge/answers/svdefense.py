"""Against truncated singular value decompositions."""

from __future__ import annotations

import torch

from attack.knowledge.known_defenses import Adaptation, register_adaptation
from attack.matching.objectives import Tensors
from core.target import Target

# Singular values below this share of the largest are rounding.
ROUNDING = 1e-5


@register_adaptation("svdefense")
def _svdefense(adaptation: Adaptation, target: Target, values: list[float]) -> None:
    """Compare what the kept singular vectors determine of a gradient.

    With U and V the kept vectors of a layer's gradient G, the shared matrix T = U U' G V V' is
    also U U' G and G V V', for the dropped part is orthogonal to both. A candidate's gradient
    is projected onto all matrices that share a row or a column space with T; the true one then
    is T exactly, and what the truncation left open is not compared.
    """
    shared = list(target.gradient.values())
    bases = [kept_vectors(g) for g in shared]
    hidden = [g for g, b in zip(shared, bases, strict=True) if b is not None]
    adaptation.through = Tangent(bases)
    ranks = [b[0].shape[1] for b in bases if b is not None]
    adaptation.notes.append(
        f"svdefense: {len(hidden)} matrices are compared where their {sum(ranks)} kept singular "
        "vectors determine them"
    )


Bases = tuple[torch.Tensor, torch.Tensor]


def kept_vectors(shared: torch.Tensor) -> Bases | None:
    """Left and right singular vectors (m x r, n x r) of a shared matrix of lower rank.

    Returns:
        None where the tensor is a vector, or nothing of it was dropped.
    """
    if shared.dim() < 2:
        return None
    matrix = shared.flatten(1).double()
    left, singular, right = torch.linalg.svd(matrix, full_matrices=False)
    rank = int((singular > ROUNDING * singular[0].clamp_min(1e-300)).sum())
    if rank == len(singular):
        return None
    return left[:, :rank].to(shared.dtype), right[:rank].T.contiguous().to(shared.dtype)


class Tangent:
    """Project matrices onto those that share a row or a column space with the kept part.

    Args:
        bases: Of every tensor, the kept singular vectors; None leaves it as it is.
    """

    def __init__(self, bases: list[Bases | None]) -> None:
        self.bases = bases

    def __call__(self, gradient: Tensors) -> Tensors:
        """Apply it to a candidate's gradient."""
        return [_projected(g, b) for g, b in zip(gradient, self.bases, strict=True)]


def _projected(gradient: torch.Tensor, bases: Bases | None) -> torch.Tensor:
    if bases is None:
        return gradient
    left, right = (b.to(gradient) for b in bases)
    matrix = gradient.flatten(1)
    rows = left @ (left.T @ matrix)
    columns = ((matrix - rows) @ right) @ right.T
    return (rows + columns).view_as(gradient)
