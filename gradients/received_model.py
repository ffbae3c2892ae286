"""The model a client received: built anew, or read from a checkpoint of any origin."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from core.data.specs import DataSpec
from core.errors import InputError
from core.models.building import ModelSpec, build_model, last_linear
from core.models.state_files import Fit, fit, load_fitting, read_state, state_in
from core.models.unchanged import in_mode, unchanged
from core.storage import load_checkpoint
from gradients.defenses import Defense

log = logging.getLogger(__name__)

OUTLAYER_STATES = ("None", "kaiming_uniform", "normal")
_MOCO_ENCODER = "encoder_q."


@dataclass(frozen=True)
class Pretrained:
    """Parameters from a file, and what the file says about them.

    Attributes:
        path: File to read.
        state_dict: By the names in the file.
        model: The architecture, where the file states it.
        data: What it was trained on, where the file states it.
        without_classifier: Whether the last layer is missing on purpose (MoCo).
        builder: The function that builds the module, where it is the user's own.
    """

    path: Path
    state_dict: dict[str, torch.Tensor]
    model: ModelSpec | None = None
    data: DataSpec | None = None
    without_classifier: bool = False
    builder: str | None = None


def read_pretrained(path: str | Path, flag: str = "--pretrained") -> Pretrained:
    """Read a training checkpoint of ours or of others, plain parameters, or MoCo's.

    Args:
        path: File to read.
        flag: The flag the user gave it with, for messages.

    Raises:
        InputError: Missing, broken, or without parameters.
    """
    path = Path(path)
    raw = {} if path.suffix in (".safetensors", ".npz") else load_checkpoint(path, flag)
    tensors = state_in(raw, f"{flag}: {path}") if raw else read_state(path, flag)
    is_moco = any(_MOCO_ENCODER in name for name in tensors)
    if is_moco:
        tensors = _moco_encoder(tensors)
    return Pretrained(
        path=path,
        state_dict=tensors,
        model=ModelSpec.from_dict(raw["model"]) if _has(raw.get("model"), "n_classes") else None,
        data=DataSpec.from_dict(raw["data"]) if _has(raw.get("data"), "shape") else None,
        without_classifier=is_moco,
        builder=str(raw["model"]["builder"]) if _has(raw.get("model"), "builder") else None,
    )


def _has(value: Any, key: str) -> bool:
    return isinstance(value, dict) and key in value


def _moco_encoder(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The query encoder without its projection head.

    Source: He et al., MoCo, https://arxiv.org/abs/1911.05722.
    """
    encoder = {
        name.partition(_MOCO_ENCODER)[2]: value
        for name, value in tensors.items()
        if _MOCO_ENCODER in name
    }
    return {name: value for name, value in encoder.items() if not name.startswith("fc.")}


