"""Fusion of restarts, with losses that know which copy is good."""

from __future__ import annotations

import math

import pytest
import torch

from attack.loop.fusion import align_repeated_labels, combine, group_target, register


def pieces(
    n_restarts: int, n: int, seed: int = 0
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Noisy restarts with one good copy of each image somewhere; truth; where it is."""
    generator = torch.Generator().manual_seed(seed)
    truth = torch.rand(n, 3, 6, 6, generator=generator)
    noise = torch.randn(n_restarts, n, 3, 6, 6, generator=generator)
    restarts = truth + 0.3 * noise
    good = torch.randint(n_restarts, (n,), generator=generator)
    restarts[good, torch.arange(n)] = truth + 0.01 * noise[0]
    return restarts, truth, good


def one_by_one(loss):
    """Make the loss of one batch serve where those of several are asked for."""
    return lambda batches: torch.tensor([loss(b) for b in batches], dtype=torch.float64)


def gradient_loss(truth: torch.Tensor):
    """A gradient sums over the batch, so the loss couples the images, as the real one does."""
    projection = torch.randn(truth[0].numel(), 400, generator=torch.Generator().manual_seed(9))

    def gradient(batch: torch.Tensor) -> torch.Tensor:
        return torch.relu(batch.flatten(1) @ projection - 0.2).sum(0)

    goal = gradient(truth)
    return lambda batch: float((gradient(batch) - goal).square().mean())


@pytest.mark.parametrize(("n_restarts", "n"), [(2, 1), (3, 4), (4, 8)])
def test_finds_the_good_copy_of_every_image(n_restarts: int, n: int) -> None:
    restarts, truth, good = pieces(n_restarts, n)
    loss = gradient_loss(truth)
    fusion = combine(restarts, one_by_one(loss))
    assert torch.equal(fusion.choice, good)
    assert torch.equal(fusion.images, restarts[good, torch.arange(n)])
    assert fusion.loss == pytest.approx(loss(fusion.images))
    assert fusion.loss <= min(loss(restart) for restart in restarts)


def test_never_worse_than_the_best_restart_or_the_start() -> None:
    for seed in range(5):
        restarts, truth, _ = pieces(3, 4, seed)
        restarts = restarts + 0.5 * torch.randn_like(restarts)
        loss = gradient_loss(truth)
        start = torch.randint(3, (4,))
        fusion = combine(restarts, one_by_one(loss), start=start, max_sweeps=1)
        assert fusion.loss <= min(loss(restart) for restart in restarts)
        assert fusion.loss <= loss(restarts[start, torch.arange(4)])


def test_losses_are_asked_for_in_groups() -> None:
    restarts, truth, _ = pieces(5, 3)
    loss, sizes = gradient_loss(truth), []

    def losses(batches: torch.Tensor) -> torch.Tensor:
        sizes.append(len(batches))
        return one_by_one(loss)(batches)

    grouped = combine(restarts, losses, group=2)
    assert set(sizes) == {1, 2}
    assert sum(sizes) == grouped.evaluations
    assert torch.equal(grouped.choice, combine(restarts, losses, group=64).choice)


def test_a_diverged_restart_never_wins_and_ties_end() -> None:
    restarts, truth, _ = pieces(3, 2)
    restarts[1] = math.nan
    assert 1 not in combine(restarts, one_by_one(gradient_loss(truth))).choice.tolist()
    flat = combine(restarts, lambda batches: torch.zeros(len(batches)))
    assert flat.sweeps == 1
    hopeless = combine(restarts, lambda batches: torch.full((len(batches),), math.nan))
    assert hopeless.images.shape == truth.shape


def test_one_restart_is_itself() -> None:
    restarts, truth, _ = pieces(1, 3)
    assert torch.equal(combine(restarts, one_by_one(gradient_loss(truth))).images, restarts[0])


def test_repeated_labels_are_brought_into_one_order() -> None:
    restarts, truth, _ = pieces(3, 5)
    labels = torch.tensor([7, 2, 7, 7, 2])
    near = truth + 0.01 * torch.randn_like(restarts)
    shuffled = near.clone()
    shuffled[1] = near[1, [2, 1, 3, 0, 4]]
    shuffled[2] = near[2, [0, 4, 3, 2, 1]]
    assert torch.equal(align_repeated_labels(shuffled, labels), near)
    fusion = combine(shuffled, one_by_one(gradient_loss(truth)), labels=labels)
    assert float((fusion.images - truth).abs().max()) < 0.1


def test_different_labels_stay_where_they_are() -> None:
    restarts, _, _ = pieces(3, 4)
    assert torch.equal(align_repeated_labels(restarts, torch.arange(4)), restarts)


def test_group_target_is_the_mean() -> None:
    restarts, _, _ = pieces(4, 2)
    restarts.requires_grad_()
    target = group_target(restarts)
    assert not target.requires_grad
    torch.testing.assert_close(target, restarts.detach().mean(0))


@pytest.mark.parametrize("shift", [(0, 0), (1, -2), (-2, 2)])
def test_registration_undoes_a_shift(shift: tuple[int, int]) -> None:
    images = torch.rand(2, 3, 20, 18)
    moved = torch.roll(images, shift, dims=(-2, -1))
    assert torch.equal(register(moved, images), images)


def test_registration_is_limited_and_sharpens_the_target() -> None:
    image = torch.rand(1, 3, 16, 16)
    far = torch.roll(image, 6, dims=-1)
    assert not torch.equal(register(far, image), image)
    assert torch.equal(register(far, image, max_shift=6), image)
    group = torch.stack([image, image, torch.roll(image, (1, 1), dims=(-2, -1))])
    error = (group_target(group, registration=True) - image).abs().max()
    assert error < 1e-6 < (group_target(group) - image).abs().max()
