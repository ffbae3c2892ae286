"""Published defenses against their definitions, and what their attackers compute of them."""

from __future__ import annotations

import copy
import dataclasses
import functools
import itertools
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from attack.attacks.spectral import Spectral
from attack.knowledge.answers.censor import NormAndOrthogonality, SignsOf, gradient_behind
from attack.knowledge.answers.graddefense import is_noised
from attack.knowledge.answers.mixup import likeliest_mixture, mixing_target, share_from_head
from attack.knowledge.answers.outpost import noised_places
from attack.knowledge.answers.svdefense import Tangent, kept_vectors
from attack.matching.matcher import GradientMatcher
from attack.matching.objectives import Cosine
from attack.matching.replica import Replica
from attack.metrics import assign, psnr
from attack.reconstruction import Reconstruction
from core.errors import InputError
from core.losses import MeanSquaredError
from core.models.building import ModelSpec, build_model
from core.target import Target, Truth
from gradients.client import ClientSettings, generator, share_update
from gradients.defenses import ClientView, Gradient, parse_defenses
from gradients.defenses.censor import Censor
from gradients.defenses.graddefense import slice_bounds, tensor_sensitivity
from gradients.defenses.outpost import parameter_risk
from tests.targets import data_spec, smooth_images

CPU = torch.device("cpu")


def client(batch: int = 2, seed: int = 0) -> ClientView:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 6), nn.Tanh(), nn.Linear(6, 3)
    )
    labels = torch.arange(batch) % 3
    numbers = torch.Generator().manual_seed(seed)
    return ClientView(model, torch.rand(batch, 3, 8, 8), labels, numbers)


def gradient_of(view: ClientView) -> Gradient:
    loss = F.cross_entropy(view.model(view.images), view.labels)
    names, parameters = zip(*view.model.named_parameters(), strict=True)
    return dict(zip(names, torch.autograd.grad(loss, parameters), strict=True))


def applied(words: str, view: ClientView) -> tuple[Gradient, Gradient]:
    """The gradient, and what is shared of it."""
    gradient = gradient_of(view)
    (defense,) = parse_defenses(words)
    return gradient, defense.apply(gradient, view)


WORDS = ["censor:3", "svdefense:0.7", "layerdrop:0.5", "enclave:1", "graddefense", "outpost"]


@pytest.mark.parametrize("words", WORDS)
def test_a_defense_is_seeded_and_leaves_its_input_alone(words: str) -> None:
    view = client()
    gradient = gradient_of(view)
    before = copy.deepcopy(gradient)
    (defense,) = parse_defenses(words)
    first, second = (
        defense.apply(gradient, dataclasses.replace(view, generator=numbers))
        for numbers in (torch.Generator().manual_seed(1), torch.Generator().manual_seed(1))
    )
    assert list(first) == list(second)
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert all(torch.equal(gradient[name], before[name]) for name in before)
    assert all(first[name].shape == gradient[name].shape for name in first)
    assert all(first[name].dtype == gradient[name].dtype for name in first)
    changed = [n for n in gradient if n not in first or not torch.equal(first[n], gradient[n])]
    assert changed


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ("censor:0", "at least one trial"),
        ("censor:5:-2", "the seed must not be negative"),
        ("censor:5:1:sideways", "the projection is one of"),
        ("svdefense:0", r"must lie in \(0, 1\]"),
        ("layerdrop:0", r"must lie in \(0, 1\]"),
        ("enclave:0", "at least one layer"),
        ("graddefense:0", "at least one slice"),
        ("graddefense:4:5", "no more slices than there are"),
        ("graddefense:4:2:-1", "must not be negative"),
        ("outpost:-1", "must not be negative"),
        ("outpost:0.8:100", r"must lie in \[0, 100\)"),
        ("outpost:0.8:80:101", r"must lie in \[0, 100\]"),
    ],
)
def test_impossible_words_are_refused_with_a_sentence(words: str, sentence: str) -> None:
    with pytest.raises(InputError, match=sentence):
        parse_defenses(words)


# -- CENSOR ------------------------------------------------------------------------


