"""Trap weights: records read off neurons that few of a batch activate (Boenisch et al. 2023)."""

from __future__ import annotations

import itertools
import time
from typing import Any, ClassVar

import torch

from attack.attacks.base import Attack, register_attack
from attack.attacks.parts.closed_form import closed_form_reconstruction
from attack.attacks.parts.first_layer import FirstLayer, first_layer
from attack.knowledge.threat_models import Capability
from attack.reconstruction import Reconstruction
from core.errors import InputError
from core.losses import Targets
from core.target import Target

# Relative errors that rounding leaves: of a row that one sample made, and, of the gradient as
# it was shared, of a row that is emptied.
ROUNDING = {torch.float64: (1e-7, 1e-10), torch.float32: (1e-4, 1e-5)}
# Equal samples that one row may hold.
MOST_COPIES = 3


@register_attack
class TrapWeights(Attack):
    """Divide rows of the first layer's gradient, and peel off what is recovered.

    A neuron that one sample activates gives it away: (weight gradient) / (bias gradient). A
    malicious server sends weights under which few samples activate a neuron (stage 2:
    `--malicious trap:RECORDS`). The server knows the model, and so the gradient of a candidate
    under every class: a candidate whose gradient explains its row is a sample and no mixture.
    What it added to all other rows is then subtracted, and rows of two samples become rows of
    one, as codes for erasure channels are decoded (LT codes). This goes on while something is
    found. A gradient that was shrunk as a whole (clipping) is put back to its size first: rows of
    one sample agree on it.

    Our traps differ from the paper's, half of whose weights are scaled down, in that a neuron's
    bias is set to a quantile of public records: features of a table have both signs.

    Source: Boenisch, Dziedzic, Schuster, Shamsabadi, Shumailov, Papernot, "When the Curious
        Abandon Honesty: Federated Learning Is Not Private", EuroS&P 2023,
        https://arxiv.org/abs/2112.02918; peeling as in
        https://github.com/SaeedShariati/Gradient-Inversion-via-LT-Codes.

    Published: .994, .666 and .215 of the images at batch 64, 128 and 256 with 1,000 neurons on
        CIFAR-10 (the latter repository).

    Reproduced:
        trap-weights-64: 0.938 (0.922 to 0.953, n = 8), 2026-11-28: below: images of low contrast
          are furthest out in no direction: of 16 images of three batches that are not found 13
          activate no neuron, and 14 are among the sixth of lowest contrast.
        trap-weights-128: 0.820 (0.795 to 0.847, n = 8), 2026-11-28: above.
        trap-weights-256: 0.698 (0.687 to 0.711, n = 8), 2026-11-29: above.

    Example:
        python training/get_gradients.py --data randhie --arch mlp -b 64 --malicious trap:1
        python main_run.py --attack trap-weights --checkpoint CHECKPOINT --metric
    """

    name = "trap-weights"
    requires: ClassVar[frozenset[Capability]] = frozenset({Capability.MALICIOUS_SERVER})
    fits: ClassVar[frozenset[Targets]] = frozenset({Targets.CLASSES})

    def reconstruct(
        self, target: Target, *, labels: torch.Tensor, device: torch.device, seed: int, **run: Any
    ) -> Reconstruction:
        """See `Attack.reconstruct`; nothing is random, labels come with the samples.

        Raises:
            InputError: No fully connected layer sees the input, or there are several local steps.
        """
        began = time.perf_counter()
        if not target.local.shares_gradient:
            raise InputError(f"--attack {self.name}: needs the gradient of one local step")
        layer = first_layer(target, self.name, device)
        found, classes, rounds = peel(target, layer)
        labels = labels.clone()
        labels[: len(classes)] = classes.to(labels)
        return closed_form_reconstruction(
            target,
            layer.network_inputs(found),
            labels,
            device=device,
            began=began,
            iterations=rounds,
        )


def peel(target: Target, layer: FirstLayer) -> tuple[torch.Tensor, torch.Tensor, int]:
    """Samples that explain rows of the gradient, peeled off round by round.

    Args:
        target: What was shared.
        layer: What the client shared of its first layer.

    Returns:
        k x d inputs of the layer, k at most the batch size, their classes, and the rounds.
    """
    dtype = target.gradient[f"{layer.name}.weight"].dtype
    tolerance, empty = ROUNDING.get(dtype, (1e-2, 1e-4))
    weight, bias = layer.weight_gradient.clone(), layer.bias_gradient.clone()
    scale = scale_of(target, layer, weight, bias, tolerance)
    weight, bias = weight / scale, bias / scale
    # Below this a row's rest is rounding of what was there.
    floor = empty * bias.abs().max()
    samples, classes = weight.new_zeros((0, weight.shape[1])), bias.new_zeros(0).long()
    for rounds in itertools.count(1):
        new, new_classes, slopes = _explained(target, layer, weight, bias, floor, tolerance)
        room = target.batch_size - len(samples)
        new, new_classes, slopes = new[:room], new_classes[:room], slopes[:room]
        samples, classes = torch.cat([samples, new]), torch.cat([classes, new_classes])
        if not len(new) or len(samples) == target.batch_size:
            return samples, classes, rounds
        weight, bias = weight - slopes.T @ new, bias - slopes.sum(0)
    raise AssertionError("a loop without end ended")


