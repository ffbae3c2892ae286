"""What an attacker does who knows that a framework's class stands in front of the update."""

from __future__ import annotations

import torch

from attack.knowledge.known_defenses import Adaptation, register_adaptation
from attack.matching.objectives import Tensors
from core.target import Target

# Slope of a cut value beyond the cut, so that a candidate on the wrong side is led back.
LEAK = 0.1


class ThroughTruncation:
    """What `PercentilePrivacy` leaves of a candidate's gradient.

    Args:
        kept: Per tensor, which elements were shared.
        bound: What the others cannot exceed.
        limit: Where shared ones were cut.
    """

    def __init__(self, kept: list[torch.Tensor], bound: float, limit: float) -> None:
        self.kept, self.bound, self.limit = kept, bound, limit

    def __call__(self, gradient: Tensors) -> Tensors:
        """Apply it to a candidate's gradient."""
        self.kept = [k.to(g.device) for k, g in zip(self.kept, gradient, strict=True)]
        return [
            torch.where(k, self._cut(g), g.sign() * (g.abs() - self.bound).clamp_min(0))
            for k, g in zip(self.kept, gradient, strict=True)
        ]

    def _cut(self, g: torch.Tensor) -> torch.Tensor:
        within = g.clamp(-self.limit, self.limit)
        return within + LEAK * (g - within)


@register_adaptation("nvflare-percentile")
def _percentile(adaptation: Adaptation, target: Target, values: list[float]) -> None:
    """Cut candidates as the filter does; what was dropped is bounded by what was kept."""
    shared = list(target.gradient.values())
    magnitudes = torch.cat([g.detach().abs().flatten() for g in shared])
    kept = magnitudes[magnitudes > 0]
    # The update is the difference over lr K, and the cut is at gamma per step.
    limit = values[1] / target.local.lr
    bound = float(kept.min()) if kept.numel() else limit
    adaptation.through = ThroughTruncation([g != 0 for g in shared], bound, limit)
    share = float((kept >= 0.999 * limit).float().mean()) if kept.numel() else 0.0
    adaptation.notes.append(
        f"nvflare-percentile: {kept.numel() / magnitudes.numel():.1%} of the elements are shared, "
        f"{share:.1%} of them cut; candidates are cut as well"
    )


@register_adaptation("nvflare-svt")
def _sparse_vector(adaptation: Adaptation, target: Target, values: list[float]) -> None:
    """Compare directions, where something was shared."""
    adaptation.keep_only([g != 0 for g in target.gradient.values()])
    _directions(adaptation, "nvflare-svt: only what was shared is compared")


def _directions(adaptation: Adaptation, note: str) -> None:
    if adaptation.config.matching.objective == "L2":
        adaptation.config = adaptation.config.changed(objective="sim")
    adaptation.notes.append(f"{note}, and by its direction")


@register_adaptation("nvflare-exclude")
def _excluded(adaptation: Adaptation, target: Target, values: list[float]) -> None:
    adaptation.notes.append("nvflare-exclude: what is missing is seen, told or not")


@register_adaptation("flower-local-dp")
@register_adaptation("flower-fixed-clipping")
@register_adaptation("flower-adaptive-clipping")
@register_adaptation("opacus")
def _scaled(adaptation: Adaptation, target: Target, values: list[float]) -> None:
    """Clipping leaves the direction, and white noise asks for no weights."""
    _directions(adaptation, "clipped: all elements are compared")
