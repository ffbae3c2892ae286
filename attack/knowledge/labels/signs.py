"""Rules that read labels off the signs and sizes of the last layer's rows.

With cross-entropy, class i's row of the weight gradient is the mean over samples of
(p_i - [y = i]) times the features: where no feature is negative, the row sum of a class that
does not occur is not negative either.
"""

from __future__ import annotations

import torch
from torch import nn

from attack.knowledge.labels.last_layer import LastLayer
from attack.knowledge.labels.registry import SignedFeatures, register_rule
from core.errors import InputError
from core.target import Target


@register_rule("llg", signed_features=SignedFeatures.MISLEAD)
def _llg(target: Target, model: nn.Module, last: LastLayer) -> torch.Tensor:
    """Label Leakage from Gradients: every negative class once, then the lowest again and again.

    One sample's impact is 1 + 1/n of the mean negative row sum, n the number of classes, as
    the paper has it.

    Source: Wainakh et al., User-Level Label Leakage from Gradients in Federated Learning,
    PoPETs 2022, https://arxiv.org/abs/2105.09369.
    """
    return _emit(last, 1 + 1 / last.n_classes)


@register_rule("llg-negatives", signed_features=SignedFeatures.MISLEAD)
def _llg_negatives(target: Target, model: nn.Module, last: LastLayer) -> torch.Tensor:
    """LLG as the code published with gradient heterogeneity has it.

    One sample's impact is 1 + 1/(number of negative classes) of the mean negative row sum,
    where the paper has the number of all classes.
    """
    negatives = int((last.row_sums() < 0).sum())
    return _emit(last, 1 + 1 / max(1, negatives))


def _emit(last: LastLayer, factor: float) -> torch.Tensor:
    """Both passes of LLG."""
    labels, sums, impact = _first_pass(last, factor)
    while len(labels) < last.batch_size:
        lowest = int(sums.argmin())
        sums[lowest] -= impact
        labels.append(lowest)
    return torch.tensor(labels)


@register_rule("llg-stale", signed_features=SignedFeatures.MISLEAD)
def _llg_stale(target: Target, model: nn.Module, last: LastLayer) -> torch.Tensor:
    """LLG as a widespread implementation has it, for comparison with published numbers.

    In its second pass the impact is subtracted from the class emitted last in the first
    pass, not from the class just chosen, so that the choice hardly ever changes.
    """
    labels, sums, impact = _first_pass(last, 1 + 1 / last.n_classes)
    stale = labels[-1] if labels else 0
    while len(labels) < last.batch_size:
        labels.append(int(sums.argmin()))
        sums[stale] -= impact
    return torch.tensor(labels)


def _first_pass(last: LastLayer, factor: float) -> tuple[list[int], torch.Tensor, float]:
    """Labels certain from their sign, what is left of the row sums, and one sample's impact."""
    sums = last.row_sums()
    negative = (sums < 0).nonzero().flatten()
    impact = float(sums[negative].sum()) / last.batch_size * factor
    # Noise can make more classes negative than there are samples: the lowest are kept.
    kept = negative[sums[negative].argsort()][: last.batch_size].sort().values
    sums = sums.clone()
    sums[kept] -= impact
    return kept.tolist(), sums, impact


@register_rule("from_grads", signed_features=SignedFeatures.MISLEAD_WITHOUT_BIAS)
def _from_grads(target: Target, model: nn.Module, last: LastLayer) -> torch.Tensor:
    """The classes of negative bias gradient (of negative row sum, where there is no bias).

    What the sign proves and no more: the rule cannot count, so labels still missing are
    filled with the found classes in turn, the most negative first.
    """
    signal = last.row_sums() if last.bias_gradient is None else last.bias_gradient
    order = signal.argsort()
    present = max(1, int((signal < 0).sum()))
    return order[torch.arange(last.batch_size) % present]


@register_rule("idlg", signed_features=SignedFeatures.MISLEAD)
def _idlg(target: Target, model: nn.Module, last: LastLayer) -> torch.Tensor:
    """The class of lowest row sum; exact for one sample with non-negative features.

    Source: Zhao, Mopuri, Bilen, iDLG: Improved Deep Leakage from Gradients, 2020,
    https://arxiv.org/abs/2001.02610.
    """
    if last.batch_size != 1:
        raise InputError(
            f"label recovery idlg is defined for one sample, not for a batch of {last.batch_size}"
        )
    return last.row_sums().argmin().view(1)


@register_rule("yin", signed_features=SignedFeatures.MISLEAD)
def _yin(target: Target, model: nn.Module, last: LastLayer) -> torch.Tensor:
    """The K classes of smallest row minimum, under the assumption that no label repeats.

    Source: Yin et al., See through Gradients: Image Batch Recovery via GradInversion,
    CVPR 2021 (label restoration), https://arxiv.org/abs/2104.07586.
    """
    if last.batch_size > last.n_classes:
        raise InputError(
            "label recovery yin assumes labels without repetition, which "
            f"{last.batch_size} samples of {last.n_classes} classes cannot have"
        )
    return last.weight_gradient.amin(1).argsort()[: last.batch_size]
