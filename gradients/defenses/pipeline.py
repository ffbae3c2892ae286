"""Several defenses as the one transformation that training asks for."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import nn

from gradients.defenses.base import (
    ClientView,
    Defense,
    Gradient,
    apply_defenses,
    encode_batch,
    parse_defenses,
)


@dataclass(frozen=True)
class Pipeline:
    """Defenses in the order in which they are applied; see `training.transforms.Transform`."""

    defenses: tuple[Defense, ...]

    @property
    def word(self) -> str:
        """What `parse_defenses` reads."""
        return ",".join(defense.word for defense in self.defenses)

    def prepare(self, model: nn.Module) -> None:
        """Change the model before local training."""
        for defense in self.defenses:
            defense.prepare(model)

    def encode(self, client: ClientView) -> tuple[torch.Tensor, torch.Tensor]:
        """What the client trains on."""
        return encode_batch(self.defenses, client)

    def apply(self, gradient: Gradient, client: ClientView) -> Gradient:
        """The update to share."""
        return apply_defenses(self.defenses, gradient, client)

    def epsilon(self, rounds: int, delta: float) -> float | None:
        """The budget of the best promise; what comes after noise takes nothing from it."""
        norm, promised = math.inf, []
        for defense in self.defenses:
            promised.append(defense.epsilon(norm, rounds, delta))
            norm = defense.largest_norm(norm)
        return min((epsilon for epsilon in promised if epsilon is not None), default=None)


def as_transform(words: str) -> Pipeline:
    """The defenses of words such as `clip:1,gaussian:0.01` as one transformation.

    Raises:
        InputError: See `parse_defenses`.
    """
    return Pipeline(parse_defenses(words))
