"""The derivative of a shared gradient in the images behind it, by products."""

from __future__ import annotations

import torch
from tqdm import tqdm

from core.errors import InputError
from core.models.kinds import Dropout
from core.target import Target, Truth

# Entries of the matrix, 2 GiB in float64: what is larger is no small network.
LARGEST = 1 << 28


class GradientOfImages:
    """What a client would share of images, in float64, and its derivative in them.

    Args:
        target: What the client shared: one gradient of one step.
        labels: What the loss compares the outputs with.
        n: Values of the images.

    Raises:
        InputError: Several local steps, active dropout, or a Jacobian that is too large.
    """

    def __init__(self, target: Target, labels: torch.Tensor, n: int) -> None:
        self.numbers = sum(g.numel() for g in target.gradient.values())
        _check(target, n, self.numbers)
        self._target = target
        self._model = target.build_model().double()
        parameters = dict(self._model.named_parameters())
        self._shared = [parameters[name].requires_grad_() for name in target.gradient]
        self._labels = labels.double() if labels.is_floating_point() else labels

    def loss(self, images: torch.Tensor) -> torch.Tensor:
        """The client's loss of N x C x ... images in float64."""
        return self._target.loss(self._model(self._target.data.normalize(images)), self._labels)

    def __call__(self, images: torch.Tensor, *, create_graph: bool = False) -> torch.Tensor:
        """The shared numbers in the order of `target.gradient`, m of them."""
        gradient = torch.autograd.grad(
            self.loss(images), self._shared, create_graph=create_graph, materialize_grads=True
        )
        return torch.cat([part.flatten() for part in gradient])

    def jacobian(self, images: torch.Tensor, *, progress: bool = False) -> torch.Tensor:
        """The m x n Jacobian at images.

        A column J v comes from two products with the transpose, which reverse mode gives: J^T u
        is linear in u, so that its derivative in u along v is J v.

        Args:
            images: N x C x ... in float64.
            progress: Show a bar.
        """
        images = images.detach().requires_grad_()
        flat = self(images, create_graph=True)
        u = torch.zeros_like(flat, requires_grad=True)
        (transposed,) = torch.autograd.grad(
            flat, images, u, create_graph=True, materialize_grads=True
        )
        n = images.numel()
        columns = torch.empty(len(flat), n, dtype=torch.float64)
        if not transposed.requires_grad:
            return columns.zero_()
        for k in tqdm(range(n), desc="Jacobian", disable=not progress, leave=False):
            along = torch.zeros(n, dtype=torch.float64)
            along[k] = 1
            (column,) = torch.autograd.grad(
                transposed, u, along.view_as(transposed), retain_graph=True, materialize_grads=True
            )
            columns[:, k] = column
        return columns


def gradient_jacobian(target: Target, truth: Truth, *, progress: bool = False) -> torch.Tensor:
    """The Jacobian of the shared gradient in the values of the images, at the truth.

    Args:
        target: What the client shared: one gradient of one step.
        truth: The images and targets behind it.
        progress: Show a bar.

    Returns:
        m x n in float64: m shared numbers in the order of `target.gradient`, n = N x C x ...
        values of the images, in the units of `truth.images`.

    Raises:
        InputError: Several local steps, active dropout, or a matrix that is too large.
    """
    gradient = GradientOfImages(target, truth.labels, truth.images.numel())
    return gradient.jacobian(truth.images.double(), progress=progress)


def _check(target: Target, n: int, m: int) -> None:
    if target.local.steps != 1 or len(target.shards) > 1:
        raise InputError("bounds: only the gradient of one step on one process is differentiated")
    if target.dropout_seed is not None and target.train_mode and _has_dropout(target):
        raise InputError("bounds: dropout is active, so that the gradient is random by itself")
    if n * m > LARGEST:
        raise InputError(
            f"bounds: the Jacobian has {m} x {n} entries, more than {LARGEST}; take a smaller "
            "network, smaller images or fewer of them"
        )


def _has_dropout(target: Target) -> bool:
    modules = target.build_model().modules()
    return any(isinstance(module, Dropout) and module.p > 0 for module in modules)
