"""Robbing the Fed on text: an imprint block behind the embedding (Fowl et al. 2022)."""

from __future__ import annotations

import time
from typing import Any, ClassVar

import torch
import torch.nn.functional as F

from attack.attacks.base import Attack, register_attack
from attack.attacks.parts.bins import read_bins
from attack.attacks.text.parts.optimised import labels_of
from attack.attacks.text.parts.result import as_many, text_reconstruction
from attack.knowledge.threat_models import Capability
from attack.reconstruction import Reconstruction
from core.errors import InputError
from core.losses import Targets
from core.models.malicious import ImprintedEmbedding, malice_of
from core.target import Target

# A bin whose bias gradient is below this share of the largest is empty.
EMPTY = {torch.float64: 1e-10, torch.float32: 1e-5}


@register_attack
class RobbingTheFedText(Attack):
    """Read whole sentences out of the bins of an imprint block behind the embedding.

    The server put the block there (stage 2: `--malicious imprint:BINS` with a language model). It
    measures all embeddings of a sentence along one direction. A sentence that is alone in its bin
    comes out as its embeddings, exactly, and each reads as the nearest token; of sentences that
    share a bin a mixture comes out, in which the one with the larger gradient is read in part.

    Source: Fowl, Geiping, Czaja, Goldblum, Goldstein, "Robbing the Fed: Directly Obtaining
        Private Data in Federated Learning with Modified Models", ICLR 2022,
        https://arxiv.org/abs/2110.13057; for text as in
        https://github.com/JonasGeiping/breaching, whose block adds to the embeddings.

    Published: .888 of the tokens of 128 sentences of 32 tokens with 512 bins, in the notebook of
        https://github.com/JonasGeiping/breaching (transformer3).

    Reproduced:
        robbing-the-fed-text: 0.835 (0.813 to 0.856, n = 8), 2026-11-29: below: of 128 sentences in
          512 bins that are equally likely, 78 % are alone in expectation and come out whole; the
          published value is of one batch.

    Example:
        python training/get_gradients.py --model core.models.language:gpt2 --loss next-token \\
            --data pydoc-topics -b 32 --model-eval --malicious imprint:512
        python main_run.py --attack robbing-the-fed-text --model core.models.language:gpt2 \\
            --checkpoint CHECKPOINT --metric
    """

    name = "robbing-the-fed-text"
    reads_tokens = True
    recovers_labels = True
    fits = frozenset({Targets.TOKENS, Targets.CLASSES})
    requires: ClassVar[frozenset[Capability]] = frozenset({Capability.MALICIOUS_SERVER})

    def reconstruct(
        self,
        target: Target,
        *,
        labels: torch.Tensor | None,
        device: torch.device,
        seed: int,
        **run: Any,
    ) -> Reconstruction:
        """See `Attack.reconstruct`; nothing is random.

        Raises:
            InputError: The model has no imprint block, or there are several local steps.
        """
        began = time.perf_counter()
        name, layer = self._block(target)
        weight, bias = (target.gradient[f"{name}.imprint.0.{part}"] for part in ("weight", "bias"))
        found = read_bins(
            -layer.imprint.get_parameter("0.bias").detach(),
            weight.double(),
            bias.double(),
            target.batch_size,
            EMPTY.get(weight.dtype, 1e-3),
        )
        vectors = F.normalize(layer.embedding.weight.detach()[: target.data.n_tokens].double())
        embeddings = F.normalize(found.unflatten(1, (target.data.shape[0], -1)), dim=-1)
        ids = torch.stack([(each @ vectors.T).argmax(-1) for each in embeddings])
        return text_reconstruction(
            target,
            as_many(ids, target.batch_size),
            labels_of(target, labels),
            began,
            {"bins": len(bias), "filled_bins": len(found)},
        )

    def _block(self, target: Target) -> tuple[str, ImprintedEmbedding]:
        """The imprint block's name, and what the server sent of it."""
        if not malice_of(target.model).startswith("imprint"):
            raise InputError(
                f"--attack {self.name}: {target.model.name} has no imprint block; a malicious "
                "server adds it in stage 2 with --malicious imprint:BINS"
            )
        if not target.local.shares_gradient:
            raise InputError(f"--attack {self.name}: needs the gradient of one local step")
        modules = target.build_model().named_modules()
        name, layer = next((n, m) for n, m in modules if isinstance(m, ImprintedEmbedding))
        shared = target.gradient.get(f"{name}.imprint.0.bias")
        if shared is None or not shared.any():
            raise InputError(f"--attack {self.name}: no gradient of the imprint block was shared")
        return name, layer
