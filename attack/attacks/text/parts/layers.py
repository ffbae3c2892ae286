"""The linear layers that a language model runs on every token, and what reaches them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from core.losses import main_output
from core.models.module_inputs import inputs_of
from core.models.unchanged import in_mode, unchanged
from core.target import Target

# Sentences that run through the model at a time.
CHUNK = 256


@dataclass(frozen=True)
class TokenLayer:
    """A linear layer with one row of inputs per token.

    Attributes:
        module: The layer in the model.
        name: Its name there.
        parameter: Name of its weight.
        transposed: Whether the weight is inputs x outputs, as GPT-2's.
        local: Whether a token's row depends on that token and its position alone.
        inputs: T x width, of a random sentence, for trial.
        slopes: T x outputs, the loss's derivative in its outputs.
    """

    module: nn.Module
    name: str
    parameter: str
    transposed: bool
    local: bool
    inputs: torch.Tensor
    slopes: torch.Tensor

    def rows(self, gradient: torch.Tensor) -> torch.Tensor:
        """A gradient of the weight as outputs x inputs."""
        return gradient.T if self.transposed else gradient


@dataclass(frozen=True)
class TokenLayers:
    """A client's model as an attacker reads it.

    Attributes:
        model: In float64, in evaluation mode.
        quick: The same in float32, for many sentences.
        groups: Layers that read the same, in the order in which they run; the last layer, which
            gives the outputs, is not among them.
        causal: Whether no token's row depends on later tokens.
    """

    model: nn.Module
    quick: nn.Module
    groups: tuple[tuple[TokenLayer, ...], ...]
    causal: bool

    def inputs(self, layers: Sequence[TokenLayer], ids: torch.Tensor) -> list[torch.Tensor]:
        """What reaches these layers for sentences of token ids (N x T): N x T x width each."""
        with torch.no_grad():
            return inputs_of(self.model, [layer.module for layer in layers], ids)

    def quick_inputs(self, layer: TokenLayer, ids: torch.Tensor) -> torch.Tensor:
        """The same for one layer in float32, of any number of sentences."""
        module = self.quick.get_submodule(layer.name)
        with torch.no_grad():
            parts = [inputs_of(self.quick, [module], part)[0] for part in ids.split(CHUNK)]
        return torch.cat(parts)


def token_layers(target: Target, seed: int = 0) -> TokenLayers:
    """Find the layers of a client's model by what they do to random sentences.

    Args:
        target: Of a client with text.
        seed: Of the random sentences.
    """
    # Behind frozen layers there may be some whose gradient was shared.
    model: nn.Module = in_mode(target.build_model().double(), False).requires_grad_(True)
    length, words = target.data.shape[0], target.data.words
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randint(len(words), (1, length), generator=generator).expand(3, -1).clone()
    # The second sentence differs in the first token, the third in the last.
    drawn[1, 0] += 1
    drawn[2, -1] += 1
    ids = words[drawn % len(words)]
    calls = _trace(model, ids, target)
    names = {id(p): name for name, p in model.named_parameters()}
    modules = {module: name for name, module in model.named_modules()}
    causal = all(_alike(c.inputs[0, :-1], c.inputs[2, :-1]) for c in calls)
    groups: list[list[TokenLayer]] = []
    read: list[torch.Tensor] = []
    for call in calls:
        parameter = names[id(call.module.weight)]
        if parameter not in target.gradient:
            continue
        local = _alike(call.inputs[0, 1:], call.inputs[1, 1:])
        layer = TokenLayer(
            call.module,
            modules[call.module],
            parameter,
            call.transposed,
            local,
            call.inputs[0],
            call.slopes[0],
        )
        if read and _alike(read[-1], call.inputs):
            groups[-1].append(layer)
        else:
            groups.append([layer])
            read.append(call.inputs)
    return TokenLayers(
        model, in_mode(target.build_model(), False), tuple(map(tuple, groups)), causal
    )


def _alike(first: torch.Tensor, second: torch.Tensor) -> bool:
    """Whether these are the same numbers, up to the order in which they were summed."""
    return first.shape == second.shape and torch.allclose(first, second, rtol=0, atol=1e-10)


@dataclass(frozen=True)
class _Call:
    """One layer's pass on random sentences."""

    module: nn.Module
    inputs: torch.Tensor
    transposed: bool
    slopes: torch.Tensor


def _trace(model: nn.Module, ids: torch.Tensor, target: Target) -> list[_Call]:
    """The passes of all linear layers with a row per token, but for the one of the outputs."""
    seen: list[tuple[nn.Module, torch.Tensor, torch.Tensor]] = []

    def note(module: nn.Module, given: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
        seen.append((module, given[0].detach(), output))

    handles = [m.register_forward_hook(note) for m in model.modules() if _has_matrix(m)]
    try:
        with torch.enable_grad(), unchanged(model):
            outputs = model(ids)
            loss = _any_loss(target, outputs, ids)
    finally:
        for handle in handles:
            handle.remove()
    seen = [entry for entry in seen if entry[2].shape[:-1] == ids.shape]
    slopes = torch.autograd.grad(loss, [output for *_, output in seen], allow_unused=True)
    calls = []
    for (module, inputs, output), slope in zip(seen, slopes, strict=True):
        transposed = _is_transposed(module, inputs, output.detach())
        last = output is main_output(outputs)
        if transposed is not None and not last and slope is not None:
            calls.append(_Call(module, inputs, transposed, slope))
    return calls


def _has_matrix(module: nn.Module) -> bool:
    weight = getattr(module, "weight", None)
    return isinstance(weight, nn.Parameter) and weight.dim() == 2 and not _looks_up(module)


def _looks_up(module: nn.Module) -> bool:
    return isinstance(module, nn.Embedding)


def _any_loss(target: Target, outputs: object, ids: torch.Tensor) -> torch.Tensor:
    """The client's loss for these sentences and some targets."""
    if target.data.n_classes:
        classes = torch.arange(len(ids)) % target.data.n_classes
        return target.loss(outputs, classes)
    return target.loss(outputs, ids)


def _is_transposed(module: nn.Module, inputs: torch.Tensor, output: torch.Tensor) -> bool | None:
    """Whether the weight is inputs x outputs; None where the layer is not linear."""
    parameters = dict(module.named_parameters(recurse=False))
    weight = parameters["weight"].detach()
    bias = parameters.get("bias")
    shift: float | torch.Tensor = 0.0 if bias is None else bias.detach()
    for matrix, transposed in ((weight, False), (weight.mT, True)):
        if (matrix.shape[1], matrix.shape[0]) == (inputs.shape[-1], output.shape[-1]) and (
            torch.allclose(F.linear(inputs, matrix) + shift, output, atol=1e-9)
        ):
            return transposed
    return None