def test_censor_shares_what_is_orthogonal_and_as_long() -> None:
    gradient, shared = applied("censor:4", client())
    for name, g in gradient.items():
        a, b = g.double().numpy().ravel(), shared[name].double().numpy().ravel()
        assert abs(a @ b) < 1e-6 * np.linalg.norm(a) * np.linalg.norm(b)
        assert np.linalg.norm(b) == pytest.approx(np.linalg.norm(a), rel=1e-5)


def test_nothing_is_orthogonal_to_a_number() -> None:
    view = client()
    (defense,) = parse_defenses("censor:1")
    shared = defense.apply({"5.bias": torch.tensor([2.0])}, view)
    assert shared["5.bias"].tolist() == [0]


def test_censor_shares_the_trial_of_lowest_loss() -> None:
    view = client()
    view.model[5].weight.data *= 30
    gradient = gradient_of(view)
    seed = torch.Generator().manual_seed(3)
    trials = []
    for _ in range(6):
        draws = [torch.empty(g.shape).normal_(generator=seed) for g in gradient.values()]
        trials.append([_orthogonal(r, g) for r, g in zip(draws, gradient.values(), strict=True)])
    losses = []
    for trial in trials:
        moved = copy.deepcopy(view.model).double()
        with torch.no_grad():
            for p, step in zip(moved.parameters(), trial, strict=True):
                p -= 1e-4 * step.double()
            losses.append(float(F.cross_entropy(moved(view.images.double()), view.labels)))
    (defense,) = parse_defenses("censor:6:3")
    shared = list(defense.apply(gradient, view).values())
    best = min(range(6), key=losses.__getitem__)
    fits = [all(torch.allclose(a, b, atol=1e-6) for a, b in zip(shared, t, strict=True))
            for t in trials]  # fmt: skip
    assert fits.count(True) == 1
    # In float32 losses that differ by less are the same.
    assert losses[fits.index(True)] - losses[best] < 1e-6


def _orthogonal(r: torch.Tensor, g: torch.Tensor) -> torch.Tensor:
    r = r - (r * g).sum() / g.square().sum() * g
    return r / r.norm() * g.norm()


def test_the_published_code_is_orthogonal_to_unit_tensors_only() -> None:
    view = client()
    # A learning rate of 1e-4 away; one trial, so that no loss decides.
    (defense,) = parse_defenses("censor:1:7:code")
    g = torch.randn(6, generator=torch.Generator().manual_seed(2))
    r = torch.empty(6).normal_(generator=torch.Generator().manual_seed(7))
    r = r / r.norm()
    for length in (0.1, 1.0, 20.0):
        along = g / g.norm() * length
        shared = defense.apply({"3.bias": along}, view)["3.bias"]
        expected = r - (r @ along) / along.norm() * along
        torch.testing.assert_close(shared, expected / expected.norm() * length)
        assert (abs(float(shared @ along)) < 1e-5) == (length == 1.0)


def test_a_constant_seed_gives_the_gradient_away_up_to_signs() -> None:
    gradient, shared = applied("censor:8:123", client())
    found = gradient_behind(list(shared.values()), Censor(8, 123))
    assert found is not None
    for g, f in zip(gradient.values(), found, strict=True):
        sign = float((g * f).sum().sign())
        torch.testing.assert_close(sign * f, g, rtol=1e-3, atol=1e-4 * float(g.norm()))
    turned = SignsOf(found)(list(gradient.values()))
    assert all(float((t * f).sum()) > 0 for t, f in zip(turned, found, strict=True))


def test_secret_directions_are_not_undone() -> None:
    _, shared = applied("censor:8", client())
    assert gradient_behind(list(shared.values()), Censor(8, 123)) is None


def test_norm_and_orthogonality_are_all_that_is_compared() -> None:
    generator = torch.Generator().manual_seed(0)
    p, g = torch.randn((2, 5, 7), generator=generator, dtype=torch.float64)
    (seen,) = NormAndOrthogonality([p])([g])
    expected = (g.norm() - p.norm()) ** 2 + ((g * p).sum() / p.norm()) ** 2
    assert float((seen - p).square().sum()) == pytest.approx(float(expected), rel=1e-12)


# -- SVDefense ---------------------------------------------------------------------


