"""Differentially private gradients of one local step: clip, sum, add noise."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from core.clipping import BATCH, PER_SAMPLE
from core.errors import InputError
from core.losses import DEFAULT_LOSS, Loss
from core.models.kinds import BatchNorm
from core.target import LocalTraining
from gradients.local_update import (
    ONE_PROCESS,
    Parameters,
    Placement,
    Selection,
    StepGradient,
    client_gradient,
    dropout_masks,
    filled,
    images_of_steps,
    n_selected,
    own_parts,
)

# Per-sample gradients held at a time: their memory is this many copies of the model.
CHUNK = 8


@dataclass(frozen=True)
class PrivacySettings:
    """How a step's gradient is made private.

    Attributes:
        noise_multiplier: sigma: noise relative to the clipping norm.
        max_norm: C, the clipping norm.
        clipping: "per-sample" (DP-SGD), or "batch": the paper's variant, which clips
            the mean gradient of the batch and guarantees nothing, since one image
            can still change it by up to 2 C whatever the others are.
        delta: Of the (epsilon, delta) that is reported.
    """

    noise_multiplier: float = 0.01
    max_norm: float = 1.0
    clipping: str = PER_SAMPLE
    delta: float = 1e-5

    def __post_init__(self) -> None:
        if not 0 <= self.noise_multiplier < math.inf:
            raise InputError("--sigma must not be negative")
        if not 0 < self.max_norm < math.inf:
            raise InputError("--max-per-sample-grad_norm must be positive")
        if not 0 < self.delta < 1:
            raise InputError("--delta must lie between 0 and 1")
        if self.clipping not in (PER_SAMPLE, BATCH):
            raise InputError(f"--dp-clipping {self.clipping}: choose {PER_SAMPLE} or {BATCH}")

    @property
    def word(self) -> str:
        """As listed among the defenses of a checkpoint."""
        name = "dp-sgd" if self.clipping == PER_SAMPLE else "dp-batch"
        return f"{name}:{self.noise_multiplier:g}:{self.max_norm:g}"

    def noise_std(self, batch_size: int) -> float:
        """Standard deviation of the noise on the mean gradient of a batch."""
        scale = self.noise_multiplier * self.max_norm
        return scale / batch_size if self.clipping == PER_SAMPLE else scale


def mixes_samples(model: nn.Module) -> bool:
    """Whether a layer in train mode makes one image's output depend on the others."""
    return any(isinstance(m, BatchNorm) and m.training for m in model.modules())


def private_gradient(
    model: nn.Module,
    images: torch.Tensor,
    labels: torch.Tensor,
    local: LocalTraining,
    privacy: PrivacySettings,
    generator: torch.Generator,
    placement: Placement = ONE_PROCESS,
    buffers: Mapping[str, torch.Tensor] | None = None,
    loss: Loss = DEFAULT_LOSS,
) -> StepGradient:
    """The private gradient of a client's loss at each of its local steps.

    Args:
        model: The model, in the mode (train or eval) that the client runs it in.
        images: N x C x H x W, normalised.
        labels: N x ..., as the loss takes them.
        local: The client's local SGD.
        privacy: Clipping and noise.
        generator: Of the noise, on the CPU and in the same state on every process:
            the noise is added once per step, not once per process.
        placement: Groups of images, processes and dropout masks.
        buffers: Take the changes of the running statistics, where the batch's gradient
            is clipped as one; per sample, nothing moves them.
        loss: What the client minimises.

    Returns:
        To be run by `gradients.local_update.local_sgd`.

    Raises:
        InputError: Batches are accumulated.
    """
    if local.accumulate > 1:
        raise InputError(
            "--enable-dp: noise is added once per batch, so that batches may not be accumulated; "
            "leave accumulate out of the local training"
        )
    steps = images_of_steps(len(images), local, placement.shards)
    if privacy.clipping == BATCH:
        plain = client_gradient(
            model, images, labels, local, placement=placement, buffers=buffers, loss=loss
        )

        def clipped(current: Parameters, step: int) -> Sequence[torch.Tensor]:
            found = filled(plain(current, step), list(current.values()))
            return clip_to_norm(found, privacy.max_norm)

    else:
        fixed = dict(model.named_buffers())

        def clipped(current: Parameters, step: int) -> Sequence[torch.Tensor]:
            total = [torch.zeros_like(p) for p in current.values()]
            for index in own_parts(placement):
                piece = steps[step][index]
                with dropout_masks(placement.dropout_seed, step, index, images.device):
                    shard = clipped_gradient_sum(
                        model,
                        current,
                        fixed,
                        images[piece],
                        labels[piece],
                        privacy.max_norm,
                        loss=loss,
                    )
                total = [t + s for t, s in zip(total, shard, strict=True)]
            summed = total if placement.reduce is None else placement.reduce(total)
            return [g / _step_size(steps[step]) for g in summed]

    def noisy(current: Parameters, step: int) -> Sequence[torch.Tensor]:
        std = privacy.noise_std(_step_size(steps[step]))
        return add_noise(clipped(current, step), std, generator)

    return noisy


