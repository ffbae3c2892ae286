"""LAMP: matching of embeddings in turn with a search over orders (Balunovic et al. 2022)."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from attack.attacks.base import register_attack
from attack.attacks.optimisation import OptimizationAttack
from attack.attacks.parts.closed_form import gradient_loss
from attack.attacks.text.parts.embedding_space import embedding_space
from attack.attacks.text.parts.optimised import EMBEDDINGS, labels_of, optimised, read_tokens
from attack.attacks.text.parts.result import text_reconstruction
from attack.reconstruction import Reconstruction
from attack.settings import InversionConfig
from core.losses import Targets
from core.models.unchanged import in_mode
from core.target import Target

# Optimisations, with a search over orders behind each.
ROUNDS = 4
# Orders that are tried per sentence and round.
TRIED = 24
# Weight of the language model's loss beside the gradient's distance.
FLUENCY = 0.01


@dataclass(frozen=True)
class _State:
    """Where the attack stands.

    Attributes:
        embeddings: N x T x width.
        ids: N x T, what they read.
        value: The gradient's distance and the weighted loss of the language model.
    """

    embeddings: torch.Tensor
    ids: torch.Tensor
    value: float


@register_attack
class Lamp(OptimizationAttack):
    """Optimise embeddings, then try other orders of the tokens, in turn.

    An order is kept where the distance of the gradients, plus a share of what the client's own
    language model says of the sentence, is smaller: two tokens exchanged, one moved, a span moved,
    or a beginning put to the end. A classifier has no language model, and the distance alone
    decides. The targets of a language model are optimised along, anew in every round.

    The paper's prior is GPT-2 as it is published, and it draws the lengths of embeddings to their
    mean; here the distance of an order is that of its tokens, not of the embeddings.

    Source: Balunovic, Dimitrov, Jovanovic and Vechev, "LAMP: Extracting Text from Gradients with
        Language Model Priors", NeurIPS 2022, algorithm 1, https://arxiv.org/abs/2202.08827.

    Example:
        python main_run.py --attack lamp --model core.models.language:gpt2 \\
            --checkpoint CHECKPOINT --metric
    """

    name = "lamp"
    reads_tokens = True
    recovers_labels = True
    fits = frozenset({Targets.TOKENS, Targets.CLASSES})
    published: ClassVar[InversionConfig] = EMBEDDINGS.changed(objective="sim")

    def reconstruct(
        self,
        target: Target,
        *,
        labels: torch.Tensor | None,
        device: torch.device,
        seed: int,
        **run: Any,
    ) -> Reconstruction:
        """See `Attack.reconstruct`; a state file is not kept."""
        began = time.perf_counter()
        run = {**run, "state_file": None}
        space = embedding_space(target)
        known = labels_of(space.target, labels)
        # The first round takes half of the iterations.
        half = max(1, self.config.optimiser.iterations // 2)
        first = self.config.changed(iterations=half)
        config = self.config.changed(iterations=max(1, half // (ROUNDS - 1)))
        generator = torch.Generator().manual_seed(seed)
        found = optimised(space, known, first, device, seed, run)
        state = _judged(target, found.images, read_tokens(space, found), known)
        moved = 0
        for _ in range(ROUNDS - 1):
            state, changes = _reordered(target, state, known, generator)
            moved += changes
            found = optimised(space, known, config, device, seed, run, start=state.embeddings)
            ids = read_tokens(space, found)
            state = min(state, _judged(target, found.images, ids, known), key=lambda s: s.value)
        state, changes = _reordered(target, state, known, generator)
        return text_reconstruction(
            target,
            state.ids,
            known,
            began,
            {"orders_changed": moved + changes},
            iterations=half + (ROUNDS - 1) * config.optimiser.iterations,
            status=found.status,
        )


def _judged(
    target: Target, embeddings: torch.Tensor, ids: torch.Tensor, labels: torch.Tensor | None
) -> _State:
    known = ids if labels is None else labels
    value = gradient_loss(target, ids, known, ids.device)
    if target.loss.targets is Targets.TOKENS:
        with torch.no_grad():
            value += FLUENCY * float(target.loss(in_mode(target.build_model(), False)(ids), ids))
    return _State(embeddings, ids, value)


def _reordered(
    target: Target, state: _State, labels: torch.Tensor | None, generator: torch.Generator
) -> tuple[_State, int]:
    """The best of some random orders of every sentence; how often one was better."""
    better = 0
    for sentence in range(len(state.ids)):
        for _ in range(TRIED):
            order = random_order(state.ids.shape[1], generator)
            embeddings, ids = state.embeddings.clone(), state.ids.clone()
            embeddings[sentence], ids[sentence] = embeddings[sentence][order], ids[sentence][order]
            tried = _judged(target, embeddings, ids, labels)
            if tried.value < state.value:
                state, better = tried, better + 1
    return state, better


def random_order(length: int, generator: torch.Generator) -> torch.Tensor:
    """A change of order: two tokens exchanged, one or a span moved, or a beginning put last."""
    order = torch.arange(length)

    def drawn(end: int) -> int:
        return int(torch.randint(end, (), generator=generator))

    kind = drawn(4)
    if kind == 0:
        a, b = drawn(length), drawn(length)
        order[[a, b]] = order[[b, a]]
        return order
    if kind == 3:
        return order.roll(-drawn(length))
    size = 1 if kind == 1 else 1 + drawn(max(1, length // 2))
    first = drawn(length - size + 1)
    rest = torch.cat([order[:first], order[first + size :]])
    place = drawn(len(rest) + 1)
    return torch.cat([rest[:place], order[first : first + size], rest[place:]])
