"""Against PRECODE: what its bottleneck drew is in its own gradients."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from scipy.optimize import least_squares
from scipy.special import softmax

from attack.knowledge.known_defenses import Adaptation, register_adaptation
from attack.knowledge.likely import SHORT, Attempt, Likely
from attack.matching.objectives import Cosine, squared_norm
from attack.matching.replica import Replica
from core.models.architecture import Architecture
from core.models.building import last_linear
from core.target import Target
from gradients.defenses.base import stated
from gradients.defenses.precode import (
    BOTTLENECK,
    BottleneckArchitecture,
    Precode,
    VariationalBottleneck,
    bottleneck_of,
)

# Singular values below this share of the largest are rounding.
RANK = 1e-5
# Mean error of probabilities from which on the equations are not solved, and below which another
# start could not do better: gradients are of single precision.
UNSOLVED = 1e-3
SOLVED = 1e-6
# Starts of the equations, and by how much of its mean the later ones are changed: images of one
# class begin at one point, from which they must be parted.
STARTS = 12
PARTED = 0.3
# What was drawn has a mean square of 1; a wrong solution has another one.
LIKELY_SQUARES = (0.5, 2.0)
# Rounds of solving for features whose divergence depends on them.
ROUNDS = 20


@register_adaptation("precode")
def _precode(adaptation: Adaptation, target: Target, values: list[float]) -> None:
    """Compare everything where the noise is known, else only what lies before the bottleneck.

    Source of the second: Scheliga, Mäder, Seeland, "Combining Variational Modeling with Partial
    Gradient Perturbation to Prevent Deep Gradient Leakage", https://arxiv.org/abs/2208.04767.
    """
    late, seen = _late(target), target.model
    if not isinstance(seen, SeenBottleneck):
        factor = 0.0
        note = (
            "noise is drawn anew in every evaluation; the bottleneck's gradients and those after "
            "it are left out"
        )
    elif seen.balanced:
        factor = _balance(target, late)
        note = (
            "the noise is computed from the bottleneck's gradients, which count as much as those "
            "before it"
        )
    else:
        factor, note = 1.0, "the noise is computed from the bottleneck's gradients"
    adaptation.keep_only(
        [
            torch.full((), factor if is_late else 1.0, device=g.device)
            for is_late, g in zip(late, target.gradient.values(), strict=True)
        ]
    )
    adaptation.notes.append(f"precode: {note}")


def _late(target: Target) -> list[bool]:
    """Which gradients are of the bottleneck and the layer after it."""
    head, _ = last_linear(target.build_model())
    return [name.rpartition(".")[0].startswith(head) for name in target.gradient]


def _balance(target: Target, late: list[bool]) -> float:
    """The factor of late gradients with which they are no longer than the early ones.

    The bottleneck and the layer after it are wide, and say little of the image.
    """
    lengths = dict.fromkeys((False, True), 0.0)
    for is_late, g in zip(late, target.gradient.values(), strict=True):
        lengths[is_late] = math.hypot(lengths[is_late], float(squared_norm([g]).sqrt()))
    return lengths[False] / lengths[True] if lengths[True] > lengths[False] > 0 else 1.0


def likeliest_noise(target: Target, labels: torch.Tensor, attempt: Attempt) -> Likely:
    """The target whose model has the noise that the client drew.

    The gradients of the bottleneck and of the last layer are longer than the others. A network with
    sigmoids is found by the early ones, one with ReLU by the late ones: a short attack tries each,
    and the better match of the early ones decides, which both can be judged by.

    Args:
        target: What was shared under PRECODE.
        labels: N classes.
        attempt: Runs an attack.
    """
    model = target.build_model()
    bottleneck = bottleneck_of(model)
    alone = len(target.shards) == 1 and target.local.shares_gradient and target.n_clients == 1
    assert isinstance(target.model, BottleneckArchitecture)
    if bottleneck is None or not alone or labels.is_floating_point():
        return Likely(target)
    seen = seen_bottleneck(target, labels, bottleneck)
    if seen is None:
        return Likely(target)
    noise = torch.from_numpy(seen.noise).float()
    inner, size = target.model.inner, target.model.size
    plain, balanced = (
        dataclasses.replace(target, model=SeenBottleneck(inner, size, noise, way))
        for way in (False, True)
    )
    late = _late(target)
    if all(late):
        # There is nothing that the late ones could drown.
        return Likely(plain)

    def early_distance(candidate: Target) -> float:
        images = attempt(candidate, SHORT).images
        return _early_distance(candidate, labels, images, late)

    return Likely(min((plain, balanced), key=early_distance))


class SeenBottleneck(BottleneckArchitecture):
    """A bottleneck whose noise the attacker has computed.

    Args:
        inner: See `BottleneckArchitecture`.
        size: See `BottleneckArchitecture`.
        noise: N x size.
        balanced: Whether the late gradients are scaled down to the length of the early ones.
    """

    def __init__(self, inner: Architecture, size: int, noise: torch.Tensor, balanced: bool) -> None:
        super().__init__(inner, size, noise)
        self.balanced = balanced


def _early_distance(
    target: Target, labels: torch.Tensor, images: torch.Tensor, late: list[bool]
) -> float:
    """How far the gradients before the bottleneck are from the shared ones, as 1 - cosine."""
    replica = Replica(target, images.device)
    inputs = target.data.normalize(images).to(replica.target_gradient[0].dtype)
    loss = replica.loss(replica.model, inputs, labels.to(images.device))
    found = torch.autograd.grad(loss, replica.parameters, materialize_grads=True)
    early = [not is_late for is_late in late]
    value, _ = Cosine().value_and_seed(
        list(itertools.compress(found, early)),
        list(itertools.compress(replica.target_gradient, early)),
    )
    return float(value)


@dataclass(frozen=True)
class Seen:
    """What the gradients of a bottleneck and of the head say of a batch.

    Attributes:
        features: N x d, in front of the bottleneck.
        drawn: N x k numbers that it drew.
        noise: N x k, of the standard normal distribution.
    """

    features: np.ndarray
    drawn: np.ndarray
    noise: np.ndarray


def seen_bottleneck(
    target: Target, labels: torch.Tensor, bottleneck: VariationalBottleneck
) -> Seen | None:
    """Features, draws and noise of a batch, from linear equations and one small nonlinear one.

    With b_i what was drawn for image i, logits are H (D b_i + d) + h, and u_i = softmax - y_i.
    The decoder's gradient is sum_i H' u_i b_i' / N; multiplied by the pseudo-inverse of H' it is
    the gradient of a classification layer with weight H D on inputs b_i. It has rank N and is
    P Q; b = A Q with an N x N matrix A under which u and b belong together. The encoder's
    gradient towards the mean is sum_i t_i z_i' with t_i = D' H' u_i / N plus the divergence's
    part, so the features z are a linear solution.

    Args:
        target: What was shared.
        labels: N classes.
        bottleneck: With the received parameters.

    Returns:
        None where gradients are not shared, or equations are not solved.
    """
    model = target.build_model()
    name, head = last_linear(model)
    prefix = f"{name}.{BOTTLENECK}" if name else BOTTLENECK
    wanted = [f"{prefix}.decoder", f"{prefix}.encoder"]
    if any(w not in target.gradient for w in wanted) or head.bias is None:
        return None
    decoder_gradient, encoder_gradient = (_numbers(target.gradient[w]) for w in wanted)
    weight, bias = _numbers(head.weight), _numbers(head.bias)
    decoder, shift = _numbers(bottleneck.decoder), _numbers(bottleneck.decoder_bias)
    n = len(labels)
    solved = inputs_of_head(
        np.linalg.pinv(weight.T) @ decoder_gradient,
        weight @ decoder,
        weight @ shift + bias,
        labels.tolist(),
    )
    if solved is None:
        return None
    drawn, errors = solved
    towards = errors @ weight @ decoder / n
    features = _features(target, bottleneck, encoder_gradient, towards)
    mean, deviation = _distribution(bottleneck, features)
    noise = (drawn - mean) / deviation
    low, high = LIKELY_SQUARES
    squares = np.square(noise).mean(1)
    likely = bool(((low < squares) & (squares < high)).all())
    return Seen(features, drawn, noise) if likely else None


def _features(
    target: Target,
    bottleneck: VariationalBottleneck,
    gradient: np.ndarray,
    towards: np.ndarray,
) -> np.ndarray:
    """N x d features from the gradient of the encoder's rows for the mean.

    Args:
        target: States the weight of the divergence.
        bottleneck: With the received parameters.
        gradient: 2 k x d, of the encoder.
        towards: N x k derivatives of the loss, less the divergence, in the drawn numbers.
    """
    k, n = bottleneck.size, len(towards)
    beta = stated(target.defenses, Precode).beta / (n * math.log(2))
    mean = np.zeros_like(towards)
    features = np.zeros((n, gradient.shape[1]))
    for _ in range(ROUNDS):
        features = np.linalg.pinv((towards + beta * mean).T) @ gradient[:k]
        mean, _ = _distribution(bottleneck, features)
    return features


def _distribution(
    bottleneck: VariationalBottleneck, features: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    rows = features @ _numbers(bottleneck.encoder).T + _numbers(bottleneck.encoder_bias)
    mean, raw = np.split(rows, 2, axis=1)
    return mean, np.logaddexp(0, raw)


def inputs_of_head(
    gradient: np.ndarray, weight: np.ndarray, bias: np.ndarray, labels: list[int]
) -> tuple[np.ndarray, np.ndarray] | None:
    """The inputs of a classification layer, and softmax less label, of a batch.

    Args:
        gradient: C x k, of its weight.
        weight: C x k.
        bias: C.
        labels: N classes.

    Returns:
        N x k and N x C; None where the equations are not solved.
    """
    n, c = len(labels), len(bias)
    if n >= min(weight.shape):
        return None
    left, singular, right = np.linalg.svd(gradient, full_matrices=False)
    if singular[n - 1] < RANK * singular[0]:
        return None
    p, q = left[:, :n] * singular[:n], right[:n]
    classes = np.eye(c)[labels]
    towards = q @ weight.T

    def errors(unknown: np.ndarray) -> np.ndarray:
        a = unknown.reshape(n, n)
        given = softmax(a @ towards + bias, axis=1) - classes
        return (given - n * (p @ np.linalg.pinv(a)).T).ravel()

    best, smallest = None, UNSOLVED
    for start in _starts(p, softmax(bias) - classes):
        solved = least_squares(errors, start.ravel(), xtol=1e-14, ftol=1e-14)
        error = float(np.abs(solved.fun).mean())
        if error < smallest:
            best, smallest = solved.x.reshape(n, n), error
        if smallest < SOLVED:
            break
    if best is None:
        return None
    return best @ q, softmax(best @ towards + bias, axis=1) - classes


def _starts(p: np.ndarray, expected: np.ndarray) -> Iterator[np.ndarray]:
    """Matrices A to begin with: as if each image's output were the bias, then changed at random."""
    numbers, n = np.random.default_rng(0), len(expected)
    scale = PARTED * np.abs(expected).mean()
    for number in range(STARTS):
        changed = expected + (scale * numbers.normal(size=expected.shape) if number else 0)
        yield np.linalg.pinv(np.linalg.lstsq(p, changed.T / n, rcond=None)[0])


def _numbers(tensor: torch.Tensor) -> np.ndarray:
    values: np.ndarray = tensor.detach().double().cpu().numpy()
    return values