def scale_of(
    target: Target, layer: FirstLayer, weight: torch.Tensor, bias: torch.Tensor, tolerance: float
) -> float:
    """By how much the client shrank its gradient as a whole, such as by clipping; else 1.

    A row of one sample says it: its quotient is the sample at any scale, and what the sample
    adds to the row is known. Rows of mixtures say anything, rows of one sample all the same.
    """
    rows = bias.abs().argsort(descending=True)
    rows = rows[bias[rows] != 0]
    candidates = layer.network_inputs(weight[rows] / bias[rows, None])
    made = output_gradients(target, layer.name, candidates)
    own = made.gather(2, rows.view(-1, 1, 1).expand(-1, target.data.n_classes, 1))[:, :, 0]
    said = (bias[rows, None] / own).flatten()
    said = said[(said > 0) & (said < 1 - tolerance)].sort().values
    unscaled = int(((bias[rows, None] - own).abs() <= tolerance * bias[rows, None].abs()).sum())
    if not len(said):
        return 1.0
    # The value that most of them are near.
    ends = torch.searchsorted(said, said * (1 + tolerance), right=True)
    count, first = (ends - torch.arange(len(said), device=said.device)).max(0)
    return float(said[first : first + count].median()) if count > max(unscaled, 1) else 1.0


def _explained(
    target: Target,
    layer: FirstLayer,
    weight: torch.Tensor,
    bias: torch.Tensor,
    floor: torch.Tensor,
    tolerance: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Candidates that are samples: k x d inputs, k classes, k x m gradients of the outputs."""
    # The larger a row's rest, the less of it is rounding.
    rows = bias.abs().argsort(descending=True)
    rows = rows[bias[rows].abs() > floor]
    candidates = weight[rows] / bias[rows, None]
    n_classes = target.data.n_classes
    slopes = output_gradients(target, layer.name, layer.network_inputs(candidates))
    own = slopes.gather(2, rows.view(-1, 1, 1).expand(-1, n_classes, 1))[:, :, 0]
    chosen: list[tuple[int, tuple[int, ...]]] = []
    kept = candidates.new_zeros((0, candidates.shape[1]))
    for index, members in _explanations(own, bias[rows], tolerance):
        if not _knows(kept, candidates[index], tolerance):
            kept = torch.cat([kept, candidates[index][None]])
            chosen.append((index, members))
    flat = [(index, c) for index, members in chosen for c in members]
    places = torch.tensor([i for i, _ in flat], dtype=torch.long, device=rows.device)
    classes = torch.tensor([c for _, c in flat], dtype=torch.long, device=rows.device)
    return candidates[places], classes, slopes[places, classes]


def _explanations(
    own: torch.Tensor, rest: torch.Tensor, tolerance: float
) -> list[tuple[int, tuple[int, ...]]]:
    """Rows that one sample, or a few equal ones, explain: its number, a class for each of them.

    Args:
        own: rows x classes, what a row's candidate adds to its bias gradient.
        rest: rows, what is to be explained.
        tolerance: Relative.
    """
    found: dict[int, tuple[int, ...]] = {}
    for copies in range(1, MOST_COPIES + 1):
        for members in itertools.combinations_with_replacement(range(own.shape[1]), copies):
            made = own[:, members].sum(1)
            close = (made - rest).abs() <= tolerance * rest.abs()
            for index in close.nonzero()[:, 0].tolist():
                found.setdefault(index, members)
    return list(found.items())


def _knows(samples: torch.Tensor, candidate: torch.Tensor, tolerance: float) -> bool:
    apart = (samples - candidate).norm(dim=1)
    return bool((apart <= tolerance * candidate.norm()).any())


def output_gradients(target: Target, name: str, inputs: torch.Tensor) -> torch.Tensor:
    """What each sample under each class adds to the gradient of a layer's outputs.

    Args:
        target: Model, loss and batch size.
        name: Of the layer.
        inputs: k x d network inputs.

    Returns:
        k x classes x m.
    """
    model = target.build_model().to(inputs)
    seen: list[torch.Tensor] = []
    handle = model.get_submodule(name).register_forward_hook(lambda m, a, out: seen.append(out))
    outputs = model(inputs.reshape(-1, *target.data.shape))
    handle.remove()
    rows = []
    for label in range(target.data.n_classes):
        labels = torch.full((len(inputs),), label, device=inputs.device)
        loss = target.loss.total(outputs, labels) / target.batch_size
        rows.append(torch.autograd.grad(loss, seen, retain_graph=True)[0])
    return torch.stack(rows, 1)
