"""`share`: what a client of federated learning would send for a batch."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
from torch import nn

from core.data.specs import DataSpec
from core.errors import InputError
from core.models.architecture import Architecture, GivenModel
from core.processes.distributed import Process
from core.target import LocalTraining, Target, Truth
from gradients.client import ClientSettings, share_update
from gradients.defenses import Defense, defense_names, parse_defenses
from gradinvbench._names import check_name

# Rounding of a normalisation that was undone.
_TOLERANCE = 1e-4


def share(
    model: nn.Module | Architecture,
    images: torch.Tensor,
    labels: torch.Tensor | Sequence[int],
    *,
    defense: str | Defense | Sequence[str | Defense] = (),
    local: LocalTraining | str | None = None,
    train_mode: bool | None = None,
    mean: float | Sequence[float] | None = None,
    std: float | Sequence[float] | None = None,
    class_names: Sequence[str] = (),
    seed: int = 0,
    device: torch.device | str | None = None,
) -> tuple[Target, Truth]:
    """Compute what a client shares for a batch under cross-entropy.

    Args:
        model: Any module from N x C x H x W to N x classes logits, with the parameters that
            the client receives. It is copied and left as it is. Or a `ModelSpec`.
        images: N x C x H x W in [0, 1]; any number of channels, any height and width.
        labels: N class indices.
        defense: What the client does to its update, in this order: words such as "clip:1" or
            "clip:1,gaussian:0.01" (see `defenses()`), or instances of `Defense`.
        local: The client's local training, or words of it such as "adamw lr=1e-3 steps=3"
            (see `LocalTraining.parse`); default: one step, whose gradient is shared.
        train_mode: Run the model in train mode (BatchNorm over the batch, active dropout);
            default: in the mode that it is in.
        mean: Mean of the normalisation that the model expects of images in [0, 1]; one
            number, or one per channel. None: 0, the model takes the images as they are.
        std: Standard deviation of it; None: 1.
        class_names: Names in the order of labels.
        seed: Of the random numbers of defenses, dropout and a `ModelSpec`'s parameters.
        device: Where to compute; default: where the model is.

    Returns:
        What an attacker sees, and (kept apart) what the client meant to keep private.

    Raises:
        InputError: One sentence on what cannot be used.
    """
    architecture = GivenModel(model) if isinstance(model, nn.Module) else model
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        received = architecture.build()
    truth = _checked_truth(images, labels)
    data = _data(truth.images, mean, std, class_names)
    data = _with_classes(data, _logits(received, data, truth.images), truth.labels)
    settings = ClientSettings(
        local=_local(local, len(truth.images)),
        train_mode=received.training if train_mode is None else train_mode,
        defenses=_defenses(defense),
        seed=seed,
        dropout_seed=seed,
    )
    process = Process(device=_device(received, device))
    target = share_update(
        received, architecture, data, truth.images, truth.labels, settings, process
    )
    assert target is not None
    if not all(gradient.isfinite().all() for gradient in target.gradient.values()):
        raise InputError("the update is not finite: the model or its local training diverges")
    return target, truth


def _local(given: LocalTraining | str | None, n_images: int) -> LocalTraining:
    if isinstance(given, str):
        return LocalTraining.parse(given, n_images)
    return given or LocalTraining()


def _checked_truth(images: torch.Tensor, labels: torch.Tensor | Sequence[int]) -> Truth:
    labels = torch.as_tensor(labels)
    if images.dim() != 4 or not images.is_floating_point():
        raise InputError(
            f"images must be floating-point numbers of shape N x C x H x W, not {images.dtype} "
            f"of shape {tuple(images.shape)}"
        )
    low, high = float(images.min()), float(images.max())
    # Written so that NaN is refused as well.
    if not (low >= -_TOLERANCE and high <= 1 + _TOLERANCE):
        raise InputError(
            f"images must lie in [0, 1] and these lie in [{low:g}, {high:g}]; give mean= and "
            "std= if the model expects normalised ones"
        )
    if labels.shape != images.shape[:1] or labels.is_floating_point():
        raise InputError(
            f"labels must be one class index for each of the {len(images)} images, not "
            f"{labels.dtype} of shape {tuple(labels.shape)}"
        )
    return Truth(images.detach().cpu().clamp(0, 1), labels.detach().long().cpu())


def _data(
    images: torch.Tensor,
    mean: float | Sequence[float] | None,
    std: float | Sequence[float] | None,
    class_names: Sequence[str],
) -> DataSpec:
    """The description of the images; the number of classes is still open."""
    channels, height, width = images.shape[1:]
    return DataSpec(
        name="given images",
        shape=(channels, height, width),
        mean=_per_channel("mean", 0.0 if mean is None else mean, channels),
        std=_per_channel("std", 1.0 if std is None else std, channels),
        n_classes=0,
        class_names=tuple(class_names),
    )


def _per_channel(name: str, values: float | Sequence[float], channels: int) -> tuple[float, ...]:
    numbers = torch.as_tensor(values, dtype=torch.float64).flatten()
    numbers = numbers.expand(channels) if len(numbers) == 1 else numbers
    if len(numbers) != channels or not numbers.isfinite().all():
        raise InputError(f"{name} must be a number, or one for each of the {channels} channels")
    if name == "std" and float(numbers.min()) <= 0:
        raise InputError("std must be positive")
    return tuple(numbers.tolist())


def _logits(model: nn.Module, data: DataSpec, images: torch.Tensor) -> torch.Tensor:
    """The model's output for one image, to see that they fit; the model stays as it is."""
    parameter = next(model.parameters(), None)
    if parameter is None:
        raise InputError(f"the model {type(model).__name__} has no parameters to share")
    inputs = data.normalize(images[:1].to(parameter.device, parameter.dtype))
    was_training = model.training
    try:
        with torch.no_grad():
            return model.eval()(inputs)  # type: ignore[no-any-return]
    except (RuntimeError, ValueError, TypeError, AssertionError) as error:
        raise InputError(
            f"the model {type(model).__name__} does not take images of shape "
            f"{' x '.join(map(str, data.shape))}: {str(error).splitlines()[0]}"
        ) from None
    finally:
        model.train(was_training)


