"""What is timed: models, batches and BatchNorm modes, with targets made for them."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from core.data.specs import DataSpec
from core.models.building import ModelSpec, build_model
from core.target import Target


@dataclass(frozen=True)
class Case:
    """One target.

    Attributes:
        model: How the client's model is built.
        batch: Number of images.
        train_mode: BatchNorm with the statistics of the batch.
        quick: Part of the short run.
    """

    model: ModelSpec
    batch: int
    train_mode: bool
    quick: bool = False

    @property
    def name(self) -> str:
        """Short and unique."""
        mode = "train" if self.train_mode else "eval"
        return f"{self.model.arch}-{self.model.image_size}px-b{self.batch}-{mode}"


def _both_modes(model: ModelSpec, batches: list[int], quick: tuple[int, ...] = ()) -> list[Case]:
    return [
        Case(model, batch, mode, batch in quick and not mode)
        for batch in batches
        for mode in (False, True)
    ]


# Overhead outweighs arithmetic: where batched restarts pay.
SMALL_CASE = Case(ModelSpec("cnn", 10, 32), 2, False)
CASES: dict[str, Case] = {
    case.name: case
    for case in [
        SMALL_CASE,
        *_both_modes(ModelSpec("convnet", 10, 32), [1, 8, 32], quick=(1,)),
        *_both_modes(ModelSpec("resnet18", 10, 32, "cifar"), [1, 8, 32], quick=(1,)),
        *_both_modes(ModelSpec("resnet18", 200, 64), [4], quick=(4,)),
        *_both_modes(ModelSpec("resnet18", 1000, 224), [1, 4], quick=(1,)),
        # It has no BatchNorm, and in train mode its dropout would decide.
        Case(ModelSpec("vgg11", 10, 32), 1, False),
    ]
}


# Networks whose iterations are overhead for a good part.
SMALL_CASES: dict[str, Case] = {
    case.name: case
    for case in [
        Case(ModelSpec(a, 10, 32), b, False) for a in ("cnn", "lenet", "mlp") for b in (1, 2)
    ]
}


@dataclass(frozen=True)
class Problem:
    """A target with a candidate to evaluate.

    Attributes:
        target: What the client shared.
        inputs: The candidate, N x C x H x W, normalised.
        labels: N class indices.
    """

    target: Target
    inputs: torch.Tensor
    labels: torch.Tensor

    def to(self, device: torch.device) -> Problem:
        """The same, to be evaluated on a device."""
        return Problem(self.target, self.inputs.to(device), self.labels.to(device))


def make_problem(case: Case, seed: int = 0) -> Problem:
    """The gradient of a freshly initialised model, and noise as the candidate."""
    return make_problems(case, 1, seed)[0]


def make_problems(case: Case, count: int, seed: int = 0) -> list[Problem]:
    """Gradients of other images through the same freshly initialised model.

    Args:
        case: Which model, and how many images are behind each gradient.
        count: Number of gradients.
        seed: Of the model, the images and the candidates.
    """
    torch.manual_seed(seed)
    spec, size = case.model, case.model.image_size
    data = DataSpec("noise", (3, size, size), (0.5,) * 3, (0.25,) * 3, spec.n_classes)
    model = build_model(spec).train(case.train_mode)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    labels = torch.arange(case.batch) % spec.n_classes
    made = []
    for _ in range(count):
        images = _smooth_images(case)
        loss = F.cross_entropy(model(data.normalize(images)), labels)
        named = dict(model.named_parameters())
        gradient = dict(zip(named, torch.autograd.grad(loss, list(named.values())), strict=True))
        target = Target(spec, data, state, gradient, case.train_mode, case.batch)
        made.append(Problem(target, torch.randn(case.batch, *data.shape), labels))
    return made


def _smooth_images(case: Case) -> torch.Tensor:
    side = case.model.image_size
    return F.interpolate(torch.rand(case.batch, 3, 4, 4), size=(side, side), mode="bilinear")


def true_images(case: Case, seed: int = 0) -> torch.Tensor:
    """What the target of `make_problem` was made from, N x 3 x H x W in [0, 1]."""
    torch.manual_seed(seed)
    build_model(case.model)
    return _smooth_images(case)


def in_double(target: Target) -> Target:
    """The same target in float64."""
    return dataclasses.replace(
        target,
        state_dict={
            name: value.double() if value.is_floating_point() else value
            for name, value in target.state_dict.items()
        },
        gradient={name: value.double() for name, value in target.gradient.items()},
    )
