"""A site's local training as a differentiable function of its images.

`gradients.local_update` unrolls the SGD; added here are a site's own batches (a data
loader's last batch is short, and every epoch may have an order of its own), FedProx's
proximal term, and the running BatchNorm statistics, which are part of what a federation's
client sends.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import nn

from attack.matching.smooth_relu import SmoothReLU
from audit.updates import LocalUpdate
from core.target import BatchStatistics
from gradients.batch_statistics import batch_norm_layers
from gradients.local_update import Parameters, local_sgd, trainable_parameters

# Per local step and BatchNorm layer: mean and unbiased variance of the batch.
StepStatistics = list[BatchStatistics]


@dataclass
class Simulated:
    """What a site would send for some images, as far as an attack compares it.

    Attributes:
        gradient: (theta_0 - theta_K) / (lr K), one tensor per parameter.
        statistics: See `LocalUpdate.running_change`.
    """

    gradient: list[torch.Tensor]
    statistics: BatchStatistics


class LocalSimulation:
    """The client's local training, rebuilt from what it sent.

    Args:
        update: What the site sent.
        device: Where to compute.
        dtype: Precision of the computation.

    Attributes:
        width: Of the softened ReLUs, see `attack.matching.smooth_relu`; 0 for the network as it is.
    """

    def __init__(
        self,
        update: LocalUpdate,
        device: torch.device,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.update = update
        with torch.random.fork_rng(devices=[]):
            self.model = update.model.build()
        self.model.load_state_dict({k: v.clone() for k, v in update.global_weights.items()})
        self.model.train().to(device, dtype)
        for layer in self.model.modules():
            if isinstance(layer, nn.modules.batchnorm._BatchNorm):
                # The count of batches has no derivative and is not compared.
                layer.num_batches_tracked = None
        self.start: Parameters = trainable_parameters(self.model)
        self.width = 0.0
        self._weights = _weights(len(update.steps), update.bn_momentum)

    def __call__(self, inputs: torch.Tensor, labels: torch.Tensor) -> Simulated:
        """Train on a batch of candidates.

        Args:
            inputs: N x C x H x W, normalised, N the number of the site's images.
            labels: N class indices, or N x n_classes probabilities.

        Returns:
            What the site would send; differentiable in the inputs (and probabilities).
        """
        seen: StepStatistics = []
        buffers = {name: b.clone() for name, b in self.model.named_buffers()}

        def gradient(current: Parameters, step: int) -> Sequence[torch.Tensor]:
            chosen = self.update.steps[step]
            logits = self._observed({**buffers, **current}, inputs[chosen], seen)
            loss = F.cross_entropy(logits, labels[chosen])
            found = torch.autograd.grad(
                loss, list(current.values()), create_graph=True, allow_unused=True
            )
            dense = [
                torch.zeros_like(p) if g is None else g
                for g, p in zip(found, current.values(), strict=True)
            ]
            return self._with_proximal(dense, current)

        sent = local_sgd(self.start, self.update.local, gradient)
        return Simulated(list(sent.values()), self._running(seen))

    def _with_proximal(
        self, gradient: list[torch.Tensor], current: Parameters
    ) -> list[torch.Tensor]:
        """The gradient of mu/2 |theta - theta_0|^2 added.

        Source: FedProx (Li et al. 2020), eq. 2, https://arxiv.org/abs/1812.06127.
        """
        mu = self.update.proximal
        if not mu:
            return gradient
        drift = [p - self.start[name].detach() for name, p in current.items()]
        return [g + mu * d for g, d in zip(gradient, drift, strict=True)]

    def statistics(self, inputs: torch.Tensor) -> BatchStatistics:
        """The statistics alone, as if the weights did not move during local training."""
        seen: StepStatistics = []
        buffers = {name: b.clone() for name, b in self.model.named_buffers()}
        for chosen in self.update.steps:
            self._observed({**buffers, **self.start}, inputs[chosen], seen)
        return self._running(seen)

    def _observed(
        self, state: dict[str, torch.Tensor], inputs: torch.Tensor, seen: StepStatistics
    ) -> torch.Tensor:
        """Logits of one batch; its statistics are appended to `seen`."""
        found: BatchStatistics = {}
        hooks = [
            layer.register_forward_pre_hook(partial(_measure, found, name))
            for name, layer in batch_norm_layers(self.model).items()
        ]
        try:
            with SmoothReLU(self.width):
                logits = torch.func.functional_call(self.model, state, (inputs,))
        finally:
            for hook in hooks:
                hook.remove()
        seen.append(found)
        return logits

    def _running(self, seen: StepStatistics) -> BatchStatistics:
        """The steps' statistics, weighted as the running statistics weigh them."""
        return {
            name: (
                _weighted([step[name][0] for step in seen], self._weights),
                _weighted([step[name][1] for step in seen], self._weights),
            )
            for name in seen[0]
        }


def _weights(steps: int, momentum: float) -> list[float]:
    """How much each step's statistics count in the running ones; they sum to 1."""
    raw = [momentum * (1 - momentum) ** (steps - 1 - k) for k in range(steps)]
    return [w / sum(raw) for w in raw]


def _weighted(values: list[torch.Tensor], weights: list[float]) -> torch.Tensor:
    return torch.stack([w * v for w, v in zip(weights, values, strict=True)]).sum(0)


def _measure(
    found: BatchStatistics, name: str, layer: nn.Module, inputs: tuple[torch.Tensor, ...]
) -> None:
    features = inputs[0]
    over = [dim for dim in range(features.dim()) if dim != 1]
    found[name] = (features.mean(over), features.var(over, unbiased=True))