def test_svdefense_keeps_the_fewest_values_of_enough_energy() -> None:
    g = torch.randn(8, 3, 2, 2, generator=torch.Generator().manual_seed(0))
    (defense,) = parse_defenses("svdefense:0.7")
    shared = defense.apply({"a": g}, client())["a"].numpy().reshape(8, 12)
    u, s, v = np.linalg.svd(g.numpy().reshape(8, 12), full_matrices=False)
    rank = np.linalg.matrix_rank(shared, tol=1e-4)
    kept = (s[:rank] ** 2).sum() / (s**2).sum()
    assert 1 < rank < 8
    assert kept >= 0.7 > (s[: rank - 1] ** 2).sum() / (s**2).sum()
    np.testing.assert_allclose(shared, (u[:, :rank] * s[:rank]) @ v[:rank], atol=1e-5)


def test_of_one_image_a_dense_layer_hides_nothing() -> None:
    gradient, shared = applied("svdefense:0.1", client(batch=1))
    for name in ("3.weight", "3.bias", "5.weight"):
        torch.testing.assert_close(shared[name], gradient[name], rtol=1e-4, atol=1e-7)
    assert not torch.allclose(shared["0.weight"], gradient["0.weight"], rtol=1e-2)


def test_the_true_gradient_projects_onto_what_svdefense_shared() -> None:
    gradient, shared = applied("svdefense:0.6", client())
    tangent = Tangent([kept_vectors(g) for g in shared.values()])
    projected = tangent(list(gradient.values()))
    for p, s in zip(projected, shared.values(), strict=True):
        torch.testing.assert_close(p, s, rtol=1e-3, atol=1e-5)
    others = [torch.randn(g.shape) for g in gradient.values()]
    once = tangent(others)
    for a, b in zip(tangent(once), once, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(once[0], others[0])


# -- Layers that are not shared ----------------------------------------------------


def test_layers_are_dropped_whole_and_as_often_as_stated() -> None:
    view = client()
    gradient = gradient_of(view)
    (defense,) = parse_defenses("layerdrop:0.3")
    counts = dict.fromkeys(["0", "3", "5"], 0)
    empty = 0
    for _ in range(2000):
        shared = set(defense.apply(gradient, view))
        layers = {name.split(".")[0] for name in shared}
        assert shared == {f"{layer}.{kind}" for layer in layers for kind in ("weight", "bias")}
        for layer in layers:
            counts[layer] += 1
        empty += not layers
    assert empty == 0
    # Where chance leaves none (0.7^3), one of three is drawn.
    expected = 0.3 + 0.7**3 / 3
    spread = math.sqrt(expected * (1 - expected) / 2000)
    assert all(abs(n / 2000 - expected) < 4 * spread for n in counts.values())


def test_the_enclave_hides_the_first_layers() -> None:
    gradient, shared = applied("enclave:2", client())
    assert list(shared) == ["5.weight", "5.bias"]
    assert all(torch.equal(shared[name], gradient[name]) for name in shared)


@pytest.mark.parametrize("hidden", [3, 9])
def test_the_enclave_cannot_hide_everything(hidden: int) -> None:
    (defense,) = parse_defenses(f"enclave:{hidden}")
    with pytest.raises(InputError, match="the model has 3 layers"):
        defense.prepare(client().model)


# -- GradDefense -------------------------------------------------------------------


def test_sensitivity_is_the_derivative_of_the_summed_gradient() -> None:
    view = client()
    names = [name for name, _ in view.model.named_parameters()]
    found = tensor_sensitivity(view.model, (3, 8, 8), names)
    images = torch.randn((8, 3, 8, 8), generator=torch.Generator().manual_seed(0))
    labels = torch.arange(8) % 3

    def sums(x: torch.Tensor) -> torch.Tensor:
        loss = F.cross_entropy(view.model(x), labels)
        parameters = list(view.model.parameters())
        return torch.stack(
            [g.sum() for g in torch.autograd.grad(loss, parameters, create_graph=True)]
        )

    jacobian = torch.autograd.functional.jacobian(sums, images)
    expected = jacobian.flatten(2).norm(dim=2).mean(1).double()
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6 * float(expected.mean()))


