"""Bins of a layer whose neurons measure one direction against a threshold each."""

from __future__ import annotations

import torch


def read_bins(
    thresholds: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    most: int,
    empty: float,
) -> torch.Tensor:
    """Mean input of every filled bin, the fullest first.

    Neighbours by threshold differ by the inputs in between alone: (difference of weight
    gradients) / (difference of bias gradients).

    Args:
        thresholds: m, of each neuron.
        weight: m x d gradient.
        bias: m, gradient.
        most: So many bins at most.
        empty: A bin whose bias gradient is below this share of the largest is empty.

    Returns:
        k x d, k at most `most`.

    Source: Fowl et al., "Robbing the Fed", section 3.1, https://arxiv.org/abs/2110.13057.
    """
    order = thresholds.argsort()
    weight, bias = weight[order], bias[order]
    # The last neuron has no neighbour above.
    weight = weight - torch.cat([weight[1:], torch.zeros_like(weight[:1])])
    bias = bias - torch.cat([bias[1:], torch.zeros_like(bias[:1])])
    fullest = bias.abs().argsort(descending=True)[:most]
    filled = fullest[bias[fullest].abs() > empty * bias.abs().max()]
    return weight[filled] / bias[filled, None]
