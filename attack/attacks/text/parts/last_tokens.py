"""The last token of every sentence of a language model: a label, and no input with a gradient."""

from __future__ import annotations

import torch

from attack.attacks.text.parts.layers import TokenLayer, TokenLayers
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
        ids: N x T, right but for the last token.
        target: What was shared.

    Returns:
        N token ids.
    """
    layer = layers.groups[-1][-1]
    (inputs,) = layers.inputs([layer], ids)
    n, length = ids.shape[0], ids.shape[1] - 1
    rows = inputs[:, :-1].flatten(0, 1)
    dual = torch.linalg.pinv(rows, rtol=1e-9)
    gradient = layer.rows(target.gradient[layer.parameter]).double()
    slopes = len(rows) * (gradient @ dual).T
    generator = torch.Generator().manual_seed(0)
    directions = torch.randn(
        (DIRECTIONS, gradient.shape[0]), generator=generator, dtype=torch.float64
    )
    with torch.no_grad():
        logits = main_output(layers.model(ids))[:, :-1]
        moved = torch.stack([_derivative(layers, layer, ids, u) for u in directions], -1)
    mean = torch.einsum("btv,btvk->btk", logits.softmax(-1), moved)
    measured = (slopes @ directions.T).view(n, length, -1)
    # Clipping divides all by one number, which the labels that are known tell.
    known = mean[:, :-1] - _of_labels(moved[:, :-1], ids[:, 1:-1])
    scale = (known * measured[:, :-1]).sum() / measured[:, :-1].square().sum().clamp_min(1e-300)
    scale = scale if length > 1 else torch.ones_like(scale)
    wanted = mean[:, -1] - scale * measured[:, -1]
    return (moved[:, -1] - wanted[:, None]).square().sum(-1).argmin(1)


def _of_labels(moved: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    index = labels[..., None, None].expand(*labels.shape, 1, moved.shape[-1])
    return moved.gather(2, index).squeeze(2)


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
