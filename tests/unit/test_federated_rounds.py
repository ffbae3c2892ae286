"""Rounds of clients in stage 1, against torch's own optimisers and formulas written out."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.optimize import brentq
from scipy.stats import norm
from torch import nn

from core.data.data_sets import DataSets, load_data
from core.losses import DEFAULT_LOSS
from core.models.building import ModelSpec, build_model
from core.processes.distributed import Process
from core.storage import load_checkpoint
from gradients.defenses import as_transform
from tests.image_folders import write_tree
from training.checkpoints import latest_checkpoint
from training.client_shards import ClientBatches, split_images
from training.error_feedback import DeepGradientCompression, ErrorFeedbackSGD
from training.federated_rounds import FederatedTrainer
from training.main_pytorch import main, parse_args, run, run_settings
from training.record import read_record
from training.run import run_training
from training.settings import Federation, TrainingConfig

LR = 0.05


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> DataSets:
    return load_data(write_tree(tmp_path_factory.mktemp("data"), classes=3, per_class=9))


def trainer(data: DataSets, root: Path, federation: Federation, **config: Any) -> FederatedTrainer:
    norm_layers = config.pop("norm", "group")
    spec = ModelSpec(
        "cnn", data.spec.n_classes, data.spec.shape[1], width=4, stem="cifar", norm=norm_layers
    )
    torch.manual_seed(3)
    settings = {"epochs": 1, "batch_size": 6, "lr": LR, "lr_step": 10, "workers": 0}
    given = TrainingConfig(**{**settings, "tensorboard": False, "federation": federation, **config})
    return FederatedTrainer(build_model(spec), spec, data, given, Process(), root)


def loss_of(model: nn.Module, data: DataSets, keys: np.ndarray, epoch: int = 0) -> torch.Tensor:
    items = [data.train[(epoch, int(key))] for key in keys]
    images = torch.stack([image for image, _ in items])
    labels = torch.tensor([int(label) for _, label in items])
    return DEFAULT_LOSS(model(images), labels)


def assert_same(one: nn.Module, other: nn.Module) -> None:
    states = one.state_dict(), other.state_dict()
    for name, value in states[0].items():
        torch.testing.assert_close(states[1][name], value, rtol=1e-5, atol=1e-6)


def test_fedsgd_is_sgd_on_all_clients_batches_together(data: DataSets, tmp_path: Path) -> None:
    made = trainer(data, tmp_path, Federation(3), momentum=0.9, weight_decay=1e-2)
    model = copy.deepcopy(made.model)
    optimizer = torch.optim.SGD(model.parameters(), LR, momentum=0.9, weight_decay=1e-2)
    assert made.rounds.rounds >= 3
    assert len({len(held) for held in made.rounds.shards}) == 1
    for step in range(made.rounds.rounds):
        keys = np.concatenate([made.rounds.batch(client, step) for client in range(3)])
        optimizer.zero_grad()
        loss_of(model, data, keys).backward()
        optimizer.step()
    made.train_epoch(0)
    assert_same(model, made.model)


def local_model(
    start: nn.Module, data: DataSets, batches: list[np.ndarray], lr: float = LR
) -> nn.Module:
    """A client's model after its steps, by torch's own SGD."""
    model = copy.deepcopy(start)
    optimizer = torch.optim.SGD(model.parameters(), lr)
    for keys in batches:
        optimizer.zero_grad()
        loss_of(model, data, keys).backward()
        optimizer.step()
    return model


def test_fedavg_averages_models_by_images_with_their_statistics(
    data: DataSets, tmp_path: Path
) -> None:
    federation = Federation(3, local_steps=2, rounds_per_epoch=2, split="dirichlet:5")
    made = trainer(
        data, tmp_path, federation, norm="batch", momentum=0.0, weight_decay=0.0, batch_size=9
    )
    sizes = [len(held) for held in made.rounds.shards]
    assert len(set(sizes)) > 1
    assert sum(sizes) == len(data.train)
    server = copy.deepcopy(made.model).train()
    for number in range(2):
        clients = [
            local_model(
                server, data, [made.rounds.batch(client, 2 * number + k) for k in range(2)]
            ).state_dict()
            for client in range(3)
        ]
        shares = [size / sum(sizes) for size in sizes]
        mean = {
            name: sum(share * c[name].double() for share, c in zip(shares, clients, strict=True))
            for name in clients[0]
        }
        server.load_state_dict({n: v.round() if "num_batches" in n else v for n, v in mean.items()})
    made.train_epoch(0)
    assert_same(server, made.model)


def gradients_of(model: nn.Module, data: DataSets, keys: np.ndarray) -> dict[str, torch.Tensor]:
    parameters = dict(model.named_parameters())
    found = torch.autograd.grad(loss_of(model, data, keys), list(parameters.values()))
    return dict(zip(parameters, found, strict=True))


def scaled_sign(values: torch.Tensor) -> torch.Tensor:
    return values.abs().mean() * values.sign()


@pytest.mark.parametrize("feedback", [None, "ef-sgd"])
def test_every_client_transforms_its_own_update(
    data: DataSets, tmp_path: Path, feedback: str | None
) -> None:
    federation = Federation(2, defense="sign", error_feedback=feedback, rounds_per_epoch=3)
    made = trainer(data, tmp_path, federation, momentum=0.0, weight_decay=0.0)
    model = copy.deepcopy(made.model)
    weights = [len(held) / len(data.train) for held in made.rounds.shards]
    errors: list[dict[str, torch.Tensor]] = [{}, {}]
    for step in range(3):
        mean: dict[str, torch.Tensor] = {}
        for client, weight in enumerate(weights):
            for name, g in gradients_of(model, data, made.rounds.batch(client, step)).items():
                # EF-SGD, algorithm 1: in units of the parameters.
                p = LR * g + (errors[client].get(name, 0) if feedback else 0)
                sent = scaled_sign(p)
                errors[client][name] = p - sent
                mean[name] = mean.get(name, 0) + weight * sent
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter -= mean[name]
    made.train_epoch(0)
    assert_same(model, made.model)


def keep_largest(values: np.ndarray) -> np.ndarray:
    kept = np.zeros_like(values)
    kept[np.abs(values).argmax()] = values[np.abs(values).argmax()]
    return kept


def test_deep_gradient_compression_keeps_momentum_and_clears_what_is_sent() -> None:
    feedback, m = DeepGradientCompression(0.9), 0.9
    rng = np.random.default_rng(0)
    u, v = np.zeros(4), np.zeros(4)
    for _ in range(6):
        g = rng.normal(size=4)
        u = m * u + g
        v = v + u
        sent = keep_largest(v)
        update = feedback.compensated(5, {"w": torch.tensor(g)}, 0.1)
        np.testing.assert_allclose(update["w"], v)
        feedback.remember(5, update, {"w": torch.tensor(sent)}, 0.1)
        u, v = u * (sent == 0), v * (sent == 0)


def test_nothing_is_lost_under_error_feedback() -> None:
    """What was shared and what is remembered add up to all updates, whatever the step sizes."""
    feedback, total, sent = ErrorFeedbackSGD(0.0), torch.zeros(5), torch.zeros(5)
    torch.manual_seed(0)
    for length in (0.1, 0.1, 0.02, 0.5):
        update = torch.randn(5)
        total += length * update
        compensated = feedback.compensated(0, {"w": update}, length)
        shared = torch.tensor(keep_largest(compensated["w"].numpy()))
        feedback.remember(0, compensated, {"w": shared}, length)
        sent += length * shared
    torch.testing.assert_close(sent + feedback.memories[0]["error"]["w"], total)


def command(root: Path, *more: str) -> list[str]:
    small = ["--arch", "cnn", "--width", "4", "--lr", "0.02", "--cpu", "-j", "0", "-b", "8"]
    where = ["--data", str(root.parent / "data"), "--result-root", str(root), "--no-tensorboard"]
    return [*where, *small, "--epochs", "2", *more]


@pytest.mark.parametrize("feedback", ["ef-sgd", "dgc"])
def test_a_resumed_federation_is_the_uninterrupted_one(tmp_path: Path, feedback: str) -> None:
    write_tree(tmp_path / "data", classes=2, per_class=8)
    more = ["--clients", "2", "--defense", "topk:0.1,gaussian:0.01", "--error-feedback", feedback]
    run([*command(tmp_path / "whole"), *more])
    run([*command(tmp_path / "parts"), *more, "--epochs", "1"])
    run([*command(tmp_path / "parts"), *more, "--resume", "auto"])
    states = []
    for name in ("whole", "parts"):
        path = latest_checkpoint(tmp_path / name)
        assert path is not None
        raw = load_checkpoint(path)
        states.append({**raw["state_dict"], **raw["clients"]})
    assert states[0].keys() == states[1].keys()
    assert len(raw["clients"]) > 0
    for name, value in states[0].items():
        assert torch.equal(states[1][name], value), name


def test_memories_of_other_clients_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_tree(tmp_path / "data", classes=2, per_class=8)
    more = ["--defense", "topk:0.1", "--error-feedback", "ef-sgd"]
    run([*command(tmp_path / "run"), *more, "--clients", "2", "--epochs", "1"])
    assert main([*command(tmp_path / "run"), *more, "--clients", "4", "--resume", "auto"]) == 2
    assert "what its clients remember does not fit --clients" in capsys.readouterr().err


def exact_epsilon(sigma: float, delta: float) -> float:
    """Balle and Wang's theorem 8, by scipy."""

    def excess(epsilon: float) -> float:
        a, b = 1 / (2 * sigma), epsilon * sigma
        return float(norm.cdf(a - b) - np.exp(epsilon) * norm.cdf(-a - b) - delta)

    return float(brentq(excess, 1e-6, 100))


