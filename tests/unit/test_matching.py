"""Gradient matching against plain autograd in float64."""

import dataclasses

import pytest
import torch
import torch.nn.functional as F
import torchvision

from attack.matching import switches as activations
from attack.matching.many_targets import ManyTargetsMatcher
from attack.matching.match import Match
from attack.matching.matcher import GradientMatcher
from attack.matching.objectives import (
    L2,
    Cosine,
    LayerMeanCosine,
    LayerWeighted,
    Objective,
    Products,
    inner_product,
    layer_weights,
    pieces_of,
    products_with,
    squared_norm,
)
from attack.matching.replica import Replica
from attack.priors.regularizers import BatchNormPenalty
from core.models.building import ModelSpec, register_model
from core.target import LocalTraining, Target
from gradients.local_update import unrolled_update
from tests.targets import make_target

CPU = torch.device("cpu")
RESNET = ModelSpec("resnet18", 10, 16, "cifar", width=8)
MODELS = {
    "convnet": ModelSpec("convnet", 10, 16, width=8),
    "resnet": RESNET,
    "resnet with the RA defense": dataclasses.replace(RESNET, pool_kernel=19),
    "vgg": ModelSpec("small-vgg", 10, 16),
    "lenet": ModelSpec("lenet", 10, 16),
    "vit": ModelSpec("small-vit", 10, 16),
}
MOBILENET = ModelSpec("mobilenet_v3_small", 10, 32)


@register_model("small-vgg")
def _small_vgg(spec: ModelSpec) -> torch.nn.Module:
    """torchvision's VGG with BatchNorm and dropout, narrow."""
    layers = torchvision.models.vgg.make_layers([8, "M", 16, 16, "M"], batch_norm=True)
    model = torchvision.models.vgg.VGG(layers, num_classes=spec.n_classes)
    model.avgpool = torch.nn.AdaptiveAvgPool2d(2)
    linear = [torch.nn.Linear(64, 32), torch.nn.Linear(32, spec.n_classes)]
    model.classifier = torch.nn.Sequential(
        linear[0], torch.nn.ReLU(True), torch.nn.Dropout(0.5), linear[1]
    )
    return model


@register_model("small-vit")
def _small_vit(spec: ModelSpec) -> torch.nn.Module:
    """torchvision's vision transformer, small; its head does not start at zero."""
    model = torchvision.models.VisionTransformer(
        spec.image_size, 4, 2, 2, 32, 64, num_classes=spec.n_classes
    )
    torch.nn.init.normal_(model.heads.head.weight, std=0.1)
    return model