def _step_size(pieces: Sequence[Selection]) -> int:
    return sum(map(n_selected, pieces))


def clipped_gradient_sum(
    model: nn.Module,
    parameters: Parameters,
    buffers: Mapping[str, torch.Tensor],
    images: torch.Tensor,
    labels: torch.Tensor,
    max_norm: float,
    chunk: int = CHUNK,
    loss: Loss = DEFAULT_LOSS,
) -> list[torch.Tensor]:
    """Sum of per-sample gradients, each clipped to `max_norm`.

    Args:
        model: No layer of it may mix samples.
        parameters: Parameters at which the gradients are computed.
        buffers: The model's buffers by name.
        images: N x C x H x W, normalised.
        labels: N x ..., as the loss takes them.
        max_norm: C: every image's gradient g becomes g min(1, C / |g|).
        chunk: Images per pass.
        loss: What the client minimises.

    Returns:
        In the order of `parameters`; differentiable in the images and in probabilities.

    Raises:
        InputError: The model has BatchNorm in train mode: its per-sample gradients
            are not defined; or the loss is no mean over samples.

    Source: Abadi et al., "Deep Learning with Differential Privacy", algorithm 1,
        https://arxiv.org/abs/1607.00133.
    """
    if mixes_samples(model):
        raise InputError(
            "--enable-dp: with BatchNorm in train mode an image's gradient depends on the "
            "other images and cannot be clipped alone; use --norm group, --model-eval or "
            "--dp-clipping batch"
        )

    if not loss.mean_over_samples:
        raise InputError(
            f"--enable-dp: the loss {loss.name} is no mean over samples, whose gradients could be "
            "clipped one by one; use --dp-clipping batch"
        )

    def of_one(current: Parameters, image: torch.Tensor, label: torch.Tensor) -> torch.Tensor:
        output = torch.func.functional_call(model, {**buffers, **current}, (image[None],))
        return loss(output, label[None])

    # "different": every image draws a dropout mask of its own.
    per_sample = torch.func.vmap(
        torch.func.grad(of_one), in_dims=(None, 0, 0), randomness="different"
    )
    detached = {name: p.detach() for name, p in parameters.items()}
    total = [torch.zeros_like(p) for p in detached.values()]
    for start in range(0, len(images), chunk):
        gradients = per_sample(
            detached, images[start : start + chunk], labels[start : start + chunk]
        )
        ordered = [gradients[name] for name in detached]
        total = [t + s for t, s in zip(total, _clip_and_sum(ordered, max_norm), strict=True)]
    return total


def _clip_and_sum(gradients: Sequence[torch.Tensor], max_norm: float) -> list[torch.Tensor]:
    """Clip per-sample gradients (one row per image in every tensor) and sum the rows."""
    norms = torch.stack([g.flatten(1).norm(dim=1) for g in gradients]).norm(dim=0)
    factors = (max_norm / norms.clamp(min=1e-30)).clamp(max=1)
    return [torch.tensordot(factors, g, dims=1) for g in gradients]


def clip_to_norm(gradient: Sequence[torch.Tensor], max_norm: float) -> list[torch.Tensor]:
    """Scale a list of tensors down to a common L2 norm of at most `max_norm`."""
    norm = torch.stack([g.double().norm() for g in gradient]).norm()
    factor = (max_norm / norm.clamp(min=1e-30)).clamp(max=1)
    return [g * factor for g in gradient]


def add_noise(
    gradient: Sequence[torch.Tensor], std: float, generator: torch.Generator
) -> list[torch.Tensor]:
    """Add N(0, std^2), drawn on the CPU so that every process and device draws the same."""
    return [
        g + std * torch.empty(g.shape, dtype=g.dtype).normal_(generator=generator).to(g.device)
        for g in gradient
    ]


def gaussian_epsilon(noise_multiplier: float, delta: float, steps: int = 1) -> float:
    """Exact epsilon of `steps` Gaussian mechanisms that each see every image.

    The K-fold composition of Gaussian mechanisms is one with noise multiplier
    sigma / sqrt(K). There is no amplification by sampling: the server sees updates
    of known images.

    Args:
        noise_multiplier: sigma, relative to the sensitivity C.
        delta: Delta of the (epsilon, delta) guarantee.
        steps: Local steps K.

    Returns:
        The smallest epsilon, infinity without noise.

    Source: Balle and Wang, "Improving the Gaussian Mechanism for Differential
        Privacy", theorem 8, https://arxiv.org/abs/1805.06530.
    """
    if noise_multiplier == 0:
        return math.inf
    sigma = noise_multiplier / math.sqrt(steps)
    low, high = 0.0, 1.0
    while _delta_of(sigma, high) > delta:
        low, high = high, 2 * high
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if _delta_of(sigma, middle) > delta else (low, middle)
    return high


def _delta_of(sigma: float, epsilon: float) -> float:
    a, b = 1 / (2 * sigma), epsilon * sigma
    log_cdf = torch.special.log_ndtr(torch.tensor([a - b, -a - b], dtype=torch.float64))
    return float(log_cdf[0].exp() - (epsilon + log_cdf[1]).exp())
