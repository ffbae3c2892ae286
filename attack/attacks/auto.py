"""The parameter-free worst case over all attacks."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

import torch

from attack.attacks.base import Attack, attack_names, register_attack
from attack.attacks.ensemble import Ensemble, EnsembleConfig
from attack.knowledge.threat_models import Capability
from attack.reconstruction import Reconstruction
from core.target import Target


@register_attack
class Auto(Attack):
    """Every attack that the threat model allows, within one budget and nothing to tune.

    Closed forms first, then attacks by optimisation, halved by a common gradient loss. The
    result is what the attacker would choose; `members` holds every attack's result, from
    which an evaluation states the worst case. On text those that read tokens take part, and
    read the labels as well. What AutoAttack is for robustness: Croce and Hein, Reliable
    Evaluation of Adversarial Robustness with an Ensemble of Diverse Parameter-free Attacks, ICML
    2020, https://arxiv.org/abs/2003.01690.

    Args:
        config: Budget, members and what is granted.

    Example:
        python main_run.py --attack auto --epochs 8000 --threat honest-server ...
    """

    name = "auto"
    reads_anything: ClassVar[bool] = True
    recovers_labels: ClassVar[bool] = True
    shares_a_batch: ClassVar[bool] = True
    adapts_by_default: ClassVar[bool] = True

    def __init__(self, config: EnsembleConfig | None = None) -> None:
        self.config = config or EnsembleConfig(members=ensemble_members())

    @classmethod
    def configured(cls, given: dict[str, Any]) -> Auto:
        """Under the flags given: `--epochs` or `--time-budget`, the threat model, `--adaptive`."""
        granted: frozenset[Capability] = given.get("granted", frozenset())
        budget = {k: given[k] for k in ("iterations", "time_budget") if given.get(k) is not None}
        return cls(
            EnsembleConfig(
                members=ensemble_members(),
                granted=tuple(sorted(capability.name for capability in granted)),
                adaptive=bool(given.get("adaptive", True)),
                **budget,
            )
        )

    def reconstruct(
        self,
        target: Target,
        *,
        labels: torch.Tensor | None,
        device: torch.device,
        seed: int,
        state_file: Path | None = None,
        progress: bool = False,
        save_every: int = 500,
        **run: Any,
    ) -> Reconstruction:
        """See `Attack.reconstruct`; labels may be None, then they are recovered."""
        ensemble = Ensemble(
            target,
            self.config,
            labels=labels,
            device=device,
            seed=seed,
            state_file=state_file,
            progress=progress,
            save_every=save_every,
        )
        return ensemble.run()


def ensemble_members() -> tuple[str, ...]:
    """All registered attacks but the ensemble itself."""
    return tuple(name for name in attack_names() if name != Auto.name)
