"""`share`: what a client of federated learning would send for a batch."""

from __future__ import annotations

import dataclasses
import fnmatch
from collections.abc import Sequence

import torch
from torch import nn

from core.client import SHAPES, fitted_targets, in_full_precision, outputs_of, with_classes
from core.data.records import Table
from core.errors import InputError, nearest
from core.losses import Function, Loss, as_loss, ignoring
from core.models.architecture import Architecture, GivenModel
from core.processes.distributed import Process
from core.target import LocalTraining, Target, Truth
from gradients.client import ClientSettings, share_update
from gradients.defenses import Defense, current_name, defense_names, parse_defenses
from gradients.sums import Aggregation, share_sum
from gradinvbench._clients import data_spec, is_bounded, local_training, token_spec
from gradinvbench._names import check_name

# Rounding of a normalisation that was undone.
_TOLERANCE = 1e-4


def share(
    model: nn.Module | Architecture,
    inputs: torch.Tensor | Table | None = None,
    targets: torch.Tensor | Sequence[int] | None = None,
    *,
    loss: str | Function | Loss | None = None,
    shared: str | Sequence[str] | None = None,
    bounds: tuple[float, float] | None = (0.0, 1.0),
    defense: str | Defense | Sequence[str | Defense] = (),
    local: LocalTraining | str | None = None,
    train_mode: bool | None = None,
    mean: float | Sequence[float] | None = None,
    std: float | Sequence[float] | None = None,
    class_names: Sequence[str] = (),
    tokens: Sequence[str] = (),
    pad: int | None = None,
    seed: int = 0,
    device: torch.device | str | None = None,
    aggregate: int | Aggregation = 1,
    images: torch.Tensor | None = None,
    labels: torch.Tensor | Sequence[int] | None = None,
) -> tuple[Target, Truth]:
    """Compute what a client shares for a batch.

    Args:
        model: Any module, with the parameters that the client receives. It is copied and left
            as it is; one in half precision or bfloat16 is computed in float32. Or a
            `ModelSpec`.
        inputs: N images (N x C x H x W), volumes (N x C x D x H x W), signals (N x C x L) or
            rows of a table (N x F), of any size, in [0, 1] unless `bounds` is None; N sentences of
            T token ids (N x T whole numbers). Or records of a `table`, which bring their targets,
            class names and columns.
        targets: What the loss compares the outputs with: for cross-entropy N class indices or
            N x classes probabilities, else see `losses()`.
        loss: What the client minimises: a name in `losses()`, a `Loss`, or any function of
            (outputs, targets) to a scalar; default: cross-entropy.
        shared: Patterns of parameter names such as "head.*": the client trains and shares
            these parameters only, the others are frozen. Default: all that require gradients.
        bounds: (0, 1), or None for inputs without bounds, which an attack then does not box.
        defense: What the client does to its update, in this order: words such as "clip:1" or
            "clip:1,gaussian:0.01" (see `defenses()`), or instances of `Defense`.
        local: The client's local training, or words of it such as "adamw lr=1e-3 steps=3"
            (see `LocalTraining.parse`); default: one step, whose gradient is shared.
        train_mode: Run the model in train mode (BatchNorm over the batch, active dropout);
            default: in the mode that it is in.
        mean: Mean of the normalisation that the model expects of its inputs; one number, or
            one per channel (per feature of a table). None: 0, it takes them as they are.
        std: Standard deviation of it; None: 1.
        class_names: Names in the order of labels.
        tokens: The text of every token of the vocabulary, in the order of ids.
        pad: The token id that fills up sentences shorter than T, at their end: it has no loss.
            A model that looks ahead must not see it, see `core.models.language.Padded`.
        seed: Of the random numbers of defenses, dropout and a `ModelSpec`'s parameters.
        device: Where to compute; default: where the model is.
        aggregate: Number of clients whose mean update is shared, as a server sees it under secure
            aggregation, or an `Aggregation`. Each has an equal share of the inputs, in their
            order, and trains and defends its update by itself; of the mean, `local` is of each.
        images: Another name of `inputs`.
        labels: Another name of `targets`.

    Returns:
        What an attacker sees, and (kept apart) what the client meant to keep private.

    Raises:
        InputError: One sentence on what cannot be used.
    """
    columns = None
    if isinstance(inputs, Table):
        columns, bounds, class_names = inputs.columns, None, inputs.class_names
        targets = inputs.targets if targets is None else targets
        inputs = inputs.inputs
    chosen = as_loss(loss)
    given = _one_of("inputs", inputs, images)
    text = _is_text(given)
    given = given.detach().cpu().long() if text else _checked_inputs(given, is_bounded(bounds))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        architecture = (
            GivenModel(model, shape=given.shape[1:]) if isinstance(model, nn.Module) else model
        )
        received = in_full_precision(architecture.build())
    if text:
        data = token_spec(received, given, class_names, tokens, pad)
        chosen = ignoring(chosen, pad)
    else:
        data = data_spec(given.shape[1:], mean, std, class_names, bounds is not None)
    data = dataclasses.replace(data, columns=columns)
    received.train(received.training if train_mode is None else train_mode)
    outputs = outputs_of(received, data, given)
    wanted = fitted_targets(chosen, outputs, _one_of("targets", targets, labels), len(given))
    data = with_classes(data, chosen, outputs)
    _freeze_others(received, shared)
    whose = aggregate if isinstance(aggregate, Aggregation) else _clients(aggregate)
    if len(given) % len(whose.present):
        raise InputError(
            f"aggregate: {len(given)} inputs are not as many of each of {len(whose.present)} "
            "clients"
        )
    settings = ClientSettings(
        local=local_training(local, len(given) // len(whose.present)),
        train_mode=received.training,
        defenses=_defenses(defense),
        seed=seed,
        dropout_seed=seed,
        loss=chosen,
    )
    process = Process(device=_device(received, device))
    batch = (data, given, wanted, settings)
    if whose.sums:
        target: Target | None = share_sum(received, architecture, *batch, whose, process)
    else:
        target = share_update(received, architecture, *batch, process)
    assert target is not None
    if not all(gradient.isfinite().all() for gradient in target.gradient.values()):
        raise InputError("the update is not finite: the model or its local training diverges")
    return target, Truth(given, wanted, columns=columns)


def _clients(number: int) -> Aggregation:
    if not isinstance(number, int) or number < 1:
        raise InputError(f"aggregate: a number of clients, at least 1, not {number!r:.40}")
    return Aggregation(number)


def _one_of(name: str, given: object, other: object) -> torch.Tensor:
    """A tensor from the one of two arguments that was given."""
    value = other if given is None else given
    if value is None or (given is not None and other is not None):
        raise InputError(f"give {name} once")
    try:
        return torch.as_tensor(value)
    except (TypeError, ValueError, RuntimeError) as error:
        raise InputError(f"{name} cannot be read as a tensor: {error}") from None


def _is_text(inputs: torch.Tensor) -> bool:
    """Whether these are sentences of token ids."""
    return inputs.dim() == 2 and inputs.dtype in (torch.int32, torch.int64) and inputs.numel() > 0


def _checked_inputs(inputs: torch.Tensor, bounded: bool) -> torch.Tensor:
    if not 2 <= inputs.dim() <= 5 or not inputs.is_floating_point() or not inputs.numel():
        raise InputError(
            f"images must be floating-point numbers of shape {SHAPES}, not {inputs.dtype} of "
            f"shape {tuple(inputs.shape)}"
        )
    inputs = inputs.detach().cpu()
    # Numbers of few bits are exact in more.
    inputs = inputs if inputs.dtype == torch.float64 else inputs.float()
    low, high = float(inputs.min()), float(inputs.max())
    if not bounded:
        if not inputs.isfinite().all():
            raise InputError("an input is not finite (NaN or infinity)")
        return inputs
    # Written so that NaN is refused as well.
    if not (low >= -_TOLERANCE and high <= 1 + _TOLERANCE):
        raise InputError(
            f"images must lie in [0, 1] and these lie in [{low:g}, {high:g}]; give mean= and "
            "std= if the model expects normalised ones, or bounds=None for values without bounds"
        )
    return inputs.clamp(0, 1)


def _freeze_others(model: nn.Module, patterns: str | Sequence[str] | None) -> None:
    """Leave derivatives to the parameters that are shared, tied ones by any of their names."""
    if patterns is None:
        return
    named = dict(model.named_parameters(remove_duplicate=False))
    kept: set[int] = set()
    for pattern in [patterns] if isinstance(patterns, str) else patterns:
        found = [p for name, p in named.items() if fnmatch.fnmatchcase(name, pattern)]
        if not found:
            raise InputError(
                f"shared: no parameter's name fits {pattern!r}; the nearest is "
                f"{nearest(pattern, named)}"
            )
        kept |= {id(parameter) for parameter in found}
    for parameter in named.values():
        parameter.requires_grad_(parameter.requires_grad and id(parameter) in kept)
    if not any(parameter.requires_grad for parameter in named.values()):
        raise InputError("shared: all parameters that fit are frozen, there is nothing to share")


def _defenses(given: str | Defense | Sequence[str | Defense]) -> tuple[Defense, ...]:
    parts = [given] if isinstance(given, (str, Defense)) else given
    found: list[Defense] = []
    for part in parts:
        found += [part] if isinstance(part, Defense) else _parsed(part)
    return tuple(found)


def _parsed(words: str) -> tuple[Defense, ...]:
    for word in filter(None, map(str.strip, words.split(","))):
        check_name("defense", current_name(word.partition(":")[0]), defense_names())
    return parse_defenses(words)


def _device(model: nn.Module, device: torch.device | str | None) -> torch.device:
    return next(model.parameters()).device if device is None else torch.device(device)
