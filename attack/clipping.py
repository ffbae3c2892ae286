"""What per-sample clipping makes of a candidate batch, for the attacker who knows of it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import nn

# Per-sample gradients held at a time: their memory is this many copies of the model.
CHUNK = 8


class SampleClipping:
    """The factors min(1, C / |g_i|) by which DP-SGD's client scales its images' gradients.

    What is shared is the mean of clipped gradients, in which images with small gradients
    count for more than in the gradient of the mean loss. Weighting a candidate's losses by
    these factors gives the same mean. They are taken as constants where the candidate
    stands: their own derivative is left out.

    Args:
        model: The client's model; no layer of it may mix samples.
        names: The shared parameters.
        max_norm: C.

    Source: Abadi et al., "Deep Learning with Differential Privacy", algorithm 1,
        https://arxiv.org/abs/1607.00133.
    """

    def __init__(self, model: nn.Module, names: Sequence[str], max_norm: float) -> None:
        self.max_norm = max_norm
        self._model = model
        held = dict(model.named_parameters())
        self._shared = {name: held[name].detach() for name in names}
        others = {n: p.detach() for n, p in held.items() if n not in self._shared}
        self._fixed = others | dict(model.named_buffers())

    def weights(self, inputs: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """One factor per image.

        Args:
            inputs: n x C x H x W, normalised.
            labels: n class indices, or n x classes label probabilities.
        """
        squares = torch.func.vmap(self._squared_norm, randomness="different")
        pieces = zip(inputs.detach().split(CHUNK), labels.detach().split(CHUNK), strict=True)
        norms = torch.cat([squares(x, y) for x, y in pieces]).sqrt()
        return (self.max_norm / norms.clamp_min(1e-30)).clamp(max=1)

    def _squared_norm(self, image: torch.Tensor, label: torch.Tensor) -> torch.Tensor:
        def loss(parameters: dict[str, torch.Tensor]) -> torch.Tensor:
            state = {**self._fixed, **parameters}
            output = torch.func.functional_call(self._model, state, (image[None],))
            return F.cross_entropy(output, label[None])

        gradient = torch.func.grad(loss)(self._shared)
        return torch.stack([g.square().sum() for g in gradient.values()]).sum()
