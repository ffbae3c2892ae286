"""DP-SGD against its definition, and its accountants against Opacus and known bounds."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from core.errors import InputError
from core.models.building import ModelSpec, build_model
from training.privacy import (
    Accountant,
    Epsilon,
    PerSampleClipping,
    check_mixes_no_samples,
    clip_and_noise_batch,
    noise_generator,
)

pytest.importorskip("opacus")
CPU = torch.device("cpu")


def small_model() -> nn.Module:
    torch.manual_seed(0)
    return build_model(ModelSpec("cnn", 3, 8, width=4, norm="group"))


def batch(n: int = 7) -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(1)
    return torch.randn(n, 3, 8, 8), torch.randint(3, (n,))


def clipped_mean_by_loop(
    model: nn.Module, images: torch.Tensor, labels: torch.Tensor, max_norm: float, divisor: int
) -> tuple[list[torch.Tensor], list[float]]:
    """Algorithm 1 of Abadi et al. without its noise, sample by sample."""
    parameters = list(model.parameters())
    total = [torch.zeros_like(p) for p in parameters]
    norms = []
    for image, label in zip(images, labels, strict=True):
        loss = nn.functional.cross_entropy(model(image[None]), label[None])
        gradient = torch.autograd.grad(loss, parameters)
        norm = torch.cat([g.flatten() for g in gradient]).norm()
        norms.append(float(norm))
        for sum_, g in zip(total, gradient, strict=True):
            sum_ += g * min(1.0, max_norm / float(norm))
    return [t / divisor for t in total], norms


@pytest.mark.parametrize("physical", [2, 3, 100])
def test_clips_every_sample(physical: int) -> None:
    model, (images, labels) = small_model(), batch()
    _, norms = clipped_mean_by_loop(model, images, labels, 1.0, 5)
    max_norm = sorted(norms)[3]  # clips some samples and not others
    expected, _ = clipped_mean_by_loop(model, images, labels, max_norm, 5)
    clipping = PerSampleClipping(
        model,
        max_norm=max_norm,
        noise_multiplier=0.0,
        expected_batch_size=5,
        max_physical_batch=physical,
    )
    loss, logits = clipping.backward(images, labels, noise_generator(CPU, 0, 0, 0))
    actual = [p.grad for p in model.parameters()]
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(logits, model(images).detach(), rtol=1e-4, atol=1e-5)
    expected_loss = nn.functional.cross_entropy(logits, labels, reduction="sum")
    torch.testing.assert_close(loss, expected_loss)


def test_noise_has_the_stated_deviation_even_without_samples() -> None:
    model = small_model()
    clipping = PerSampleClipping(model, max_norm=2.0, noise_multiplier=3.0, expected_batch_size=4)
    clipping.backward(
        torch.empty(0, 3, 8, 8), torch.empty(0, dtype=torch.long), noise_generator(CPU, 0, 0, 0)
    )
    noise = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
    assert noise.numel() > 2000
    assert float(noise.std()) == pytest.approx(3.0 * 2.0 / 4, rel=0.05)
    assert abs(float(noise.mean())) < 0.1


def test_noise_is_fresh_at_every_step_and_reproducible() -> None:
    draws = [
        torch.randn(4, generator=noise_generator(CPU, *key))
        for key in [(0, 0, 0), (0, 0, 1), (0, 1, 0), (1, 0, 0), (0, 0, 0)]
    ]
    assert torch.equal(draws[0], draws[4])
    assert len({tuple(draw.tolist()) for draw in draws}) == 4


def test_batch_norm_is_refused() -> None:
    with pytest.raises(InputError, match="--norm group"):
        check_mixes_no_samples(build_model(ModelSpec("cnn", 3, 8, width=4)))


def test_batch_variant_clips_the_mean_and_scales_the_noise() -> None:
    parameter = nn.Parameter(torch.zeros(10_000))
    parameter.grad = torch.full((10_000,), 3.0)
    frozen = nn.Parameter(torch.zeros(3))
    options = {"max_norm": 2.0, "generator": noise_generator(CPU, 0, 0, 0)}
    clip_and_noise_batch([parameter, frozen], noise_multiplier=0.0, **options)  # type: ignore[arg-type]
    assert float(parameter.grad.norm()) == pytest.approx(2.0, rel=1e-3)
    parameter.grad.zero_()
    clip_and_noise_batch([parameter], noise_multiplier=0.5, **options)  # type: ignore[arg-type]
    assert float(parameter.grad.std()) == pytest.approx(0.5 * 2.0, rel=0.05)


def spent(noise: float, rate: float, steps: int) -> Epsilon:
    accountant = Accountant(noise, rate, 1e-5)
    for _ in range(steps):
        accountant.step()
    return accountant.epsilon()


def test_epsilon_is_the_tighter_of_two_accountants() -> None:
    from opacus.accountants import PRVAccountant, RDPAccountant

    budget = spent(1.0, 0.05, 50)
    for kind, value in ((PRVAccountant, budget.value), (RDPAccountant, budget.rdp)):
        reference = kind()
        reference.history = [(1.0, 0.05, 50)]
        assert value == pytest.approx(reference.get_epsilon(delta=1e-5))
    assert budget.accountant == "prv"
    assert 0 < budget.value <= budget.rdp
    assert "PRV accountant" in budget.sentence(1.0)


def test_one_unsampled_step_is_the_gaussian_mechanism() -> None:
    """Against the exact trade-off of Balle and Wang (2018), https://arxiv.org/abs/1805.06530."""
    noise, budget = 2.0, spent(2.0, 1.0, 1)

    def cdf(x: float) -> float:
        return 0.5 * math.erfc(-x / math.sqrt(2))

    delta = cdf(0.5 / noise - budget.value * noise) - math.exp(budget.value) * cdf(
        -0.5 / noise - budget.value * noise
    )
    assert delta == pytest.approx(1e-5, rel=0.2)


def test_more_noise_less_epsilon_more_steps_more_epsilon() -> None:
    assert spent(2.0, 0.1, 10).value < spent(1.0, 0.1, 10).value < spent(1.0, 0.1, 100).value


def test_published_noise_multiplier_is_called_what_it_is() -> None:
    budget = spent(0.01, 0.1, 100)
    assert math.isfinite(budget.value)
    assert budget.value > 1e5
    assert budget.accountant == "rdp"
    assert "no meaningful guarantee" in budget.sentence(0.01)
    assert "no noise, no guarantee" in spent(0.0, 0.1, 10).sentence(0.0)
    assert Accountant(1.0, 0.1, 1e-5).epsilon().value == 0


def test_accountant_state() -> None:
    accountant = Accountant(1.0, 0.1, 1e-5)
    accountant.step()
    accountant.step()
    copy = Accountant(1.0, 0.1, 1e-5)
    copy.load_state_dict(accountant.state_dict())
    copy.step()
    assert copy.history == [(1.0, 0.1, 3)]
    assert accountant.planned(3) == copy.epsilon()
    assert accountant.planned(0).value == 0
