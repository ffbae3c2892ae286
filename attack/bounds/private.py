"""What DP-SGD itself forbids, in closed form: two attackers, between whom every real one lies.

The released sum of clipped gradients has noise of standard deviation sigma x C, where C is the
clipping norm and sigma the noise multiplier. One attacker knows everything but which of several
candidates was used; the other knows nothing about the image and sees it through a layer that he
made for it.
"""

from __future__ import annotations

import math

from scipy.stats import chi2, norm

from core.errors import InputError


def identification(chance: float, sigma: float, *, steps: int = 1, rate: float = 1.0) -> float:
    """Largest probability that an attacker names the right one of several candidates.

    He knows all else of the training, so that the release under one candidate and under none
    are two normal distributions at a distance of 1 / sigma (sqrt(steps) / sigma after several).

    Args:
        chance: His probability without any release: the prior of the likeliest candidate.
        sigma: Noise multiplier.
        steps: Releases that the image is in; of the whole data set (rate 1).
        rate: Probability that the image is in a step's batch; below 1 for one step only.

    Source: Hayes, Mahloujifar, Balle, "Bounding Training Data Reconstruction in DP-SGD",
        NeurIPS 2023, theorem 2, https://arxiv.org/abs/2302.07225; closed forms: Kaissis et
        al., https://arxiv.org/abs/2307.03928.

    Raises:
        InputError: A probability outside (0, 1), or several steps of a part of the data, which
            have no closed form.
    """
    _check(sigma, steps)
    if not 0 < chance < 1 or not 0 < rate <= 1:
        raise InputError("identification: chance must lie in (0, 1) and rate in (0, 1]")
    if rate < 1 and steps > 1:
        raise InputError("identification: several steps with rate below 1 have no closed form")
    seen = float(norm.cdf(norm.ppf(chance) + math.sqrt(steps) / sigma))
    return (1 - rate) * chance + rate * seen


def reconstruction(error: float, sigma: float, length: float, n: int, *, steps: int = 1) -> float:
    """Largest probability of an error this small for an attacker who knows nothing beforehand.

    The image is the gradient of a layer that he made; after clipping and noise he sees each
    value with a standard deviation of sigma x |x|, and the squared error is that times a
    chi-squared variable.

    Args:
        error: Mean squared error per value.
        sigma: Noise multiplier.
        length: L2 norm |x| of the image.
        n: Number of its values.
        steps: Releases that the image is in.

    Source: Ziller et al., "Bounding Reconstruction Attack Success of Adversaries Without Data
        Priors", https://arxiv.org/abs/2402.12861.

    Raises:
        InputError: A noise multiplier or length that is not positive.
    """
    _check(sigma, steps)
    if not length > 0 or n < 1 or not error >= 0:
        raise InputError("reconstruction: length and n must be positive, the error not negative")
    return float(chi2.cdf(n * error * steps / (sigma * length) ** 2, df=n))


def mean_reconstruction_error(sigma: float, length: float, *, steps: int = 1) -> float:
    """Mean squared error per value of the same attacker: sigma^2 |x|^2 / steps.

    Args:
        sigma: Noise multiplier.
        length: L2 norm |x| of the image.
        steps: Releases that the image is in.
    """
    _check(sigma, steps)
    return (sigma * length) ** 2 / steps


def _check(sigma: float, steps: int) -> None:
    if not sigma > 0 or steps < 1:
        raise InputError("bounds: sigma must be positive and steps at least 1")
