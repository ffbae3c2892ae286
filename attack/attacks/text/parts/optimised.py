"""Embeddings that match a gradient, and the tokens that they read: what TAG and LAMP share."""

from __future__ import annotations

from typing import Any

import torch

from attack.attacks.text.parts.embedding_space import EmbeddingSpace
from attack.knowledge.labels import recover_most_exactly
from attack.loop.inversion import Inversion
from attack.reconstruction import Reconstruction
from attack.settings import InversionConfig
from core.losses import Targets
from core.target import Target

# What optimises embeddings: none of the priors on pictures.
EMBEDDINGS = InversionConfig(
    tv=0.0, signed=False, box=False, lr=0.1, lr_min=0.0, schedule="cosine", iterations=1000
)


def read_tokens(space: EmbeddingSpace, found: Reconstruction) -> torch.Tensor:
    """The tokens (N x T) nearest to optimised embeddings.

    The last token of a language model reads nothing; it is the last label.
    """
    ids = space.nearest(found.images)
    if space.target.loss.targets is Targets.TOKENS:
        ids[:, -1] = found.labels[:, -1]
    return ids


def labels_of(embedded: Target, labels: torch.Tensor | None) -> torch.Tensor | None:
    """The classes of a classifier, recovered if nobody knows them; of a language model None."""
    if embedded.loss.targets is Targets.TOKENS:
        return None
    return recover_most_exactly(embedded) if labels is None else labels


def optimised(
    space: EmbeddingSpace,
    labels: torch.Tensor | None,
    config: InversionConfig,
    device: torch.device,
    seed: int,
    run: dict[str, Any],
    start: torch.Tensor | None = None,
) -> Reconstruction:
    """Embeddings (N x T x width) that match the gradient.

    Args:
        space: Where to optimise.
        labels: N class indices; None: the targets are optimised along.
        config: Hyper-parameters.
        device: Device that runs the computation.
        seed: Of the start.
        run: See `Inversion.run`; pictures on the way are left out.
        start: Where to begin; None: normal numbers.
    """
    if labels is None:
        config = config.changed(joint_labels=True)
        labels = torch.zeros(space.target.batch_size, dtype=torch.long)
    inversion = Inversion(space.target, labels, config, device=device, seed=seed, prior=start)
    return inversion.run(**{**run, "on_snapshot": None, "snapshot_every": 0})