def test_slices_have_equal_sensitivity() -> None:
    view = client()
    named = dict(view.model.named_parameters())
    bounds = slice_bounds(view.model, (3, 8, 8), list(named), 4)
    sensitivity = tensor_sensitivity(view.model, (3, 8, 8), list(named))
    each = [s / p.numel() for s, p in zip(sensitivity, named.values(), strict=True)]
    flat = torch.cat([e.expand(p.numel()) for e, p in zip(each, named.values(), strict=True)])
    sums = [float(flat[a:b].sum()) for a, b in itertools.pairwise(bounds)]
    assert bounds[0] == 0
    assert bounds[-1] == len(flat)
    # To an element at each end.
    assert max(sums) - min(sums) < 2 * float(flat.max())


def test_graddefense_perturbs_as_many_slices_as_stated_and_the_attacker_finds_them() -> None:
    view = client()
    gradient, shared = applied("graddefense:6:3:0.2", view)
    bounds = slice_bounds(view.model, (3, 8, 8), list(gradient), 6)
    before, after = (
        torch.cat([g.flatten() for g in tensors.values()]) for tensors in (gradient, shared)
    )
    pieces = list(itertools.pairwise(bounds))
    noised = [not torch.equal(before[a:b], after[a:b]) for a, b in pieces]
    assert sum(noised) == 3
    added = torch.cat(
        [(after - before)[a:b] for (a, b), n in zip(pieces, noised, strict=True) if n]
    )
    assert float(added.std()) == pytest.approx(0.2, rel=0.2)
    large = [i for i, (a, b) in enumerate(pieces) if b - a >= 100]
    assert large
    assert [is_noised(after[slice(*pieces[i])], 0.2) for i in large] == [noised[i] for i in large]


# -- Outpost -----------------------------------------------------------------------


def test_outpost_follows_its_definition() -> None:
    view = client()
    gradient, shared = applied("outpost:0.5:75:30", view)
    information = {n: (g.numpy() ** 2).mean(0) for n, g in gradient.items()}
    least = np.percentile(np.concatenate([i.ravel() for i in information.values()]), 70)
    risks = {n: float(np.var(p.detach().numpy(), ddof=1)) for n, p in view.model.named_parameters()}
    assert parameter_risk(view.model) == pytest.approx(risks, rel=1e-4)
    scaled = []
    for name, g in gradient.items():
        magnitudes = g.abs().numpy()
        kept = magnitudes >= np.percentile(magnitudes, 75)
        added = shared[name].numpy() - np.where(kept, g.numpy(), 0)
        quiet = np.broadcast_to(information[name] < least, g.shape)
        np.testing.assert_allclose(added[quiet], 0, atol=1e-7)
        scaled.append(added[~quiet] / (0.5 * risks[name]))
    noise = np.concatenate(scaled)
    assert noise.std() == pytest.approx(1, rel=4 / math.sqrt(2 * len(noise)))


def test_zeros_tell_where_outpost_put_noise() -> None:
    view = client()
    gradient, shared = applied("outpost", view)
    least = np.percentile(np.concatenate([(g**2).mean(0).ravel() for g in gradient.values()]), 60)
    for name in ("0.weight", "3.weight", "5.weight"):
        noised = (gradient[name] ** 2).mean(0) >= least
        told = noised_places(shared[name])[0]
        # A place whose outputs all survived pruning passes for a noised one.
        assert torch.equal(told | noised, told)
        assert float((told != noised).double().mean()) < 0.05


# -- MixUp -------------------------------------------------------------------------

LENET = ModelSpec("lenet", 10, 8, width=8)


@functools.cache
def mixed_up(seed: int = 0) -> tuple[Target, Truth]:
    """What is shared of two images under MixUp."""
    torch.manual_seed(0)
    truth = Truth(smooth_images(2, 8), torch.tensor([3, 7]))
    settings = ClientSettings(defenses=parse_defenses("mixup"), seed=seed)
    target = share_update(
        build_model(LENET), LENET, data_spec(8), truth.images, truth.labels, settings
    )
    assert target is not None
    return target, truth


def share_of(seed: int) -> float:
    """The larger share that such a client draws; 1 where its order mixes nothing."""
    view = client()
    view = dataclasses.replace(view, generator=generator(seed, 2))
    return float(parse_defenses("mixup")[0].encode(view)[1].max())


@functools.cache
def mixing_seed() -> int:
    """Of a client that mixes, clearly and not by halves."""
    return next(seed for seed in itertools.count() if 0.65 < share_of(seed) < 0.85)