def test_the_record_tells_what_the_clients_did_and_what_it_promises(tmp_path: Path) -> None:
    write_tree(tmp_path / "data", classes=2, per_class=8)
    defense = "clip:0.5,gaussian:4"
    more = ["--clients", "2", "--local-steps", "2", "--rounds-per-epoch", "3"]
    run([*command(tmp_path / "run"), *more, "--defense", defense, "--delta", "1e-3"])
    record = read_record(tmp_path / "run")
    told = record.federation
    assert told is not None
    assert (told.clients, told.local_steps, told.rounds, told.defense) == (2, 2, 6, defense)
    assert (sum(told.images), told.split, told.error_feedback) == (record.n_train, "iid", None)
    # Two updates of norm 0.5 lie at most 1 apart; six uses of noise 4.
    assert told.epsilon == pytest.approx(exact_epsilon(4 / np.sqrt(6), 1e-3), rel=1e-4)
    assert record.history[-1].epsilon == told.epsilon
    assert record.config.federation is not None
    # A record of a training in one place has none.
    run([*command(tmp_path / "alone"), "--epochs", "0"])
    assert read_record(tmp_path / "alone").federation is None
    assert json.loads((tmp_path / "alone" / "record.json").read_text())["federation"] is None


@pytest.mark.parametrize(
    ("words", "promises"),
    [
        ("gaussian:1", False),
        ("clip:1", False),
        ("gaussian:1,clip:1", False),
        ("clip:1,sign,gaussian:1", False),
        ("clip:1,gaussian:0", False),
        ("clip:1,gaussian:1", True),
        ("clip:1,gaussian:1,prune:0.5", True),
    ],
)
def test_only_noise_on_clipped_updates_promises(words: str, promises: bool) -> None:
    assert (as_transform(words).epsilon(1, 1e-5) is not None) == promises


