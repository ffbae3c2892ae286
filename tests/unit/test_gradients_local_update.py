"""The client's local SGD, against torch's own optimizer."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from core.errors import InputError
from core.models.batch_norm import convert_batch_norm
from core.models.building import ModelSpec, build_model
from core.target import LocalTraining
from gradients.local_update import Placement, images_of_steps, local_sgd, unrolled_update


def _model(arch: str = "cnn", dtype: torch.dtype = torch.float64) -> nn.Module:
    torch.manual_seed(0)
    return build_model(ModelSpec(arch, n_classes=4, image_size=12, width=3)).to(dtype)


def _batch(n: int = 6, dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    images = torch.rand(n, 3, 12, 12, generator=generator, dtype=dtype)
    return images, torch.arange(n) % 4


def _train(
    model: nn.Module, images: torch.Tensor, labels: torch.Tensor, local: LocalTraining
) -> dict[str, torch.Tensor]:
    """What a client does with `torch.optim.SGD`: (theta_0 - theta_K) / (lr K)."""
    model = copy.deepcopy(model)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = torch.optim.SGD(
        model.parameters(), lr=local.lr, momentum=local.momentum, weight_decay=local.weight_decay
    )
    size = len(images) // local.batches
    for _ in range(local.epochs):
        for start in range(0, len(images), size):
            optimizer.zero_grad()
            F.cross_entropy(
                model(images[start : start + size]), labels[start : start + size]
            ).backward()
            optimizer.step()
    scale = local.lr * local.steps
    return {name: (before[name] - p.detach()) / scale for name, p in model.named_parameters()}


@pytest.mark.parametrize(
    "local",
    [
        LocalTraining(),
        LocalTraining(epochs=4, lr=0.05),
        LocalTraining(epochs=1, batches=3, lr=0.05),
        LocalTraining(epochs=2, batches=3, lr=0.05, momentum=0.9, weight_decay=0.01),
        LocalTraining(weight_decay=0.1),
    ],
    ids=["one step", "iterations", "batches", "momentum and decay", "decay in one step"],
)
@pytest.mark.parametrize("train_mode", [True, False])
def test_update_is_that_of_a_real_client(local: LocalTraining, train_mode: bool) -> None:
    model, (images, labels) = _model().train(train_mode), _batch()
    expected = _train(model, images, labels, local)
    for create_graph in (False, True):
        update = unrolled_update(model, images, labels, local, create_graph=create_graph)
        for name, value in expected.items():
            torch.testing.assert_close(update[name].detach(), value, rtol=1e-9, atol=1e-12)
            assert update[name].requires_grad == create_graph


def test_one_step_takes_the_gradient_itself() -> None:
    model, (images, labels) = _model(dtype=torch.float32), _batch(dtype=torch.float32)
    update = unrolled_update(model, images, labels, LocalTraining(lr=1e-6), create_graph=False)
    gradient = torch.autograd.grad(F.cross_entropy(model(images), labels), model.parameters())
    assert all(torch.equal(u, g) for u, g in zip(update.values(), gradient, strict=True))


def test_update_leaves_the_model_alone() -> None:
    model, (images, labels) = _model().train(), _batch()
    before = copy.deepcopy(model.state_dict())
    unrolled_update(model, images, labels, LocalTraining(epochs=2))
    after = model.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_given_buffers_follow_the_running_statistics() -> None:
    model, (images, labels) = _model().train(), _batch()
    buffers = {name: b.clone() for name, b in model.named_buffers()}
    unrolled_update(model, images, labels, LocalTraining(), create_graph=False, buffers=buffers)
    model(images)
    for name, value in model.named_buffers():
        torch.testing.assert_close(buffers[name], value)


@pytest.mark.parametrize("local", [LocalTraining(), LocalTraining(epochs=2, lr=0.05, momentum=0.5)])
def test_unrolled_update_is_differentiable_in_the_images(local: LocalTraining) -> None:
    # Smooth activations: a finite difference must not cross a ReLU's kink.
    model, (images, labels) = _model("lenet").train(), _batch(2)
    direction = torch.rand_like(images)

    def value(x: torch.Tensor) -> torch.Tensor:
        update = unrolled_update(model, x, labels, local)
        return torch.stack([u.square().sum() for u in update.values()]).sum()

    x = images.clone().requires_grad_()
    (derivative,) = torch.autograd.grad(value(x), x)
    step = 1e-5
    difference = (value(images + step * direction) - value(images - step * direction)).detach()
    expected = float(difference) / (2 * step)
    assert float((derivative * direction).sum()) == pytest.approx(expected, rel=1e-5)


def test_labels_may_be_probabilities() -> None:
    model, (images, labels) = _model(), _batch()
    soft = F.one_hot(labels, 4).double().requires_grad_()
    hard = unrolled_update(model, images, labels, LocalTraining(), create_graph=False)
    update = unrolled_update(model, images, soft, LocalTraining())
    for name, value in hard.items():
        torch.testing.assert_close(update[name].detach(), value)
    assert torch.autograd.grad(update["conv1.weight"].sum(), soft)[0].abs().sum() > 0


@pytest.mark.parametrize("local", [LocalTraining(), LocalTraining(epochs=2, lr=0.05)])
def test_shards_in_one_process_are_groups_of_asynchronous_batch_norm(local: LocalTraining) -> None:
    model, (images, labels) = _model().train(), _batch(6)
    sharded = unrolled_update(
        model, images, labels, local, create_graph=False, placement=Placement((4, 2))
    )
    grouped = convert_batch_norm(copy.deepcopy(model), "grouped", groups=(4, 2))
    expected = unrolled_update(grouped, images, labels, local, create_graph=False)
    for name, value in expected.items():
        torch.testing.assert_close(sharded[name], value, rtol=1e-9, atol=1e-12)


def test_frozen_parameters_are_not_part_of_the_update() -> None:
    model, (images, labels) = _model(), _batch()
    model.get_parameter("conv1.weight").requires_grad_(False)
    update = unrolled_update(model, images, labels, LocalTraining(epochs=2))
    assert "conv1.weight" not in update
    assert len(update) == len(list(model.parameters())) - 1


def test_dropout_masks_come_from_the_seed() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Dropout(0.5), nn.Linear(432, 4)).double().train()
    images, labels = _batch()

    def update(seed: int) -> torch.Tensor:
        values = unrolled_update(
            model, images, labels, LocalTraining(), placement=Placement(dropout_seed=seed)
        )
        return values["2.weight"].detach()

    assert torch.equal(update(1), update(1))
    assert not torch.equal(update(1), update(2))
    torch.manual_seed(1)
    gradient = torch.autograd.grad(F.cross_entropy(model(images), labels), model[2].weight)
    assert torch.equal(update(1), gradient[0])


def test_every_step_draws_another_dropout_mask() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Dropout(0.5), nn.Linear(432, 4)).double().train()
    images, labels = _batch()
    one = unrolled_update(
        model, images, labels, LocalTraining(), placement=Placement(dropout_seed=0)
    )
    # So small a learning rate leaves the weights in place: only the mask can differ.
    two = unrolled_update(
        model,
        images,
        labels,
        LocalTraining(epochs=2, lr=1e-12),
        placement=Placement(dropout_seed=0),
    )
    assert not torch.allclose(one["2.weight"], two["2.weight"], rtol=1e-3)


def test_images_of_steps_cover_every_epoch_in_order() -> None:
    assert images_of_steps(7, LocalTraining(epochs=2, batches=2), (0, 0)) == 2 * [
        [slice(0, 2), slice(2, 4)],
        [slice(4, 6), slice(6, 7)],
    ]
    assert images_of_steps(7, LocalTraining(), (5, 2)) == [[slice(0, 5), slice(5, 7)]]


def test_an_order_of_its_own_says_which_images_a_step_uses() -> None:
    local = LocalTraining(epochs=1, batches=2, order=((2, 0), (1,)))
    assert images_of_steps(3, local) == [[[2, 0]], [[1]]]
    with pytest.raises(InputError, match="one process"):
        images_of_steps(3, local, (2, 1))
    with pytest.raises(InputError, match="0 to 1 only"):
        images_of_steps(2, local)
    with pytest.raises(InputError, match="3 local steps"):
        LocalTraining(epochs=1, batches=2, order=((0,), (1,), (2,)))


def test_the_order_of_even_batches_is_the_split_in_order() -> None:
    model, (images, labels) = _model().train(), _batch()
    plain = LocalTraining(epochs=2, batches=3, lr=0.05, momentum=0.9)
    ordered = LocalTraining(
        epochs=2, batches=3, lr=0.05, momentum=0.9, order=((0, 1), (2, 3), (4, 5)) * 2
    )
    ours, theirs = (unrolled_update(model, images, labels, each) for each in (ordered, plain))
    for name, value in theirs.items():
        assert torch.equal(ours[name], value)


@pytest.mark.parametrize(
    ("n", "local", "shards"),
    [(3, LocalTraining(batches=4), ()), (3, LocalTraining(), (2, 2)), (2, LocalTraining(), (2, 0))],
)
def test_shards_without_images_are_refused(
    n: int, local: LocalTraining, shards: tuple[int, ...]
) -> None:
    with pytest.raises(InputError, match="--shards or --local-batches"):
        images_of_steps(n, local, shards)


def test_update_has_no_cancellation_where_weights_hardly_move() -> None:
    local = LocalTraining(epochs=3, lr=1e-9)
    weights = {"w": torch.tensor([1.0, 2.0])}
    update = local_sgd(weights, local, lambda parameters, step: [torch.tensor([0.3, -0.7])])
    torch.testing.assert_close(update["w"], torch.tensor([0.3, -0.7]), rtol=1e-6, atol=0)
