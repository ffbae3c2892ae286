"""The model a client received: built anew, or read from a checkpoint of any origin."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from core.data.specs import DataSpec
from core.errors import InputError
from core.models.building import ModelSpec, build_model, last_linear, load_parameters
from core.storage import load_checkpoint

log = logging.getLogger(__name__)

OUTLAYER_STATES = ("None", "kaiming_uniform", "normal")
_MOCO_ENCODER = "encoder_q."


@dataclass(frozen=True)
class Pretrained:
    """Parameters from a file, and what the file says about them.

    Attributes:
        path: File to read.
        state_dict: By name, without the prefixes of wrappers.
        model: The architecture, where the file states it.
        data: What it was trained on, where the file states it.
        without_classifier: Whether the last layer is missing on purpose (MoCo).
    """

    path: Path
    state_dict: dict[str, torch.Tensor]
    model: ModelSpec | None = None
    data: DataSpec | None = None
    without_classifier: bool = False


def read_pretrained(path: str | Path, flag: str = "--pretrained") -> Pretrained:
    """Read a training checkpoint (`state_dict` inside), plain parameters, or MoCo's.

    Args:
        path: File to read.
        flag: The flag the user gave it with, for messages.

    Raises:
        InputError: Missing, broken, or without parameters.
    """
    raw = load_checkpoint(path, flag)
    # Some trainers keep the parameters under "model".
    candidates = map(_tensors, (raw.get("state_dict"), raw.get("model"), raw))
    tensors = next(filter(None, candidates), None)
    if tensors is None:
        raise InputError(f"{flag}: {path} holds no model parameters")
    is_moco = any(name.startswith(_MOCO_ENCODER) for name in tensors)
    if is_moco:
        tensors = _moco_encoder(tensors)
    return Pretrained(
        path=Path(path),
        state_dict=tensors,
        model=ModelSpec.from_dict(raw["model"]) if _has(raw.get("model"), "arch") else None,
        data=DataSpec.from_dict(raw["data"]) if _has(raw.get("data"), "shape") else None,
        without_classifier=is_moco,
    )


def _has(value: Any, key: str) -> bool:
    return isinstance(value, dict) and key in value


def _tensors(state: Any) -> dict[str, torch.Tensor]:
    """The tensors of a dictionary, by name without the prefix of a parallel wrapper."""
    if not isinstance(state, Mapping):
        return {}
    found = {str(name): value for name, value in state.items() if torch.is_tensor(value)}
    return {name.removeprefix("module."): value for name, value in found.items()}


def _moco_encoder(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The query encoder without its projection head.

    Source: He et al., MoCo, https://arxiv.org/abs/1911.05722.
    """
    encoder = {
        name.removeprefix(_MOCO_ENCODER): value
        for name, value in tensors.items()
        if name.startswith(_MOCO_ENCODER)
    }
    return {name: value for name, value in encoder.items() if not name.startswith("fc.")}


def build_received_model(
    spec: ModelSpec,
    pretrained: Pretrained | None = None,
    outlayer_state: str = "None",
    seed: int = 0,
) -> nn.Module:
    """Build the architecture and give it its parameters.

    A classification layer for another number of classes is left as initialised.

    Args:
        spec: How the model is built.
        pretrained: Parameters; None for the initial model.
        outlayer_state: How to initialise the last layer: "None" (leave it),
            "kaiming_uniform" or "normal" (std 0.01, bias 0).
        seed: Seed of the random initialisation.

    Raises:
        InputError: The parameters do not belong to this architecture.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = build_model(spec)
        if pretrained is not None:
            _load(model, spec, pretrained)
        _set_outlayer(model, outlayer_state)
    return model


def _load(model: nn.Module, spec: ModelSpec, pretrained: Pretrained) -> None:
    state = dict(pretrained.state_dict)
    name, layer = last_linear(model)
    keys = [key for key in (f"{name}.weight", f"{name}.bias") if key in model.state_dict()]
    weight = state.get(f"{name}.weight")
    other_classes = weight is not None and weight.shape[1:] == layer.weight.shape[1:]
    other_classes = other_classes and weight is not None and len(weight) != spec.n_classes
    if other_classes or pretrained.without_classifier:
        log.warning("%s: the classifier %s is initialised anew", pretrained.path.name, name)
        state |= {key: model.state_dict()[key] for key in keys}
    try:
        load_parameters(model, state)
    except RuntimeError as error:
        reason = str(error).splitlines()[-1].strip()
        raise InputError(
            f"--pretrained: the parameters in {pretrained.path} do not fit --arch {spec.arch} "
            f"(stem {spec.stem}, norm {spec.norm}): {reason}"
        ) from None


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
