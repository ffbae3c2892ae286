"""GInfoR: how much of the shared gradient's information is each sample's.

A measure of the truth, not an attack: it says which images of a batch a shared gradient
exposes most.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from core.errors import InputError
from core.losses import CrossEntropy, main_output
from core.target import Target, Truth

if TYPE_CHECKING:
    from prettytable import PrettyTable

Gradient = tuple[torch.Tensor, ...]


@dataclass(frozen=True)
class GradientInformation:
    """What every sample of a batch has to do with the gradient (all of length N, CPU).

    Attributes:
        labels: The true class of each image.
        confidence: Probability the model gives the true class.
        predicted: Most probable class.
        norm: Norm of the sample's own gradient.
        cosine: Cosine between the sample's gradient and the batch's.
        information: info_i = <grad l_i, grad L>.
        predicted_confidence: Probability of the most probable class.
        distance: Squared Euclidean distance of the sample's gradient from the batch's.
        same_signs: Share of entries whose signs in the two gradients are the same.
    """

    labels: torch.Tensor
    confidence: torch.Tensor
    predicted: torch.Tensor
    norm: torch.Tensor
    cosine: torch.Tensor
    information: torch.Tensor
    predicted_confidence: torch.Tensor
    distance: torch.Tensor
    same_signs: torch.Tensor

    @property
    def ratio(self) -> torch.Tensor:
        """Gradient information ratio: shifted by |min| if any is negative, sum 1."""
        shifted = self.information + self.information.min().clamp_max(0).abs()
        total = shifted.sum()
        # All samples alike (a zero gradient, say): nobody stands out.
        if total <= 0:
            return torch.full_like(shifted, 1 / len(shifted))
        return shifted / total

    def ratio_by_label(self) -> dict[int, float]:
        """The sum of the ratios of every label's samples, by label in ascending order."""
        ratio = self.ratio
        return {
            int(label): float(ratio[self.labels == label].sum()) for label in self.labels.unique()
        }

    def to_record(self) -> dict[str, Any]:
        """Plain values for a JSON record: by sample and by label."""
        columns = {
            "label": self.labels,
            "confidence": self.confidence,
            "predicted": self.predicted,
            "norm": self.norm,
            "cosine": self.cosine,
            "information": self.information,
            "ratio": self.ratio,
            "predicted_confidence": self.predicted_confidence,
            "distance": self.distance,
            "same_signs": self.same_signs,
        }
        names, values = list(columns), zip(*(v.tolist() for v in columns.values()), strict=True)
        return {
            "by_sample": [
                {"index": i, **dict(zip(names, row, strict=True))} for i, row in enumerate(values)
            ],
            "by_label": {str(label): value for label, value in self.ratio_by_label().items()},
        }

    def to_table(self) -> PrettyTable:
        """One row per sample, with the sum over the samples of its label."""
        from prettytable import PrettyTable

        by_label = self.ratio_by_label()
        head = ["image", "label", "confidence", "predicted", "its confidence", "gradient norm"]
        further = ["distance", "cosine", "same signs (%)", "information"]
        table = PrettyTable([*head, *further, "GInfoR (%)", "of its label (%)"])
        table.title = "gradient information ratio"
        for row in self.to_record()["by_sample"]:
            shown = {name: f"{value:.4f}" for name, value in row.items()}
            names = [row["index"], row["label"], shown["confidence"], row["predicted"]]
            cells = [shown[k] for k in ("predicted_confidence", "norm", "distance", "cosine")]
            signs = f"{100 * row['same_signs']:.1f}"
            shares = [f"{100 * v:.2f}" for v in (row["ratio"], by_label[row["label"]])]
            table.add_row([*names, *cells, signs, shown["information"], *shares])
        table.align = "r"
        return table


def gradient_information(
    target: Target, truth: Truth, *, use_shared: bool = False
) -> GradientInformation:
    """Measure every sample's part in the gradient of its batch.

    l_i is the loss of sample i within its batch (BatchNorm statistics included) and L
    their mean.

    Args:
        target: Model, parameters and mode; per-shard BatchNorm where not synchronized.
        truth: The images and labels behind the gradient.
        use_shared: Take the gradient as it was shared (after defenses and local steps)
            for grad L, and only the parameters that were shared.

    Raises:
        InputError: The client's loss is no cross-entropy, by which this measure is defined.

    Source:
        Reveal the "Leaker" and Block the Attacker: Defending Gradient Inversion Attacks
        on Federated Learning (gradient heterogeneity, GInfoR).
    """
    loss = target.loss
    if not (isinstance(loss, CrossEntropy) and loss.mean_over_samples) or truth.labels.dim() != 1:
        raise InputError(
            "the gradient information ratio is defined for cross-entropy with one class per "
            f"sample, and this client's loss is {loss.name}"
        )
    model = target.build_model()
    named = {n: p for n, p in model.named_parameters() if not use_shared or n in target.gradient}
    logits = _logits(model, target, truth)
    losses = nn.functional.cross_entropy(
        logits, truth.labels, reduction="none", label_smoothing=loss.label_smoothing
    )
    if use_shared:
        whole = tuple(target.gradient[name] for name in named)
    else:
        whole = _gradient(losses.mean(), named)
    measured = torch.stack([_compare(_gradient(loss, named), whole) for loss in losses])
    squared, information, distance, same_signs = measured.unbind(1)
    probabilities = logits.detach().softmax(1).double()
    norms = squared.sqrt() * _inner(whole, whole).sqrt()
    return GradientInformation(
        labels=truth.labels.cpu(),
        confidence=probabilities.gather(1, truth.labels[:, None]).flatten().cpu(),
        predicted=logits.argmax(1).cpu(),
        norm=squared.sqrt(),
        cosine=information / norms.clamp_min(torch.finfo(torch.float64).tiny),
        information=information,
        predicted_confidence=probabilities.amax(1).cpu(),
        distance=distance,
        same_signs=same_signs,
    )


def _logits(model: nn.Module, target: Target, truth: Truth) -> torch.Tensor:
    """The client's forward pass, shard by shard unless BatchNorm was synchronized."""
    inputs = target.data.normalize(truth.images).to(next(model.parameters()))
    shards = (len(inputs),) if target.synchronized else target.shards
    with torch.random.fork_rng(devices=[]):
        if target.dropout_seed is not None:
            torch.manual_seed(target.dropout_seed)
        return torch.cat([main_output(model(shard)) for shard in inputs.split(list(shards))])


def _gradient(loss: torch.Tensor, named: dict[str, nn.Parameter]) -> Gradient:
    return torch.autograd.grad(
        loss, list(named.values()), retain_graph=True, allow_unused=True, materialize_grads=True
    )


def _compare(own: Gradient, whole: Gradient) -> torch.Tensor:
    """Of a sample's gradient and the batch's: its squared norm, their inner product, their squared
    distance, and the share of entries of the same sign.
    """
    apart = tuple(a - b for a, b in zip(own, whole, strict=True))
    alike = [(a.sign() == b.sign()).sum() for a, b in zip(own, whole, strict=True)]
    share = torch.stack(alike).sum().cpu().double() / sum(a.numel() for a in own)
    return torch.stack([_inner(own, own), _inner(own, whole), _inner(apart, apart), share])


def _inner(first: Gradient, second: Gradient) -> torch.Tensor:
    # Millions of small products: float64, or the sum loses the small ones.
    products = [(a.double() * b.double()).sum() for a, b in zip(first, second, strict=True)]
    return torch.stack(products).sum().cpu()