def test_clients_of_dp_sgd_are_accounted_by_their_own_images(tmp_path: Path) -> None:
    pytest.importorskip("opacus")
    from opacus.accountants import RDPAccountant

    write_tree(tmp_path / "data", classes=2, per_class=8)
    more = ["--enable-dp", "--sigma", "1.5", "--clients", "2", "--local-steps", "2", "-b", "4"]
    run([*command(tmp_path / "run"), *more])
    record = read_record(tmp_path / "run")
    assert record.privacy is not None
    assert record.federation is not None
    accountant = RDPAccountant()
    steps = 2 * record.federation.rounds
    accountant.history = [(1.5, 2 / min(record.federation.images), steps)]
    assert record.privacy.steps == steps
    assert record.privacy.epsilon_rdp == pytest.approx(accountant.get_epsilon(1e-5))


def test_every_client_draws_noise_of_its_own(data: DataSets, tmp_path: Path) -> None:
    made = trainer(data, tmp_path, Federation(2, defense="gaussian:1"), lr=1e-9)
    sent: list[torch.Tensor] = []
    apply = made.transform.apply

    def spy(update: Any, view: Any) -> Any:
        shared = apply(update, view)
        sent.append(torch.cat([(shared[n] - update[n]).flatten() for n in shared]))
        return shared

    class Spied:
        word, prepare, epsilon = "spy", made.transform.prepare, made.transform.epsilon
        encode = made.transform.encode
        apply: Callable[..., Any] = staticmethod(spy)

    made.transform = Spied()
    made.train_epoch(0)
    correlations = np.corrcoef(torch.stack(sent).numpy())
    assert len(sent) == 2 * made.rounds.rounds
    assert np.abs(correlations - np.eye(len(sent))).max() < 0.2


