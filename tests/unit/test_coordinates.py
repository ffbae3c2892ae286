"""The variables of an image, and learning rates over the course of an attack."""

from __future__ import annotations

import pytest
import scipy.fft
import torch

from attack.loop.schedules import learning_rate
from attack.priors.coordinates import Coordinates, Cosines, make_coordinates
from core.errors import InputError

CPU = torch.device("cpu")
NAMES = ["pixels", "dct", "dct:0", "dct:1.7"]


def coordinates(name: str, size: tuple[int, int] = (6, 9)) -> Coordinates:
    return make_coordinates(name, size, CPU, torch.float64)


@pytest.fixture
def images() -> torch.Tensor:
    return torch.randn(2, 3, 6, 9, generator=torch.Generator().manual_seed(1)).double()


@pytest.mark.parametrize("name", NAMES)
def test_encode_and_decode_are_inverse(name: str, images: torch.Tensor) -> None:
    c = coordinates(name)
    torch.testing.assert_close(c.decode(c.encode(images)), images, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(c.encode(c.decode(images)), images, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", NAMES)
def test_pull_back_is_the_chain_rule(name: str, images: torch.Tensor) -> None:
    c = coordinates(name)
    variable = torch.randn_like(images).requires_grad_()
    (expected,) = torch.autograd.grad((c.decode(variable) * images).sum(), variable)
    torch.testing.assert_close(c.pull_back(images), expected, rtol=1e-12, atol=1e-12)


def test_without_scaling_it_is_the_orthonormal_dct(images: torch.Tensor) -> None:
    expected = scipy.fft.dctn(images.numpy(), type=2, norm="ortho", axes=(-2, -1))
    found = coordinates("dct:0").encode(images).numpy()
    assert found == pytest.approx(expected, abs=1e-12)


def test_the_spectrum_falls_with_frequency_and_keeps_the_power() -> None:
    c = Cosines((8, 8), 1.0, CPU, torch.float64)
    one = torch.zeros(3, 8, 8, dtype=torch.float64)
    one[0, 0, 0] = one[1, 0, 3] = one[2, 3, 4] = 1
    lengths = c.decode(one).flatten(1).norm(dim=1)
    assert lengths[0] / lengths[1] == pytest.approx(4)
    assert lengths[0] / lengths[2] == pytest.approx(6)
    noise = torch.randn(400, 8, 8, generator=torch.Generator().manual_seed(0)).double()
    assert float(c.decode(noise).square().mean()) == pytest.approx(1, rel=0.1)


@pytest.mark.parametrize("name", ["fourier", "dct:steep", "pixels:2"])
def test_unknown_coordinates(name: str) -> None:
    with pytest.raises(InputError, match=f"coordinates {name}: choose pixels"):
        coordinates(name)


def rates(schedule: str, warmup: int = 0, n: int = 80) -> list[float]:
    return [learning_rate(schedule, i, n, 0.1, 1e-3, warmup) for i in range(n + 1)]


def test_step_falls_tenfold_at_three_five_and_seven_eighths() -> None:
    found = rates("step")
    assert found[0] == found[29] == 0.1
    assert found[30] == found[49] == pytest.approx(1e-2)
    assert found[50] == found[69] == pytest.approx(1e-3)
    assert found[70] == found[79] == pytest.approx(1e-4)


def test_cosine_goes_from_lr_to_lr_min() -> None:
    found = rates("cosine")
    assert found[0] == 0.1
    assert found[40] == pytest.approx((0.1 + 1e-3) / 2)
    assert found[80] == pytest.approx(1e-3)
    assert found == sorted(found, reverse=True)
    # A smaller learning rate than the usual end stays as it is.
    assert learning_rate("cosine", 70, 80, 1e-4, 1e-3) == pytest.approx(1e-4)


def test_warm_up_grows_linearly_and_then_the_schedule_begins() -> None:
    found = rates("cosine", warmup=10)
    assert found[:10] == pytest.approx([0.01 * (i + 1) for i in range(10)])
    assert found[10] == 0.1
    assert found[80] == pytest.approx(1e-3)
    assert rates("constant", warmup=2)[1:] == [0.1] * 80


@pytest.mark.parametrize(("lr", "lr_min"), [(0.1, 1e-3), (1.0, 0.02)])
def test_the_published_cosine_is_torchs_with_a_longer_period(lr: float, lr_min: float) -> None:
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=lr)
    schedule = torch.optim.lr_scheduler.CosineAnnealingWarmRestarts(
        optimizer, T_0=80 + 10, eta_min=lr_min
    )
    expected = []
    for _ in range(80):
        expected.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    found = [learning_rate("cosine-published", i, 80, lr, lr_min) for i in range(80)]
    assert found == pytest.approx(expected, rel=1e-9)
    assert found[-1] > learning_rate("cosine", 79, 80, lr, lr_min)


def test_unknown_schedule() -> None:
    with pytest.raises(InputError, match=r"optimiser\.schedule sawtooth"):
        learning_rate("sawtooth", 0, 10, 0.1, 0.0)
