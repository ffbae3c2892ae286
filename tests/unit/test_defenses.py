"""Every defense against its definition."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from core.errors import InputError
from gradients.defenses import (
    ClientView,
    Defense,
    Gradient,
    apply_defenses,
    defense_names,
    parse_defenses,
    register_defense,
)
from gradients.defenses.soteria import feature_sensitivity


def _client(seed: int = 0, model: nn.Module | None = None) -> ClientView:
    torch.manual_seed(0)
    model = model or nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 6), nn.Tanh(), nn.Linear(6, 3)
    )
    generator = torch.Generator().manual_seed(seed)
    return ClientView(model, torch.rand(2, 3, 8, 8), torch.tensor([0, 2]), generator)


def _gradient(n: int = 40_000) -> Gradient:
    generator = torch.Generator().manual_seed(5)
    return {
        "a": torch.randn(n // 100, 100, generator=generator),
        "b": 10 * torch.randn(50, generator=generator),
    }


def _apply(words: str, gradient: Gradient | None = None, seed: int = 0) -> Gradient:
    gradient = _gradient() if gradient is None else gradient
    return apply_defenses(parse_defenses(words), gradient, _client(seed))


def _norm(gradient: Gradient) -> float:
    return math.sqrt(sum(float(g.double().square().sum()) for g in gradient.values()))


WORDS = [
    "clip:1",
    "gaussian:0.1",
    "laplace:0.1",
    "prune:0.5",
    "topk:0.1",
    "sign",
    "quantize:4",
    "percentile:0.1:95",
]


@pytest.mark.parametrize("words", WORDS)
def test_a_defense_is_seeded_and_leaves_its_input_alone(words: str) -> None:
    gradient = _gradient()
    before = {name: g.clone() for name, g in gradient.items()}
    first, second = _apply(words, gradient), _apply(words, gradient)
    assert list(first) == list(gradient)
    for name, g in gradient.items():
        assert torch.equal(g, before[name])
        assert torch.equal(first[name], second[name])
        assert first[name].shape == g.shape
        assert first[name].dtype == g.dtype
        assert not torch.equal(first[name], g)


@pytest.mark.parametrize("words", ["gaussian:0.1", "laplace:0.1", "quantize:4", "percentile:0.1"])
def test_noise_depends_on_the_seed(words: str) -> None:
    assert not torch.equal(_apply(words, seed=0)["a"], _apply(words, seed=1)["a"])


def test_clip_scales_the_whole_update_to_the_norm() -> None:
    gradient = _gradient()
    clipped = _apply("clip:2.5", gradient)
    assert _norm(clipped) == pytest.approx(2.5, rel=1e-5)
    ratio = clipped["b"] / gradient["b"]
    torch.testing.assert_close(ratio, torch.full_like(ratio, 2.5 / _norm(gradient)))


def test_clip_leaves_a_short_update_alone() -> None:
    gradient = {"a": torch.tensor([0.3, 0.4])}
    assert torch.equal(_apply("clip:1", gradient)["a"], gradient["a"])


def test_gaussian_noise_has_the_stated_deviation() -> None:
    gradient = _gradient()
    noise = (_apply("gaussian:0.05", gradient)["a"] - gradient["a"]).flatten().double()
    assert float(noise.mean()) == pytest.approx(0, abs=0.05 * 4 / math.sqrt(len(noise)))
    assert float(noise.std()) == pytest.approx(0.05, rel=0.02)
    # A normal distribution: 68.3 % within one deviation.
    assert float((noise.abs() < 0.05).double().mean()) == pytest.approx(0.683, abs=0.01)


def test_laplace_noise_has_the_stated_scale() -> None:
    gradient = _gradient()
    noise = (_apply("laplace:0.05", gradient)["a"] - gradient["a"]).flatten().double()
    assert float(noise.abs().mean()) == pytest.approx(0.05, rel=0.02)
    assert float(noise.std()) == pytest.approx(math.sqrt(2) * 0.05, rel=0.03)
    assert float((noise.abs() > 0.05 * math.log(10)).double().mean()) == pytest.approx(
        0.1, abs=0.01
    )


def test_prune_zeroes_the_smallest_of_every_tensor() -> None:
    pruned = _apply("prune:0.9")
    for name, g in _gradient().items():
        kept = pruned[name] != 0
        assert int(kept.sum()) == round(0.1 * g.numel())
        assert torch.equal(pruned[name][kept], g[kept])
        assert float(g[kept].abs().min()) >= float(g[~kept].abs().max())


def test_topk_keeps_the_largest_of_the_whole_update() -> None:
    gradient = {"a": torch.tensor([1.0, -2.0, 3.0]), "b": torch.tensor([[10.0, -20.0]])}
    kept = _apply("topk:0.4", gradient)
    assert kept["a"].tolist() == [0, 0, 0]
    assert kept["b"].tolist() == [[10, -20]]


def test_sign_keeps_signs_and_the_mean_magnitude() -> None:
    gradient = {"a": torch.tensor([1.0, -2.0, 0.0, 5.0])}
    assert _apply("sign", gradient)["a"].tolist() == [2, -2, 0, 2]


def test_quantize_uses_the_stated_levels_without_bias() -> None:
    gradient = {"a": torch.tensor([3.0, -4.0, 0.0, 1.2])}
    norm = float(gradient["a"].norm())
    (defense,), client = parse_defenses("quantize:4"), _client()
    draws = torch.stack([defense.apply(gradient, client)["a"] for _ in range(4000)])
    levels = draws * 4 / norm
    torch.testing.assert_close(levels, levels.round(), atol=1e-5, rtol=0)
    spread = norm / 4 / math.sqrt(len(draws))
    assert float((draws.mean(0) - gradient["a"]).abs().max()) < 4 * spread
    assert _apply("quantize:4", {"a": torch.zeros(3)})["a"].tolist() == [0, 0, 0]


def test_percentile_noise_follows_the_nonzero_magnitudes() -> None:
    gradient = {"a": torch.linspace(-1, 1, 20_001), "b": torch.zeros(50_000)}
    nonzero = gradient["a"][gradient["a"] != 0].abs().numpy()
    expected = 0.5 * np.percentile(nonzero, 90)
    noisy = _apply("percentile:0.5:90", gradient)
    # Noise goes on every variable, also on those that are zero.
    assert float(noisy["b"].std()) == pytest.approx(expected, rel=0.02)
    assert float((noisy["a"] - gradient["a"]).std()) == pytest.approx(expected, rel=0.02)


def _gradient_of(client: ClientView) -> Gradient:
    loss = F.cross_entropy(client.model(client.images), client.labels)
    names, parameters = zip(*client.model.named_parameters(), strict=True)
    return dict(zip(names, torch.autograd.grad(loss, parameters), strict=True))


def test_soteria_hides_the_features_that_react_most_weakly() -> None:
    client = _client()
    gradient = _gradient_of(client)
    defended = apply_defenses(parse_defenses("soteria:0.5"), gradient, client)
    ratio = _ratio_by_jacobian(client)
    hidden = set(ratio.argsort()[:3].tolist())
    columns = defended["5.weight"].abs().sum(0) == 0
    assert set(columns.nonzero().flatten().tolist()) == hidden
    kept = [i for i in range(6) if i not in hidden]
    assert torch.equal(defended["5.weight"][:, kept], gradient["5.weight"][:, kept])
    others = [name for name in gradient if name != "5.weight"]
    assert all(torch.equal(defended[name], gradient[name]) for name in others)


def _ratio_by_jacobian(client: ClientView) -> torch.Tensor:
    """|dr_i/dX| / |r_i| from the full Jacobian, summed over the batch."""
    trunk = client.model[:5]
    jacobian = torch.autograd.functional.jacobian(trunk, client.images)
    per_image = torch.stack([jacobian[n, :, n].flatten(1).norm(dim=1) for n in range(2)])
    return (per_image / trunk(client.images).abs()).sum(0)


def test_feature_sensitivity_is_the_norm_of_the_jacobian() -> None:
    client = _client()
    expected = _ratio_by_jacobian(client)
    torch.testing.assert_close(feature_sensitivity(client.model, client.images), expected)


def test_a_silent_feature_is_not_hidden_before_others() -> None:
    class Dead(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x * torch.tensor([0.0, 1.0, 1.0])

    model = nn.Sequential(nn.Flatten(), nn.Linear(192, 3), Dead(), nn.Linear(3, 2))
    sensitivity = feature_sensitivity(model, torch.rand(2, 3, 8, 8))
    assert torch.isinf(sensitivity[0])
    assert torch.isfinite(sensitivity[1:]).all()


@pytest.mark.parametrize(
    ("free", "expected"),
    [("1", ["5.weight", "5.bias"]), ("3+5", ["3.weight", "3.bias", "5.weight", "5.bias"])],
)
def test_freeze_leaves_only_the_free_layers_trainable(free: str, expected: list[str]) -> None:
    client = _client()
    (defense,) = parse_defenses(f"freeze:{free}")
    defense.prepare(client.model)
    trainable = [name for name, p in client.model.named_parameters() if p.requires_grad]
    assert trainable == expected
    shared = defense.apply(_gradient_of(_client()), client)
    assert list(shared) == expected


@pytest.mark.parametrize("free", ["0", "9", "layer9", "3+layer9"])
def test_freeze_refuses_layers_that_do_not_exist(free: str) -> None:
    (defense,) = parse_defenses(f"freeze:{free}")
    with pytest.raises(InputError, match="the model has"):
        defense.prepare(_client().model)


def test_defenses_apply_in_the_order_given() -> None:
    first = _apply("gaussian:1,clip:1")
    second = _apply("clip:1,gaussian:1")
    assert _norm(first) == pytest.approx(1, rel=1e-5)
    assert _norm(second) > 10


def test_words_name_defenses_and_parameters() -> None:
    words = "clip:4,gaussian:0.001,percentile:0.1:90,freeze:layer4+fc,quantize:8,sign"
    assert ",".join(d.word for d in parse_defenses(words)) == words
    assert [d.word for d in parse_defenses("soteria, prune")] == ["soteria:0.8", "prune:0.9"]
    assert parse_defenses("") == ()


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ("blur:1", "unknown defense; known are .*clip, .*freeze, gaussian"),
        ("clip:0", "the norm must be positive"),
        ("clip:one", "clip:one"),
        ("clip:nan", "must be a finite number"),
        ("gaussian:-1", "must not be negative"),
        ("gaussian:inf", "must be a finite number"),
        ("prune:1", r"must lie in \[0, 1\)"),
        ("topk:0", r"must lie in \(0, 1\]"),
        ("quantize:0", "at least one level"),
        ("percentile:1:101", r"must lie in \(0, 100\]"),
        ("soteria:2", r"must lie in \[0, 1\)"),
        ("sign:1", "takes at most 0 parameters"),
    ],
)
def test_impossible_words_are_refused_with_a_sentence(words: str, sentence: str) -> None:
    with pytest.raises(InputError, match=sentence):
        parse_defenses(words)


def test_a_defense_can_be_registered_once() -> None:
    class Zero(Defense):
        def apply(self, gradient: Gradient, client: ClientView) -> Gradient:
            return {name: 0 * g for name, g in gradient.items()}

    assert "clip" in defense_names()
    with pytest.raises(ValueError, match="registered already"):
        register_defense("clip")(Zero)
