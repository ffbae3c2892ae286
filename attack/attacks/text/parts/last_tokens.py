"""The last token of every sentence of a language model: a label, and no input with a gradient."""

from __future__ import annotations

import torch

from attack.attacks.text.parts.layers import TokenLayer, TokenLayers
from attack.attacks.text.parts.result import lengths_of
from core.losses import main_output
from core.target import Target

# Directions in which the outputs are probed; tokens differ in them almost surely.
DIRECTIONS = 8
STEP = 1e-4


def last_tokens(layers: TokenLayers, ids: torch.Tensor, target: Target) -> torch.Tensor:
    """The last label of every sentence, once everything in front of it is known.

    With a weight's inputs a_r of all tokens r that the loss depends on, a dual vector d_b of the
    last of sentence b (d_b a_r = 1 for this row, else 0) singles its output's gradient out of the
    weight's. Along a direction u of the outputs that is (p - y) J u / n, with the probabilities p
    and the derivative J u of the logits, which are known: the label y is the token that fits.

    Args:
        layers: The client's model.
        ids: N x T, right but for the last token of every sentence, which is no padding.
        target: What was shared.

    Returns:
        N token ids.
    """
    layer = layers.groups[-1][-1]
    (inputs,) = layers.inputs([layer], ids)
    lengths = lengths_of(ids, target.data) - 1
    # Tokens that have a label behind them, of all sentences one after another.
    labelled = torch.arange(ids.shape[1] - 1) < lengths[:, None]
    last = lengths.cumsum(0) - 1
    dual = torch.linalg.pinv(inputs[:, :-1][labelled], rtol=1e-9)
    gradient = layer.rows(target.gradient[layer.parameter]).double()
    shares = (len(ids) * lengths[:, None]).expand_as(labelled)[labelled]
    slopes = shares[:, None] * (gradient @ dual).T
    generator = torch.Generator().manual_seed(0)
    directions = torch.randn(
        (DIRECTIONS, gradient.shape[0]), generator=generator, dtype=torch.float64
    )
    with torch.no_grad():
        logits = main_output(layers.model(ids))[:, :-1][labelled]
        moved = torch.stack([_derivative(layers, layer, ids, u)[labelled] for u in directions], -1)
    mean = torch.einsum("rv,rvk->rk", logits.softmax(-1), moved)
    measured = slopes @ directions.T
    # Clipping divides all by one number, which the labels that are known tell.
    told = torch.ones(len(measured), dtype=torch.bool)
    told[last] = False
    labels = ids[:, 1:][labelled]
    known = mean[told] - moved[told, labels[told]]
    scale = (known * measured[told]).sum() / measured[told].square().sum().clamp_min(1e-300)
    scale = scale if bool(told.any()) else torch.ones_like(scale)
    wanted = mean[last] - scale * _of_one(measured, known / scale, told, ids, labelled, shares)
    return (moved[last] - wanted[:, None]).square().sum(-1).argmin(1)


def _of_one(
    measured: torch.Tensor,
    known: torch.Tensor,
    told: torch.Tensor,
    ids: torch.Tensor,
    labelled: torch.Tensor,
    shares: torch.Tensor,
) -> torch.Tensor:
    """What the last row of every sentence adds to the gradient, without rows that are the same.

    Beginnings that two sentences share have the same rows, whose dual vectors are shared as well:
    together they show the sum of all, from which those whose labels are known are taken.

    Args:
        measured: R x directions, of the labelled rows, in units of their shares.
        known: Of those rows whose labels are known.
        told: R, which these are.
        ids: N x T.
        labelled: N x T - 1.
        shares: R, one over the weight of each row.
    """
    sentence, place = labelled.nonzero(as_tuple=True)
    parts = torch.zeros_like(measured)
    parts[told] = known
    rows = []
    for row in (~told).nonzero().flatten().tolist():
        begins = ids[sentence, : int(place[row]) + 1] == ids[sentence[row], : int(place[row]) + 1]
        same = (place == place[row]) & begins.all(1)
        total = (measured[same] / shares[same, None]).sum(0)
        others = (parts[same & told] / shares[same & told, None]).sum(0)
        alone = int((same & ~told).sum())
        rows.append((total - others) * shares[row] / alone)
    return torch.stack(rows)


def _derivative(
    layers: TokenLayers, layer: TokenLayer, ids: torch.Tensor, direction: torch.Tensor
) -> torch.Tensor:
    """Of the logits, where the layer's output moves along a direction at every token."""

    def logits(step: float) -> torch.Tensor:
        handle = layer.module.register_forward_hook(lambda m, given, out: out + step * direction)
        try:
            return main_output(layers.model(ids))[:, :-1]
        finally:
            handle.remove()

    return (logits(STEP) - logits(-STEP)) / (2 * STEP)
