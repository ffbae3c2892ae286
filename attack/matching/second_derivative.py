"""Second derivatives: operators that have one, and which module of a model lacks it."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.function import BackwardCFunction
from torch.autograd.graph import Node
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode

from core.errors import InputError, first_line
from core.losses import main_output
from core.models.unchanged import buffers_of, held, in_mode, random_numbers_held, unchanged

# Samples, step and relative error of a second derivative that is held against a difference.
_SAMPLES, _STEP, _ERROR = 2, 1e-7, 0.05
# What torch says where an operator cannot be differentiated twice.
_WORDS = ("is not implemented", "once_differentiable", "double backward", "backward twice")


class TwiceDifferentiable(TorchFunctionMode):
    """While active, activations whose fused kernel has no second derivative are composed."""

    def __torch_function__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        if func is F.hardsigmoid:
            return F.relu6(args[0] + 3) / 6
        if func is F.hardswish:
            return args[0] * F.relu6(args[0] + 3) / 6
        return func(*args, **(kwargs or {}))


@contextlib.contextmanager
def explain_missing_derivative(
    model: nn.Module, inputs: torch.Tensor, steps: int
) -> Iterator[None]:
    """Turn torch's message about an operator into a sentence about the module that has it.

    Args:
        model: The module in which two derivatives are taken within the block.
        inputs: What it is given there.
        steps: Local steps that are differentiated; of one a difference serves as well.

    Raises:
        InputError: An operator has no second derivative.
    """
    try:
        yield
    except RuntimeError as error:
        if not any(word in str(error) for word in _WORDS):
            raise
        culprit = _culprit(model, inputs, _has_two_derivatives)
        raise InputError(
            f"{culprit or f'the model {type(model).__name__}'} cannot be differentiated twice "
            f"({first_line(error)}); {_advice(steps)}"
        ) from None


def _advice(steps: int) -> str:
    if steps == 1:
        return "set hvp='difference' (--hvp difference), which needs one derivative only"
    return (
        "several local steps need it; local_steps='one' (--local-steps one) takes the update for "
        "one step's gradient"
    )


def has_own_functions(model: nn.Module, inputs: torch.Tensor) -> bool:
    """Whether a pass calls an autograd function that somebody wrote in Python.

    Torch's own operators refuse a second derivative that they lack; such a function may not.

    Args:
        model: Run once; nothing of it changes.
        inputs: What it is given.
    """
    with torch.enable_grad(), unchanged(model):
        output = main_output(model(inputs.detach()))
    seen: set[Node] = set()
    open_nodes = [output.grad_fn]
    while open_nodes:
        node = open_nodes.pop()
        if node is None or node in seen:
            continue
        if isinstance(node, BackwardCFunction):
            return True
        seen.add(node)
        open_nodes += [before for before, _ in node.next_functions]
    return False


def refuse_silent_gaps(model: nn.Module, inputs: torch.Tensor, steps: int = 1) -> None:
    """Refuse a module whose second derivative lacks a part without an error.

    So does a function of one's own whose backward pass detaches a tensor that it depends on. To
    be asked where the second backward pass and the difference of two passes do not agree.

    Args:
        model: The module in which two derivatives are taken.
        inputs: What it is given.
        steps: Local steps that are differentiated.

    Raises:
        InputError: Names the module.
    """
    culprit = _culprit(model, inputs, _second_derivative_is_whole)
    if culprit:
        raise InputError(
            f"{culprit} has a second derivative that lacks a part: its backward pass detaches "
            f"what it depends on, or is differentiable once; {_advice(steps)}"
        )


def _culprit(
    model: nn.Module, inputs: torch.Tensor, is_well: Callable[[nn.Module, torch.Tensor], bool]
) -> str:
    """The smallest module that is not well, in words; empty where all are."""
    seen: dict[str, torch.Tensor] = {}

    def note(name: str) -> object:
        def hook(module: nn.Module, given: tuple[object, ...], output: object) -> None:
            if given and isinstance(given[0], torch.Tensor) and given[0].is_floating_point():
                seen.setdefault(name, given[0].detach())

        return hook

    named = dict(model.named_modules())
    hooks = [m.register_forward_hook(note(n)) for n, m in named.items()]  # type: ignore[arg-type]
    state = {name: buffer.clone() for name, buffer in model.named_buffers()}
    try:
        with torch.no_grad(), random_numbers_held(inputs.device):
            torch.func.functional_call(model, state, (inputs.detach(),))
    finally:
        for hook in hooks:
            hook.remove()
    # A part is asked before the whole that it belongs to.
    for name in sorted(seen, key=lambda n: len(list(named[n].modules()))):
        if not is_well(named[name], seen[name]):
            kind = type(named[name]).__name__
            return f"the module {name} ({kind})" if name else f"the model {kind}"
    return ""


def _has_two_derivatives(module: nn.Module, given: torch.Tensor) -> bool:
    x = given.clone().requires_grad_()
    state = {name: buffer.clone() for name, buffer in module.named_buffers()}
    wanted = [x, *(p for p in module.parameters() if p.requires_grad)]
    with sdpa_kernel(SDPBackend.MATH), TwiceDifferentiable():
        try:
            output = main_output(torch.func.functional_call(module, state, (x,)))
            first = torch.autograd.grad(
                output.square().sum(), wanted, create_graph=True, materialize_grads=True
            )
            total = torch.stack([g.square().sum() for g in first if g.requires_grad]).sum()
            torch.autograd.grad(total, wanted, allow_unused=True)
        except (RuntimeError, InputError, TypeError) as error:
            return not any(word in str(error) for word in _WORDS)
    return True


def _second_derivative_is_whole(module: nn.Module, given: torch.Tensor) -> bool:
    """Whether double backward agrees with a difference, along one random direction in float64.

    At random inputs, which do not lie on a kink as zeros do; in eval mode, where the
    statistics of two samples play no part.
    """
    module = in_mode(copy.deepcopy(module).double(), False)
    generator = torch.Generator().manual_seed(0)
    shape = given[:_SAMPLES].shape
    x, way = torch.randn((2, *shape), generator=generator, dtype=torch.float64).to(given.device)
    try:
        slope, total = _slope(module, x, way)
        ends = [_slope(module, x + sign * _STEP * way, way)[1] for sign in (1, -1)]
    except (RuntimeError, ValueError, TypeError, LookupError, InputError):
        # Not made for such inputs.
        return True
    expected = (ends[0] - ends[1]) / (2 * _STEP)
    size = max(abs(slope), abs(expected))
    return abs(slope - expected) <= _ERROR * size or size < 1e-6 * abs(total)


def _slope(module: nn.Module, x: torch.Tensor, way: torch.Tensor) -> tuple[float, float]:
    """The sum of a random share of all first derivatives: its own derivative, and itself."""
    x = x.clone().requires_grad_()
    wanted = [x, *(p for p in module.parameters() if p.requires_grad)]
    twice = sdpa_kernel(SDPBackend.MATH), TwiceDifferentiable()
    with contextlib.ExitStack() as around:
        for each in (held(buffers_of(module)), random_numbers_held(x.device), *twice):
            around.enter_context(each)
        torch.manual_seed(0)
        output = main_output(module(x))
        share = (output * torch.randn_like(output)).sum()
        first = torch.autograd.grad(share, wanted, create_graph=True, materialize_grads=True)
        total = torch.stack([(g * torch.randn_like(g)).sum() for g in first]).sum()
        if not total.requires_grad:
            return 0.0, float(total)
        (second,) = torch.autograd.grad(total, x, materialize_grads=True)
        return float((second * way).sum()), float(total.detach())
