"""Faster arithmetic for the passes of gradient matching, where it keeps the gradient.

Five choices, all off by default, because each moves the last digits of published numbers:

- `trace`: both passes of the difference as one list of plain operators each
  (`attack.matching.plain_operators`); frozen switches become outputs of the first list and inputs
  of the second. The priors' gradient is such a list as well (`attack.loop.weighted_loss`). Small
  convolutions are matrix products there (`attack.matching.small_convolutions`).
- `compile`: those lists, fused by torch's compiler, which looks into no Python.
- `cuda_graphs`: the same graphs captured once on a CUDA device and replayed, which saves the
  launches of their kernels.
- `precision`: "tf32" (matrix products with 10 bits of mantissa, on CUDA) or "bf16"
  (automatic mixed precision); parameters and what is done to them stay in float32.
- `channels_last`: the memory layout that convolutions on tensor cores read directly; on a CPU
  it is chosen without being asked for (see `attack.matching.replica`).

Every choice is held against the exact gradient in plain float32 by the calibration of
`attack.matching.matcher`, and given up with a sentence in the log where the two part.

Source: Reed et al., torch.fx: Practical Program Capture and Transformation for Deep Learning
in Python, MLSys 2022, https://arxiv.org/abs/2112.08429; Micikevicius et al., Mixed Precision
Training, ICLR 2018, https://arxiv.org/abs/1710.03740.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from attack.matching.clipping import SampleClipping
from attack.matching.held_state import RandomNumbers
from attack.matching.match import Match, Penalty, Tensors, filled, fresh_variables
from attack.matching.matcher import (
    ACCEPTED_COSINE,
    STEP_SIZES,
    GradientMatcher,
    cosine_of_images,
)
from attack.matching.objectives import Objective
from attack.matching.plain_operators import Pass, plain_operators
from attack.matching.replica import Replica, laid_out_as
from attack.matching.small_convolutions import all_are_small, write_out_small_convolutions
from attack.matching.switches import RecordActivations, ReplayActivations
from attack.settings import SpeedSettings, setting_error
from core.errors import InputError, first_line
from core.models.unchanged import random_numbers_held
from core.processes import distributed
from core.records import fits

logger = logging.getLogger(__name__)

# A difference of two passes loses as many digits as its step is small, so few bits want long
# steps; frozen switches keep the function smooth over them.
LOW_STEPS = (1e-2, 3e-3, 1e-3, 3e-2)
# To the gradient in float32. With bf16 the difference and two backward passes reached 0.99 on a
# small CNN, where 300 iterations lost no PSNR by it; on LeNet they cost up to 1.9 dB. Chosen on
# these few cases, on a CPU: measure before relying on it.
LOW_ACCEPTED_COSINE = 0.98
# Calls of a captured function before it is recorded: libraries choose their kernels in them.
WARM_UP_CALLS = 3


@contextlib.contextmanager
def product_precision(precision: str) -> Iterator[None]:
    """Within the block, matrix products and convolutions on CUDA use TF32 or do not.

    Torch's own default lets convolutions use it, in whose noise a difference of two passes
    drowns; the settings of the whole process are put back afterwards.

    Args:
        precision: "tf32", or anything else for full float32.
    """
    settings: tuple[Any, Any] = (torch.backends.cuda.matmul, torch.backends.cudnn)
    held = [each.allow_tf32 for each in settings]
    for each in settings:
        each.allow_tf32 = precision == "tf32"
    try:
        yield
    finally:
        for each, before in zip(settings, held, strict=True):
            each.allow_tf32 = before


@contextlib.contextmanager
def lowered(precision: str, device_type: str) -> Iterator[None]:
    """Within the block, passes run in this precision."""
    # A cast kept from one pass would be stale, or foreign to a trace, in the next.
    mixed = torch.autocast(
        device_type, torch.bfloat16, enabled=precision == "bf16", cache_enabled=False
    )
    with product_precision(precision), mixed:
        yield


class AcceleratedMatcher(GradientMatcher):
    """`GradientMatcher` with faster passes.

    Args:
        replica: The client's computation.
        objective: Distance between gradients.
        hvp: As of `GradientMatcher`; "auto" keeps checking.
        speed: Which speed-ups are used.
        clipping: As of `GradientMatcher`.
        clipped_from: Likewise.

    Attributes:
        notes: What ran and what was given up, as plain values for a record.

    Raises:
        InputError: Graphs of passes that talk to other processes.

    Example:
        >>> matcher = AcceleratedMatcher(replica, Cosine(), "auto", SpeedSettings(compile=True))
        >>> match = matcher(inputs, labels)
    """

    def __init__(
        self,
        replica: Replica,
        objective: Objective,
        hvp: str,
        speed: SpeedSettings,
        clipping: SampleClipping | None = None,
        clipped_from: float = 0.0,
    ) -> None:
        self.device_type = replica.target_gradient[0].device.type
        speed.check_device(self.device_type)
        _check_traceable(replica, speed)
        if speed.channels_last:
            replica.lay_out(torch.channels_last)
        # A compiler has ways of its own; other layouts and fewer bits have other kernels.
        otherwise = speed.compile or speed.lowered or speed.channels_last
        n_images = replica.sizes[distributed.rank()]
        self._writes_out = (
            speed.trace
            and self.device_type == "cpu"
            and not otherwise
            and all_are_small(replica.model, (n_images, *replica.data.shape))
        )
        if self._writes_out:
            replica.lay_out(torch.contiguous_format)
        # A factored pass replaces layers while it runs; a graph has them all.
        super().__init__(replica, objective, hvp, not speed.traced, clipping, clipped_from)
        self.speed = speed
        self.traced, self.precision = speed.traced, speed.precision
        if speed.lowered:
            self._steps = LOW_STEPS
            self.step = None if self.step is None else LOW_STEPS[0]
        self._graphs: dict[Any, _Graphs] = {}
        self._twice = False
        self.events: list[str] = []
        self.compile_seconds = 0.0

    @property
    def notes(self) -> dict[str, Any]:
        """What ran."""
        asked = self.speed
        running = self.traced and self.step is not None
        return {
            "trace": running,
            "compile": asked.compile and running,
            "compile_seconds": round(self.compile_seconds, 3),
            "cuda_graphs": asked.cuda_graphs and running,
            "precision": self.precision,
            "channels_last": self.replica.layout == torch.channels_last,
            "events": self.events,
        }

    def details(self) -> dict[str, Any]:
        """See `GradientMatcher`; and what was sped up."""
        return {**super().details(), "acceleration": self.notes}

    def state_dict(self) -> dict[str, Any]:
        """See `GradientMatcher`."""
        return {
            **super().state_dict(),
            "traced": self.traced,
            "precision": self.precision,
            "steps": list(self._steps),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The inverse of `state_dict`."""
        super().load_state_dict(state)
        for name, kind in {"traced": bool, "precision": str, "steps": list[float]}.items():
            if not fits(state.get(name), kind):
                raise InputError(f"the saved matching has {name} = {state.get(name)!r:.40}")
        self.traced, self.precision = state["traced"], state["precision"]
        self._steps = tuple(state["steps"])

    # -- Choosing -----------------------------------------------------------------

    def calibrate(self, inputs: torch.Tensor, labels: torch.Tensor) -> None:
        """Give up, one after the other, what parts from the exact gradient in float32."""
        if self.precision == "float32" and not self.traced:
            super().calibrate(inputs, labels)
            return
        exact = self.exact_as_recorded(inputs, labels)
        enough = ACCEPTED_COSINE if self.precision == "float32" else LOW_ACCEPTED_COSINE
        self.agreement, self.step = self._best_step(exact, inputs, labels)
        if self.agreement >= enough:
            return
        if self.precision == "float32":
            self._note(
                f"traced passes part from the exact gradient (cosine {self.agreement:.6f}); "
                "passes run one operator at a time"
            )
            self.traced = False
        elif self._two_backward_passes_agree(exact, inputs, labels):
            return
        else:
            self._note(
                f"--precision {self.precision}: cosine to float32 is {self.agreement:.4f}, at "
                f"least {enough} is asked for; float32 is used"
            )
            self._raise_precision()
        self.calibrate(inputs, labels)

    def exact_as_recorded(self, inputs: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """In full float32, whatever the passes run in."""
        with lowered("float32", self.device_type):
            return super().exact_as_recorded(inputs, labels)

    def sampled(
        self, inputs: torch.Tensor, labels: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The whole batch: traced passes are for its shape."""
        return inputs, labels

    def _two_backward_passes_agree(
        self, exact: torch.Tensor, inputs: torch.Tensor, labels: torch.Tensor
    ) -> bool:
        """Whether the double backward keeps the gradient in few bits: it subtracts nothing."""
        self.step, difference = None, self.agreement
        with random_numbers_held(inputs.device):
            found = self.exact_match(inputs, labels, 1.0, None).input_gradient
        self.agreement = cosine_of_images(exact, found)
        agrees = self.agreement >= LOW_ACCEPTED_COSINE
        if agrees and not self._twice:
            self._twice = True
            self._note(
                f"--precision {self.precision}: the difference of passes has cosine "
                f"{difference:.4f} to float32, two backward passes {self.agreement:.4f}; "
                "they are used"
            )
        return agrees

    def _raise_precision(self) -> None:
        self.precision, self._steps = "float32", STEP_SIZES[torch.float32]
        self._graphs.clear()

    def _note(self, event: str) -> None:
        self.events.append(event)
        logger.warning("%s", event)

    # -- Passes -------------------------------------------------------------------

    def value(self, inputs: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """See `GradientMatcher`."""
        with lowered(self.precision, self.device_type):
            return super().value(inputs, labels)

    def several(self, inputs: torch.Tensor, labels: torch.Tensor) -> list[Match]:
        """See `GradientMatcher`."""
        with lowered(self.precision, self.device_type):
            return super().several(inputs, labels)

    def exact_match(self, *args: Any, **options: Any) -> Match:
        """See `GradientMatcher`."""
        with lowered(self.precision, self.device_type):
            return super().exact_match(*args, **options)

    def difference_match(
        self,
        inputs: torch.Tensor,
        labels: torch.Tensor,
        weight: float,
        penalty: Callable[[nn.Module], Penalty] | None,
        step: float,
        apart: bool = False,
    ) -> Match:
        """See `GradientMatcher`."""
        if self.traced:
            # A graph holds its casts; running it with automatic ones would add others.
            with product_precision(self.precision):
                graphs = self._graphs_for(inputs, labels, penalty, apart)
                if graphs is not None:
                    return self._by_graphs(graphs, inputs, labels, weight, step)
        with lowered(self.precision, self.device_type):
            return super().difference_match(inputs, labels, weight, penalty, step, apart)

    def _by_graphs(
        self,
        graphs: _Graphs,
        inputs: torch.Tensor,
        labels: torch.Tensor,
        weight: float,
        step: float,
    ) -> Match:
        theta = [p.detach() for p in self.replica.parameters]
        n = len(theta)
        with torch.no_grad():
            found = graphs.first(*theta, inputs.detach(), labels.detach())
            gradient, at_theta = found[:n], found[n : n + graphs.variables]
            value, moved, h = self._moved_parameters(list(gradient), step)
            scale = inputs.new_tensor(weight / h)
            switches = found[n + graphs.variables :]
            later = graphs.second(*moved, inputs.detach(), labels.detach(), scale, *switches)
            at_moved, rest = later[: graphs.variables], later[graphs.variables :]
            pairs = zip(at_moved, at_theta, strict=True)
            # Graphs overwrite their results at the next call.
            result = [b.sub(a, alpha=weight / h) for b, a in pairs]
        return Match(
            value=value,
            input_gradient=result[0],
            label_gradient=result[1] if graphs.variables == 2 else None,
            penalty=rest[0].clone() if rest else None,
            penalty_gradient=rest[1].clone() if len(rest) == 2 else None,
        )

    def _graphs_for(
        self,
        inputs: torch.Tensor,
        labels: torch.Tensor,
        penalty: Callable[[nn.Module], Penalty] | None,
        apart: bool,
    ) -> _Graphs | None:
        """The passes as graphs for arguments like these; None, and never again, if impossible."""
        key = (inputs.shape, labels.shape, penalty, apart)
        if key not in self._graphs:
            begun = time.perf_counter()
            try:
                self._graphs[key] = self._make_graphs(inputs, labels, penalty, apart)
            # What a compiler may raise has no common base: no C++ compiler, no Triton, an
            # operator that it does not know. The passes run without it just as well.
            except Exception as error:
                self._note(f"{_flags(self.speed)} not used: {first_line(error)[:200]}")
                self.traced = False
            self.compile_seconds += time.perf_counter() - begun
        return self._graphs.get(key)

    def _make_graphs(
        self,
        inputs: torch.Tensor,
        labels: torch.Tensor,
        penalty: Callable[[nn.Module], Penalty] | None,
        apart: bool,
    ) -> _Graphs:
        """Trace both passes, then compile and capture them as asked for."""
        tracer = _Tracer(self.replica, self._perturbed, penalty, apart)
        theta = [p.detach() for p in self.replica.parameters]
        n, variables = len(theta), 2 if self.replica.optimises(labels) else 1
        arguments = (*theta, inputs.detach(), labels.detach())
        random_numbers = RandomNumbers(inputs.device)
        graph = self._traced(tracer.first, arguments)
        if random_numbers.drawn:
            raise RuntimeError("the model draws random numbers, which a graph would not repeat")
        first = self._faster(graph, arguments, range(n, n + 2))
        with torch.no_grad():
            found = list(first(*arguments))
        # Where the gradient was, there the moved parameters will be.
        moved = [laid_out_as(g, t) for g, t in zip(found[:n], theta, strict=True)]
        scale, switches = inputs.new_tensor(1.0), found[n + variables :]
        later = (*moved, *arguments[n:], scale, *switches)
        second = self._faster(self._traced(tracer.second, later), later, range(n, n + 3))
        with torch.no_grad():
            second(*later)
        return _Graphs(first, second, variables)

    def _traced(self, function: Pass, arguments: tuple[torch.Tensor, ...]) -> Pass:
        """The operators that a call with such arguments consists of."""
        with lowered(self.precision, self.device_type):
            graph = plain_operators(function, arguments)
        if self._writes_out:
            write_out_small_convolutions(graph)
        return graph

    def _faster(self, graph: Pass, arguments: tuple[torch.Tensor, ...], changing: range) -> Pass:
        """A traced pass, compiled and captured as asked for."""
        if self.speed.compile:
            graph = torch.compile(graph, fullgraph=True, dynamic=False)
        if self.speed.cuda_graphs:
            return CapturedPass(graph, arguments, changing)
        return graph


@dataclass
class _Graphs:
    """Both passes: functions of tensors, for one shape of arguments.

    Attributes:
        first: (theta, inputs, labels) to the gradients in theta and in the variables, and
            the switches.
        second: (moved parameters, inputs, labels, scale, switches) to the gradients in the
            variables, then the penalty and (where it is kept apart) its gradient.
        variables: 2 where labels are optimised as well, else 1.
    """

    first: Pass
    second: Pass
    variables: int


class _Tracer:
    """Writes the two passes down.

    Args:
        replica: The client's computation.
        model: Whose parameters are replaced by arguments.
        penalty: As of `GradientMatcher`; it rides along in the second pass.
        apart: See `GradientMatcher.__call__`.
    """

    def __init__(
        self,
        replica: Replica,
        model: nn.Module,
        penalty: Callable[[nn.Module], Penalty] | None,
        apart: bool,
    ) -> None:
        self.replica, self.model, self.penalty, self.apart = replica, model, penalty, apart
        self.replays: list[Any] = []
        self.counts: list[int] = []

    def first(self, *arguments: torch.Tensor) -> Tensors:
        """The pass at theta."""
        n = len(self.replica.names)
        theta = [p.detach().requires_grad_() for p in arguments[:n]]
        inputs, labels = arguments[n:]
        variables = fresh_variables(inputs, labels, self.replica.optimises(labels))
        with RecordActivations() as record:
            loss = self._loss(theta, variables, labels)
        found = torch.autograd.grad(loss, [*theta, *variables], materialize_grads=True)
        self.replays, self.counts = list(record.replays), [len(s) for s in record.switches]
        switches = [tensor for layer in record.switches for tensor in layer]
        return [t.detach() for t in [*found, *switches]]

    def second(self, *arguments: torch.Tensor) -> Tensors:
        """The pass at moved parameters, on the switches of the first."""
        n = len(self.replica.names)
        inputs, labels, scale, *flat = arguments[n:]
        variables = fresh_variables(inputs, labels, self.replica.optimises(labels))
        pieces = iter(flat)
        switches = [tuple(next(pieces) for _ in range(count)) for count in self.counts]
        observe = None if self.penalty is None else self.penalty(self.model)
        with ReplayActivations(self.replays, switches):
            loss = self._loss(list(arguments[:n]), variables, labels)
            extra = None if observe is None else observe()
        total, rest = loss * scale, [] if extra is None else [extra]
        if extra is not None and self.apart:
            rest += torch.autograd.grad(extra, variables[:1], retain_graph=True)
        elif extra is not None:
            total = total + extra
        found = torch.autograd.grad(total, variables)
        return [t.detach() for t in [*found, *rest]]

    def _loss(self, parameters: Tensors, variables: Tensors, labels: torch.Tensor) -> torch.Tensor:
        named = dict(zip(self.replica.names, parameters, strict=True))
        return self.replica.loss(
            lambda x: torch.func.functional_call(self.model, named, (x,)),
            *filled(variables, labels),
        )


class CapturedPass:
    """A function of tensors, recorded once as a CUDA graph and replayed.

    Args:
        function: Allocates through torch alone, and waits for nothing.
        arguments: What it is recorded on; the shapes are those of every call.
        changing: Which of them are others' memory, and are copied in at every call. The rest
            is read where it is; what comes from elsewhere is copied there.

    Source: https://docs.pytorch.org/docs/stable/notes/cuda.html#cuda-graphs
    """

    def __init__(
        self, function: Pass, arguments: tuple[torch.Tensor, ...], changing: range
    ) -> None:
        self._held = [t.clone() if i in changing else t for i, t in enumerate(arguments)]
        self._function = function  # Its constants are read by the recorded kernels.
        aside = torch.cuda.Stream()
        aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(aside), torch.no_grad():
            for _ in range(WARM_UP_CALLS):
                function(*self._held)
        torch.cuda.current_stream().wait_stream(aside)
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph), torch.no_grad():
            self._results = list(function(*self._held))

    def __call__(self, *arguments: torch.Tensor) -> Tensors:
        """The results, which the next call overwrites."""
        for mine, given in zip(self._held, arguments, strict=True):
            if mine.data_ptr() != given.data_ptr():
                mine.copy_(given)
        self._graph.replay()
        return self._results


def _flags(speed: SpeedSettings) -> str:
    """The flags that write passes down and what they are, for a sentence: "--trace is"."""
    flags = [f"--{name.replace('_', '-')}" for name in speed.tracers]
    return f"{' and '.join(flags)} {'is' if len(flags) == 1 else 'are'}"


def _check_traceable(replica: Replica, speed: SpeedSettings) -> None:
    if not speed.traced:
        return
    flag = speed.tracing_setting
    if not replica.local.shares_gradient:
        raise setting_error(
            f"{flag} speeds up the difference, which several local steps do not use"
        )
    if distributed.world_size() > 1 and replica.model.training:
        raise setting_error(f"{flag} runs on one process where BatchNorm is in train mode")
