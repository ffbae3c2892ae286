"""What all parts of an inversion look at."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from core.processes import distributed

if TYPE_CHECKING:
    from attack.knowledge.known_defenses import Adaptation
    from attack.loop.restarts import Restart
    from attack.matching.replica import Replica
    from attack.priors.coordinates import Coordinates
    from attack.settings import InversionConfig
    from core.target import Target


@dataclass(frozen=True)
class InversionProblem:
    """One target, and how it is inverted on this process.

    Attributes:
        target: What the client shared.
        config: Hyper-parameters.
        adaptation: What is done about the client's stated defenses.
        replica: The client's computation for this process's images.
        labels: n labels of this process's images.
        coordinates: Coordinates that are optimised in place of pixels.
        device: Device that runs the computation.
        dtype: Precision of the computation.
    """

    target: Target
    config: InversionConfig
    adaptation: Adaptation
    replica: Replica
    labels: torch.Tensor
    coordinates: Coordinates
    device: torch.device
    dtype: torch.dtype

    @property
    def shape(self) -> tuple[int, ...]:
        """N x C x H x W of the whole batch (of signals N x C x L, of tables N x F)."""
        return (self.target.batch_size, *self.target.data.shape)

    def mine(self, batch: torch.Tensor) -> torch.Tensor:
        """This process's part of the whole batch."""
        return batch[self.replica.share]

    def whole(self, mine: torch.Tensor) -> torch.Tensor:
        """The whole batch from the parts of all processes."""
        return distributed.all_gather_rows(mine, self.replica.sizes)

    def inputs(self, restart: Restart) -> torch.Tensor:
        """Network inputs (n x C x H x W) where the restart stands."""
        return self.coordinates.decode(restart.variable.detach())

    def boxed(self, inputs: torch.Tensor) -> torch.Tensor:
        """Network inputs moved into the range of valid images, where there is one."""
        if not self.target.data.bounded:
            return inputs
        low, high = self._range
        return torch.minimum(torch.maximum(inputs, low), high)

    @functools.cached_property
    def _range(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The network inputs (1 x C x 1 x 1) of 0 and of 1."""
        data = self.target.data
        black = torch.zeros(
            (1, data.shape[0], *[1] * (len(data.shape) - 1)), dtype=self.dtype, device=self.device
        )
        return data.normalize(black), data.normalize(black + 1)

    def found(self, restart: Restart) -> torch.Tensor:
        """Network inputs (n x C x H x W) that are the restart's result so far."""
        inputs = restart.best_inputs
        return self.inputs(restart) if inputs is None else inputs

    def found_labels(self, restart: Restart) -> torch.Tensor:
        """The n labels that belong to them."""
        return self.labels if restart.best_labels is None else restart.best_labels

    def images(self, inputs: torch.Tensor) -> torch.Tensor:
        """Network inputs of all processes on the CPU: N x C x H x W in [0, 1], or unbounded."""
        whole = self.whole(inputs)
        # Pictures and metrics are in float32 whatever the attack computed in.
        return self.target.data.clamp(self.target.data.denormalize(whole)).float().cpu()
