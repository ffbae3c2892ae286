"""Private images behind noised ones: for defenses that disturb a client's images."""

from __future__ import annotations

import dataclasses

import torch

from attack.knowledge.encoded_inputs import EncodedArchitecture
from attack.knowledge.likely import Attempt
from core.settings import Value
from core.target import Target

# Iterations on what the client trained on, in those of the attack.
LONGER = 2.0
# Such images are rough: the prior, in the balance with the gradient, counts a fifth.
FAINT_PRIOR: dict[str, Value] = {"balance": 0.1, "balance_end": 0.01}
# Weight of total variation beside a squared error in noise's own units, and its rounding at 0.
SMOOTH, ROUNDED = 7.0, 1e-4
# Gradient steps of the denoising, and their length.
STEPS, RATE = 150, 0.03


def is_plain(target: Target) -> bool:
    """Whether one client's single step on one batch was shared, which these answers are for."""
    one = len(target.shards) <= 1 and target.n_clients == 1
    return one and target.local.shares_gradient and target.data.bounded


def trained_on(target: Target, attempt: Attempt) -> torch.Tensor:
    """The disturbed images, which the gradient determines like any others.

    Args:
        target: What was shared of them.
        attempt: An attack.

    Returns:
        N x C x H x W in [0, 1].
    """
    changes = FAINT_PRIOR if len(target.data.shape) == 3 else {}
    return attempt(target, LONGER, **changes).images


def denoised(observed: torch.Tensor, variance: torch.Tensor) -> torch.Tensor:
    """The likeliest smooth images behind observed ones.

    (x - y)^2 / 2 v, summed over pixels, plus the total variation of x is minimised over [0, 1].

    Args:
        observed: y: N x C x H x W.
        variance: v of the noise in it, of a shape that broadcasts to that of y.
    """
    # Where there is no noise, y holds; a finite weight keeps the descent stable.
    precision = 1 / variance.clamp_min(1e-3)
    images = observed.clamp(0, 1).clone().requires_grad_()
    adam = torch.optim.Adam([images], lr=RATE)
    for _ in range(STEPS):
        adam.zero_grad()
        error = (precision * (images - observed).square()).sum() / 2
        (error + SMOOTH * _total_variation(images)).backward()
        adam.step()
        with torch.no_grad():
            images.clamp_(0, 1)
    return images.detach()


def _total_variation(images: torch.Tensor) -> torch.Tensor:
    across = images.diff(dim=3)[:, :, :-1].square()
    down = images.diff(dim=2)[:, :, :, :-1].square()
    return ((across + down).sum(1) + ROUNDED).sqrt().sum()


def disturbed(target: Target, share: float, rest: torch.Tensor) -> Target:
    """The target of private images x, whose model sees share x + rest.

    Args:
        target: What was shared.
        share: Of the private image in what was trained on.
        rest: The disturbance, as the attacker found it: N x C x H x W in pixels of [0, 1].
    """
    spec = target.data

    def encode(inputs: torch.Tensor) -> torch.Tensor:
        seen = share * spec.denormalize(inputs) + rest.to(inputs)
        return spec.normalize(seen.clamp(0, 1))

    model = EncodedArchitecture(target.model, encode, target.batch_size)
    return dataclasses.replace(target, model=model)
