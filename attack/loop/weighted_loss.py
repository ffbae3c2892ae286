"""Values and gradients of everything that an iteration minimises."""

from __future__ import annotations

import functools
import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from attack.matching.plain_operators import Pass, plain_operators
from attack.priors.contrast import hidden_contrast, without_contrast
from attack.priors.regularizers import GroupConsistency, ModelPenalty, Regularizer, weighted_penalty
from core.errors import first_line
from core.processes import distributed

if TYPE_CHECKING:
    from attack.loop.problem import InversionProblem
    from attack.loop.restarts import Restart
    from attack.matching.match import Match, Matcher

logger = logging.getLogger(__name__)

# Parameters below which batched restarts pay on a CPU: 1.4 times faster with a ResNet-18 of
# 0.7 million at 32 px, no faster with a ConvNet of 2.9 million.
SMALL_MODEL = 1_000_000


class WeightedLoss:
    """Evaluates restarts where they stand.

    Args:
        problem: The target and how this process inverts it.
        matcher: The gradient loss.
        penalties: Weighted penalties on what the model shows of the candidates.
        regularizers: Weighted penalties on the images alone.
    """

    def __init__(
        self,
        problem: InversionProblem,
        matcher: Matcher,
        penalties: Sequence[tuple[float, ModelPenalty]],
        regularizers: Sequence[tuple[float, Regularizer]],
    ) -> None:
        self.problem, self.matcher, self.config = problem, matcher, problem.config
        self.penalties, self.regularizers = list(penalties), list(regularizers)
        # For inputs of one shape, see `_traced_prior`.
        self._prior: tuple[torch.Size, Pass] | None = None
        # Made once: a compiled pass knows its penalty by identity.
        self._penalty = self._weighted_penalty()
        self._most_at_once: int | None = None
        # Which of this process's images have a contrast that is kept; None: no image.
        self._hidden = None
        if self.config.priors.keep_contrast:
            replica = problem.replica
            batch = problem.target.batch_size
            self._hidden = hidden_contrast(replica.model, batch, replica.groups)
        # By regulariser, this process's part of its weighted value at the last `prior`.
        self.last_terms: dict[str, torch.Tensor] = {}

    def match(self, restart: Restart, inputs: torch.Tensor) -> Match:
        """The gradient loss and the model's penalties at a restart's inputs."""
        logits = restart.label_logits
        return self.matcher(
            inputs,
            self.problem.labels if logits is None else logits.detach(),
            weight=self.config.matching.gradient_weight,
            penalty=self._penalty,
            apart=self.config.priors.balance is not None,
        )

    def _weighted_penalty(self) -> ModelPenalty | None:
        if not self.penalties:
            return None
        if self.config.priors.balance is not None:
            # Only the direction of the BatchNorm term counts there.
            return self.penalties[0][1]
        return weighted_penalty(self.penalties)

    def prior(
        self, inputs: torch.Tensor, consensus: torch.Tensor | None
    ) -> tuple[float, torch.Tensor | None]:
        """Value and gradient of the weighted regularisers, as this process's part."""
        terms = list(self.regularizers)
        together = self.config.consensus
        if consensus is not None and together.group > 0:
            squared = not together.registration
            terms.append((together.group, GroupConsistency(consensus, squared)))
        if not terms:
            return 0.0, None
        if len(terms) == len(self.regularizers) and self.config.speed.trace:
            total, parts, gradient = self._traced_prior(inputs.detach())
        else:
            total, parts, gradient = self._differentiated(terms, inputs)
        names = [type(regularizer).__name__ for _, regularizer in terms]
        self.last_terms = dict(zip(names, parts.unbind(), strict=True))
        return float(total), self.less_contrast(gradient, inputs)

    def _differentiated(
        self, terms: Sequence[tuple[float, Regularizer]], inputs: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """The sum of weighted regularisers, each of them, and the gradient of the sum."""
        leaf = inputs.detach().requires_grad_()
        values = torch.stack([weight * r(leaf).sum() for weight, r in terms])
        total = values.sum()
        total = total / self.problem.target.batch_size
        parts = values.detach() / self.problem.target.batch_size
        (gradient,) = torch.autograd.grad(total, leaf)
        return total.detach(), parts, gradient

    def _traced_prior(
        self, inputs: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """The same of the regularisers that never change, as a list of operators.

        It is written down at the first call, and again for inputs of another shape.
        """
        if self._prior is None or self._prior[0] != inputs.shape:
            own: Pass = functools.partial(self._differentiated, self.regularizers)
            try:
                own = plain_operators(own, (inputs,))
            # What a user's own regulariser may raise has no common base.
            except Exception as error:
                logger.warning("--trace leaves the priors as they are: %s", first_line(error))
            self._prior = inputs.shape, own
        total, parts, gradient = self._prior[1](inputs)
        return total, parts, gradient

    def less_contrast(self, gradient: torch.Tensor, inputs: torch.Tensor) -> torch.Tensor:
        """The priors' gradient, which leaves the contrast alone where it is hidden.

        Args:
            gradient: Of the priors in the images of one batch, or of several one after the
                other (N x C x ...).
            inputs: The images.
        """
        if self._hidden is None:
            return gradient
        less = without_contrast(gradient, inputs)
        if all(self._hidden):
            return less
        hidden = torch.tensor(self._hidden, device=inputs.device)
        return torch.where(hidden.view(-1, *[1] * (inputs.dim() - 1)), less, gradient)

    # -- Several restarts in one call ---------------------------------------------

    def together(self, restarts: Sequence[Restart]) -> dict[int, Match]:
        """The matches of all restarts from batched calls, by index; empty where not batched."""
        at_once = self.at_once(len(restarts))
        try:
            return self._in_groups(restarts, at_once) if at_once > 1 else {}
        except torch.cuda.OutOfMemoryError:
            # What activations take is known only when they are there.
            logger.info("%d restarts in one call do not fit; trying half as many", at_once)
            self._most_at_once = at_once // 2
        # Not within the handler: its traceback keeps what did not fit.
        torch.cuda.empty_cache()
        return self.together(restarts)

    def _in_groups(self, restarts: Sequence[Restart], at_once: int) -> dict[int, Match]:
        matches: dict[int, Match] = {}
        for first in range(0, len(restarts), at_once):
            group = restarts[first : first + at_once]
            inputs = torch.stack([self.problem.inputs(restart) for restart in group])
            found = self.matcher.several(inputs, self.problem.labels)
            for restart, match in zip(group, found, strict=True):
                match.input_gradient.mul_(self.config.matching.gradient_weight)
                matches[restart.index] = match
        return matches

    def at_once(self, n_restarts: int) -> int:
        """How many restarts one call evaluates; 1 where a batched call is not possible."""
        if n_restarts < 2 or not self._batchable():
            return 1
        if self._most_at_once is None:
            # Once: memory that the allocator keeps for later no longer counts as free.
            self._most_at_once = self.config.speed.restarts_at_once or self._estimated()
        return max(1, min(self._most_at_once, n_restarts))

    def _estimated(self) -> int:
        """How many restarts pay in one call, as far as parameters tell."""
        n_parameters = sum(p.numel() for p in self.problem.replica.parameters)
        if self.problem.device.type == "cpu":
            # Batching saves the overhead of many small kernels; large layers gain nothing.
            return self.config.starts.restarts if n_parameters < SMALL_MODEL else 1
        # Gradient, perturbed copy and its update are kept per restart.
        bytes_each = 16 * n_parameters
        free, _ = torch.cuda.mem_get_info(self.problem.device)
        return int(free // (4 * bytes_each))

    def _batchable(self) -> bool:
        return (
            not self.penalties
            and self.problem.target.loss.batchable
            and not self.config.matching.joint_labels
            and self.config.optimiser.name != "LBFGS"
            and not self.config.speed.traced
            and not self.config.speed.images_at_once
            and self.problem.target.local.shares_gradient
            and self.problem.replica.groups is None
            and distributed.world_size() == 1
        )