def build_received_model(
    spec: ModelSpec,
    pretrained: Pretrained | None = None,
    outlayer_state: str = "None",
    seed: int = 0,
    defenses: Sequence[Defense] = (),
) -> nn.Module:
    """Build the architecture and give it its parameters.

    A classification layer for another number of classes is left as initialised.

    Args:
        spec: How the model is built.
        pretrained: Parameters; None for the initial model.
        outlayer_state: How to initialise the last layer: "None" (leave it),
            "kaiming_uniform" or "normal" (std 0.01, bias 0).
        seed: Seed of the random initialisation.
        defenses: Of the client; some change the model.

    Raises:
        InputError: The parameters do not belong to this architecture.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = build_model(spec)
        if pretrained is not None:
            for defense in defenses:
                # A model that was trained under it has its parameters; another one gets them later.
                if defense.changes_model() and defense.is_in(pretrained.state_dict):
                    defense.prepare(model)
            _load(model, spec, pretrained)
        _set_outlayer(model, outlayer_state)
    return model


def _load(model: nn.Module, spec: ModelSpec, pretrained: Pretrained) -> None:
    """Load all that the file has for the model; only the classifier may be missing or differ."""
    name, _ = last_linear(model)
    classifier = {f"{name}.weight", f"{name}.bias"}
    found = fit(pretrained.state_dict, model)
    blocks = {block for block, _ in model.named_children()}
    # Heads that the model was built without may be left out, parts of its blocks may not: a
    # ResNet-34's file holds all names of a ResNet-18.
    more = [other for other in found.unexpected if other.partition(".")[0] in blocks]
    others = {block: v for block, v in found.other_shape.items() if block not in classifier}
    if more or others or not set(found.missing) <= classifier or _other_features(found, name):
        raise InputError(
            f"--pretrained: the parameters in {pretrained.path} do not fit --arch {spec.arch} "
            f"(stem {spec.stem}, norm {spec.norm}): {found.sentence()}"
        )
    if found.unexpected:
        log.warning(
            "%s: %d tensors of other heads are left out (%s, ...)",
            pretrained.path.name, len(found.unexpected), found.unexpected[0],
        )  # fmt: skip
    if load_fitting(model, found, f"--pretrained: {pretrained.path}"):
        log.warning("%s: the classifier %s is initialised anew", pretrained.path.name, name)


def _other_features(found: Fit, name: str) -> bool:
    """Whether the file's classifier reads other features, not only names other classes."""
    shapes = found.other_shape.get(f"{name}.weight")
    return shapes is not None and shapes[0][1:] != shapes[1][1:]


def load_own(model: nn.Module, pretrained: Pretrained, example: torch.Tensor) -> None:
    """Load a file into a module of the user's own, whose head may be missing in it.

    What is missing has to come last in the computation: a backbone's file fits a model that has a
    head more, or one for other classes. Other names in the file (another head) are left out.

    Args:
        model: Changed; run once for the order of its layers.
        pretrained: The file's parameters.
        example: Samples that the model takes.

    Raises:
        InputError: They do not fit; one sentence says what.
    """
    place = f"--pretrained {pretrained.path}"
    found = fit(pretrained.state_dict, model)
    absent = [*found.missing, *found.other_shape]
    if absent:
        # Which layers come last is asked where something is missing only.
        order = _layers_in_order(model, example)
        head = {name.rpartition(".")[0] for name in absent}
        last = order[len(order) - len(head.intersection(order)) :]
        others = [name for name in found.other_shape if name.rpartition(".")[0] != order[-1]]
        differing = any(given[1:] != own[1:] for given, own in found.other_shape.values())
        if not head.intersection(order) <= set(last) or others or differing:
            raise InputError(f"{place}: does not fit {type(model).__name__}: {found.sentence()}")
    anew = load_fitting(model, found, place)
    if anew:
        log.warning(
            "%s: %d tensors of the head are initialised anew (%s)",
            pretrained.path.name, len(anew), ", ".join(anew[:4]),
        )  # fmt: skip
    if found.unexpected:
        log.warning(
            "%s: %d tensors are not the model's and left out (%s, ...)",
            pretrained.path.name, len(found.unexpected), found.unexpected[0],
        )  # fmt: skip


def _layers_in_order(model: nn.Module, example: torch.Tensor) -> list[str]:
    """Names of the modules with parameters of their own, in the order in which they are done."""
    order: dict[str, None] = {}

    def note(name: str) -> Callable[..., None]:
        return lambda *_: order.update({name: None})

    owners = {name.rpartition(".")[0] for name, _ in model.named_parameters()}
    handles = [model.get_submodule(name).register_forward_hook(note(name)) for name in owners]
    try:
        with torch.no_grad(), unchanged(model):
            in_mode(model, False)(example)
    finally:
        for handle in handles:
            handle.remove()
    return list(order)


def _set_outlayer(model: nn.Module, state: str) -> None:
    if state == "None":
        return
    _, layer = last_linear(model)
    if state == "kaiming_uniform":
        layer.reset_parameters()
    elif state == "normal":
        nn.init.normal_(layer.weight, std=0.01)
        nn.init.zeros_(layer.bias)
    else:
        raise InputError(f"--outlayer-state {state}: choose one of {', '.join(OUTLAYER_STATES)}")
