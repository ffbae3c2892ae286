"""Against InstaHide: the encodings are found first, then taken apart."""

from __future__ import annotations

import dataclasses
import itertools

import numpy as np
import torch

from attack.knowledge.answers.mixup import MixingLoss, solved_shares
from attack.knowledge.encoded_inputs import EncodedArchitecture
from attack.knowledge.known_defenses import Adaptation, register_adaptation
from attack.knowledge.likely import Attempt, Likely
from core.data.specs import DataSpec
from core.settings import Value
from core.target import Target
from gradients.defenses.mixup import mixed

# Iterations on the encodings, in those of the attack: nothing is known of their pixels.
LONGER = 3.0
# Encodings look like noise: no prior on images helps to find them.
WITHOUT_PRIOR: dict[str, Value] = {
    "coordinates": "pixels", "tv": 0.0, "balance": None, "balance_end": None,
}  # fmt: skip
# Shares to begin at; a private share is at most 0.65.
SHARES = (0.4, 0.5, 0.6)
# Decoding: gradient steps, their length, and the weight of smoothness.
STEPS, RATE, SMOOTH = 200, 0.03, 0.05
# Starts, and turns of each, where there are more encodings than images.
STARTS, TURNS = 30, 20


@register_adaptation("instahide")
def _instahide(adaptation: Adaptation, target: Target, values: list[float]) -> None:
    if isinstance(target.model, EncodedArchitecture):
        adaptation.notes.append("instahide: candidates are mixed and signed like the client's")
    else:
        adaptation.notes.append("instahide: the encoded images are matched, and not decoded")


def likeliest_encoding(target: Target, labels: torch.Tensor, attempt: Attempt) -> Likely:
    """The target whose model mixes images and flips signs as the client did.

    One update determines its encodings e as well as images without a defense, if no prior on
    images is asked of them. Of the private images they leave |e| = |sum_j s_j x_j|; the shares
    follow from the last layer. Smooth images of these magnitudes are found by descent, see
    `decoded`. What stays open of a single update is where a mixture is darker than the mean:
    Carlini et al. have many encodings of every image, as many rounds show them.

    Args:
        target: What was shared under InstaHide, of one image or of two.
        labels: N classes.
        attempt: An attack.
    """
    if len(target.shards) > 1 or target.batch_size > 2 or not target.local.shares_gradient:
        return Likely(target)
    weights = shares_of_mixtures(target, labels)
    loss = MixingLoss(target.loss, weights)
    seen = attempt(dataclasses.replace(target, loss=loss), LONGER, **WITHOUT_PRIOR).images
    encodings = target.data.normalize(seen)
    images = decoded(target.data, encodings, weights)
    inputs = target.data.normalize(images)
    signs = torch.where(encodings * mixed(inputs, weights) < 0, -1.0, 1.0)

    def encode(x: torch.Tensor) -> torch.Tensor:
        return signs.to(x) * mixed(x, weights.to(x.device))

    model = EncodedArchitecture(target.model, encode, target.batch_size)
    return Likely(dataclasses.replace(target, model=model, loss=loss), images)


def shares_of_mixtures(target: Target, labels: torch.Tensor) -> torch.Tensor:
    """N x N shares of the private images in the mixtures, from the last layer.

    Where it does not say, of images of one class for example, all shares are the same.
    """
    if target.batch_size == 1:
        return torch.ones(1, 1, dtype=torch.float64)
    starts = [list(pair) for pair in itertools.product(SHARES, SHARES)]
    found = solved_shares(target, labels, starts, _mixed_classes)
    first, second = (0.5, 0.5) if found is None else np.clip(found, 0.0, 1.0).tolist()
    return torch.tensor([[first, 1 - first], [1 - second, second]], dtype=torch.float64)


def _mixed_classes(classes: np.ndarray, shares: np.ndarray) -> np.ndarray:
    weights = np.array([[shares[0], 1 - shares[0]], [1 - shares[1], shares[1]]])
    mixture: np.ndarray = weights @ classes
    return mixture


def decoded(data: DataSpec, encodings: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Images whose mixtures have the magnitudes of the encodings.

    Encodings of several updates of the same images leave open only whether a place is darker or
    brighter than the mean in all of them; those of a single update more. The bright side is
    taken.

    Args:
        data: Says how inputs are normalised.
        encodings: M x C x H x W, as network inputs.
        weights: M x N shares of the images in the mixtures.

    Returns:
        N x C x H x W in [0, 1].
    """
    magnitudes = encodings.abs()
    weights = weights.to(magnitudes)
    start = _alternated(magnitudes, weights)
    if len(weights) > weights.shape[1]:
        return data.clamp(data.denormalize(start))
    return _descended(data, magnitudes, weights, start)


def _alternated(magnitudes: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Images whose mixtures have these magnitudes, place by place and bright.

    The signs of the mixtures and the images that fit them best are found in turns, from several
    starts, of which each place takes the best.

    Args:
        magnitudes: M x ...
        weights: M x N shares.
    """
    flat, n = magnitudes.double().flatten(1), weights.shape[1]
    w = weights.double()
    inverse = torch.linalg.pinv(w)
    numbers = torch.Generator().manual_seed(0)
    best = inverse @ flat
    error = ((w @ best).abs() - flat).square().sum(0)
    for _ in range(STARTS if len(w) > n else 0):
        images = torch.empty(n, 1, dtype=w.dtype).normal_(generator=numbers).to(w) * flat.mean(0)
        for _ in range(TURNS):
            images = inverse @ (torch.where(w @ images < 0, -1.0, 1.0) * flat)
        rest = ((w @ images).abs() - flat).square().sum(0)
        best = torch.where(rest < error, images, best)
        error = torch.minimum(rest, error)
    bright = torch.where(best.sum(0) < 0, -best, best)
    return bright.to(magnitudes).view(n, *magnitudes.shape[1:])


def _descended(
    data: DataSpec, magnitudes: torch.Tensor, weights: torch.Tensor, start: torch.Tensor
) -> torch.Tensor:
    images = data.clamp(data.denormalize(start)).requires_grad_()
    adam = torch.optim.Adam([images], lr=RATE)

    def loss() -> torch.Tensor:
        mixtures = mixed(data.normalize(images), weights)
        rest = (mixtures.abs() - magnitudes).square().mean()
        jumps = [images.diff(dim=dim).abs().mean() for dim in range(2, images.dim())]
        return rest + SMOOTH * sum(jumps[1:], jumps[0])

    for _ in range(STEPS):
        adam.zero_grad()
        loss().backward()
        adam.step()
        with torch.no_grad():
            images.copy_(data.clamp(images))
    return images.detach()