def test_mixup_mixes_images_and_labels_alike() -> None:
    view = dataclasses.replace(client(batch=3), labels=torch.tensor([2, 0, 1]))
    (defense,) = parse_defenses("mixup")
    images, labels = defense.encode(view)
    assert labels.shape == (3, 3)
    torch.testing.assert_close(labels.sum(1), torch.ones(3))
    # The labels say which images are in a mixture, and how much of them.
    expected = sum(
        labels[:, c].view(3, 1, 1, 1) * view.images[int((view.labels == c).nonzero()[0])]
        for c in range(3)
    )
    torch.testing.assert_close(images, expected)
    torch.testing.assert_close(labels.sum(0), torch.ones(3))


def test_shares_of_mixup_have_the_stated_distribution() -> None:
    view = dataclasses.replace(client(), labels=torch.tensor([0, 2]))
    (defense,) = parse_defenses("mixup:0.5")
    shares = [float(defense.encode(view)[1][0, 0]) for _ in range(400)]
    unmixed = sum(share == 1 for share in shares) / 400
    assert unmixed == pytest.approx(0.5, abs=4 * 0.025)
    found = np.array([share for share in shares if share < 1])
    # Beta(1/2, 1/2) has variance 1/8.
    assert found.var() == pytest.approx(0.125, rel=0.2)
    assert (abs(found - 0.5) > 0.4).mean() == pytest.approx(0.41, abs=0.15)


def test_labels_that_are_no_classes_are_not_mixed() -> None:
    view = dataclasses.replace(client(), loss=MeanSquaredError())
    (defense,) = parse_defenses("mixup")
    with pytest.raises(InputError, match="mixes classes"):
        defense.encode(view)


def test_private_images_explain_the_gradient_of_their_mixture() -> None:
    target, truth = mixed_up(mixing_seed())
    replica = Replica(mixing_target(target, share_of(mixing_seed())), CPU, torch.float64)
    inputs = target.data.normalize(truth.images.double())
    matcher = GradientMatcher(replica, Cosine(), "exact")
    assert float(matcher.value(inputs, truth.labels)) < 1e-6
    unmixed = GradientMatcher(Replica(target, CPU, torch.float64), Cosine(), "exact")
    assert float(unmixed.value(inputs, truth.labels)) > 1e-4


@pytest.mark.parametrize("seed", range(6))
def test_the_last_layer_says_what_the_share_was(seed: int) -> None:
    target, truth = mixed_up(seed)
    found = share_from_head(target, truth.labels)
    assert found == pytest.approx(share_of(seed), abs=0.002)


def test_a_head_that_is_not_shared_says_nothing() -> None:
    target, truth = mixed_up()
    kept = {n: g for n, g in target.gradient.items() if g.dim() == 4}
    assert share_from_head(dataclasses.replace(target, gradient=kept), truth.labels) is None
    assert share_from_head(target, torch.tensor([3, 3])) is None


def test_short_attacks_tell_the_share_where_the_head_does_not() -> None:
    target, truth = mixed_up()
    kept = {n: g for n, g in target.gradient.items() if g.dim() == 4}
    hidden = dataclasses.replace(target, gradient=kept)

    def objective(candidate: Target) -> float:
        return abs(float(candidate.model.weights[0, 0]) - 0.71)

    found = likeliest_mixture(hidden, truth.labels, objective)
    assert float(found.model.weights[0, 0]) == pytest.approx(0.71, abs=0.026)
    three = dataclasses.replace(hidden, batch_size=3, shards=(3,))
    assert likeliest_mixture(three, truth.labels, objective) is three


def test_the_attacker_of_mixup_finds_the_share_and_the_images() -> None:
    target, truth = mixed_up(mixing_seed())

    def attack(adaptive: bool) -> Reconstruction:
        config = Spectral.published.changed(iterations=200, race=0, adaptive=adaptive)
        return Spectral(config).reconstruct(target, labels=truth.labels, device=CPU, seed=0)

    untold, told = attack(False), attack(True)
    (note,) = told.details["adaptations"]
    assert float(note.split()[-1]) == pytest.approx(share_of(mixing_seed()), abs=0.002)
    values = [
        float(psnr(f.images[assign(f.images, truth.images)], truth.images).mean())
        for f in (untold, told)
    ]
    assert values[1] > values[0] + 3
