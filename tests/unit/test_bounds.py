"""Bounds: the Jacobian, the information it carries, and what DP-SGD forbids."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import nn

import gradinvbench as gib
from attack.bounds.information import Identifiability, decibels, mean_smallest_error
from attack.bounds.jacobian import gradient_jacobian
from attack.bounds.likelihood import NormalPrior, likeliest
from attack.bounds.private import identification, mean_reconstruction_error, reconstruction
from benchmarks.bounds import KNOWING, LIKELIEST, measure
from core.errors import InputError


def shared(
    model: nn.Module, images: torch.Tensor, defense: str = ""
) -> tuple[gib.Target, gib.Truth]:
    return gib.share(
        model, images, torch.arange(len(images)), bounds=None, mean=0.3, std=0.5, defense=defense
    )


@pytest.fixture
def network() -> nn.Module:
    torch.manual_seed(0)
    conv = nn.Conv2d(1, 3, 3, stride=2, padding=1)
    return nn.Sequential(
        conv, nn.GroupNorm(1, 3), nn.Tanh(), nn.Flatten(), nn.Linear(12, 3)
    ).double()


def flat(target: gib.Target) -> torch.Tensor:
    return torch.cat([part.flatten() for part in target.gradient.values()])


def test_the_jacobian_is_that_of_central_differences(network: nn.Module) -> None:
    images = torch.rand(2, 1, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    target, truth = shared(network, images)
    jacobian = gradient_jacobian(target, truth)
    step = 1e-5
    for k in (0, 7, 31):
        moved = torch.zeros(32, dtype=torch.float64)
        moved[k] = step
        ahead, behind = (
            flat(shared(network, images + sign * moved.view_as(images))[0]) for sign in (1, -1)
        )
        difference = (ahead - behind) / (2 * step)
        assert torch.allclose(jacobian[:, k], difference, atol=1e-8, rtol=1e-6)


def test_a_gradient_that_does_not_depend_on_the_image_fixes_nothing() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(16, 2))
    target, truth = gib.share(model, torch.rand(1, 1, 4, 4), [0], shared=["1.bias"])
    spectrum = Identifiability.of(gradient_jacobian(target, truth) * 0)
    assert spectrum.rank == 0
    assert spectrum.smallest_error(1e-3) == math.inf


def test_of_a_linear_gradient_van_trees_bound_is_the_posterior_variance() -> None:
    rng = torch.Generator().manual_seed(0)
    jacobian = torch.randn(9, 6, dtype=torch.float64, generator=rng)
    half = torch.randn(6, 6, dtype=torch.float64, generator=rng)
    prior, noise = half @ half.T + 0.1 * torch.eye(6).double(), 0.7
    # The textbook formula of a conditional normal distribution, in the other space.
    seen = jacobian @ prior @ jacobian.T + noise**2 * torch.eye(9).double()
    posterior = prior - prior @ jacobian.T @ torch.linalg.solve(seen, jacobian @ prior)
    bound = mean_smallest_error([jacobian], noise, prior)
    assert Identifiability.of(jacobian).expected_error(noise, prior) == pytest.approx(bound)
    assert bound == pytest.approx(float(posterior.trace() / 6), rel=1e-9)
    assert bound < Identifiability.of(jacobian).smallest_error(noise)


def test_fewer_numbers_than_values_leave_an_attack_without_bias_nothing() -> None:
    jacobian = torch.randn(3, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    spectrum = Identifiability.of(jacobian)
    assert spectrum.rank == 3
    assert spectrum.smallest_error(0.1) == math.inf
    assert spectrum.identified(noise=1e-3, spread=1.0) == 3


def test_a_small_perturbation_moves_the_image_as_least_squares_does(network: nn.Module) -> None:
    images = torch.rand(1, 1, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    target, truth = shared(network, images)
    jacobian = gradient_jacobian(target, truth)
    noisy, _ = shared(network, images, "gaussian:1e-6")
    perturbation = flat(noisy) - flat(target)
    moved = Identifiability.of(jacobian).moved_by(perturbation, jacobian)
    expected = torch.linalg.lstsq(jacobian, perturbation[:, None]).solution[:, 0]
    assert torch.allclose(moved, expected, rtol=1e-5, atol=1e-12)


@pytest.mark.parametrize("name", ["linear", "fully connected"])
def test_the_likeliest_images_meet_the_bound_and_nothing_is_below_that_of_any(name: str) -> None:
    row = measure(name, 1e-3, images=6, seed=0, attacks={"spectral": 200})
    assert row.violations == ()
    decibel = {attack: decibels(float(np.mean(errors))) for attack, errors in row.errors.items()}
    # The mean of 6 x 64 squared errors scatters by 0.3 dB.
    assert decibel[LIKELIEST] == pytest.approx(decibels(row.unbiased), abs=1)
    assert decibel[KNOWING] == pytest.approx(decibels(row.instance), abs=1)
    assert decibel["spectral"] < decibels(row.any_attack) + 1


def test_the_likeliest_images_are_a_minimum_and_the_prior_draws_them_to_its_mean(
    network: nn.Module,
) -> None:
    images = torch.rand(1, 1, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    labels, noise = torch.tensor([0]), 1e-3
    target, _ = shared(network, images, f"gaussian:{noise}")
    start = images + 0.05
    found = likeliest(target, start, labels, noise)

    def distance(candidate: torch.Tensor) -> float:
        return float((flat(shared(network, candidate)[0]) - flat(target)).square().sum())

    # Two computations of the gradient: the search's own, and what a client would share.
    rng = torch.Generator().manual_seed(0)
    for _ in range(20):
        aside = torch.randn(found.shape, dtype=torch.float64, generator=rng)
        assert distance(found) <= distance(found + 1e-4 * aside)
    assert distance(found) < distance(images) < distance(start)

    mean = torch.full((16,), 0.5, dtype=torch.float64)
    for spread, most in ((1e-6, 1e-5), (1.0, 1.0)):
        prior = NormalPrior(mean, spread**2 * torch.eye(16).double())
        known = likeliest(target, start, labels, noise, prior=prior)
        assert (known - 0.5).abs().max() < most
    assert torch.allclose(known, found, atol=1e-3)


def test_likeliest_images_need_a_noise(network: nn.Module) -> None:
    target, truth = shared(network, torch.rand(1, 1, 4, 4).double())
    with pytest.raises(InputError, match="noise"):
        likeliest(target, truth.images, truth.labels, 0.0)


@pytest.mark.parametrize(("sigma", "steps"), [(0.5, 1), (2.0, 1), (2.0, 9)])
def test_the_best_test_between_candidates_reaches_the_bound(sigma: float, steps: int) -> None:
    # Hypothesis test by hand: the candidate is named where the release is large.
    rng = np.random.default_rng(0)
    without, chance = rng.normal(0, sigma, (200_000, steps)).mean(1), 0.1
    named = np.quantile(without, 1 - chance)
    found = (rng.normal(1, sigma, (200_000, steps)).mean(1) > named).mean()
    assert found == pytest.approx(identification(chance, sigma, steps=steps), abs=0.01)


def test_a_sampled_step_names_fewer() -> None:
    whole, part = identification(0.1, 0.5), identification(0.1, 0.5, rate=0.25)
    assert part == pytest.approx(0.25 * whole + 0.75 * 0.1)
    with pytest.raises(InputError, match="no closed form"):
        identification(0.1, 0.5, rate=0.25, steps=2)


def test_the_attacker_without_knowledge_has_the_stated_errors() -> None:
    rng = np.random.default_rng(0)
    image, sigma, clip = rng.uniform(size=48), 0.2, 3.0
    length = float(np.linalg.norm(image))
    released = clip * image / length + rng.normal(0, sigma * clip, (20_000, 48))
    errors = np.square(released * length / clip - image).mean(1)
    assert errors.mean() == pytest.approx(mean_reconstruction_error(sigma, length), rel=0.01)
    middle = float(np.median(errors))
    assert reconstruction(middle, sigma, length, 48) == pytest.approx(0.5, abs=0.01)
    assert reconstruction(middle / 2, sigma, length, 48, steps=2) == pytest.approx(0.5, abs=0.01)


@pytest.mark.parametrize(
    ("local", "shape", "message"),
    [("steps=2 lr=0.1", (4, 4), "one step"), ("", (1 << 7, 1 << 7), "smaller")],
)
def test_what_has_no_bound_is_said(local: str, shape: tuple[int, int], message: str) -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(shape[0] * shape[1], 3))
    images = torch.rand(1, 1, *shape)
    target, truth = gib.share(model, images, [0], local=f"sgd {local}" if local else None)
    with pytest.raises(InputError, match=message):
        gradient_jacobian(target, truth)
