"""GInfoR against its definition, written out."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import nn

from attack.metrics.information_ratio import GradientInformation, gradient_information
from core.data.specs import DataSpec
from core.models.building import ModelSpec, build_model
from core.target import Target, Truth

DATA = DataSpec("noise", (3, 8, 8), (0.4, 0.5, 0.6), (0.2,) * 3, 5)


def setting(arch: str, train: bool, n: int = 4) -> tuple[Target, Truth]:
    torch.manual_seed(1)
    spec = ModelSpec(arch, 5, 8, width=8)
    model = build_model(spec).double().train(train)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    truth = Truth(torch.rand(n, 3, 8, 8, dtype=torch.float64), torch.tensor([0, 2, 2, 4])[:n])
    loss = nn.functional.cross_entropy(model(DATA.normalize(truth.images)), truth.labels)
    named = dict(model.named_parameters())
    gradient = dict(zip(named, torch.autograd.grad(loss, list(named.values())), strict=True))
    return Target(spec, DATA, state, gradient, train, n), truth


@pytest.mark.parametrize("arch", ["mlp", "cnn"])
def test_is_the_definition_without_batch_statistics(arch: str) -> None:
    target, truth = setting(arch, train=False)
    model = target.build_model()
    per_sample = []
    for image, label in zip(truth.images, truth.labels, strict=True):
        logits = model(DATA.normalize(image[None]).float())
        loss = nn.functional.cross_entropy(logits, label[None])
        gradients = torch.autograd.grad(loss, list(model.parameters()))
        per_sample.append(torch.cat([g.flatten() for g in gradients]).double())
    gradient = torch.stack(per_sample).mean(0)
    info = torch.stack([g @ gradient for g in per_sample])
    torch.testing.assert_close(
        gradient_information(target, truth).information, info, rtol=1e-4, atol=1e-6
    )
    found = gradient_information(target, truth)
    norm = torch.stack([g.norm() for g in per_sample])
    torch.testing.assert_close(found.norm, norm, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(found.cosine, info / norm / gradient.norm(), rtol=1e-4, atol=1e-6)
    shifted = info - min(0.0, float(info.min()))
    torch.testing.assert_close(
        gradient_information(target, truth).ratio, shifted / shifted.sum(), rtol=1e-4, atol=1e-6
    )


@pytest.mark.parametrize("train", [False, True])
def test_information_adds_up_to_the_gradient(train: bool) -> None:
    target, truth = setting("cnn", train)
    norm = sum(float(g.square().sum()) for g in target.gradient.values())
    own = gradient_information(target, truth).information
    assert float(own.mean()) == pytest.approx(norm, rel=1e-4)
    shared = gradient_information(target, truth, use_shared=True).information
    torch.testing.assert_close(own, shared, rtol=1e-3, atol=1e-6)


def test_shards_have_their_own_statistics() -> None:
    target, truth = setting("cnn", train=True)
    apart = dataclasses.replace(target, shards=(2, 2), synchronized=False)
    halves = [
        dataclasses.replace(target, batch_size=2, shards=(2,)),
        Truth(truth.images[:2], truth.labels[:2]),
    ]
    whole = gradient_information(target, truth).information
    sharded = gradient_information(apart, truth).information
    assert not torch.allclose(whole, sharded, rtol=1e-3)
    # With the same direction, the first shard knows nothing of the second.
    first = gradient_information(*halves, use_shared=True).information  # type: ignore[arg-type]
    torch.testing.assert_close(
        gradient_information(apart, truth, use_shared=True).information[:2],
        first,
        rtol=1e-4,
        atol=1e-7,
    )


def test_a_negative_part_is_shifted_and_all_sum_to_one() -> None:
    target, truth = setting("mlp", train=False)
    flipped = {name: -gradient for name, gradient in target.gradient.items()}
    target = dataclasses.replace(target, gradient=flipped)
    assert float(gradient_information(target, truth, use_shared=True).information.min()) < 0
    ratio = gradient_information(target, truth, use_shared=True).ratio
    assert float(ratio.sum()) == pytest.approx(1)
    assert float(ratio.min()) == 0


def test_only_what_was_shared_counts() -> None:
    target, truth = setting("mlp", train=False)
    nothing = {name: torch.zeros_like(g) for name, g in target.gradient.items()}
    name = next(iter(nothing))
    silent = dataclasses.replace(target, gradient={name: nothing[name]})
    ratio = gradient_information(silent, truth, use_shared=True).ratio
    assert ratio.tolist() == pytest.approx([0.25] * 4)


def test_table_and_record() -> None:
    columns = torch.tensor([0.1, 0.2, 0.3, 0.4])
    labels = torch.tensor([0, 2, 2, 4])
    information = GradientInformation(labels, columns, labels, *[columns] * 6)
    assert information.ratio_by_label() == pytest.approx({0: 0.1, 2: 0.5, 4: 0.4})
    assert "50.00" in information.to_table().get_string()
    record = information.to_record()
    assert record["by_label"]["2"] == pytest.approx(0.5)
    assert record["by_sample"][3]["ratio"] == pytest.approx(0.4)
    assert record["by_sample"][3]["predicted"] == 4


def test_a_samples_gradient_is_compared_entry_by_entry() -> None:
    target, truth = setting("cnn", train=False)
    found = gradient_information(target, truth)
    model = target.build_model()
    inputs = DATA.normalize(truth.images).float()

    def gradient(rows: slice) -> torch.Tensor:
        loss = torch.nn.functional.cross_entropy(model(inputs[rows]), truth.labels[rows])
        return torch.cat([g.flatten() for g in torch.autograd.grad(loss, [*model.parameters()])])

    whole = gradient(slice(None))
    for i in range(len(inputs)):
        own = gradient(slice(i, i + 1))
        assert float(found.distance[i]) == pytest.approx(float((own - whole).square().sum()), 1e-3)
        signs = float((own.sign() == whole.sign()).double().mean())
        assert float(found.same_signs[i]) == pytest.approx(signs, abs=1e-3)
    most = model(inputs).softmax(1).amax(1)
    torch.testing.assert_close(found.predicted_confidence.float(), most)


def test_confidence_is_the_models() -> None:
    target, truth = setting("cnn", train=False)
    logits = target.build_model()(DATA.normalize(truth.images).float())
    found = gradient_information(target, truth)
    assert torch.equal(found.predicted, logits.argmax(1))
    expected = logits.softmax(1)[torch.arange(4), truth.labels].double()
    torch.testing.assert_close(found.confidence, expected, rtol=1e-4, atol=1e-6)
