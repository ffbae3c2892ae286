"""`invert`: what an attacker gets out of what was shared."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from attack.attacks import Attack, OptimizationAttack, attack_names, get_attack
from attack.knowledge.clients import check_client, require_classes
from attack.knowledge.labels import recover_most_exactly
from attack.knowledge.threat_models import Capability
from attack.reconstruction import Reconstruction
from attack.settings import SETTINGS
from core.errors import InputError
from core.losses import Outputs, Targets
from core.models.unchanged import in_mode
from core.target import Target
from gradinvbench._names import check_name

# What a target's owner knows; labels count where they are given.
_GRANTED = frozenset(Capability) - {
    Capability.LABELS,
    Capability.PRIOR_DATA,
    Capability.DROPOUT_MASKS,
}
# Targets that are optimised together with the inputs.
OPTIMISE = "optimise"
# One value of a setting.
Value = str | int | float | bool | tuple[float, ...] | None


def invert(
    target: Target,
    *,
    attack: str | Attack = "spectral-3",
    iterations: int | None = None,
    labels: torch.Tensor | Sequence[int] | str | None = None,
    targets: torch.Tensor | Sequence[int] | str | None = None,
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
        labels: N class indices, or what else the client's loss compares with, if they are known
            in the order of the images; "optimise": they are optimised together with the
            images. Default: they are recovered from the target, by the rule "exact": class
            indices, findings of binary cross-entropy, the values of one image under squared
            error; other targets must be given or optimised.
        targets: Another name of `labels`.
        prior: What to start from instead of noise: one image (C x H x W in [0, 1]) or one
            for each of the batch (N x C x H x W).
        seed: Of the starts and of noise.
        device: Where to compute; default: a GPU if there is one.
        progress: Show a bar.
        settings: Further settings of the attack, by the names of `Settings`, such as
            `restarts=4`, `tv=1e-3`, `double=True` or `adaptive=True`.

    Returns:
        Images (in [0, 1], if they have bounds) and labels, in no particular order.

    Raises:
        InputError: An unknown name, a setting that makes no sense, or a target that the
            attack cannot invert.
    """
    if labels is not None and targets is not None:
        raise InputError("give labels or targets, not both: they are the same")
    known = targets if labels is None else labels
    given = settings if iterations is None else {**settings, "iterations": iterations}
    if isinstance(known, str):
        given = {**given, "joint_labels": _is_optimise(known)}
    chosen = _configured(attack, given, known is not None and not isinstance(known, str))
    check_client(chosen, target)
    start = {} if prior is None else {"prior": _prior(target, prior)}
    return chosen.reconstruct(
        target,
        labels=_labels(chosen, target, known),
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


def _is_optimise(word: str) -> bool:
    check_name("targets", word, [OPTIMISE])
    return True


def _labels(
    attack: Attack, target: Target, labels: torch.Tensor | Sequence[int] | str | None
) -> torch.Tensor:
    if labels is None and target.data.n_tokens:
        # A language model's targets are its inputs; the classes of others the attack recovers.
        return None  # type: ignore[return-value]
    if isinstance(labels, str) or (labels is None and _optimises_others(attack, target)):
        return _placeholder(attack, target)
    if labels is None:
        if attack.recovers_labels:
            require_classes("the recovery of labels", target.loss)
            # An ensemble tries several ways to get them; the base class does not know of None.
            return None  # type: ignore[return-value]
        recovered = recover_most_exactly(target)
        return target.loss.fitted(_outputs(target), recovered)
    labels = torch.as_tensor(labels).detach().cpu()
    if labels.dim() == 0 or len(labels) != target.batch_size:
        raise InputError(f"{labels.numel()} labels for a batch of {target.batch_size} images")
    return target.loss.fitted(_outputs(target), labels)


def _optimises_others(attack: Attack, target: Target) -> bool:
    """Whether the attack optimises targets anyway, and they are no classes to start from."""
    if not isinstance(attack, OptimizationAttack) or target.loss.targets is Targets.CLASSES:
        return False
    return attack.config.matching.joint_labels


def _placeholder(attack: Attack, target: Target) -> torch.Tensor:
    """Stands where labels would; every restart optimises its own."""
    if not isinstance(attack, OptimizationAttack):
        raise InputError(f"attack {attack.name} does not optimise targets: give them")
    if attack.config.consensus.combine:
        raise InputError("combine: restarts with targets of their own cannot be combined")
    return torch.zeros(target.batch_size, dtype=torch.long)


def _outputs(target: Target) -> Outputs:
    """What the model gives for one sample of the mean colour."""
    model = in_mode(target.build_model(), False)
    parameter = next(model.parameters())
    inputs = target.data.placed(torch.zeros((1, *target.data.shape), dtype=torch.long), parameter)
    with torch.no_grad():
        outputs: Outputs = model(inputs)
    return outputs


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
