"""What a client sent, read from two states or a gradient, is what `share` gives."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import gradinvbench as gib
from core.errors import InputError


def network(norm: bool = True) -> nn.Module:
    """With BatchNorm and a frozen tensor."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4) if norm else nn.Identity(), nn.Tanh(),
        nn.Flatten(), nn.Linear(4 * 36, 16), nn.Tanh(), nn.Linear(16, 3),
    ).double()  # fmt: skip
    model[4].bias.requires_grad_(False)
    return model


def batch() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    coarse = torch.rand((4, 1, 3, 3), generator=generator, dtype=torch.float64)
    images = nn.functional.interpolate(coarse, (6, 6), mode="bicubic").clamp(0, 1)
    return images, torch.tensor([0, 1, 2, 1])


def trained(model: nn.Module, optimizer: Callable[..., Any], epochs: int, size: int) -> nn.Module:
    """The model after a real training with torch's own optimiser."""
    after = copy.deepcopy(model).train()
    steps = optimizer([p for p in after.parameters() if p.requires_grad])
    images, labels = batch()
    for _ in range(epochs):
        for start in range(0, len(images), size):
            steps.zero_grad()
            outputs = after(images[start : start + size])
            nn.functional.cross_entropy(outputs, labels[start : start + size]).backward()
            steps.step()
    return after


TRAININGS: dict[str, tuple[Callable[..., Any], str, int, int]] = {
    "one step": (lambda p: torch.optim.SGD(p, lr=0.2), "sgd lr=0.2", 1, 4),
    "momentum": (
        lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, weight_decay=0.01),
        "sgd lr=0.05 momentum=0.9 weight-decay=0.01 epochs=3 batch-size=2", 3, 2,
    ),
    "adamw": (
        lambda p: torch.optim.AdamW(p, lr=1e-2, weight_decay=0.1),
        "adamw lr=1e-2 weight-decay=0.1 epochs=2 batch-size=2", 2, 2,
    ),
}  # fmt: skip
FORMS: dict[str, Callable[[nn.Module], Any]] = {
    "state": lambda after: after.state_dict(),
    "wrapped": lambda after: {f"module.{n}": v for n, v in after.state_dict().items()},
    "Flower's list": lambda after: [value.numpy() for value in after.state_dict().values()],
    "NVFlare's arrays": lambda after: {n: v.numpy() for n, v in after.state_dict().items()},
    "difference": lambda after: {n: v - network().state_dict()[n]
                                 for n, v in after.state_dict().items()},
}  # fmt: skip


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("training", TRAININGS)
def test_two_states_of_a_real_training_are_what_is_shared(training: str, form: str) -> None:
    optimizer, words, epochs, size = TRAININGS[training]
    before = network().train()
    after = trained(before, optimizer, epochs, size)
    expected, _ = gib.share(before, *batch(), local=words)
    update = gib.read_update(before.state_dict(), FORMS[form](after))
    found = gib.target_from_update(update, before, (1, 6, 6), batch_size=4, local=words)
    assert list(found.gradient) == list(expected.gradient)
    for name, value in expected.gradient.items():
        assert torch.allclose(found.gradient[name], value, rtol=1e-6, atol=1e-9), name
    assert found.state_dict.keys() == expected.state_dict.keys()
    assert all(torch.equal(found.state_dict[n], v) for n, v in expected.state_dict.items())
    assert found.running_after is not None
    assert expected.running_after is not None
    for name, value in expected.running_after.items():
        assert torch.allclose(found.running_after[name], value, rtol=1e-9), name
    assert (found.local, found.data.n_classes, found.train_mode) == (expected.local, 3, True)


def test_the_model_given_need_not_have_the_parameters() -> None:
    before = network()
    update = gib.read_update(before, trained(before, TRAININGS["one step"][0], 1, 4))
    other = network().float()
    nn.init.zeros_(other[0].weight)  # type: ignore[arg-type]
    found = gib.target_from_update(update, other, (1, 6, 6), batch_size=4, local="sgd lr=0.2")
    built = found.build_model()
    assert torch.equal(built[0].weight, before[0].weight)  # type: ignore[index]
    assert not other[0].weight.any()