def _with_classes(data: DataSpec, logits: torch.Tensor, labels: torch.Tensor) -> DataSpec:
    """The description with the number of classes that the model's output has."""
    if not isinstance(logits, torch.Tensor) or logits.dim() != 2 or logits.shape[1] < 2:
        shape = tuple(getattr(logits, "shape", ()))
        raise InputError(
            f"the model must give one row of logits per image, not {type(logits).__name__} of "
            f"shape {shape}"
        )
    n_classes = logits.shape[1]
    if int(labels.min()) < 0 or int(labels.max()) >= n_classes:
        raise InputError(
            f"labels must lie in 0..{n_classes - 1}, the classes of the model, and one is "
            f"{int(labels.max()) if int(labels.min()) >= 0 else int(labels.min())}"
        )
    if data.class_names and len(data.class_names) != n_classes:
        raise InputError(f"{len(data.class_names)} class_names for {n_classes} classes")
    return dataclasses.replace(data, n_classes=n_classes)


def _defenses(given: str | Defense | Sequence[str | Defense]) -> tuple[Defense, ...]:
    parts = [given] if isinstance(given, (str, Defense)) else given
    found: list[Defense] = []
    for part in parts:
        found += [part] if isinstance(part, Defense) else _parsed(part)
    return tuple(found)


def _parsed(words: str) -> tuple[Defense, ...]:
    for word in filter(None, map(str.strip, words.split(","))):
        check_name("defense", word.partition(":")[0], defense_names())
    return parse_defenses(words)


def _device(model: nn.Module, device: torch.device | str | None) -> torch.device:
    return next(model.parameters()).device if device is None else torch.device(device)