def candidate(target: Target, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    shape = (target.batch_size, *target.data.shape)
    return torch.randn(shape, generator=torch.Generator().manual_seed(7)).to(dtype)


def by_autograd(
    target: Target, objective: Objective, inputs: torch.Tensor, labels: torch.Tensor
) -> tuple[float, torch.Tensor]:
    """The textbook: one graph from the images to the objective, on the plain model."""
    model = target.build_model().double()
    inputs = inputs.double().requires_grad_()
    torch.manual_seed(3)
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        loss = F.cross_entropy(model(inputs), labels)
    gradient = torch.autograd.grad(loss, list(model.parameters()), create_graph=True)
    goal = [g.double() for g in target.gradient.values()]
    value = objective.distance(list(gradient), goal)
    return float(value.detach()), torch.autograd.grad(value, inputs)[0]


def cosine(a: torch.Tensor, b: torch.Tensor) -> float:
    return float(F.cosine_similarity(a.double().flatten(), b.double().flatten(), dim=0))


def match(
    target: Target, inputs: torch.Tensor, labels: torch.Tensor, hvp: str, dtype: torch.dtype
) -> Match:
    matcher = GradientMatcher(Replica(target, CPU, dtype), Cosine(), hvp)
    torch.manual_seed(3)  # Of dropout.
    return matcher(inputs.to(dtype), labels)


@pytest.mark.parametrize("train_mode", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("name", list(MODELS))
def test_both_ways_equal_autograd(name, train_mode):
    target, truth = make_target(MODELS[name], 3, train_mode=train_mode)
    inputs = candidate(target)
    value, reference = by_autograd(target, Cosine(), inputs, truth.labels)
    exact = match(target, inputs, truth.labels, "exact", torch.float64)
    assert float(exact.value) == pytest.approx(value, rel=1e-10)
    torch.testing.assert_close(exact.input_gradient, reference, rtol=1e-8, atol=1e-14)
    difference = match(target, inputs, truth.labels, "difference", torch.float64)
    assert float(difference.value) == pytest.approx(value, rel=1e-10)
    assert cosine(difference.input_gradient, reference) > 1 - 1e-6
    ratio = float(difference.input_gradient.norm() / reference.norm())
    assert ratio == pytest.approx(1, rel=1e-3)


def test_kernels_without_second_derivative_are_composed():
    target, truth = make_target(MOBILENET, 4, train_mode=True)
    inputs = candidate(target)
    exact = match(target, inputs, truth.labels, "exact", torch.float64)
    difference = match(target, inputs, truth.labels, "difference", torch.float64)
    assert cosine(exact.input_gradient, difference.input_gradient) > 0.999


@pytest.mark.parametrize("train_mode", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("near", [False, True], ids=["far", "near"])
def test_difference_in_float32_is_close_to_float64(train_mode, near):
    target, truth = make_target(RESNET, 4, train_mode=train_mode, double=False)
    inputs = candidate(target, torch.float32)
    if near:
        inputs = target.data.normalize(truth.images) + 0.05 * inputs
    _, reference = by_autograd(target, Cosine(), inputs, truth.labels)
    result = match(target, inputs, truth.labels, "difference", torch.float32)
    assert cosine(result.input_gradient, reference) > 0.9998


def test_layout_of_the_shared_gradient_does_not_matter():
    target, truth = make_target(MODELS["convnet"], 2)
    as_stored = {
        name: g.to(memory_format=torch.channels_last) if g.dim() == 4 else g
        for name, g in target.gradient.items()
    }
    other = dataclasses.replace(target, gradient=as_stored)
    inputs = candidate(target)
    a, b = (
        match(t, inputs, truth.labels, "difference", torch.float64).input_gradient
        for t in (target, other)
    )
    torch.testing.assert_close(a, b)


@pytest.mark.parametrize("objective", [Cosine(), L2()], ids=["cosine", "L2"])
def test_inner_products_give_value_and_seed(objective):
    generator = torch.Generator().manual_seed(2)
    g, t = ([torch.randn(n, generator=generator).double() for n in (70_000, 3)] for _ in range(2))
    value, seed = objective.value_and_seed(g, t)
    pieces = pieces_of(g), pieces_of(t)
    gg, gt = products_with(*pieces)
    affine = objective.affine_seed(Products(gg, gt, products_with(pieces[1], pieces[1])[0]))
    assert affine.value == pytest.approx(float(value), rel=1e-10)
    assert affine.length == pytest.approx(float(squared_norm(seed).sqrt()), rel=1e-10)
    for s, x, y in zip(seed, g, t, strict=True):
        torch.testing.assert_close(s, affine.on_gradient * x + affine.on_target * y)
    # Near the target the products have lost the digits, and nothing is claimed.
    near = Products(1.0, 1.0 - 1e-6, 1.0)
    assert objective.affine_seed(near) is None


def test_frozen_switches_make_the_difference_accurate():
    """Without them, units that change sides between the passes spoil it."""
    target, truth = make_target(RESNET, 4, train_mode=True)
    inputs = candidate(target)
    _, reference = by_autograd(target, Cosine(), inputs, truth.labels)
    matcher = GradientMatcher(Replica(target, CPU, torch.float64), Cosine(), "difference")
    matcher.step = 1e-4
    frozen = matcher(inputs, truth.labels).input_gradient
    theta = [p.detach().clone() for p in matcher.replica.parameters]
    leaf = inputs.clone().requires_grad_()
    loss = matcher.replica.loss(matcher.replica.model, leaf, truth.labels)
    first = torch.autograd.grad(loss, [*matcher.replica.parameters, leaf])
    _, seed = Cosine().value_and_seed(list(first[:-1]), matcher.replica.target_gradient)
    length = torch.stack([s.square().sum() for s in seed]).sum().sqrt()
    h = 1e-4 * torch.stack([p.square().sum() for p in theta]).sum().sqrt() / length
    with torch.no_grad():
        for p, t, s in zip(matcher.replica.parameters, theta, seed, strict=True):
            p.copy_(t + h * s)
    loss = matcher.replica.loss(matcher.replica.model, leaf, truth.labels)
    free = (torch.autograd.grad(loss, leaf)[0] - first[-1]) / h
    assert 1 - cosine(frozen, reference) < 0.2 * (1 - cosine(free, reference))


def test_auto_checks_itself_and_falls_back():
    target, truth = make_target(RESNET, 2)
    inputs = candidate(target, torch.float32)
    good = GradientMatcher(Replica(target, CPU), Cosine(), "auto")
    good(inputs, truth.labels)
    assert good.step is not None
    assert good.agreement > 0.9999
    # No step is accurate where none can be: the perturbation is far too large.
    bad = GradientMatcher(Replica(target, CPU), Cosine(), "auto")
    bad._steps = (3.0,)
    bad(inputs, truth.labels)
    assert bad.step is None
    exact = GradientMatcher(Replica(target, CPU), Cosine(), "exact")
    torch.testing.assert_close(
        bad(inputs, truth.labels).input_gradient, exact(inputs, truth.labels).input_gradient
    )


def test_large_batches_are_checked_on_few_images(monkeypatch):
    target, truth = make_target(MODELS["resnet"], 4, train_mode=True)
    per_image = candidate(target)[0].numel()
    monkeypatch.setattr("attack.matching.matcher.CALIBRATED_VALUES", 3 * per_image)
    matcher = GradientMatcher(Replica(target, CPU, torch.float64), Cosine(), "auto")
    sizes = []
    exact = matcher.exact_match

    def noted(self, inputs, *args, **options):
        sizes.append(len(inputs))
        return exact(inputs, *args, **options)

    monkeypatch.setattr(GradientMatcher, "exact_match", noted)
    found = matcher(candidate(target), truth.labels).input_gradient
    assert sizes == [2]
    assert matcher.step is not None
    assert cosine(found, exact(candidate(target), truth.labels, 1.0, None).input_gradient) > 0.9999


def test_a_unit_that_another_kernel_would_switch_is_no_error_of_the_difference(monkeypatch):
    target, truth = make_target(MODELS["resnet"], 1)
    matcher = GradientMatcher(Replica(target, CPU), Cosine(), "auto")
    inputs = candidate(target).float()

    def with_a_flip(func, x, *args, **kwargs):
        """One unit of every layer is on where it should be off, or off where on."""
        on = x.detach() > 0
        on[0, 0, 0, 0] = ~on[0, 0, 0, 0]
        return x * on, (on,), torch.mul

    monkeypatch.setitem(activations._RECORDERS, F.relu, with_a_flip)
    found = matcher(inputs, truth.labels).input_gradient
    unfrozen = matcher.exact_match(inputs, truth.labels, 1.0, None).input_gradient
    assert cosine(found, unfrozen) < 0.999, "the flips change nothing: nothing is shown"
    assert matcher.step is not None
    assert matcher.agreement > 0.9999


@pytest.mark.parametrize("hvp", ["exact", "difference"])
def test_label_logits_are_differentiated_too(hvp):
    target, _ = make_target(MODELS["lenet"], 2)
    inputs = candidate(target)
    logits = torch.randn(2, 10, dtype=torch.float64)
    matcher = GradientMatcher(Replica(target, CPU, torch.float64, joint=True), Cosine(), hvp)
    result = matcher(inputs, logits)
    model = target.build_model().double()
    x, y = inputs.clone().requires_grad_(), logits.clone().requires_grad_()
    loss = F.cross_entropy(model(x), y.softmax(-1))
    gradient = torch.autograd.grad(loss, list(model.parameters()), create_graph=True)
    value = Cosine().distance(list(gradient), list(target.gradient.values()))
    by_x, by_y = torch.autograd.grad(value, [x, y])
    assert cosine(result.input_gradient, by_x) > 1 - 1e-7
    assert cosine(result.label_gradient, by_y) > 1 - 1e-7


def test_unrolled_local_steps():
    local = LocalTraining(epochs=2, batches=2, lr=0.05, momentum=0.9, weight_decay=1e-3)
    target, truth = make_target(MODELS["lenet"], 4, local=local)
    inputs = candidate(target)
    result = match(target, inputs, truth.labels, "auto", torch.float64)
    model = target.build_model().double()
    leaf = inputs.clone().requires_grad_()
    update = unrolled_update(model, leaf, truth.labels, local)
    value = Cosine().distance(list(update.values()), list(target.gradient.values()))
    torch.testing.assert_close(result.input_gradient, torch.autograd.grad(value, leaf)[0])
    # The truth explains its own update.
    solved = match(
        target, target.data.normalize(truth.images), truth.labels, "exact", torch.float64
    )
    assert float(solved.value) < 1e-12


@pytest.mark.parametrize("hvp", ["exact", "difference"])
@pytest.mark.parametrize("apart", [False, True], ids=["together", "apart"])
def test_penalty_rides_along(hvp, apart):
    target, truth = make_target(RESNET, 3, train_mode=True)
    inputs = candidate(target)
    known = [{k: (m.double(), v.double()) for k, (m, v) in s.items()} for s in target.bn_statistics]
    penalty = BatchNormPenalty(known, [3])
    matcher = GradientMatcher(Replica(target, CPU, torch.float64), Cosine(), hvp)
    bare = matcher(inputs, truth.labels).input_gradient
    result = matcher(inputs, truth.labels, weight=0.5, penalty=penalty, apart=apart)
    # By autograd alone.
    model = target.build_model().double()
    leaf = inputs.clone().requires_grad_()
    watch = penalty(model)
    model(leaf)
    total = watch()
    (own,) = torch.autograd.grad(total, leaf)
    assert float(result.penalty) == pytest.approx(float(total.detach()), rel=1e-4)
    whole = result.input_gradient + (result.penalty_gradient if apart else 0)
    assert cosine(whole, 0.5 * bare + own) > 1 - 1e-6


def test_batch_norm_penalty_vanishes_at_the_truth():
    target, truth = make_target(RESNET, 3, train_mode=True)
    known = [{k: (m.double(), v.double()) for k, (m, v) in s.items()} for s in target.bn_statistics]
    model = target.build_model().double()
    penalty = BatchNormPenalty(known, [3])
    watch = penalty(model)
    model(target.data.normalize(truth.images).double())
    at_truth = float(watch().detach())
    watch = penalty(model)
    model(candidate(target))
    assert at_truth < 1e-5 < float(watch().detach())


OBJECTIVES = [
    Cosine(),
    L2(),
    LayerMeanCosine(),
    LayerWeighted(Cosine(), layer_weights(3, "linear")),
    LayerWeighted(L2(), layer_weights(3, "last:2")),
]


@pytest.mark.parametrize("objective", OBJECTIVES, ids=lambda o: type(o).__name__)
def test_seeds_are_the_derivatives(objective):
    generator = torch.Generator().manual_seed(0)
    shapes = [(4, 3), (7,), (2, 2, 2)]
    g = [torch.randn(s, generator=generator, dtype=torch.float64) for s in shapes]
    t = [torch.randn(s, generator=generator, dtype=torch.float64) for s in shapes]
    value, seed = objective.value_and_seed(g, t)
    by_autograd_value, by_autograd_seed = Objective.value_and_seed(objective, g, t)
    assert float(value) == pytest.approx(float(by_autograd_value), rel=1e-12)
    for a, b in zip(seed, by_autograd_seed, strict=True):
        torch.testing.assert_close(a, b)


def test_cosine_keeps_its_digits_near_a_match():
    g = [torch.randn(1_000_000, generator=torch.Generator().manual_seed(0))]
    t = [g[0] + 1e-5 * torch.randn(1_000_000, generator=torch.Generator().manual_seed(1))]
    reference = Cosine().distance([g[0].double()], [t[0].double()])
    value, _ = Cosine().value_and_seed(g, t)
    # 1 - cos in float32 cannot tell anything below 6e-8.
    assert float(reference) < 1e-9
    assert float(value) == pytest.approx(float(reference), rel=0.01)


def test_zero_target_gradient_is_no_division_by_zero():
    value, seed = Cosine().value_and_seed([torch.ones(3)], [torch.zeros(3)])
    assert torch.isfinite(value)
    assert torch.isfinite(seed[0]).all()


@pytest.mark.parametrize("hvp", ["auto", "difference", "exact"])
@pytest.mark.parametrize("bias", [60.0, 1e4])
def test_a_gradient_that_vanishes_has_no_direction(hvp, bias):
    target, truth = make_target(ModelSpec("lenet", 10, 8, width=4), 1, double=False)
    # The model is as good as sure, or as sure as float32 can be.
    state = {name: value.clone() for name, value in target.state_dict.items()}
    state[list(state)[-1]][int(truth.labels)] += bias
    sure = dataclasses.replace(target, state_dict=state)
    inputs = target.data.normalize(truth.images) + 0.1
    matcher = GradientMatcher(Replica(sure, CPU), Cosine(), hvp)
    match = matcher(inputs, truth.labels)
    assert match.value.isfinite()
    assert match.input_gradient.isfinite().all()
    gradient = [torch.zeros_like(g) for g in target.gradient.values()]
    value, seed = Cosine().value_and_seed(gradient, list(target.gradient.values()))
    assert float(value) == pytest.approx(0.5)
    assert not any(s.any() for s in seed)
    rows = ManyTargetsMatcher([matcher, GradientMatcher(Replica(sure, CPU), Cosine(), hvp)])
    found = rows(torch.stack([inputs, inputs]), truth.labels.expand(2, 1), [0, 1])
    torch.testing.assert_close(found.values, match.value.expand(2), rtol=1e-4, atol=1e-6)
    assert found.input_gradient.isfinite().all()


def test_shared_parameters_that_are_zero_yet_are_moved_all_the_same():
    target, truth = make_target(MODELS["vit"], 3)
    target = dataclasses.replace(target, gradient={"class_token": target.gradient["class_token"]})
    assert not target.state_dict["class_token"].any()
    inputs = candidate(target)
    exact = match(target, inputs, truth.labels, "exact", torch.float64)
    difference = match(target, inputs, truth.labels, "difference", torch.float64)
    assert cosine(difference.input_gradient, exact.input_gradient) > 1 - 1e-6


def test_millions_of_entries_keep_their_digits():
    entries = torch.randn(3_000_000, generator=torch.Generator().manual_seed(0))
    expected = float(entries.double().square().sum())
    assert float(squared_norm([entries])) == pytest.approx(expected, rel=1e-5)
    assert float(inner_product([entries], [entries])) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("train_mode", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("name", ["convnet", "resnet", "vit"])
def test_batched_restarts_equal_single_ones(name, train_mode):
    target, truth = make_target(MODELS[name], 2, train_mode=train_mode)
    shape = (3, target.batch_size, *target.data.shape)
    inputs = torch.randn(shape, generator=torch.Generator().manual_seed(1)).double()
    replica = Replica(target, CPU, torch.float64)
    matcher = GradientMatcher(replica, Cosine(), "difference", factor=False)
    together = matcher.several(inputs, truth.labels)
    for one, batched in zip(inputs, together, strict=True):
        alone = matcher(one, truth.labels)
        assert float(batched.value) == pytest.approx(float(alone.value), rel=1e-9)
        torch.testing.assert_close(
            batched.input_gradient, alone.input_gradient, rtol=1e-4, atol=1e-7
        )


def test_batched_restarts_without_difference_are_exact():
    target, truth = make_target(MODELS["lenet"], 2)
    inputs = torch.stack([candidate(target), candidate(target) + 0.1])
    matcher = GradientMatcher(Replica(target, CPU, torch.float64), Cosine(), "exact")
    for one, batched in zip(inputs, matcher.several(inputs, truth.labels), strict=True):
        torch.testing.assert_close(
            batched.input_gradient, matcher(one, truth.labels).input_gradient
        )
