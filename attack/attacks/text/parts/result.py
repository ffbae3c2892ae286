"""From recovered token ids to a reconstruction, and what a stated defense adds."""

from __future__ import annotations

import itertools
import time
from typing import Any

import torch

from attack.attacks.parts.closed_form import gradient_loss
from attack.attacks.text.parts.embedding_space import embedding_space
from attack.knowledge.labels import recover_most_exactly
from attack.reconstruction import Reconstruction
from core.data.specs import DataSpec
from core.errors import InputError
from core.losses import Targets
from core.target import Target

# Times that every two labels of a batch are tried the other way round.
SWEEPS = 2


def text_reconstruction(
    target: Target,
    ids: torch.Tensor,
    labels: torch.Tensor | None,
    began: float,
    details: dict[str, Any],
    **result: Any,
) -> Reconstruction:
    """A reconstruction from sentences of token ids.

    Args:
        target: What the client shared.
        ids: N x T.
        labels: N class indices where they are known; of a language model the ids are.
        began: `time.perf_counter()` at the start of the attack.
        details: See `Reconstruction`.
        result: Further fields of it.
    """
    known = ids if target.loss.targets is Targets.TOKENS else labels
    shown = torch.zeros(len(ids), dtype=torch.long) if known is None else known
    objective = float("nan") if known is None else gradient_loss(target, ids, known, ids.device)
    return Reconstruction(
        images=ids,
        labels=shown.cpu(),
        objective=objective,
        seconds=time.perf_counter() - began,
        details=details,
        data=target.data,
        **result,
    )


def arranged(target: Target, ids: torch.Tensor, labels: torch.Tensor | None) -> torch.Tensor | None:
    """The labels of a classifier's sentences in an order that explains the gradient.

    Two labels are exchanged while that brings the gradient nearer to the shared one.

    Args:
        target: What the client shared.
        ids: N x T, in any order.
        labels: N class indices in another order; None: they are recovered first.

    Returns:
        None for a language model, and where no rule recovers them.
    """
    if target.loss.targets is not Targets.CLASSES:
        return labels
    if labels is None:
        try:
            labels = recover_most_exactly(embedding_space(target).target)
        except InputError:
            return None
    order = labels.clone()
    best = gradient_loss(target, ids, order, ids.device)
    pairs = list(itertools.combinations(range(len(order)), 2))
    for i, j in pairs * SWEEPS:
        if order[i] == order[j]:
            continue
        tried = order.clone()
        tried[[i, j]] = order[[j, i]]
        value = gradient_loss(target, ids, tried, ids.device)
        if value < best:
            order, best = tried, value
    return order


def lengths_of(ids: torch.Tensor, data: DataSpec) -> torch.Tensor:
    """Tokens of each of N sentences (N x T), without what fills them up."""
    return data.is_word(ids).sum(1)


def as_many(ids: torch.Tensor, batch_size: int) -> torch.Tensor:
    """N sentences from k x T token ids: what was not found repeats what was, or is token 0."""
    if not len(ids):
        return torch.zeros((batch_size, ids.shape[1]), dtype=torch.long)
    return ids[torch.arange(batch_size) % len(ids)].clone()


def noise_of(target: Target) -> float:
    """Standard deviation of the noise that the client says it added to every number."""
    squares = 0.0
    for word in target.defenses:
        name, _, value = word.partition(":")
        factor = {"gaussian": 1.0, "laplace": 2.0}.get(name, 0.0)
        squares += factor * float(value) ** 2 if factor else 0.0
    return squares**0.5


def is_pruned(target: Target) -> bool:
    """Whether the client says that it set the smallest numbers of its update to zero."""
    return any(word.partition(":")[0] in ("prune", "topk") for word in target.defenses)
