"""BatchNorm statistics of the batch, recovered from the client's shared running statistics."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch

from attack.loop.inversion import Inversion
from attack.loop.loss_terms import batch_norm_penalty
from attack.matching.replica import Replica
from attack.priors.regularizers import MovingAveragePenalty
from attack.priors.shared_statistics import layer_momentum, recovered_statistics
from attack.settings import InversionConfig
from core.errors import InputError
from core.models.building import ModelSpec, build_model
from core.target import LocalTraining, Target, Truth
from gradients.batch_statistics import collect_batch_statistics
from gradients.checkpoint import load_target, save_target
from gradients.client import ClientSettings, share_update
from gradients.local_update import Placement, unrolled_update
from tests.targets import data_spec, smooth_images

CPU = torch.device("cpu")
CNN = ModelSpec("cnn", 10, 16, width=4)
CONFIG = InversionConfig(
    iterations=15, signed=False, tv=0.01, coordinates="dct", double=True, hvp="exact", bn=0.1
)


def share(settings: ClientSettings, double: bool = False) -> tuple[Target, Truth]:
    torch.manual_seed(0)
    model = build_model(CNN)
    truth = Truth(smooth_images(6, 16), torch.arange(6))
    # Statistics that are not the initial ones.
    model.train()(torch.randn(8, 3, 16, 16))
    model = model.double() if double else model
    target = share_update(model, CNN, data_spec(16), truth.images, truth.labels, settings)
    assert target is not None
    return target, truth


def invert(target: Target, truth: Truth, **fields: object) -> torch.Tensor:
    config = CONFIG.changed(**fields)  # type: ignore[arg-type]
    return Inversion(target, truth.labels, config, device=CPU).run().images


@pytest.mark.parametrize("shards", [(), (4, 2)], ids=["one process", "asynchronous"])
def test_one_local_step_gives_the_statistics_away(shards: tuple[int, ...]) -> None:
    target, truth = share(ClientSettings(shards=shards))
    found = recovered_statistics(target)
    first = truth.images[: shards[0] if shards else 6]
    model = target.build_model()
    expected = collect_batch_statistics(model, target.data.normalize(first))
    assert found.keys() == expected.keys()
    for name, (mean, variance) in expected.items():
        torch.testing.assert_close(found[name][0].float(), mean, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(found[name][1].float(), variance, rtol=1e-5, atol=1e-5)


def test_the_attack_is_the_one_that_knows_the_statistics() -> None:
    target, truth = share(ClientSettings(), double=True)
    # Few iterations: where a max-pool's winner changes, rounding errors grow fast.
    recovered = invert(target, truth, iterations=3, bn_from_update=True)
    exact = invert(target, truth, iterations=3, exact_bn=True)
    torch.testing.assert_close(recovered, exact, rtol=0, atol=1e-3)
    assert float((exact - invert(target, truth, iterations=3)).abs().max()) > 1e-2


@pytest.mark.parametrize("shards", [(), (3, 3)], ids=["one process", "asynchronous"])
def test_several_steps_give_their_average_away(shards: tuple[int, ...]) -> None:
    local = LocalTraining(epochs=2, batches=3, lr=0.1)
    target, truth = share(ClientSettings(local=local, shards=shards))
    momentum = layer_momentum(target)
    penalty = MovingAveragePenalty(recovered_statistics(target), momentum, len(shards) or 1)

    def distance(images: torch.Tensor) -> float:
        model = Replica(target, CPU).model
        observe = penalty(model)
        inputs, placement = target.data.normalize(images), Placement(shards)
        unrolled_update(model, inputs, truth.labels, local, placement=placement)
        return float(observe().detach())

    assert distance(truth.images) < 1e-3
    assert distance(truth.images.flip(0)) > 0.05
    assert torch.isfinite(invert(target, truth, iterations=2, bn_from_update=True)).all()


def test_asynchronous_shards_keep_all_but_the_first_ones_statistics() -> None:
    target, truth = share(ClientSettings(shards=(4, 2)), double=True)
    inversion = Inversion(
        target,
        truth.labels,
        CONFIG.changed(bn_from_update=True),
        device=CPU,
    )
    inputs = target.data.normalize(truth.images).double().requires_grad_()
    observe = batch_norm_penalty(inversion.problem)(inversion.replica.model)
    inversion.replica.model(inputs)
    value = observe()
    assert float(value.detach()) < 1e-3
    (gradient,) = torch.autograd.grad(value, inputs)
    assert not gradient[4:].any()


def test_the_file_keeps_them_and_a_client_may(tmp_path: Path) -> None:
    target, truth = share(ClientSettings())
    save_target(tmp_path / "all.tar", target, truth)
    loaded, _ = load_target(tmp_path / "all.tar")
    assert target.running_after is not None
    assert loaded.running_after is not None
    for name, value in target.running_after.items():
        torch.testing.assert_close(loaded.running_after[name], value)
        assert not torch.equal(value, target.state_dict[name])
    kept, _ = share(ClientSettings(share_running=False))
    assert kept.running_after is None
    with pytest.raises(InputError, match=r"priors\.bn_from_update"):
        invert(kept, truth, bn_from_update=True)
    eval_mode, _ = share(ClientSettings(train_mode=False))
    assert eval_mode.running_after is None


def test_a_malformed_file_is_refused(tmp_path: Path) -> None:
    target, _ = share(ClientSettings())
    assert target.running_after is not None
    short = dict(list(target.running_after.items())[1:])
    save_target(tmp_path / "bad.tar", dataclasses.replace(target, running_after=short))
    with pytest.raises(InputError, match="running statistics after training"):
        load_target(tmp_path / "bad.tar")


def test_flags_that_contradict_each_other() -> None:
    for fields in ({"exact_bn": True}, {"bn": 0.0}):
        config = CONFIG.changed(bn_from_update=True, **fields)  # type: ignore[arg-type]
        with pytest.raises(InputError, match=r"priors\.bn_from_update"):
            config.validate()
