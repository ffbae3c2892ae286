"""What a client shares, seen from the attacker's side."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from core.data.data_sets import DataSets
from core.data.specs import DataSpec
from core.errors import InputError
from core.models.batch_norm import convert_batch_norm
from core.models.building import ModelSpec, build_model
from core.target import LocalTraining, Target, Truth
from gradients.client import ClientSettings, has_active_dropout, resolve_shards, share_update
from gradients.client_batch import batch_indices, duplicate_label_indices, validation_guesses
from gradients.defenses import parse_defenses
from gradients.local_update import Placement, unrolled_update

CNN = ModelSpec("cnn", n_classes=5, image_size=32, width=4)
DROPOUT = ModelSpec("mobilenet_v2", n_classes=5, image_size=32)

CLIENTS = {
    "one step": (CNN, ClientSettings()),
    "eval mode": (CNN, ClientSettings(train_mode=False)),
    "asynchronous shards": (CNN, ClientSettings(shards=(4, 2))),
    "synchronized shards": (CNN, ClientSettings(shards=(4, 2), synchronized=True)),
    "local iterations": (
        CNN,
        ClientSettings(local=LocalTraining(2, 3, 0.05, 0.9, 1e-3), shards=(3, 3)),
    ),
    "dropout": (DROPOUT, ClientSettings(dropout_seed=11, local=LocalTraining(2, lr=0.01))),
    "dropout in shards": (DROPOUT, ClientSettings(dropout_seed=11, shards=(3, 3))),
    "frozen layers": (CNN, ClientSettings(defenses=parse_defenses("freeze:fc"))),
}


def _share(spec: ModelSpec, settings: ClientSettings) -> tuple[Target, Truth]:
    torch.manual_seed(0)
    model = build_model(spec)
    data = DataSpec("noise", (3, 32, 32), (0.5, 0.4, 0.3), (0.2, 0.25, 0.3), 5)
    truth = Truth(torch.rand(6, 3, 32, 32), torch.tensor([0, 1, 2, 3, 4, 0]))
    target = share_update(model, spec, data, truth.images, truth.labels, settings)
    assert target is not None
    return target, truth


@pytest.mark.parametrize("name", CLIENTS)
def test_the_truth_reproduces_the_update_from_the_target_alone(name: str) -> None:
    target, truth = _share(*CLIENTS[name])
    model = target.build_model()
    for parameter_name, parameter in model.named_parameters():
        parameter.requires_grad_(parameter_name in target.gradient)
    update = unrolled_update(
        model,
        target.data.normalize(truth.images),
        truth.labels,
        target.local,
        create_graph=False,
        placement=Placement(target.shards, dropout_seed=target.dropout_seed),
    )
    assert list(update) == list(target.gradient)
    for parameter_name, gradient in target.gradient.items():
        torch.testing.assert_close(update[parameter_name], gradient, rtol=1e-5, atol=1e-6)


def test_statistics_of_shards_are_those_of_grouped_batch_norm() -> None:
    target, truth = _share(*CLIENTS["asynchronous shards"])
    model = convert_batch_norm(target.build_model(), "grouped", groups=target.shards)
    inputs = target.data.normalize(truth.images)
    features = model[:1](inputs).detach()
    assert target.bn_statistics is not None
    for part, statistics in zip(features.split(target.shards), target.bn_statistics, strict=True):
        mean, variance = statistics["bn1"]
        torch.testing.assert_close(mean, part.mean((0, 2, 3)))
        torch.testing.assert_close(variance, part.var((0, 2, 3), unbiased=False))


def test_several_local_batches_have_no_statistics_of_one_batch() -> None:
    settings = ClientSettings(local=LocalTraining(batches=2))
    assert _share(CNN, settings)[0].bn_statistics is None


def test_dropout_is_active_only_where_it_is_drawn() -> None:
    model = build_model(DROPOUT)
    assert has_active_dropout(model.train())
    assert not has_active_dropout(model.eval())
    assert not has_active_dropout(build_model(CNN).train())
    # Stochastic depth draws masks as well.
    assert has_active_dropout(build_model(ModelSpec("convnext_tiny", 5, 32)).train())


def test_shards_are_spread_evenly_unless_stated() -> None:
    assert resolve_shards(7, ClientSettings(), 1) == (7,)
    assert resolve_shards(7, ClientSettings(), 3) == (3, 2, 2)
    assert resolve_shards(7, ClientSettings(shards=(6, 1)), 2) == (6, 1)
    assert resolve_shards(7, ClientSettings(shards=(6, 1), synchronized=True), 1) == (7,)
    # Two local batches of 4 and 3 images, each spread over both processes.
    assert resolve_shards(7, ClientSettings(local=LocalTraining(batches=2)), 2) == (4, 3)


@pytest.mark.parametrize(
    ("settings", "processes", "sentence"),
    [
        (ClientSettings(shards=(3, 3)), 1, "sum to the batch, 7"),
        (ClientSettings(shards=(8, -1)), 1, "must be positive"),
        (ClientSettings(shards=(3, 4)), 3, "there are 3 processes"),
        (ClientSettings(shards=(6, 1), local=LocalTraining(batches=2)), 2, "evenly: 4,3"),
    ],
)
def test_shards_that_do_not_suit_are_refused(
    settings: ClientSettings, processes: int, sentence: str
) -> None:
    with pytest.raises(InputError, match=sentence):
        resolve_shards(7, settings, processes)


def test_freezing_everything_leaves_nothing_to_share() -> None:
    model = build_model(CNN).requires_grad_(False)
    target, truth = _share(CNN, ClientSettings())
    with pytest.raises(InputError, match="nothing to share"):
        share_update(model, CNN, target.data, truth.images, truth.labels, ClientSettings())


def test_defenses_see_the_update_and_not_the_other_way_round() -> None:
    plain, _ = _share(CNN, ClientSettings())
    clipped, _ = _share(CNN, ClientSettings(defenses=parse_defenses("clip:0.1")))
    norm = torch.stack([g.norm() for g in plain.gradient.values()]).norm()
    for name, gradient in plain.gradient.items():
        torch.testing.assert_close(clipped.gradient[name], gradient * 0.1 / norm)
    tensors = {"gradient": {}, "state_dict": {}, "bn_statistics": None, "running_after": None}
    assert replace(clipped, defenses=(), **tensors) == replace(plain, **tensors)


def test_batches_are_parts_of_one_shuffle() -> None:
    batches = [batch_indices(10, 3, index, seed=4) for index in range(3)]
    flat = [i for batch in batches for i in batch]
    assert len(set(flat)) == 9
    assert flat != sorted(flat)
    assert batches[1] == batch_indices(10, 3, 1, seed=4)
    assert batches[1] != batch_indices(10, 3, 1, seed=5)


def test_duplicates_come_from_classes_with_enough_images() -> None:
    labels = [0] * 5 + [1] * 2 + [2] * 4 + [3] * 9
    for index in range(5):
        chosen = duplicate_label_indices(labels, 8, 4, index, seed=1)
        assert len(set(chosen)) == 8
        found = [labels[i] for i in chosen]
        assert found[:4] == 4 * [found[0]]
        assert found[4:] == 4 * [found[4]]
        assert found[0] != found[4]
        assert 1 not in found


class _Images(torch.utils.data.Dataset[tuple[torch.Tensor, int]]):
    def __init__(self, images: torch.Tensor) -> None:
        self.images, self.targets = images, [0] * len(images)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        return self.images[index], 0


@pytest.mark.parametrize("n", [3, 120])
def test_guesses_come_from_images_of_others_and_are_the_nearest(n: int) -> None:
    torch.manual_seed(1)
    spec = DataSpec("noise", (3, 4, 4), (0.0,) * 3, (1.0,) * 3, 2)
    others, originals = torch.rand(n, 3, 4, 4), torch.rand(2, 3, 4, 4)
    images = _Images(others)
    mean, nearest = validation_guesses(DataSets(spec, images, images, images), originals)
    assert mean is not None
    assert nearest is not None
    torch.testing.assert_close(mean, others.mean(0))
    distances = torch.cdist(originals.flatten(1), others.flatten(1))
    torch.testing.assert_close(nearest, others[distances.argmin(1)])


def test_without_validation_images_there_is_no_guess() -> None:
    spec = DataSpec("noise", (3, 4, 4), (0.0,) * 3, (1.0,) * 3, 2)
    empty = _Images(torch.zeros(0, 3, 4, 4))
    assert validation_guesses(DataSets(spec, empty, empty, empty), torch.rand(1, 3, 4, 4)) == (
        None,
        None,
    )
