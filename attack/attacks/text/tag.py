"""TAG: gradient matching in the space of embeddings (Deng et al. 2021)."""

from __future__ import annotations

import time
from typing import Any, ClassVar

import torch

from attack.attacks.base import register_attack
from attack.attacks.optimisation import OptimizationAttack
from attack.attacks.text.parts.embedding_space import EmbeddingSpace, embedding_space
from attack.attacks.text.parts.result import text_reconstruction
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


@register_attack
class Tag(OptimizationAttack):
    """Match the gradient by embeddings that are optimised freely; read each as the nearest token.

    The distance of two gradients is the squared one plus a tenth of the absolute one. The targets
    of a language model are optimised along, as a distribution over tokens at every position; of a
    classifier the labels are recovered first. The gradient of the embedding itself is not used.

    Embeddings are in units of their spread, so that one learning rate suits models trained or not;
    the rate falls along a cosine, the paper's linearly.

    Source: Deng et al., "TAG: Gradient Attack on Transformer-based Language Models", Findings of
        EMNLP 2021, eq. 4 and algorithm 1, https://arxiv.org/abs/2103.06819.

    Published: token accuracy .875 and ROUGE-1 .80 on one sentence of 16 tokens after 1,000
        iterations, random weights, in the notebook of https://github.com/JonasGeiping/breaching.

    Example:
        python main_run.py --attack tag --model core.models.language:gpt2 \\
            --checkpoint CHECKPOINT --metric
    """

    name = "tag"
    reads_tokens = True
    recovers_labels = True
    fits = frozenset({Targets.TOKENS, Targets.CLASSES})
    published: ClassVar[InversionConfig] = EMBEDDINGS.changed(objective="L2+L1")

    def reconstruct(
        self,
        target: Target,
        *,
        labels: torch.Tensor | None,
        device: torch.device,
        seed: int,
        **run: Any,
    ) -> Reconstruction:
        """See `Attack.reconstruct`."""
        began = time.perf_counter()
        space = embedding_space(target)
        known = labels_of(space.target, labels)
        found = optimised(space, known, self.config, device, seed, run)
        ids = read_tokens(space, found)
        return text_reconstruction(
            target,
            ids,
            known,
            began,
            {"embedding_objective": found.objective},
            trace=found.trace,
            iterations=found.iterations,
            status=found.status,
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
