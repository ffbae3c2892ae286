"""Gradient matching of a batch in pieces, so that one piece's activations are held at a time.

The gradient of a mean loss over images is the sum of its pieces' gradients. A first pass over the
pieces sums them; the objective and its derivative v are those of the sum; a second pass
differentiates each piece along the same v. So the result is that of the whole batch, up to the
order of a sum, for a network that treats images one by one. BatchNorm on the statistics of the
batch does not, and is refused.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from attack.matching.held_state import RandomNumbers
from attack.matching.match import Match, Penalty, Tensors, filled, match_of, pulled_back
from attack.matching.matcher import GradientMatcher
from attack.matching.objectives import Objective
from attack.matching.replica import Replica
from attack.matching.second_derivative import TwiceDifferentiable
from attack.matching.switches import RecordActivations, ReplayActivations
from attack.settings import SettingError, setting_error
from core.losses import main_output
from core.models.kinds import BatchNorm
from core.models.unchanged import random_numbers_held

# Between an image's outputs alone and beside another one, as a share of the largest.
ALIKE = 1e-3

Piece = tuple[torch.Tensor, torch.Tensor]


class PieceMatcher(GradientMatcher):
    """`GradientMatcher` over a few images at a time.

    Args:
        replica: The client's computation.
        objective: Distance between gradients.
        hvp: As of `GradientMatcher`.
        at_once: Images in one pass.

    Raises:
        SettingError: The images of the batch cannot be taken apart; says why.

    Example:
        >>> matcher = PieceMatcher(Replica(target, device), Cosine(), "auto", at_once=8)
        >>> match = matcher(inputs, labels)
    """

    def __init__(
        self, replica: Replica, objective: Objective, hvp: str = "auto", at_once: int = 1
    ) -> None:
        reason = _reason_against(replica)
        if reason is not None:
            raise _refusal(reason)
        # A factored pass holds the factors of the whole batch.
        super().__init__(replica, objective, hvp, factor=False)
        self.at_once = at_once
        # Restarts share no call: memory is what is short.
        self._batches = False

    def _pieces(self, inputs: torch.Tensor, labels: torch.Tensor) -> Iterator[Piece]:
        return zip(inputs.split(self.at_once), labels.split(self.at_once), strict=True)

    def _count_call(self, inputs: torch.Tensor, labels: torch.Tensor) -> None:
        if self.calls == 0:
            self._refuse_mixed_images(inputs)
        super()._count_call(inputs, labels)

    def _refuse_mixed_images(self, inputs: torch.Tensor) -> None:
        """Refuse a network that gives an image other outputs beside another one."""
        if len(inputs) < 2:
            return
        with random_numbers_held(inputs.device), torch.no_grad():
            first, again, second, together = (
                main_output(self.replica.model(images))
                for images in (inputs[:1], inputs[:1], inputs[1:2], inputs[:2])
            )
        if not torch.equal(first, again):
            # Random masks of two images are not those of one: there is nothing to compare.
            return
        difference = float((torch.cat([first, second]) - together).abs().max())
        if difference > ALIKE * float(together.abs().max()):
            raise _refusal("the network mixes the images of a batch")

    def exact(self) -> GradientMatcher:
        """See `GradientMatcher.exact`."""
        return PieceMatcher(self.replica, self.objective, "exact", self.at_once)

    def value(self, inputs: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """The objective alone, a scalar in float64."""
        return self._value_and_seed(self._sum_of_pieces(self._laid_out(inputs), labels))[0]

    def _sum_of_pieces(self, inputs: torch.Tensor, labels: torch.Tensor) -> Tensors:
        """The gradient of this process's images in the parameters."""
        with _SummedGradients(self.replica.parameters) as summed:
            for x, y in self._pieces(inputs, labels):
                summed.add(self.replica.loss(self.replica.model, x, y))
            return summed.total()

    def exact_match(
        self,
        inputs: torch.Tensor,
        labels: torch.Tensor,
        weight: float,
        penalty: Callable[[nn.Module], Penalty] | None,
        apart: bool = False,
        frozen: object = None,
    ) -> Match:
        """See `GradientMatcher.exact_match`; one more pass, which sums the pieces."""
        _refuse_penalty(penalty)
        random_numbers = RandomNumbers(inputs.device)
        # The kernels of the second pass, so that the sum is that of what it differentiates.
        with sdpa_kernel(SDPBackend.MATH), TwiceDifferentiable():
            value, seed = self._value_and_seed(self._sum_of_pieces(inputs, labels))
            cotangents = seed if weight == 1 else list(torch._foreach_mul(seed, weight))
            random_numbers.rewind()
            found = []
            for x, y in self._pieces(inputs, labels):
                variables = self._variables(x, y)
                loss = self.replica.loss(self.replica.model, *filled(variables, y))
                gradient = self._gradients(loss, self.replica.parameters, create_graph=True)
                found.append(pulled_back(gradient, cotangents, variables))
        return match_of(value, _joined(found), None, None)

    def difference_match(
        self,
        inputs: torch.Tensor,
        labels: torch.Tensor,
        weight: float,
        penalty: Callable[[nn.Module], Penalty] | None,
        step: float,
        apart: bool = False,
    ) -> Match:
        """See `GradientMatcher.difference_match`; of the first pass, switches are held."""
        _refuse_penalty(penalty)
        random_numbers = RandomNumbers(inputs.device)
        at_theta: list[Tensors] = []
        records: list[RecordActivations] = []
        with _SummedGradients(self.replica.parameters) as summed:
            for x, y in self._pieces(inputs, labels):
                variables = self._variables(x, y)
                with RecordActivations() as record:
                    loss = self.replica.loss(self.replica.model, *filled(variables, y))
                at_theta.append(summed.add(loss, variables))
                records.append(record)
            total = summed.total()
        value, moved, h = self._moved_parameters(total, step)
        # The same dropout masks as in the first pass.
        random_numbers.rewind()
        results = []
        for (x, y), before, record in zip(
            self._pieces(inputs, labels), at_theta, records, strict=True
        ):
            variables = self._variables(x, y)
            with self._at(self._moved, moved, ReplayActivations(record.replays, record.switches)):
                loss = self.replica.loss(self._perturbed, *filled(variables, y))
                after = self._gradients(loss * (weight / h), variables)
            pairs = zip(before, after, strict=True)
            results.append([b.sub_(a, alpha=weight / h) for a, b in pairs])
        return match_of(value, _joined(results), None, None)