def test_an_update_is_inverted() -> None:
    before = network(norm=False)
    images, labels = (part[:1] for part in batch())
    after = copy.deepcopy(before)
    steps = torch.optim.SGD(after.parameters(), lr=0.1, momentum=0.9)
    for _ in range(2):
        steps.zero_grad()
        nn.functional.cross_entropy(after(images), labels).backward()
        steps.step()
    update = gib.read_update(before.state_dict(), after.state_dict())
    words = "sgd lr=0.1 momentum=0.9 steps=2"
    target = gib.target_from_update(update, before, (1, 6, 6), batch_size=1, local=words)
    found = gib.invert(target, iterations=150, double=True, progress=False)
    assert found.labels.tolist() == labels.tolist()
    assert gib.evaluate(found, gib.Truth(images, labels)).to_frame()["psnr"][0] > 30


GRADIENTS: dict[str, Callable[[list[str], list[torch.Tensor | None]], Any]] = {
    "by name": lambda names, values: dict(zip(names, values, strict=True)),
    "wrapped": lambda names, values: {f"module.{n}": v for n, v in zip(names, values, strict=True)},
    "list": lambda names, values: values,
    "arrays": lambda names, values: [v.numpy() for v in values if v is not None],
}


@pytest.mark.parametrize("form", GRADIENTS)
def test_a_gradient_of_ones_own_is_what_is_shared(form: str) -> None:
    model = network().eval()
    images, labels = batch()
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    loss = nn.functional.cross_entropy(model(images), labels)
    values = list(torch.autograd.grad(loss, list(named.values())))
    given = GRADIENTS[form](list(named), [*values])
    found = gib.target_from_update(given, model, (1, 6, 6), batch_size=4)
    expected, _ = gib.share(model, images, labels)
    assert list(found.gradient) == list(expected.gradient)
    for name, value in expected.gradient.items():
        assert torch.allclose(found.gradient[name], value, rtol=1e-9, atol=1e-14)


def test_a_part_of_the_parameters_and_those_without_a_gradient() -> None:
    model = network().eval()
    given = {name: torch.ones_like(p) for name, p in model.named_parameters()}
    part = {"shape": (1, 6, 6), "batch_size": 1}
    found = gib.target_from_update(given, model, shared="6.*", **part)  # type: ignore[arg-type]
    assert list(found.gradient) == ["6.weight", "6.bias"]
    absent: dict[str, Any] = {**given, "6.bias": None}
    found = gib.target_from_update(absent, model, **part)  # type: ignore[arg-type]
    assert "6.bias" not in found.gradient
    with pytest.raises(InputError, match=r"no parameter of the update fits head\.\*"):
        gib.target_from_update(given, model, shared="head.*", **part)  # type: ignore[arg-type]


def test_what_does_not_fit_is_one_sentence() -> None:
    model = network().eval()
    good = {name: torch.ones_like(p) for name, p in model.named_parameters()}

    def refused(update: Any, message: str, **options: Any) -> None:
        with pytest.raises(InputError, match=message):
            gib.target_from_update(
                update, options.pop("model", model), (1, 6, 6), **{"batch_size": 1, **options}
            )

    refused({"6.wieght": good["6.weight"]}, r"6\.wieght .* nearest is 6\.weight")
    refused({**good, "6.bias": torch.ones(4)}, r"6\.bias has shape \(4,\)")
    refused({**good, "6.bias": good["6.bias"] * float("nan")}, r"6\.bias is not finite")
    refused([torch.ones(3)], "a list of 1, and Sequential trains 7 parameters")
    refused({}, "holds no parameter")
    refused(good, "batch_size must be a whole number", batch_size=0)
    same = gib.read_update(model, {**model.state_dict(), "7.weight": torch.ones(2)})
    refused(same, r"changes no parameter .* names 7\.weight, and the nearest is", local="sgd lr=1")
    update = gib.read_update(model, trained(model, TRAININGS["one step"][0], 1, 4))
    refused(update, "says nothing of the learning rate")
    other = nn.Sequential(nn.Flatten(), nn.Linear(36, 3))
    refused(update, "state before the update is not that of Sequential", local="sgd", model=other)
    refused(update, "does not take images of shape 1 x 6 x 6", local="sgd lr=1",
            model=_of_other_shape())  # fmt: skip


def _of_other_shape() -> nn.Module:
    """The same parameters, on images of another size."""
    model = network()
    model[3] = nn.Sequential(nn.Upsample((8, 8)), nn.Flatten())  # type: ignore[operator]
    return model
