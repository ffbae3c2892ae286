"""Small attack targets with a known truth, made without stage 2."""

from __future__ import annotations

import dataclasses

import torch
import torch.nn.functional as F

from core.data.specs import DataSpec
from core.models.building import ModelSpec, build_model
from core.target import LocalTraining, Target, Truth
from gradients.batch_statistics import collect_batch_statistics
from gradients.local_update import unrolled_update


def data_spec(size: int, n_classes: int = 10) -> DataSpec:
    return DataSpec("noise", (3, size, size), (0.5, 0.45, 0.4), (0.25, 0.3, 0.2), n_classes)


def smooth_images(n: int, size: int, seed: int = 0) -> torch.Tensor:
    """Images with structure: coarse noise, enlarged (N x 3 x size x size in [0, 1])."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand((n, 3, 4, 4), generator=generator)
    return F.interpolate(coarse, size=(size, size), mode="bicubic").clamp(0, 1)


def make_target(
    spec: ModelSpec,
    batch: int,
    *,
    train_mode: bool = False,
    local: LocalTraining | None = None,
    shards: tuple[int, ...] = (),
    seed: int = 0,
    double: bool = True,
    adapted: bool = False,
) -> tuple[Target, Truth]:
    """The gradient of a freshly initialised model on smooth images with labels 0, 1, ...

    With `adapted`, its running BatchNorm statistics are those of such images.
    """
    torch.manual_seed(seed)
    dtype = torch.float64 if double else torch.float32
    data = data_spec(spec.image_size, spec.n_classes)
    truth = Truth(smooth_images(batch, spec.image_size, seed), torch.arange(batch) % spec.n_classes)
    model = build_model(spec).to(dtype)
    if adapted:
        adapt_running_statistics(model, data.normalize(smooth_images(256, spec.image_size, 99)))
    model.train(train_mode)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    inputs = data.normalize(truth.images).to(dtype)
    target = Target(
        model=spec,
        data=data,
        state_dict=state,
        gradient={name: torch.zeros_like(p) for name, p in model.named_parameters()},
        train_mode=train_mode,
        batch_size=batch,
        local=local or LocalTraining(),
        shards=shards,
        synchronized=not shards,
        bn_statistics=(collect_batch_statistics(model, inputs),) if not shards else None,
    )
    model.load_state_dict(state)
    return dataclasses.replace(target, gradient=_shared(target, model, inputs, truth)), truth


def share_model(
    spec: ModelSpec, n_targets: int, batch: int, *, train_mode: bool = False
) -> list[tuple[Target, torch.Tensor]]:
    """Gradients of other images and labels through one model."""
    base, _ = make_target(spec, batch, train_mode=train_mode)
    found = []
    for number in range(n_targets):
        images = smooth_images(batch, spec.image_size, number + 1)
        labels = (torch.arange(batch) + number) % spec.n_classes
        found.append((share_images(base, images, labels), labels))
    return found


def share_images(base: Target, images: torch.Tensor, labels: torch.Tensor) -> Target:
    """What another client with these images would share, of the same model."""
    dtype = next(iter(base.gradient.values())).dtype
    model = base.build_model().to(dtype).requires_grad_()
    inputs = base.data.normalize(images).to(dtype)
    statistics = collect_batch_statistics(model, inputs)
    named = dict(model.named_parameters())
    loss = F.cross_entropy(model(inputs), labels)
    gradient = dict(zip(named, torch.autograd.grad(loss, list(named.values())), strict=True))
    return dataclasses.replace(base, gradient=gradient, bn_statistics=(statistics,))


def adapt_running_statistics(model: torch.nn.Module, inputs: torch.Tensor) -> None:
    for module in model.modules():
        if isinstance(module, torch.nn.modules.batchnorm._BatchNorm):
            module.momentum = 1.0
    with torch.no_grad():
        model.train()(inputs.to(next(model.parameters())))
    for module in model.modules():
        if isinstance(module, torch.nn.modules.batchnorm._BatchNorm):
            module.momentum = 0.1


def _shared(
    target: Target, model: torch.nn.Module, inputs: torch.Tensor, truth: Truth
) -> dict[str, torch.Tensor]:
    if target.local.steps > 1:
        update = unrolled_update(model, inputs, truth.labels, target.local, create_graph=False)
        return {name: value.detach() for name, value in update.items()}
    parts = zip(inputs.split(target.shards), truth.labels.split(target.shards), strict=True)
    losses = [F.cross_entropy(model(x), y, reduction="sum") for x, y in parts]
    loss = torch.stack(losses).sum() / target.batch_size
    named = dict(model.named_parameters())
    return dict(zip(named, torch.autograd.grad(loss, list(named.values())), strict=True))
