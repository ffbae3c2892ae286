"""Membership by losses: the statistics against other computations, calm without, loud with it."""

from __future__ import annotations

import dataclasses
import sys

import numpy as np
import pytest
import torch
from scipy import stats
from torch import nn

import gradinvbench as gib
from audit.membership import (
    CONFIDENCE,
    LOCAL,
    SINGLE_SITE,
    THRESHOLD,
    TRAJECTORY,
    losses_under,
    measure_membership,
    rates,
    too_few,
)
from audit.record import RateSection
from core.errors import InputError
from core.losses import PixelCrossEntropy, loss_class, loss_names
from core.target import Target, Truth

pytest.importorskip("sklearn")


def network(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(1, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU(), nn.Flatten(),
        nn.Linear(6 * 64, 2),
    )  # fmt: skip


def patients(n: int, seed: int) -> Truth:
    generator = torch.Generator().manual_seed(seed)
    return Truth(torch.rand(n, 1, 8, 8, generator=generator), torch.arange(n) % 2)


def client_of(model: nn.Module, samples: Truth, **stated: object) -> Target:
    return gib.share(model.eval(), samples.images, samples.labels, **stated)[0]


def by_hand(scores: np.ndarray, is_member: np.ndarray) -> float:
    """AUROC from the sum of the members' ranks."""
    m = int(is_member.sum())
    rank_sum = stats.rankdata(scores)[is_member].sum()
    return float((rank_sum - m * (m + 1) / 2) / (m * (len(scores) - m)))


def test_threshold_against_rank_sums_and_scikit_learn() -> None:
    from sklearn.metrics import roc_auc_score

    rng = np.random.default_rng(0)
    # Rounded, so that there are ties.
    losses = rng.exponential(size=(60, 1)).round(1)
    is_member, classes = np.arange(60) < 25, np.arange(60) % 3
    found = list(rates("global", losses, is_member, classes, seed=0, bootstrap=200))
    assert [rate.of_class for rate in found] == [None, 0, 1, 2]
    for rate in found:
        inside = np.full(60, True) if rate.of_class is None else classes == rate.of_class
        scores, member = -losses[inside, 0], is_member[inside]
        assert rate.auroc == pytest.approx(by_hand(scores, member))
        assert rate.auroc == pytest.approx(roc_auc_score(member, scores))
        assert rate.auroc_low < rate.auroc < rate.auroc_high
        assert (rate.members, rate.non_members) == (member.sum(), (~member).sum())


def test_bootstrap_interval_against_a_loop_that_repeats_images() -> None:
    rng = np.random.default_rng(1)
    losses = np.concatenate([rng.normal(0, 1, 40), rng.normal(0.7, 1, 50)])
    is_member = np.arange(90) < 40
    (found,) = rates("global", losses[:, None], is_member, None, seed=0, bootstrap=4000)
    sampled = []
    for _ in range(2000):
        chosen = np.concatenate([rng.choice(40, 40), 40 + rng.choice(50, 50)])
        sampled.append(by_hand(-losses[chosen], is_member[chosen]))
    expected = np.percentile(sampled, [2.5, 97.5])
    assert [found.auroc_low, found.auroc_high] == pytest.approx(expected, abs=0.015)


def test_without_membership_the_intervals_hold_one_half() -> None:
    """95 % intervals: of 100 fewer than 90 hold it with probability 3 %; of the trajectory 30."""
    held = {THRESHOLD: [], TRAJECTORY: []}
    is_member = np.arange(24) < 12
    for seed in range(100):
        rng = np.random.default_rng((11, seed))
        # As losses are: of one image alike over the rounds.
        losses = rng.exponential(size=(24, 1)) * rng.uniform(
            0.5, 1.5, size=(24, 3 if seed < 30 else 1)
        )
        for rate in rates("global", losses, is_member, None, seed, bootstrap=200):
            held[rate.method].append(rate.auroc_low <= 0.5 <= rate.auroc_high)
    assert np.mean(held[THRESHOLD]) >= 0.9
    assert np.mean(held[TRAJECTORY]) >= 0.9


def trained(model: nn.Module, samples: Truth, steps: int) -> list[dict[str, torch.Tensor]]:
    """States on the way to knowing the samples by heart."""
    optimiser, states = torch.optim.AdamW(model.parameters(), lr=0.01), []
    for step in range(1, steps + 1):
        optimiser.zero_grad()
        nn.functional.cross_entropy(model(samples.images), samples.labels).backward()
        optimiser.step()
        if step % (steps // 4) == 0:
            states.append({name: value.clone() for name, value in model.state_dict().items()})
    return states


def test_a_model_that_knows_its_images_by_heart_gives_them_away() -> None:
    members, others, model = patients(16, 1), patients(16, 2), network()
    states = trained(model, members, 60)
    client = client_of(model, members)
    found = measure_membership(
        client, states[:2], states[-1], members, others, single_site=states[-1:], bootstrap=200
    )
    ways = {THRESHOLD, TRAJECTORY, CONFIDENCE}
    expected = {(model, way) for model in ("global", "local") for way in ways}
    # One model alone has no trajectory.
    assert {(r.model, r.method) for r in found} == expected | {
        (SINGLE_SITE, THRESHOLD), (SINGLE_SITE, CONFIDENCE)
    }  # fmt: skip
    by_heart = {r.method: r for r in found if r.model == LOCAL and r.of_class is None}
    assert by_heart[THRESHOLD].auroc > 0.97
    assert by_heart[TRAJECTORY].auroc > 0.9
    assert by_heart[THRESHOLD].balanced_accuracy > 0.85
    assert by_heart[THRESHOLD].auroc_low > 0.5
    # It is the same model, and in all but the trajectory the same numbers.
    alone = {r.method: r for r in found if r.model == SINGLE_SITE and r.of_class is None}
    for way, rate in alone.items():
        assert dataclasses.replace(rate, model=LOCAL) == by_heart[way]


def test_confidence_and_the_best_threshold_against_plain_counts() -> None:
    members, others, model = patients(16, 1), patients(16, 2), network()
    state = trained(model, members, 60)[-1]
    found = measure_membership(
        client_of(model, members), [state], None, members, others, bootstrap=10
    )
    (sure,) = [r for r in found if r.method == CONFIDENCE and r.of_class is None]
    model.load_state_dict(state)
    with torch.no_grad():
        inside, outside = (
            model.eval()(s.images).softmax(1).max(1).values for s in (members, others)
        )
    pairs = (inside[:, None] > outside).double() + (inside[:, None] == outside).double() / 2
    assert sure.auroc == pytest.approx(float(pairs.mean()))
    best = max(
        float((inside >= t).double().mean() + (outside < t).double().mean()) / 2
        for t in [*inside, *outside, torch.tensor(2.0)]
    )
    assert sure.best_balanced_accuracy == pytest.approx(best)
    assert sure.best_balanced_accuracy >= sure.balanced_accuracy


def test_losses_are_those_of_single_images_in_eval_mode_and_the_model_stays() -> None:
    members, model = patients(9, 3), network()
    trained(model, members, 8)
    client = client_of(model, members)
    before = {name: value.clone() for name, value in client.state_dict.items()}
    found = losses_under(client, [client.state_dict, network(5).state_dict()], [members])
    outputs = model.eval()(members.images)
    expected = nn.functional.cross_entropy(outputs, members.labels, reduction="none")
    assert found[:, 0] == pytest.approx(expected.tolist(), rel=1e-5)
    assert not np.allclose(found[:, 0], found[:, 1])
    assert all(torch.equal(before[name], value) for name, value in client.state_dict.items())


class TwoHeads(nn.Module):
    """Gives what every loss here may take, beside a second output."""

    def __init__(self, pixels: bool) -> None:
        super().__init__()
        self.layers = nn.Conv2d(1, 2, 3, padding=1) if pixels else network()

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        found = self.layers(x)
        return {"logits": found, "features": found.flatten(1)}


# One has no default, the other is for sentences.
@pytest.mark.parametrize(
    "name", [n for n in loss_names() if n not in ("sum-of-heads", "next-token")]
)
def test_every_loss_with_several_outputs(name: str) -> None:
    loss = loss_class(name)()
    pixels = isinstance(loss, PixelCrossEntropy) or name == "dice"
    images, classes = patients(6, 4).images, torch.arange(6) % 2
    labels = (images[:, 0] > 0.5).long() if pixels else classes
    if name in ("binary-cross-entropy", "mse", "mae"):
        labels = nn.functional.one_hot(classes, 2).float()
    model, samples = TwoHeads(pixels).eval(), Truth(images, labels)
    client = client_of(model, samples, loss=name)
    found = losses_under(client, [model.state_dict()], [samples, samples])[:, 0]
    assert found[:6].tolist() == found[6:].tolist()
    # All of them are means over samples.
    with torch.no_grad():
        assert found[:6].mean() == pytest.approx(float(loss(model(images), labels)), rel=1e-5)


def test_too_few_images_are_a_sentence() -> None:
    few, enough = patients(3, 1), patients(12, 2)
    assert "4 members" in too_few(3, 12)
    assert too_few(4, 4) == ""
    assert measure_membership(client_of(network(), few), [], None, few, enough) == ()


def test_classes_with_too_few_images_are_left_out() -> None:
    losses, classes = np.random.default_rng(0).random((20, 1)), np.array([0] * 3 + [1] * 17)
    found: list[RateSection] = list(rates("global", losses, np.arange(20) % 2 == 0, classes, 0, 50))
    assert [rate.of_class for rate in found] == [None, 1]


def test_without_scikit_learn_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sklearn", None)
    samples = patients(6, 1)
    client = client_of(network(), samples)
    with pytest.raises(InputError, match=r"gradinvbench\[audit\]"):
        measure_membership(client, [client.state_dict], None, samples, samples)


def test_a_diverged_model_is_named() -> None:
    samples = patients(6, 1)
    client = client_of(network(), samples)
    broken = {n: v * float("nan") if n == "4.bias" else v for n, v in client.state_dict.items()}
    with pytest.raises(InputError, match="not finite"):
        measure_membership(client, [broken], None, samples, samples)
