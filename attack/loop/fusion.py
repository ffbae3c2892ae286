"""Making one batch of several restarts: E2EGI's fusion, and the group's mean.

Restarts are S x N x C x H x W. The functions look at gradient losses only, never at
the truth.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from scipy.optimize import linear_sum_assignment

from attack.metrics.assignment import pairwise_mse

# Gradient losses (B) of a group of batches (B x N x C x H x W).
Losses = Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class Fusion:
    """One batch put together from several restarts.

    Attributes:
        images: N x C x H x W.
        choice: The restart that each image is taken from (N).
        loss: Gradient loss of `images`.
        evaluations: Batches whose loss was computed.
        sweeps: Passes over the batch until nothing changed.
    """

    images: torch.Tensor
    choice: torch.Tensor
    loss: float
    evaluations: int
    sweeps: int


def combine(
    restarts: torch.Tensor,
    losses: Losses,
    *,
    labels: torch.Tensor | None = None,
    start: torch.Tensor | None = None,
    max_sweeps: int = 10,
    group: int = 16,
) -> Fusion:
    """Minimum-loss combinatorial optimization: per image, the restart of smallest loss.

    Coordinate descent over the images from the best single restart: each image in turn is
    taken from every restart, all others held, and the best is kept, until a whole sweep
    changes nothing. Never worse than the best restart.

    Args:
        restarts: S x N x C x H x W, image n of every restart with the same label.
        losses: Gradient losses of up to `group` batches at once; NaN never wins.
        labels: N. Where labels repeat, images of one label may stand in another order in
            every restart; given the labels, they are brought into the same order first.
        start: The choice to start from (N), as of an earlier fusion.
        max_sweeps: Sweeps at most; 1 is the published procedure.
        group: Batches per call of `losses`.

    Returns:
        The fused batch and where its images come from.

    Source:
        Li, Wang, Chen, Zhang, Shafiq, Gu, E2EGI: End-to-End Gradient Inversion in
        Federated Learning, IEEE JBHI 27(2), 2023, https://doi.org/10.1109/JBHI.2022.3204455.
    """
    if labels is not None:
        restarts = align_repeated_labels(restarts, labels)
    search = _CoordinateSearch(restarts, losses, group)
    search.begin(start)
    sweeps, changed = 0, True
    while changed and sweeps < max_sweeps:
        changed = sum(search.improve(image) for image in range(restarts.shape[1])) > 0
        sweeps += 1
    images = search.batch(search.choice)
    return Fusion(images, search.choice.clone(), search.loss, search.evaluations, sweeps)


class _CoordinateSearch:
    """The choice so far, its loss, and one step of the descent."""

    def __init__(self, restarts: torch.Tensor, losses: Losses, group: int) -> None:
        self.restarts, self.losses, self.group = restarts, losses, group
        self.choice = torch.zeros(restarts.shape[1], dtype=torch.long)
        self.loss = float("inf")
        self.evaluations = 0

    def batch(self, choice: torch.Tensor) -> torch.Tensor:
        """The batch (N x C x H x W) of a choice."""
        choice = choice.to(self.restarts.device)
        return self.restarts[choice, torch.arange(len(choice), device=choice.device)]

    def begin(self, start: torch.Tensor | None) -> None:
        """Start from the best restart, or from `start` where that is better."""
        n_restarts, n = self.restarts.shape[:2]
        choices = [torch.full((n,), restart) for restart in range(n_restarts)]
        if start is not None:
            choices.append(start.cpu().long())
        self._keep_best(choices)

    def improve(self, image: int) -> bool:
        """Take `image` from the best restart; whether that changed anything."""
        choices = []
        for restart in range(len(self.restarts)):
            if restart != int(self.choice[image]):
                choices.append(self.choice.clone())
                choices[-1][image] = restart
        return self._keep_best(choices)

    def _keep_best(self, choices: list[torch.Tensor]) -> bool:
        found = []
        for first in range(0, len(choices), self.group):
            batches = [self.batch(choice) for choice in choices[first : first + self.group]]
            found.append(self.losses(torch.stack(batches)).detach().double().cpu())
        self.evaluations += len(choices)
        if not found:
            return False
        values = torch.cat(found).nan_to_num(nan=float("inf"))
        best = int(values.argmin())
        # Equal losses must not make two choices take turns for ever. The first call
        # keeps its best even where every restart has diverged.
        if values[best] >= self.loss and self.evaluations > len(choices):
            return False
        self.choice, self.loss = choices[best], float(values[best])
        return True


def align_repeated_labels(restarts: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Bring images of equal label into the order of the first restart (smallest total MSE).

    Args:
        restarts: S x N x C x H x W.
        labels: Of the N images.

    Returns:
        The restarts, reordered within every label.
    """
    aligned = restarts.clone()
    # Of targets that are no class indices, whole rows are compared.
    _, numbers = labels.unique(dim=0, return_inverse=True)
    for number in numbers.unique():
        members = (numbers == number).nonzero().flatten().to(restarts.device)
        if len(members) < 2:
            continue
        reference = restarts[0, members]
        for restart in range(1, len(restarts)):
            images = restarts[restart, members]
            cost = pairwise_mse(reference, images).double().cpu().nan_to_num(nan=1e6, posinf=1e6)
            _, columns = linear_sum_assignment(cost.numpy())
            order = torch.from_numpy(columns).to(images.device)
            aligned[restart, members] = images[order]
    return aligned


