"""What per-sample clipping makes of a candidate batch, for the attacker who knows of it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from core.losses import DEFAULT_LOSS, Loss
from gradients.private_gradient import clipped_gradient_sum

# Share of the iterations before a candidate's images are clipped: from noise, one of them
# may get stuck, whose faint gradient clipping makes as long as the others'.
CLIPPED_FROM = 0.25


class SampleClipping:
    """The mean of a candidate's gradients, each clipped as DP-SGD's client clips its own.

    In what is shared, images with small gradients count for more than in the gradient of
    the mean loss, which a true batch therefore does not match. This mean it does, and it
    can be differentiated in the images, their factors min(1, C / |g_i|) included.

    Args:
        model: The client's model; no layer of it may mix samples.
        names: The shared parameters.
        max_norm: Clipping norm C, the largest Euclidean norm that is left as it is.
        batch_size: Of the client, over which the mean is taken.
        loss: What the client minimises.

    Source: Abadi et al., "Deep Learning with Differential Privacy", algorithm 1,
        https://arxiv.org/abs/1607.00133.
    """

    def __init__(
        self,
        model: nn.Module,
        names: Sequence[str],
        max_norm: float,
        batch_size: int,
        loss: Loss = DEFAULT_LOSS,
    ) -> None:
        self.max_norm = max_norm
        self.batch_size = batch_size
        self.loss = loss
        self._model, self._names = model, list(names)

    def mean_gradient(self, inputs: torch.Tensor, labels: torch.Tensor) -> list[torch.Tensor]:
        """This process's part of the mean, by shared parameter.

        Args:
            inputs: n x C x H x W, normalised.
            labels: n x ..., as the loss takes them.
        """
        held = {name: p.detach() for name, p in self._model.named_parameters()}
        shared = {name: held[name] for name in self._names}
        others = {n: p for n, p in held.items() if n not in shared}
        fixed = others | dict(self._model.named_buffers())
        total = clipped_gradient_sum(
            self._model, shared, fixed, inputs, labels, self.max_norm, loss=self.loss
        )
        return [t / self.batch_size for t in total]
