"""Which module of a model lacks a second derivative, told in one sentence."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from attack.matching.switches import TwiceDifferentiable
from core.errors import InputError, first_line
from core.losses import main_output

# What torch says where an operator cannot be differentiated twice.
_WORDS = ("is not implemented", "once_differentiable", "double backward", "backward twice")


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
        advice = (
            "set hvp='difference' (--hvp difference), which needs one derivative only"
            if steps == 1
            else "several local steps need it"
        )
        raise InputError(
            f"{_culprit(model, inputs)} cannot be differentiated twice ({first_line(error)}); "
            f"{advice}"
        ) from None


def _culprit(model: nn.Module, inputs: torch.Tensor) -> str:
    """The smallest module that cannot, in words."""
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
        with torch.no_grad():
            torch.func.functional_call(model, state, (inputs.detach(),))
    finally:
        for hook in hooks:
            hook.remove()
    # A part is asked before the whole that it belongs to.
    for name in sorted(seen, key=lambda n: len(list(named[n].modules()))):
        if not _has_two_derivatives(named[name], seen[name]):
            kind = type(named[name]).__name__
            return f"the module {name} ({kind})" if name else f"the model {kind}"
    return f"the model {type(model).__name__}"


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