def group_target(
    restarts: torch.Tensor, *, registration: bool = False, max_shift: int | None = None
) -> torch.Tensor:
    """What group consistency pulls every restart towards: the mean over restarts.

    Args:
        restarts: S x N x C x H x W.
        registration: Shift every image onto the pixel-wise mean first.
        max_shift: Largest shift in pixels; an eighth of the side if None.

    Returns:
        N x C x H x W, without gradient.

    Source:
        Yin et al., See through Gradients: Image Batch Recovery via GradInversion, CVPR
        2021, section 3.4, https://arxiv.org/abs/2104.07586. The paper registers by
        RANSAC-flow, a trained network; here it is the best whole-pixel translation.
    """
    restarts = restarts.detach()
    mean = restarts.mean(0)
    if not registration:
        return mean
    return torch.stack([register(images, mean, max_shift) for images in restarts]).mean(0)


def register(
    images: torch.Tensor, reference: torch.Tensor, max_shift: int | None = None
) -> torch.Tensor:
    """Shift every image (cyclically, by whole pixels) to correlate best with its reference.

    Args:
        images: N x C x H x W, or signals and volumes of one or three axes in space. The rows
            of a table (N x F) can't be shifted and stay as they are.
        reference: The same shape.
        max_shift: Largest shift in pixels in either direction; an eighth of the smallest side
            if None.
    """
    size = images.shape[2:]
    if not size:
        return images
    space = tuple(range(-len(size), 0))
    limit = max(1, min(size) // 8) if max_shift is None else max_shift
    a = images - images.mean(space, keepdim=True)
    b = reference - reference.mean(space, keepdim=True)
    # Cross-correlation of all cyclic shifts at once.
    spectrum = torch.fft.rfftn(a, dim=space).conj() * torch.fft.rfftn(b, dim=space)
    correlation = torch.fft.irfftn(spectrum, s=size, dim=space).sum(1)
    far = _farther_than(limit, size).to(images.device)
    best = correlation.masked_fill(far, -torch.inf).flatten(1).argmax(1)
    shifts = torch.stack(torch.unravel_index(best, size), dim=1).tolist()
    pairs = zip(images, shifts, strict=True)
    return torch.stack([torch.roll(image, shift, dims=space) for image, shift in pairs])


def _farther_than(limit: int, size: tuple[int, ...]) -> torch.Tensor:
    """Which cyclic shifts move by more than `limit` along any axis."""
    far = torch.zeros(size, dtype=torch.bool)
    for axis, side in enumerate(size):
        shift = torch.arange(side)
        along = torch.minimum(shift, side - shift) > limit
        far |= along.view(-1, *[1] * (len(size) - axis - 1))
    return far
