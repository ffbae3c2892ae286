"""Class representatives: they show a class that is one person, and no one of a random model."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import gradinvbench as gib
from audit.class_representatives import class_representatives, invert_model
from audit.record import ClassSection
from core.target import Target, Truth


def faces(n: int, seed: int, shape: tuple[int, ...] = (1, 8, 8)) -> torch.Tensor:
    """Smooth random images."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand((n, 1, *[4] * (len(shape) - 1)), generator=generator)
    mode = {2: "linear", 3: "bilinear", 4: "trilinear"}[len(shape)]
    return nn.functional.interpolate(coarse, size=shape[1:], mode=mode)


def trained(images: torch.Tensor, labels: torch.Tensor, loss: nn.Module) -> nn.Module:
    """Fredrikson's setting: a softmax over pixels, each class a person."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(images[0].numel(), 3))
    optimiser = torch.optim.Adam(model.parameters(), lr=0.02)
    for _ in range(150):
        optimiser.zero_grad()
        loss(model(images), labels).backward()
        optimiser.step()
    return model


def target_of(model: nn.Module, samples: Truth, loss: str | None = None) -> Target:
    return gib.share(model, samples.images, samples.labels, loss=loss)[0]


def mean_ncc(found: tuple[ClassSection, ...]) -> float:
    return sum(section.similarities[0].best_member[0] for section in found) / len(found)


def test_a_class_that_is_one_person_is_shown_and_a_random_model_shows_nobody() -> None:
    labels = torch.arange(3)
    members, others = Truth(faces(3, 1), labels), Truth(faces(30, 2), labels.repeat(10))
    model = trained(members.images, labels, nn.CrossEntropyLoss())
    client = target_of(model, members)
    found = class_representatives(client, model.state_dict(), members, others, restarts=2)
    assert [section.of_class for section in found] == [0, 1, 2]
    assert min(section.confidence for section in found) > 0.9
    # The mean image and the noise know nothing of the person.
    for section in found:
        ncc, ssim = section.similarities
        assert (ncc.metric, ssim.metric) == ("ncc", "ssim")
        assert ncc.above_noise == 2
        assert ncc.best_member[0] > max(ncc.mean_image, 0.5)
    random = nn.Sequential(nn.Flatten(), nn.Linear(64, 3))
    blind = class_representatives(client, random.state_dict(), members, others, restarts=2)
    assert mean_ncc(found) > 0.5 > mean_ncc(blind) + 0.2


def test_it_is_the_maximum_that_the_box_allows_of_a_linear_output() -> None:
    """Without a prior's say (a table), each feature goes to the end that its weight points to."""
    torch.manual_seed(0)
    model = nn.Linear(6, 3)
    samples = Truth(torch.rand(4, 6), torch.tensor([0, 1, 2, 0]))
    client = target_of(model, samples)
    found = invert_model(client, model.state_dict(), (0, 2), restarts=1)
    (images,) = found.images
    assert torch.equal(images, (model.weight[[0, 2]] > 0).float())
    confidences = model(images).softmax(1)[[0, 1], [0, 2]]
    assert found.confidences == pytest.approx(confidences.tolist())


@pytest.mark.parametrize("shape", [(1, 12), (1, 6, 6, 6)])
def test_signals_and_volumes_with_findings(shape: tuple[int, ...]) -> None:
    findings = torch.tensor([[1.0, 0, 0], [0, 1, 0], [1, 1, 0], [1, 0, 0]])
    samples = Truth(faces(4, 1, shape), findings)
    model = nn.Sequential(nn.Flatten(), nn.Linear(samples.images[0].numel(), 3))
    client = target_of(model, samples, "binary-cross-entropy")
    found = class_representatives(client, model.state_dict(), samples, samples, iterations=40)
    # Nobody has the third finding.
    assert [section.of_class for section in found] == [0, 1]
    assert all(0.5 < section.confidence < 1 for section in found)
    assert len(found[0].similarities[0].noise) == 100
    assert len(found[0].similarities[0].best_member) == 4


def test_restarts_are_all_there_the_surest_first_and_held_against_as_many_as_asked() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.Tanh(), nn.Linear(8, 2))
    samples = Truth(faces(12, 1), torch.arange(12) % 2)
    client = target_of(model, samples)
    found = invert_model(client, client.state_dict, (0, 1), restarts=5, iterations=5)
    assert found.images.shape == (5, 2, 1, 8, 8)
    logits = torch.stack([model(images) for images in found.images])
    for place in (0, 1):
        own = logits[:, place, place].tolist()
        assert own == sorted(own, reverse=True)
    one, other = (
        class_representatives(
            client, client.state_dict, samples, samples, iterations=5, compared=compared
        )[0].similarities[0]
        for compared in (2, 0)
    )
    assert all(few <= most for few, most in zip(one.best_member, other.best_member, strict=True))
    assert one != other


def test_the_model_stays_and_a_seed_gives_the_same_images() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4 * 36, 2))
    samples = Truth(faces(4, 1), torch.arange(4) % 2)
    client = target_of(model, samples)
    before = {name: value.clone() for name, value in client.state_dict.items()}
    first, again, other = (
        invert_model(client, client.state_dict, (0, 1), iterations=10, seed=seed).images
        for seed in (1, 1, 2)
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert all(torch.equal(value, client.state_dict[name]) for name, value in before.items())


def test_a_client_without_classes_has_none() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 1))
    samples = Truth(faces(4, 1), torch.rand(4, 1))
    client = target_of(model, samples, "mse")
    assert class_representatives(client, model.state_dict(), samples, samples) == ()