class _SummedGradients:
    """Within the block, gradients are added where they arise, layer by layer.

    Two whole gradients, the sum and one piece's, are never held at a time.

    Args:
        parameters: Leaves without gradients.
    """

    def __init__(self, parameters: Tensors) -> None:
        self._parameters = parameters

    def __enter__(self) -> _SummedGradients:
        return self

    def __exit__(self, *_: object) -> None:
        for parameter in self._parameters:
            parameter.grad = None

    def add(self, loss: torch.Tensor, variables: Sequence[torch.Tensor] = ()) -> Tensors:
        """Add a loss's gradient in the parameters; returns that in the variables."""
        torch.autograd.backward(loss, inputs=[*self._parameters, *variables])
        return [_gradient_of(variable) for variable in variables]

    def total(self) -> Tensors:
        """The sum; zero in parameters that the forward pass does not use."""
        return [_gradient_of(parameter) for parameter in self._parameters]


def _gradient_of(leaf: torch.Tensor) -> torch.Tensor:
    return torch.zeros_like(leaf) if leaf.grad is None else leaf.grad


def _joined(pieces: list[Tensors]) -> Tensors:
    """What belongs to each variable, in the order of the batch."""
    return [torch.cat(parts) for parts in zip(*pieces, strict=True)]


def _refusal(reason: str) -> SettingError:
    return setting_error(f"{{images_at_once}}: {reason}")


def _refuse_penalty(penalty: Callable[[nn.Module], Penalty] | None) -> None:
    if penalty is not None:
        raise _refusal("a penalty on layers' statistics needs the whole batch in one pass")


def _reason_against(replica: Replica) -> str | None:
    """Why the images of a batch cannot be taken apart; None where they can."""
    if not replica.local.shares_gradient:
        return f"the target comes from {replica.local.steps} local step(s) of training"
    if not replica.client_loss.mean_over_samples:
        return "the client's loss is no mean over its samples"
    if replica.knows_masks:
        return "the client's dropout masks are those of its whole batch"
    training = [m for m in replica.model.modules() if isinstance(m, BatchNorm) and m.training]
    if training:
        return "the client's BatchNorm used the statistics of its whole batch"
    return None
