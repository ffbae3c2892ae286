"""`invert`: what an attacker gets out of what was shared."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from attack.attacks import Attack, OptimizationAttack, attack_names, get_attack
from attack.knowledge.labels import recover_most_exactly
from attack.knowledge.threat_models import Capability
from attack.reconstruction import Reconstruction
from attack.settings import SETTINGS
from core.errors import InputError
from core.target import Target
from gradinvbench._names import check_name

# What a target's owner knows; labels count where they are given.
_GRANTED = frozenset(Capability) - {Capability.LABELS, Capability.PRIOR_DATA}
# One value of a setting.
Value = str | int | float | bool | tuple[float, ...] | None


def invert(
    target: Target,
    *,
    attack: str | Attack = "spectral",
    iterations: int | None = None,
    labels: torch.Tensor | Sequence[int] | None = None,
    prior: torch.Tensor | None = None,
    seed: int = 0,
    device: torch.device | str | None = None,
    progress: bool = True,
    **settings: Value,
) -> Reconstruction:
    """Reconstruct the images behind what a client shared.

    Args:
        target: What the client shared.
        attack: A name in `attacks()`, run under its published setting, or an `Attack`.
        iterations: Of the whole attack; default: the published number.
        labels: N class indices, if they are known in the order of the images; default: they
            are recovered from the target, by the most exact rule that applies.
        prior: What to start from instead of noise: one image (C x H x W in [0, 1]) or one
            for each of the batch (N x C x H x W).
        seed: Of the starts and of noise.
        device: Where to compute; default: a GPU if there is one.
        progress: Show a bar.
        settings: Further settings of the attack, by the names of `Settings`, such as
            `restarts=4`, `tv=1e-3`, `double=True` or `adaptive=True`.

    Returns:
        Images in [0, 1] and labels, in no particular order.

    Raises:
        InputError: An unknown name, a setting that makes no sense, or a target that the
            attack cannot invert.
    """
    given = settings if iterations is None else {**settings, "iterations": iterations}
    chosen = _configured(attack, given, labels is not None)
    start = {} if prior is None else {"prior": _prior(target, prior)}
    return chosen.reconstruct(
        target,
        labels=_labels(chosen, target, labels),
        device=_device(device),
        seed=seed,
        progress=progress,
        **start,
    )


def _configured(attack: str | Attack, given: dict[str, Value], labelled: bool) -> Attack:
    """The attack under its published setting with the given fields on top."""
    for name in given:
        check_name("setting", name, SETTINGS)
    if isinstance(attack, Attack):
        if given:
            raise InputError(f"{next(iter(given))}: set it where the attack is created")
        return attack
    check_name("attack", attack, attack_names())
    kind = get_attack(attack)
    if not issubclass(kind, OptimizationAttack):
        granted = _GRANTED | ({Capability.LABELS} if labelled else frozenset())
        return kind.configured({"adaptive": True, **given, "granted": granted})
    config = kind.published.changed(**given)
    config.validate()
    return kind(config)


def _labels(
    attack: Attack, target: Target, labels: torch.Tensor | Sequence[int] | None
) -> torch.Tensor:
    if labels is None:
        # An ensemble tries several ways to get them; the base class does not know of None.
        own = attack.recovers_labels
        return None if own else recover_most_exactly(target)  # type: ignore[return-value]
    labels = torch.as_tensor(labels).detach().long().cpu()
    if labels.shape != (target.batch_size,):
        raise InputError(f"{labels.numel()} labels for a batch of {target.batch_size} images")
    if int(labels.min()) < 0 or int(labels.max()) >= target.data.n_classes:
        raise InputError(f"labels must lie in 0..{target.data.n_classes - 1}")
    return labels


def _prior(target: Target, prior: torch.Tensor) -> torch.Tensor:
    """An image to start from for each of the batch."""
    shape = (target.batch_size, *target.data.shape)
    if tuple(prior.shape) not in (shape, shape[1:]):
        size = " x ".join(map(str, shape[1:]))
        raise InputError(f"prior has shape {tuple(prior.shape)} and the images are {size}")
    return prior.detach().float().cpu().expand(shape)


def _device(device: torch.device | str | None) -> torch.device:
    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return torch.device(device)
