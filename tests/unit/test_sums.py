"""What a server sees of several clients: means of their updates, and what rounds tell apart."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import gradinvbench as gib
from attack.attacks import get_attack
from attack.attacks.parts.closed_form import gradient_loss
from attack.disaggregation import disaggregate, participation_from_counts
from attack.disaggregation import main as disaggregate_files
from attack.knowledge.known_defenses import adapt
from attack.knowledge.label_search import parts_of
from attack.metrics import assign, psnr
from attack.settings import InversionConfig
from core.errors import InputError
from core.models.building import ModelSpec, build_model
from core.target import LocalTraining, Target, Truth
from gradients.checkpoint import load_target, save_target
from gradients.client import ClientSettings, share_update
from gradients.command import main as extract
from gradients.defenses import parse_defenses
from gradients.record import read_record
from gradients.sums import Aggregation, client_settings, lone_elements, share_sum
from tests.targets import data_spec, smooth_images

CPU = torch.device("cpu")
MLP = ModelSpec("mlp", 10, 8, width=96)
CNN = ModelSpec("cnn", 10, 8, width=4)
EVAL = ClientSettings(train_mode=False)
FEDAVG = LocalTraining(epochs=2, batches=2, lr=0.05, momentum=0.9)


def shared(
    spec: ModelSpec,
    aggregation: Aggregation,
    settings: ClientSettings = EVAL,
    size: int = 2,
    seed: int = 0,
) -> tuple[Target, Truth]:
    """The mean of the clients that take part, `size` images each."""
    torch.manual_seed(seed)
    model = build_model(spec).double()
    n = size * aggregation.clients
    places = aggregation.places(size)
    truth = Truth(
        smooth_images(n, spec.image_size)[places], (torch.arange(n) % spec.n_classes)[places]
    )
    data = data_spec(spec.image_size)
    given = (truth.images, truth.labels)
    return share_sum(model, spec, data, *given, settings, aggregation), truth


def largest_difference(one: Target, other: dict[str, torch.Tensor]) -> float:
    assert list(one.gradient) == list(other)
    return max(float((one.gradient[n] - g).abs().max()) for n, g in other.items())


def test_the_mean_of_gradients_is_the_gradient_of_all_images() -> None:
    target, truth = shared(CNN, Aggregation(3))
    model = target.build_model().double()
    inputs = target.data.normalize(truth.images.double())
    loss = F.cross_entropy(model(inputs), truth.labels)
    named = dict(model.named_parameters())
    whole = dict(zip(named, torch.autograd.grad(loss, list(named.values())), strict=True))
    assert largest_difference(target, whole) < 1e-14
    assert (target.batch_size, target.n_clients, target.images_per_client) == (6, 3, 2)
    assert target.clients == (0, 1, 2)
    assert target.shards == (6,)


def test_under_batch_norm_every_client_is_a_group() -> None:
    target, truth = shared(CNN, Aggregation(3), ClientSettings())
    torch.manual_seed(0)
    model = build_model(CNN).double()
    groups = ClientSettings(shards=(2, 2, 2))
    one = share_update(model, CNN, target.data, truth.images, truth.labels, groups)
    assert one is not None
    assert largest_difference(target, one.gradient) < 1e-14
    assert target.shards == one.shards
    assert not target.synchronized
    assert target.bn_statistics is None
    assert target.running_after is None


def by_torch(target: Target, images: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
    """A client's update by torch's own optimiser."""
    model, local = target.build_model().double(), target.local
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    optimiser = torch.optim.SGD(model.parameters(), local.lr, momentum=local.momentum)
    inputs = target.data.normalize(images.double())
    for _ in range(local.epochs):
        for x, y in zip(inputs.chunk(local.batches), labels.chunk(local.batches), strict=True):
            optimiser.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimiser.step()
    return {
        n: (before[n] - p.detach()) / (local.lr * local.steps) for n, p in model.named_parameters()
    }


def test_federated_averaging_is_the_mean_of_separate_trainings() -> None:
    target, truth = shared(MLP, Aggregation(3), dataclasses.replace(EVAL, local=FEDAVG))
    pairs = zip(truth.images.split(2), truth.labels.split(2), strict=True)
    updates = [by_torch(target, *pair) for pair in pairs]
    mean = {n: torch.stack([u[n] for u in updates]).mean(0) for n in target.gradient}
    assert largest_difference(target, mean) < 1e-12
    # The attacker takes the clients' steps apart as well.
    inputs = target.data.normalize(truth.images.double())
    assert gradient_loss(target, inputs, truth.labels, CPU) < 1e-12
    alone = dataclasses.replace(target, clients=())
    assert gradient_loss(alone, inputs, truth.labels, CPU) > 1e-4
    assert parts_of(target) == [1] * 6


def test_every_client_defends_itself_with_numbers_of_its_own() -> None:
    noise = dataclasses.replace(EVAL, defenses=parse_defenses("clip:0.5,gaussian:0.01"))
    target, truth = shared(MLP, Aggregation(2), noise)
    torch.manual_seed(0)
    model = build_model(MLP).double()
    own = [
        share_update(model, MLP, target.data, x, y, client_settings(noise, client))
        for client, (x, y) in enumerate(
            zip(truth.images.split(2), truth.labels.split(2), strict=True)
        )
    ]
    first, second = (each.gradient for each in own if each is not None)
    assert largest_difference(target, {n: (first[n] + second[n]) / 2 for n in first}) < 1e-15
    assert not torch.equal(first["1.bias"], second["1.bias"])
    notes = adapt(target, InversionConfig()).notes
    assert notes == [
        f"{word}: nothing is known against it in a mean of clients"
        for word in ("clip:0.5", "gaussian:0.01")
    ]


def test_what_one_client_alone_contributes_is_counted_and_can_be_withheld() -> None:
    assert lone_elements([torch.tensor([0, 1, 2]), torch.tensor([1])]) == pytest.approx(2 / 3)
    assert lone_elements([torch.zeros(3)]) is None
    sparse = dataclasses.replace(EVAL, defenses=parse_defenses("topk:0.05"))
    torch.manual_seed(0)
    model, data = build_model(MLP).double(), data_spec(8)
    images, labels = smooth_images(4, 8), torch.tensor([0, 1, 2, 3])
    measured: dict[str, float] = {}
    given = (model, MLP, data, images, labels, sparse)
    seen = [share_sum(*given, Aggregation(2, (), n), measured=measured) for n in (1, 2)]
    plain, withheld = ({n: g != 0 for n, g in t.gradient.items()} for t in seen)
    shown = sum(int(mask.sum()) for mask in plain.values())
    both = sum(int(mask.sum()) for mask in withheld.values())
    assert 0 < both < shown
    assert measured["lone_elements"] == pytest.approx(1 - both / shown)


@pytest.mark.parametrize(
    ("attack", "malicious"),
    [("spear", ""), ("robbing-the-fed", "imprint:400"), ("trap-weights", "trap:1")],
)
def test_exact_attacks_read_a_sum_as_one_batch(attack: str, malicious: str) -> None:
    from gradients.malicious_server import tamper

    aggregation, data = Aggregation(3), data_spec(8)
    spec = dataclasses.replace(MLP, malicious=malicious)
    torch.manual_seed(0)
    model = build_model(MLP).double()
    if malicious:
        public = data.normalize(smooth_images(400, 8, seed=7))
        model = tamper(model, spec, public, batch_size=6)
    truth = Truth(smooth_images(6, 8), torch.arange(6))
    target = share_sum(model, spec, data, truth.images, truth.labels, EVAL, aggregation)
    found = get_attack(attack)().reconstruct(target, labels=truth.labels, device=CPU, seed=0)
    quality = psnr(found.images[assign(found.images, truth.images)], truth.images)
    assert (quality > 60).sum() >= 5


def test_a_sum_survives_its_file_and_older_programs_refuse_it(tmp_path: Path) -> None:
    target, truth = shared(MLP, Aggregation(4, (3, 1)))
    save_target(tmp_path / "t.tar", target, truth)
    loaded, known = load_target(tmp_path / "t.tar")
    assert loaded.clients == (3, 1)
    assert known is not None
    torch.testing.assert_close(known.images, truth.images)
    content = torch.load(tmp_path / "t.tar", weights_only=False)
    assert content["format_version"] == 3
    for clients in ([0, 0], [0, 1, 2], [-1, 2], "two"):
        torch.save(content | {"clients": clients}, tmp_path / "bad.tar")
        with pytest.raises(InputError, match="clients"):
            load_target(tmp_path / "bad.tar")


def test_the_command_writes_the_mean_of_the_batch_cut_into_clients(tmp_path: Path) -> None:
    base = ["--data", "photo-patches", "-a", "mlp", "--width", "8", "--image-size", "8"]
    base += ["--model-eval", "--double", "--cpu"]
    for folder, flags in {
        "whole": ["-b", "6"],
        "sum": ["-b", "2", "--aggregate", "3"],
        "two": ["-b", "2", "--aggregate", "3", "--participants", "2,0"],
    }.items():
        assert extract([*base, *flags, "--results", str(tmp_path / folder)]) == 0
    whole, mean, two = (load_target(next((tmp_path / f).glob("*.tar"))) for f in
                        ("whole", "sum", "two"))  # fmt: skip
    assert largest_difference(mean[0], whole[0].gradient) < 1e-14
    assert mean[1] is not None
    assert two[1] is not None
    assert torch.equal(two[1].images, mean[1].images[[4, 5, 0, 1]])
    assert two[0].clients == (2, 0)
    record = read_record(next((tmp_path / "two").glob("*.json")))
    assert record.target.clients == (2, 0)
    assert record.measured.lone_elements is not None
    assert next((tmp_path / "two").glob("idtest_mlp_init_photo-patches_b2_k2_i0-*.tar"))
    assert json.loads(next((tmp_path / "whole").glob("*.json")).read_text()).get("clients") is None


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (["--aggregate", "0"], "--aggregate must be at least 1"),
        (["--aggregate", "3", "--participants", "0,3"], "--participants 0,3: give each client"),
        (["--aggregate", "3", "--participants", "a"], "--participants a: expected numbers"),
        (["--aggregate", "3", "--reveal-from", "4"], "--reveal-from 4: 3 clients take part"),
        (["--aggregate", "2", "--shards", "16,16"], "--shards and --aggregate"),
        (["--aggregate", "2", "--nproc-per-node", "2", "--multiprocessing-distributed",
          "--dist-backend", "gloo"], "--aggregate: every client is one process"),
    ],
)  # fmt: skip
def test_what_cannot_be_summed_is_refused(
    flags: list[str], sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert extract(["--data", "photo-patches", "--cpu", *flags]) == 2
    assert sentence in capsys.readouterr().err


def test_fedavg_attack_on_order_refuses_a_sum() -> None:
    target, truth = shared(MLP, Aggregation(2), dataclasses.replace(EVAL, local=FEDAVG))
    with pytest.raises(InputError, match="the mean of 2"):
        get_attack("data-leakage-fedavg")().reconstruct(
            target, labels=truth.labels, device=CPU, seed=0
        )


# --- Several rounds -----------------------------------------------------------------------

ROUNDS = ((0, 1, 2), (0, 1), (1, 2), (0, 2), (0,), (2,))


def sums_of(rounds: Sequence[Sequence[int]]) -> list[tuple[Target, Truth]]:
    return [shared(MLP, Aggregation(3, tuple(present))) for present in rounds]


def test_a_difference_of_two_sums_is_the_client_who_left() -> None:
    sums = sums_of(ROUNDS[:2])
    found = disaggregate([target for target, _ in sums])
    assert list(found.targets) == [2]
    assert found.undetermined == (0, 1)
    alone, truth = shared(MLP, Aggregation(3, (2,)))
    assert largest_difference(found.targets[2], alone.gradient) < 1e-14
    assert found.targets[2].batch_size == 2
    images = get_attack("spear")().reconstruct(
        found.targets[2], labels=truth.labels, device=CPU, seed=0
    ).images  # fmt: skip
    assert psnr(images[assign(images, truth.images)], truth.images).min() > 60


def test_who_took_part_follows_from_how_often() -> None:
    targets = [target for target, _ in sums_of(ROUNDS)]
    present = np.array([[n in each for n in range(3)] for each in ROUNDS], dtype=float)
    counts = present.reshape(3, 2, 3).sum(1).T
    found = disaggregate(targets, counts, window=2)
    assert np.array_equal(found.participation, present)
    assert found.residual < 1e-10
    for client in range(3):
        alone, _ = shared(MLP, Aggregation(3, (client,)))
        assert largest_difference(found.targets[client], alone.gradient) < 1e-12


def test_participation_is_found_among_updates_that_change() -> None:
    rng = np.random.default_rng(0)
    present = (rng.random((16, 4)) < 0.5).astype(float)
    updates = rng.normal(size=(4, 60))
    sums = present @ updates + 0.05 * rng.normal(size=(16, 60))
    counts = present.reshape(4, 4, 4).sum(1).T
    assert np.array_equal(participation_from_counts(sums, counts, 4), present)


@pytest.mark.parametrize(
    ("counts", "window", "sentence"),
    [
        (np.ones((3, 1)), 2, "2 windows|1 windows per client"),
        (np.ones((6, 1)), None, "6 sums of 6 clients"),
        (np.full((3, 1), 9.0), None, "no participation has the counts"),
    ],
)
def test_counts_that_do_not_fit_are_refused(
    counts: np.ndarray, window: int | None, sentence: str
) -> None:
    with pytest.raises(InputError, match=sentence):
        disaggregate([target for target, _ in sums_of(ROUNDS)], counts, window)


def test_sums_of_different_batches_are_refused() -> None:
    one, _ = shared(MLP, Aggregation(2))
    other, _ = shared(MLP, Aggregation(2), size=3)
    with pytest.raises(InputError, match="batches of different sizes"):
        disaggregate([one, other])
    with pytest.raises(InputError, match="at least two rounds"):
        disaggregate([one])


def test_the_command_writes_a_checkpoint_per_client(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = []
    for number, (target, truth) in enumerate(sums_of(ROUNDS[:2])):
        files.append(str(tmp_path / f"{number}.tar"))
        save_target(files[-1], target, truth)
    disaggregate_files([*files, "--results", str(tmp_path / "out")])
    assert "client 0: not determined" in capsys.readouterr().out
    _, truth = load_target(tmp_path / "out" / "client2-checkpoint.pth.tar")
    assert truth is not None
    torch.testing.assert_close(truth.images, shared(MLP, Aggregation(3, (2,)))[1].images)
    with pytest.raises(InputError, match="--counts 1,2/1: expected"):
        disaggregate_files([*files, "--results", "out", "--counts", "1,2/1"])


# -- In Python ---------------------------------------------------------------------


def test_share_gives_the_mean_of_clients_with_equal_parts_of_the_inputs() -> None:
    torch.manual_seed(0)
    model = build_model(MLP).eval()
    images, labels = smooth_images(6, 8), torch.arange(6)
    target, truth = gib.share(model, images, labels, aggregate=3, local="sgd lr=0.1 steps=2")
    assert target.clients == (0, 1, 2)
    assert torch.equal(truth.images, images)
    alone = [
        gib.share(model, x, y, local="sgd lr=0.1 steps=2")[0].gradient
        for x, y in zip(images.split(2), labels.split(2), strict=True)
    ]
    for name, shared_value in target.gradient.items():
        mean = torch.stack([gradient[name] for gradient in alone]).double().mean(0)
        torch.testing.assert_close(shared_value.double(), mean, rtol=1e-5, atol=1e-7)
    two, _ = gib.share(model, images[:4], labels[:4], aggregate=Aggregation(3, (2, 0)))
    assert two.clients == (2, 0)


@pytest.mark.parametrize("aggregate", [0, 4, "two"])
def test_share_refuses_clients_that_cannot_be(aggregate: object) -> None:
    with pytest.raises(gib.InputError, match="aggregate: "):
        gib.share(build_model(MLP), smooth_images(6, 8), torch.arange(6), aggregate=aggregate)
