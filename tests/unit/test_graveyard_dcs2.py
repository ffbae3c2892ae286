"""DCS-2: what conceals, and the attacker who counts the concealing images."""

from __future__ import annotations

import functools

import pytest
import torch
import torch.nn.functional as F

from attack.attacks.spectral import Spectral
from attack.knowledge.answers.dcs2 import drawn_classes, with_concealing_images
from attack.matching.matcher import GradientMatcher
from attack.matching.objectives import Cosine
from attack.matching.replica import Replica
from core.errors import InputError
from core.local_training import LocalTraining
from core.losses import MeanSquaredError
from core.models.building import ModelSpec, build_model
from core.target import Target, Truth
from gradients.client import ClientSettings, generator, share_update
from gradients.defenses import ClientView, Gradient, parse_defenses
from gradients.defenses.dcs2 import DCS2, _turned
from tests.targets import data_spec, smooth_images

CPU = torch.device("cpu")
LENET = ModelSpec("lenet", 10, 8, width=8)
LABELS = torch.tensor([3, 7])
DEFENSE = DCS2(iterations=20)


def view(**changes: object) -> ClientView:
    torch.manual_seed(0)
    model = build_model(LENET).eval()
    inputs = data_spec(8).normalize(smooth_images(2, 8))
    given: dict[str, object] = {"images": inputs, "labels": LABELS, "generator": generator(0, 2)}
    return ClientView(model, **{**given, **changes})


def gradient_of(client: ClientView, images: torch.Tensor, labels: torch.Tensor) -> Gradient:
    loss = F.cross_entropy(client.model(images), labels)
    names, parameters = zip(*client.model.named_parameters(), strict=True)
    return dict(zip(names, torch.autograd.grad(loss, parameters), strict=True))


@functools.cache
def shared() -> tuple[Target, Truth]:
    torch.manual_seed(0)
    truth = Truth(smooth_images(2, 8), LABELS)
    settings = ClientSettings(train_mode=False, defenses=(DEFENSE,))
    target = share_update(
        build_model(LENET), LENET, data_spec(8), truth.images, truth.labels, settings
    )
    assert target is not None
    return target, truth


def cosine(one: Gradient, other: Gradient) -> float:
    a, b = (torch.cat([g.flatten() for g in each.values()]) for each in (one, other))
    return float(F.cosine_similarity(a, b, dim=0))


def test_the_concealing_images_have_a_gradient_more_alike_than_where_they_began() -> None:
    client = view()
    own = gradient_of(client, client.images, client.labels)
    found = []
    for iterations in (0, 20):
        images, labels = DCS2(iterations).concealing(own, view())
        found.append(cosine(gradient_of(client, images, labels), own))
        torch.testing.assert_close(labels.sum(1), torch.ones(2))
        assert float((images - client.images).abs().mean()) > 0.5
    assert found[1] > found[0]


def test_what_is_shared_is_the_gradient_of_all_four_images() -> None:
    target, _ = shared()
    client = view()
    own = gradient_of(client, client.images, client.labels)
    images, labels = DEFENSE.concealing(own, view())
    both = torch.cat([client.images, images])
    wanted = torch.cat([F.one_hot(LABELS, 10).float(), labels])
    together = gradient_of(client, both, wanted)
    assert cosine(together, own) > 0
    for name, g in together.items():
        torch.testing.assert_close(target.gradient[name], g, rtol=1e-3, atol=1e-6)


def test_what_points_away_is_turned_until_it_does_not() -> None:
    own = {"a": torch.tensor([1.0, 0.0]), "b": torch.tensor([2.0])}
    away = {"a": torch.tensor([-3.0, 4.0]), "b": torch.tensor([1.0])}
    turned = _turned(away, own)
    flat = [torch.cat([one["a"], one["b"]]) for one in (turned, own, away)]
    assert float(flat[0] @ flat[1]) == pytest.approx(0, abs=1e-6)
    # Moved along one's own gradient only.
    assert torch.linalg.matrix_rank(torch.stack([flat[0] - flat[2], flat[1]])) == 1
    assert _turned(own, own) is own


def test_the_last_bias_tells_the_classes_that_were_drawn() -> None:
    target, _ = shared()
    expected = torch.randint(10, (2,), generator=generator(0, 2)).sort().values
    assert torch.equal(drawn_classes(target, LABELS), expected)


def test_the_doubled_target_is_explained_by_all_four_images() -> None:
    target, truth = shared()
    likely = with_concealing_images(target, truth.labels, None)  # type: ignore[arg-type]
    assert (likely.target.batch_size, likely.kept) == (4, 2)
    client = view()
    own = gradient_of(client, client.images, client.labels)
    images, labels = DEFENSE.concealing(own, view())
    own_labels = F.one_hot(LABELS, 10).float()
    matcher = GradientMatcher(Replica(likely.target, CPU), Cosine(), "exact")
    both = torch.cat([client.images, images])
    assert float(matcher.value(both, torch.cat([own_labels, labels]))) < 1e-5
    alone = GradientMatcher(Replica(target, CPU), Cosine(), "exact")
    assert float(alone.value(client.images, LABELS)) > 1e-2
    # Known but for which concealing image is whose.
    assert likely.labels is not None
    torch.testing.assert_close(likely.labels.sum(0), torch.cat([own_labels, labels]).sum(0))


def test_the_attacker_explains_more_and_gives_the_private_images_only() -> None:
    target, truth = shared()
    found = []
    for adaptive in (False, True):
        config = Spectral.published.changed(iterations=60, race=0, adaptive=adaptive)
        result = Spectral(config).reconstruct(target, labels=truth.labels, device=CPU, seed=0)
        assert result.images.shape == truth.images.shape
        assert len(result.labels) == 2
        found.append(result.objective)
    assert found[1] < found[0] / 2


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"loss": MeanSquaredError()}, "is for classifiers"),
        ({"local": LocalTraining(epochs=2, batches=1, lr=0.1)}, "one local step"),
    ],
)
def test_what_cannot_be_concealed_is_refused(changes: dict[str, object], sentence: str) -> None:
    client = view(**changes)
    with pytest.raises(InputError, match=sentence):
        DEFENSE.apply({}, client)


def test_impossible_words_are_refused() -> None:
    with pytest.raises(InputError, match="must lie in"):
        parse_defenses("dcs2:10:1.5")