@pytest.mark.parametrize("split", ["iid", "dirichlet:0.5"])
def test_a_split_gives_every_image_to_one_client(split: str) -> None:
    labels = [index % 4 for index in range(80)]
    shards = split_images(80, Federation(5, split=split), labels, seed=1)
    assert sorted(np.concatenate(shards)) == list(range(80))
    assert all(map(len, shards))
    again = split_images(80, Federation(5, split=split), labels, seed=1)
    assert all(np.array_equal(a, b) for a, b in zip(shards, again, strict=True))


def test_dirichlet_clients_differ_in_their_classes() -> None:
    labels = np.arange(4000) % 4
    skewed = split_images(4000, Federation(4, split="dirichlet:0.3"), labels.tolist(), seed=0)
    even = split_images(4000, Federation(4, split="dirichlet:1000"), labels.tolist(), seed=0)

    def spread(shards: list[np.ndarray]) -> float:
        return max(np.bincount(labels[s], minlength=4).max() / len(s) for s in shards)

    assert spread(even) < 0.3 < 0.5 < spread(skewed)


def test_a_client_uses_all_its_images_before_one_again() -> None:
    shards = [np.arange(10), np.arange(10, 20)]
    batches = ClientBatches(shards, 8, Federation(2), [1], seed=0)
    batches.set_epoch(3)
    first = np.concatenate([batches.batch(1, step) for step in range(3)])
    assert sorted(first) == list(range(10, 20))
    assert [key for batch in batches for _, key in batch] == list(first)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--defense", "sign"], "--defense needs --clients"),
        (["--local-steps", "2"], "--local-steps needs --clients"),
        (["--error-feedback", "dgc"], "--error-feedback needs --clients"),
        (["--clients", "0"], "--clients must be at least 1"),
        (["--clients", "2", "--local-steps", "0"], "--local-steps must be at least 1"),
        (["--clients", "2", "--defense", "signs"], "--defense signs: unknown defense"),
        (["--clients", "2", "--split", "dirichlet:-1"], "--split dirichlet:-1: must be"),
        (["--clients", "2", "--split", "dirichlet:a"], "--split dirichlet:a: must be"),
        (["--clients", "20"], "--batch-size 8: is of all clients"),
        (["--clients", "20", "-b", "20"], "--clients 20: there are 12 training images"),
        (["--clients", "2", "--amp", "bf16"], "--amp cannot be combined with --clients"),
        (["--clients", "2", "--accumulate", "2"], "--accumulate cannot be combined"),
        (["--clients", "2", "--defense", "freeze:99"], "--defense freeze:99"),
    ],
)
def test_settings_that_make_no_sense(
    more: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_tree(tmp_path / "data", classes=2, per_class=8)
    assert main([*command(tmp_path / "run"), *more]) == 2
    assert message in capsys.readouterr().err


def test_clients_train_on_what_a_defense_makes_of_their_batch(
    data: DataSets, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[torch.Tensor, torch.Tensor]] = []
    backward = FederatedTrainer._gradient

    def watched(self: FederatedTrainer, batch: Any, *where: Any) -> Any:
        seen.append(batch)
        return backward(self, batch, *where)

    monkeypatch.setattr(FederatedTrainer, "_gradient", watched)
    for defense in ("", "mixup:1"):
        federation = Federation(clients=2, rounds_per_epoch=1, defense=defense)
        trainer(data, tmp_path / (defense or "none")[:4], federation).train_epoch(0)
    (plain, labels), (mixed, probabilities) = seen[0], seen[2]
    # Every mixed image is a mean of two of the plain ones, with the weights of its labels.
    one_hot = nn.functional.one_hot(labels, data.spec.n_classes).double()
    weights = torch.linalg.lstsq(plain.flatten(1).double().T, mixed.flatten(1).double().T).solution
    rebuilt = weights.T @ plain.flatten(1).double()
    torch.testing.assert_close(rebuilt, mixed.flatten(1).double(), rtol=0, atol=1e-4)
    torch.testing.assert_close(weights.T @ one_hot, probabilities.double(), rtol=0, atol=1e-4)
    assert not torch.allclose(mixed, plain)


def test_a_training_from_python_begins_with_its_seed_s_weights(tmp_path: Path) -> None:
    words = ["--data", "photo-patches", "--arch", "cnn", "--width", "2", "--epochs", "0", "--cpu"]
    states = []
    for drawn in (0, 7):
        torch.manual_seed(drawn)
        root = tmp_path / str(drawn)
        args = parse_args([*words, "-j", "0", "--no-tensorboard", "--result-root", str(root)])
        run_training(Process(), run_settings(args))
        states.append(load_checkpoint(root / "model_init.pth.tar")["state_dict"])
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
