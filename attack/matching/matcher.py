"""Gradient matching: the objective and its gradient in the images.

Let g(x) = grad_theta L(theta, x) be the gradient of a candidate batch x, t the
target gradient, D the objective and v = dD/dg. Wanted is dD/dx, which is both

    (dg/dx)^T v                                  a second backward pass ("exact"), and
    d/dh grad_x L(theta + h v, x) at h = 0       a difference of two first-order
                                                 passes ("difference").

The second form needs no double backward: grad_x L(theta) falls out of the pass
that computes g, and the perturbed pass needs the gradient of the images only.
Frozen activation switches (see `attack.matching.switches`) make the difference that of
a smooth function.

A batch may be spread over processes. Only parameter gradients travel, summed in
one flat buffer; each process differentiates its own images.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import CheckpointError

from attack.matching.held_state import RandomNumbers, buffers_standing
from attack.matching.late_layers import Factored, find_layers, saves_sweeps
from attack.matching.match import (
    Match,
    Penalty,
    Tensors,
    filled,
    fresh_variables,
    match_of,
    penalty_gradient,
    pulled_back,
)
from attack.matching.objectives import (
    Objective,
    Products,
    inner_product,
    pieces_of,
    products_with,
    squared_norm,
)
from attack.matching.replica import Replica, laid_out_as
from attack.matching.second_derivative import (
    TwiceDifferentiable,
    explain_missing_derivative,
    has_own_functions,
    refuse_silent_gaps,
)
from attack.matching.switches import (
    RecordActivations,
    ReplayActivations,
)
from attack.settings import HVP_MODES, setting_error
from core.errors import InputError, first_line
from core.models.architecture import copied
from core.models.unchanged import random_numbers_held
from core.processes import distributed
from core.records import fits

if TYPE_CHECKING:
    from attack.matching.clipping import SampleClipping

logger = logging.getLogger(__name__)

# Relative size of the parameter perturbation to try, best first, by precision.
STEP_SIZES = {
    torch.float64: (1e-7, 1e-6, 1e-8),
    torch.float32: (1e-5, 1e-4, 3e-6, 1e-3),
}
ACCEPTED_COSINE = 0.9999
CHECK_EVERY = 250
# Batches with more values are checked on images with about half as many: one of 224 px.
CALIBRATED_VALUES = 1 << 18
# Calls that do not try factored gradients after one whose products had lost their digits.
CALLS_WITHOUT_FACTORS = 20


@dataclass
class _FirstPass:
    """What the pass at theta leaves for the second one.

    Attributes:
        value: The objective, a scalar in float64.
        at_theta: Gradients of the loss in what is optimised.
        h: Step along the objective's derivative in the parameters.
        moved: Within it the perturbed model is at theta + h v, with frozen switches.
    """

    value: torch.Tensor
    at_theta: Sequence[torch.Tensor]
    h: float
    moved: contextlib.AbstractContextManager[Any]


class _Swept:
    """Parameters whose gradients are written out.

    Args:
        theta: The parameters.
        goal: Their shared gradients, in the same layout.

    Attributes:
        theta: The parameters.
        goal_pieces: See `pieces_of`; cut once.
    """

    def __init__(self, theta: Tensors, goal: Tensors) -> None:
        self.theta, self.goal_pieces = theta, pieces_of(goal)
        self._theta_pieces = pieces_of(theta)

    def move(self, gradient: Tensors, a: float, b: float) -> None:
        """Overwrite the pieces of a gradient g by theta + a g + b goal."""
        for g, t, p in zip(gradient, self.goal_pieces, self._theta_pieces, strict=True):
            # What is small is added first: the sum with theta rounds only once.
            g.mul_(a).add_(t, alpha=b).add_(p)


class GradientMatcher:
    """The objective and its gradient in the images for one target.

    A subclass may compute the same in another way: `exact_match` and `difference_match` are one
    evaluation each, `calibrate` decides between them on what `sampled` and `exact_as_recorded`
    give.

    Args:
        replica: The client's computation.
        objective: Distance between gradients.
        hvp: "exact", "difference", or "auto": the difference while it agrees with
            the exact one, which is checked at the start and every `CHECK_EVERY` calls.
        factor: Keep late layers' gradients as products (see `attack.matching.late_layers`).
        clipping: What the client's per-sample clipping does to a candidate; None: it
            does not clip.
        clipped_from: Share of the iterations before a candidate is clipped.

    Raises:
        InputError: Unknown `hvp`.

    Example:
        >>> matcher = GradientMatcher(Replica(target, device), Cosine())
        >>> match = matcher(inputs, labels)
    """

    def __init__(
        self,
        replica: Replica,
        objective: Objective,
        hvp: str = "auto",
        factor: bool = True,
        clipping: SampleClipping | None = None,
        clipped_from: float = 0.0,
    ) -> None:
        if hvp not in HVP_MODES:
            raise setting_error(f"{{hvp}} {hvp}: choose one of {', '.join(HVP_MODES)}")
        self.replica = replica
        self.objective = objective
        self.hvp = hvp
        self._clips, self._clipped_from = clipping, clipped_from
        self.clipping = clipping if clipped_from == 0 else None
        self.factor = factor
        self.calls = 0
        self.agreement: float | None = None
        self._steps = STEP_SIZES[_precision(replica.target_gradient)]
        self.step: float | None = self._steps[0] if hvp != "exact" else None
        self._perturbed = _sharing_copy(replica.model)
        moved = dict(self._perturbed.named_parameters())
        self._moved: Tensors = [moved[name] for name in replica.names]
        self._swept = _Swept(_detached(replica.parameters), replica.target_gradient)
        # Those beside the factored ones.
        self._beside = self._swept
        self._surveyed: torch.Size | None = None
        self._factored: Factored | None = None
        self._near = 0
        # Whether restarts can be evaluated in one batched call.
        self._batches = True
        self._target_squared = float(squared_norm(replica.target_gradient))
        # Parameters may all be zero yet, as biases are.
        self._theta_norm = float(squared_norm(_detached(replica.parameters)).sqrt()) or 1.0
        if not replica.local.shares_gradient:
            self._require_one_process()
            self.hvp, self.step = "exact", None

    def __call__(
        self,
        inputs: torch.Tensor,
        labels: torch.Tensor,
        *,
        weight: float = 1.0,
        penalty: Callable[[nn.Module], Penalty] | None = None,
        apart: bool = False,
    ) -> Match:
        """Evaluate the objective.

        Args:
            inputs: n x C x H x W, normalised; this process's images.
            labels: n labels, or the variables that stand for them (see `Replica.optimises`).
            weight: Factor of the objective in the gradients.
            penalty: Called with the model before a forward pass; what it returns is
                called after it for a differentiable scalar.
            apart: Keep the penalty's gradient apart, at the cost of a backward pass.
        """
        inputs = self._laid_out(inputs)
        with explain_missing_derivative(self.replica.model, inputs, self.replica.local.steps):
            match = self._evaluate(inputs, labels, weight, penalty, apart)
        match.input_gradient = match.input_gradient.contiguous()
        if match.penalty_gradient is not None:
            match.penalty_gradient = match.penalty_gradient.contiguous()
        return match

    def _laid_out(self, inputs: torch.Tensor) -> torch.Tensor:
        return inputs.contiguous(memory_format=self.replica.layout)

    def _evaluate(
        self,
        inputs: torch.Tensor,
        labels: torch.Tensor,
        weight: float,
        penalty: Callable[[nn.Module], Penalty] | None,
        apart: bool,
    ) -> Match:
        if self.clipping is not None:
            return self._clipped(inputs, labels, weight, penalty, apart)
        self._count_call(inputs, labels)
        with self.replica.masks():
            if self.step is None:
                return self.exact_match(inputs, labels, weight, penalty, apart)
            return self.difference_match(inputs, labels, weight, penalty, self.step, apart)

    def _variables(self, inputs: torch.Tensor, labels: torch.Tensor) -> Tensors:
        return fresh_variables(inputs, labels, self.replica.optimises(labels))

    @staticmethod
    def _gradients(
        loss: torch.Tensor, wanted: Sequence[torch.Tensor], create_graph: bool = False
    ) -> Tensors:
        """The loss's derivatives; zero in parameters that the forward pass does not use."""
        found = torch.autograd.grad(
            loss, list(wanted), create_graph=create_graph, materialize_grads=True
        )
        return list(found)

    def _count_call(self, inputs: torch.Tensor, labels: torch.Tensor) -> None:
        if self.hvp == "auto" and self.calls % CHECK_EVERY == 0:
            self.calibrate(inputs, labels)
        if self.hvp == "exact" and self.calls == 0:
            self._refuse_silent_gaps(inputs)
        self.calls += 1

    def _refuse_silent_gaps(self, inputs: torch.Tensor) -> None:
        """Where no difference agrees with the second derivative, or none is taken.

        Of torch's own operators it lacks nothing silently: a deep ReLU network has kinks enough for
        a difference to disagree.
        """
        if distributed.world_size() > 1 or self.replica.groups is not None:
            # BatchNorm over processes or groups is a function of our own.
            return
        if has_own_functions(self.replica.model, inputs):
            refuse_silent_gaps(self.replica.model, inputs, self.replica.local.steps)

    def several(self, inputs: torch.Tensor, labels: torch.Tensor) -> list[Match]:
        """Evaluate several restarts in one batched call.

        Every restart has BatchNorm statistics of its own. The results are those of
        calling the matcher once per restart, up to rounding; where differences are not
        in use, or images are clipped one by one, that is what happens.

        Args:
            inputs: R x n x C x H x W, normalised.
            labels: n labels, the same for all restarts.
        """
        if self.clipping is not None or self.replica.knows_masks:
            return [self(one, labels) for one in inputs]
        self._count_call(inputs[0], labels)
        if self.step is None:
            return [self.exact_match(one, labels, 1.0, None) for one in inputs]
        if self._batches:
            try:
                with buffers_standing(self._perturbed):
                    return self._several_differences(inputs, labels, self.step)
            except torch.OutOfMemoryError:
                raise
            except RuntimeError as error:
                # What cannot be batched: random masks, checkpointed blocks, buffers that move.
                self._batches = False
                logger.debug("restarts run one by one (%s)", first_line(error))
        each = (self._laid_out(one) for one in inputs)
        return [self.difference_match(one, labels, 1.0, None, self.step) for one in each]

    def _several_differences(
        self, inputs: torch.Tensor, labels: torch.Tensor, step: float
    ) -> list[Match]:
        # Batched over restarts, weights become those of grouped convolutions, which channels
        # last are slow.
        plain = [p.contiguous() for p in _detached(self.replica.parameters)]
        theta = dict(zip(self.replica.names, plain, strict=True))
        record = RecordActivations()

        def first(parameters: dict[str, torch.Tensor], x: torch.Tensor) -> Any:
            record.replays.clear()
            record.switches.clear()
            with record:
                loss = self._functional_loss(parameters, x, labels)
            return loss, list(record.switches)

        def second(
            parameters: dict[str, torch.Tensor], x: torch.Tensor, switches: list[Any]
        ) -> torch.Tensor:
            with ReplayActivations(record.replays, switches):
                return self._functional_loss(parameters, x, labels)

        pair = torch.func.grad(first, argnums=(0, 1), has_aux=True)
        (gradients, at_theta), switches = torch.func.vmap(pair, in_dims=(None, 0))(theta, inputs)
        moved = {n: t.expand(len(inputs), *t.shape).clone() for n, t in theta.items()}
        values, lengths = [], []
        for restart in range(len(inputs)):
            value, seed = self._value_and_seed([gradients[n][restart] for n in theta])
            h = self._perturbation(float(squared_norm(seed).sqrt()), step)
            torch._foreach_add_([moved[n][restart] for n in theta], seed, alpha=h)
            values.append(value)
            lengths.append(h)
        at_moved = torch.func.vmap(torch.func.grad(second, argnums=1))(moved, inputs, switches)
        return [
            Match(value, (b - a) / h)
            for value, a, b, h in zip(values, at_theta, at_moved, lengths, strict=True)
        ]

    def _functional_loss(
        self, parameters: dict[str, torch.Tensor], x: torch.Tensor, labels: torch.Tensor
    ) -> torch.Tensor:
        return self.replica.loss(
            lambda z: torch.func.functional_call(self._perturbed, parameters, (z,)), x, labels
        )

    def _perturbation(self, length: float, step: float) -> float:
        """h such that h times a seed of this length is `step` times as long as theta."""
        # A length that has overflowed is at least so long.
        return step * self._theta_norm / min(max(length, 1e-30), 1e30)

    def at(self, iteration: int, iterations: int) -> bool:
        """Clip the candidates' images like the client's, once they have taken shape.

        See `attack.matching.match.Matcher`.
        """
        first = int(self._clipped_from * iterations)
        if self._clips is None or iteration < first:
            return False
        self.clipping = self._clips
        return iteration == first

    def exact(self) -> GradientMatcher:
        """A matcher of the same objective, clipped as this one is now, by two backward passes."""
        return GradientMatcher(self.replica, self.objective, "exact", clipping=self.clipping)

    def details(self) -> dict[str, Any]:
        """How well differences agreed with the exact derivative, and their step."""
        return {"hvp_agreement": self.agreement, "hvp_step": self.step}

    def value(self, inputs: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """The objective alone, a scalar in float64."""
        inputs = self._laid_out(inputs)
        if self.clipping is not None:
            gradient = self.clipping.mean_gradient(inputs, self.replica.targets_of(labels))
        elif not self.replica.local.shares_gradient:
            gradient = self.replica.update(inputs, labels, create_graph=False)
        else:
            with self.replica.masks():
                loss = self.replica.loss(self.replica.model, inputs, labels)
            gradient = self._gradients(loss, self.replica.parameters)
        return self._value_and_seed(_detached(gradient))[0]

    def _require_one_process(self) -> None:
        if distributed.world_size() > 1:
            raise InputError(
                f"--multiprocessing-distributed: the target comes from {self.replica.local.steps} "
                "local step(s) of training, whose batch cannot be sharded; add --spread restarts"
            )

    def calibrate(self, inputs: torch.Tensor, labels: torch.Tensor) -> None:
        """Choose the step whose difference agrees with the second backward pass."""
        factor, whole = self.factor, (inputs, labels)
        inputs, labels = self.sampled(inputs, labels)
        # Layers that are factored for few images may not be for all of them.
        self.factor = factor and len(inputs) == len(whole[0])
        try:
            exact = self.exact_as_recorded(inputs, labels)
        except ValueError:
            # BatchNorm refuses one image of which it gets a vector, or a map of one pixel.
            if len(inputs) > 1:
                raise
            inputs, labels = whole[0][:2], whole[1][:2]
            exact = self.exact_as_recorded(inputs, labels)
        best = self._best_step(exact, inputs, labels)
        if best[0] < ACCEPTED_COSINE and self._factored is not None:
            factor, self.factor, self._factored = False, False, None
            best = self._best_step(exact, inputs, labels)
        self.factor = factor
        if best[0] < ACCEPTED_COSINE and self.calls == 0:
            self._refuse_silent_gaps(inputs)
        self.agreement = best[0]
        self.step = best[1] if best[0] >= ACCEPTED_COSINE else None
        logger.debug("difference step %s, cosine to exact %.6f", self.step, self.agreement)

    def exact_as_recorded(self, inputs: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """The exact gradient in the images, on the switches that the difference freezes.

        A unit so close to its switch that another kernel's rounding flips it would show as an
        error of the difference, and is none: one flip in a late layer turns the gradient by
        more than a cosine of `ACCEPTED_COSINE` allows.
        """
        factored = self._factoring(inputs)
        kernels = contextlib.nullcontext() if factored is None else factored.record()
        held = functools.partial(random_numbers_held, inputs.device)
        with held(), torch.no_grad(), RecordActivations() as record, kernels:
            self.replica.model(inputs)
        frozen = ReplayActivations(record.replays, record.switches)
        with held():
            match = GradientMatcher.exact_match(self, inputs, labels, 1.0, None, frozen=frozen)
        return match.input_gradient

    def sampled(
        self, inputs: torch.Tensor, labels: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Of large batches a few images: the second backward pass is what takes most memory."""
        whole = self.replica.groups is not None or distributed.world_size() > 1
        if whole or inputs.numel() <= CALIBRATED_VALUES:
            return inputs, labels
        few = math.ceil(CALIBRATED_VALUES / 2 / inputs[0].numel())
        return inputs[:few], labels[:few]

    def _best_step(
        self, exact: torch.Tensor, inputs: torch.Tensor, labels: torch.Tensor
    ) -> tuple[float, float]:
        """The best cosine to the exact gradient, and the step that has it."""
        best = (-1.0, self._steps[0])
        for step in self._steps:
            with random_numbers_held(inputs.device):
                candidate = self.difference_match(inputs, labels, 1.0, None, step).input_gradient
            best = max(best, (cosine_of_images(exact, candidate), step))
            if best[0] >= ACCEPTED_COSINE:
                break
        return best

    def exact_match(
        self,
        inputs: torch.Tensor,
        labels: torch.Tensor,
        weight: float,
        penalty: Callable[[nn.Module], Penalty] | None,
        apart: bool = False,
        frozen: contextlib.AbstractContextManager[Any] | None = None,
    ) -> Match:
        """One evaluation by a second backward pass, see `__call__`.

        With `frozen`, the passes run on the switches of an earlier one.
        """
        variables = self._variables(inputs, labels)
        observe = None if penalty is None else penalty(self.replica.model)
        around = contextlib.nullcontext() if frozen is None else frozen
        # Fused attention kernels have no second derivative.
        with sdpa_kernel(SDPBackend.MATH), TwiceDifferentiable(), around:
            if not self.replica.local.shares_gradient:
                segments = None if penalty is None else 1
                found = filled(variables, labels)
                update = self.replica.update(*found, create_graph=True, segments=segments)
                # Within the modes: steps may be computed again.
                return self._pulled(update, variables, weight, observe, apart)
            loss = self.replica.loss(self.replica.model, *filled(variables, labels))
            if self.calls == 0:
                _refuse_detached(loss, variables[0])
            gradient = self._gradients(loss, self.replica.parameters, create_graph=True)
        return self._pulled(gradient, variables, weight, observe, apart)

    def _pulled(
        self,
        gradient: Tensors,
        variables: Tensors,
        weight: float,
        observe: Penalty | None,
        apart: bool,
    ) -> Match:
        """The match of a gradient, differentiated back to the variables."""
        value, seed = self._value_and_seed(_detached(gradient))
        outputs = gradient
        cotangents = seed if weight == 1 else list(torch._foreach_mul(seed, weight))
        extra = None if observe is None else observe()
        alone = penalty_gradient(extra, variables[0]) if apart else None
        if extra is not None and not apart:
            outputs, cotangents = [*outputs, extra], [*cotangents, torch.ones_like(extra)]
        return match_of(value, pulled_back(outputs, cotangents, variables), extra, alone)

    def _clipped(
        self,
        inputs: torch.Tensor,
        labels: torch.Tensor,
        weight: float,
        penalty: Callable[[nn.Module], Penalty] | None,
        apart: bool,
    ) -> Match:
        """The exact derivative through the clipping of every image's gradient."""
        assert self.clipping is not None
        variables = self._variables(inputs, labels)
        with sdpa_kernel(SDPBackend.MATH), TwiceDifferentiable():
            x, y = filled(variables, labels)
            gradient = self.clipping.mean_gradient(x, self.replica.targets_of(y))
        value, seed = self._value_and_seed(_detached(gradient))
        result = pulled_back(gradient, list(torch._foreach_mul(seed, weight)), variables)
        if penalty is None:
            return match_of(value, result, None, None)
        observe = penalty(self.replica.model)
        self.replica.model(variables[0])
        extra = observe()
        (alone,) = torch.autograd.grad(extra, variables[0])
        if not apart:
            result[0] = result[0] + alone
        return match_of(value, result, extra, alone if apart else None)

    def difference_match(
        self,
        inputs: torch.Tensor,
        labels: torch.Tensor,
        weight: float,
        penalty: Callable[[nn.Module], Penalty] | None,
        step: float,
        apart: bool = False,
    ) -> Match:
        """One evaluation by the difference of two first-order passes, see `__call__`.

        `step` is the relative size of the parameters' perturbation.
        """
        random_numbers = RandomNumbers(inputs.device)
        first = self._first_pass_factored(inputs, labels, step)
        if first is None:
            random_numbers.rewind()
            first = self._first_pass(inputs, labels, step)
        variables = self._variables(inputs, labels)
        observe = None if penalty is None else penalty(self._perturbed)
        # The same dropout masks as in the first pass.
        random_numbers.rewind()
        with first.moved:
            loss = self.replica.loss(self._perturbed, *filled(variables, labels))
            extra = None if observe is None else observe()
            alone = penalty_gradient(extra, variables[0]) if apart else None
            # The penalty rides along in the second pass; that it is taken at slightly
            # moved parameters changes it in the fifth digit.
            total = loss * (weight / first.h)
            if extra is not None and not apart:
                total = total + extra
            at_moved = self._gradients(total, variables)
        pairs = zip(first.at_theta, at_moved, strict=True)
        result = [b.sub_(a, alpha=weight / first.h) for a, b in pairs]
        return match_of(first.value, result, extra, alone)

    def _first_pass(self, inputs: torch.Tensor, labels: torch.Tensor, step: float) -> _FirstPass:
        """The pass at theta, with every parameter's gradient."""
        variables = self._variables(inputs, labels)
        with RecordActivations() as record:
            loss = self.replica.loss(self.replica.model, *filled(variables, labels))
        n = len(self.replica.parameters)
        found = self._gradients(loss, [*self.replica.parameters, *variables])
        value, moved, h = self._moved_parameters(list(found[:n]), step)
        frozen = ReplayActivations(record.replays, record.switches)
        return _FirstPass(value, found[n:], h, self._at(self._moved, moved, frozen))

    def _first_pass_factored(
        self, inputs: torch.Tensor, labels: torch.Tensor, step: float
    ) -> _FirstPass | None:
        """The same where late layers' gradients stay factored; None where they cannot."""
        factored = self._factoring(inputs)
        if factored is None:
            return None
        variables = self._variables(inputs, labels)
        with RecordActivations() as record, factored.record() as factors:
            loss = self.replica.loss(self.replica.model, *filled(variables, labels))
        others = factored.others(self.replica.parameters)
        try:
            found = self._gradients(loss, [*others, *factors.taps, *variables])
        except CheckpointError:
            # A block that computes its layers again does so without their products.
            self._factored = None
            return None
        n, m = len(others), len(others) + len(factors.taps)
        factors.close(found[n:m])
        swept = self._beside
        gradient = self._summed(list(found[:n]), swept.theta)
        pieces = pieces_of(gradient)
        pairs = (products_with(pieces, swept.goal_pieces), factored.products(factors))
        gg, gt = (sum(parts) for parts in zip(*pairs, strict=True))
        affine = self.objective.affine_seed(Products(gg, gt, self._target_squared))
        if affine is None or affine.on_target == 0:
            self._near = CALLS_WITHOUT_FACTORS
            return None
        wanted = self._perturbation(affine.length, step)
        along = factored.along_target(wanted * affine.on_target)
        h = along / affine.on_target
        swept.move(pieces, h * affine.on_gradient, h * affine.on_target)
        frozen = ReplayActivations(record.replays, record.switches)
        replay = factored.replay(factors, along, h * affine.on_gradient)
        moved = self._at(factored.others(self._moved), gradient, frozen, replay)
        value = inputs.new_tensor(affine.value, dtype=torch.float64)
        return _FirstPass(value, found[m:], h, moved)

    def _factoring(self, inputs: torch.Tensor) -> Factored | None:
        """The layers to keep factored for such inputs; None where it does not pay."""
        if self._near > 0:
            # Products of gradients have lost their digits; so they will for a while.
            self._near -= 1
            return None
        if inputs.shape != self._surveyed:
            self._surveyed, self._factored = inputs.shape, self._survey(inputs.shape)
        return self._factored

    def _survey(self, shape: torch.Size) -> Factored | None:
        probe = self.objective.affine_seed(Products(1.0, 0.5, 1.0))
        if not self.factor or probe is None:
            return None
        replica = self.replica
        worth = functools.partial(saves_sweeps, sizes=replica.sizes)
        layers = find_layers(replica.model, replica.parameters, shape, worth)
        if len(layers) == len(replica.parameters):
            # Some gradient is written out, so that no sum is over nothing.
            layers = layers[1:]
        if not layers:
            return None
        models, goal = (replica.parameters, self._moved), replica.target_gradient
        factored = Factored(layers, models, goal, replica.sizes)
        theta = factored.others(_detached(replica.parameters))
        self._beside = _Swept(theta, factored.others(goal))
        return factored

    def _moved_parameters(
        self, gradient: Tensors, step: float
    ) -> tuple[torch.Tensor, Tensors, float]:
        """The objective, theta + h v, and h; the gradient's memory is used for the second."""
        swept = self._swept
        gradient = self._summed(gradient, swept.theta)
        pieces = pieces_of(gradient)
        gg, gt = products_with(pieces, swept.goal_pieces)
        affine = self.objective.affine_seed(Products(gg, gt, self._target_squared))
        if affine is None:
            value, seed = self.objective.value_and_seed(gradient, self.replica.target_gradient)
            h = self._perturbation(float(squared_norm(seed).sqrt()), step)
            torch._foreach_mul_(seed, h)
            torch._foreach_add_(seed, swept.theta)
            return value, seed, h
        h = self._perturbation(affine.length, step)
        swept.move(pieces, h * affine.on_gradient, h * affine.on_target)
        return gradient[0].new_tensor(affine.value, dtype=torch.float64), gradient, h

    @staticmethod
    @contextlib.contextmanager
    def _at(
        parameters: Tensors, moved: Tensors, *modes: contextlib.AbstractContextManager[Any]
    ) -> Iterator[None]:
        """Within the block parameters of the perturbed model have these values, in these modes."""
        held = [p.data for p in parameters]
        for parameter, value in zip(parameters, moved, strict=True):
            parameter.data = value
        try:
            with contextlib.ExitStack() as around:
                for mode in modes:
                    around.enter_context(mode)
                yield
        finally:
            for parameter, value in zip(parameters, held, strict=True):
                parameter.data = value

    def _value_and_seed(self, gradient: Tensors) -> tuple[torch.Tensor, Tensors]:
        """The objective of the whole batch's gradient."""
        goal = self.replica.target_gradient
        return self.objective.value_and_seed(self._summed(gradient, goal), goal)

    @staticmethod
    def _summed(gradient: Tensors, like: Tensors) -> Tensors:
        """The gradient of the whole batch, the parts of all processes added, in a layout."""
        gradient = [laid_out_as(g, t) for g, t in zip(gradient, like, strict=True)]
        if distributed.world_size() == 1:
            return gradient
        flat = [g.as_strided((g.numel(),), (1,)) for g in gradient]
        pieces = distributed.all_reduce(torch.cat(flat)).split([g.numel() for g in gradient])
        return [
            piece.as_strided(g.shape, g.stride(), piece.storage_offset())
            for piece, g in zip(pieces, gradient, strict=True)
        ]

    def state_dict(self) -> dict[str, Any]:
        """What a resumed attack needs to go on to the bit, as plain values."""
        fields = {"calls": self.calls, "step": self.step}
        return {**fields, "factor": self.factor, "near": self._near}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The inverse of `state_dict`."""
        kinds = {"calls": int, "step": float | None, "factor": bool, "near": int}
        for name, kind in kinds.items():
            if not fits(state.get(name), kind):
                raise InputError(f"the saved matching has {name} = {state.get(name)!r:.40}")
        self.calls, self.step = state["calls"], state["step"]
        self.factor, self._near = state["factor"], state["near"]


def _precision(tensors: Tensors) -> torch.dtype:
    return torch.float64 if tensors[0].dtype == torch.float64 else torch.float32


def _sharing_copy(model: nn.Module) -> nn.Module:
    """A copy of a model on the same memory, whose parameters need no gradient."""
    shared: dict[int, torch.Tensor] = {
        id(p): nn.Parameter(p.detach(), requires_grad=False) for p in model.parameters()
    }
    return copied(model, shared)


def _refuse_detached(loss: torch.Tensor, inputs: torch.Tensor) -> None:
    """Refuse a model through which no derivative reaches its inputs.

    Raises:
        InputError: There is no path from the loss to the inputs.
    """
    if loss.requires_grad:
        found = torch.autograd.grad(loss, inputs, retain_graph=True, allow_unused=True)
        if found[0] is not None:
            return
    raise InputError(
        "the model's outputs do not depend on its inputs by operations that torch differentiates: "
        "is there a step through .detach(), .data or NumPy in its forward pass?"
    )


def _detached(tensors: Tensors) -> Tensors:
    return [t.detach() for t in tensors]


def cosine_of_images(a: torch.Tensor, b: torch.Tensor) -> float:
    """Cosine over the images of all processes, so that all take the same decision."""
    products = torch.stack([inner_product([a], [b]), squared_norm([a]), squared_norm([b])])
    dot, aa, bb = distributed.all_reduce(products).tolist()
    return dot / math.sqrt(aa * bb) if aa > 0 and bb > 0 else (1.0 if aa == bb else 0.0)
