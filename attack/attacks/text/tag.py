"""TAG: gradient matching in the space of embeddings (Deng et al. 2021)."""

from __future__ import annotations

import time
from typing import Any, ClassVar

import torch

from attack.attacks.base import register_attack
from attack.attacks.optimisation import OptimizationAttack
from attack.attacks.text.parts.embedding_space import embedding_space
from attack.attacks.text.parts.optimised import EMBEDDINGS, labels_of, optimised, read_tokens
from attack.attacks.text.parts.result import text_reconstruction
from attack.reconstruction import Reconstruction
from attack.settings import InversionConfig
from core.losses import Targets
from core.target import Target


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

    Reproduced:
        tag: 1.000 (1.000 to 1.000, n = 8), 2026-11-29: above.

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
