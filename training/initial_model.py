"""The model that a training starts from: built, initialised, or read from a file."""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import nn

from core.data.specs import DataSpec
from core.errors import InputError
from core.models.architecture import Architecture
from core.models.batch_norm import convert_batch_norm
from core.models.building import (
    ModelSpec,
    default_stem,
)
from core.models.state_files import fit, load_fitting, read_state
from core.processes.distributed import Process
from training.settings import ModelSettings, TrainingConfig

logger = logging.getLogger(__name__)


def model_spec(settings: ModelSettings, data: DataSpec, *, per_sample: bool) -> ModelSpec:
    """The architecture that the settings and the data ask for.

    Args:
        settings: Of the architecture.
        data: Size of the images, or number of a record's features; number of classes.
        per_sample: Whether the gradient of every sample is clipped by itself.
    """
    if data.columns is not None:
        return ModelSpec(
            arch=settings.arch,
            n_classes=data.n_classes,
            width=settings.width,
            features=data.shape[0],
        )
    size = data.shape[1]
    return ModelSpec(
        arch=settings.arch,
        n_classes=data.n_classes,
        image_size=size,
        stem=default_stem(size) if settings.stem == "auto" else settings.stem,
        width=settings.width,
        pool_kernel=settings.pool_kernel,
        norm=("group" if per_sample else "batch") if settings.norm == "auto" else settings.norm,
    )


def build_client_model(
    settings: ModelSettings, config: TrainingConfig, spec: Architecture, process: Process
) -> nn.Module:
    """The model of one process: initialised, BatchNorm converted, on its device.

    Args:
        settings: Of the architecture.
        config: How it will be trained.
        spec: How the model is built.
        process: Rank, device and number of processes.

    Raises:
        InputError: The BatchNorm that was asked for needs CUDA or another package.
    """
    # Every process draws the same initial parameters.
    model = spec.build()
    if settings.bn_groups:
        model = convert_batch_norm(model, "grouped", groups=settings.bn_groups)
    elif config.synchronized and process.world_size > 1:
        model = _synchronized(model, settings.bn_backend, process)
    model = model.to(process.device)
    return model.to(memory_format=torch.channels_last) if config.channels_last else model


def _synchronized(model: nn.Module, backend: str, process: Process) -> nn.Module:
    nccl = torch.distributed.get_backend() == "nccl"
    if backend == "torch" and process.device.type != "cuda":
        raise InputError("--bn-backend torch needs CUDA; use --bn-backend own")
    if backend == "apex":
        return _apex_synchronized(model)
    if backend == "torch" or (backend == "auto" and nccl):
        return torch.nn.SyncBatchNorm.convert_sync_batchnorm(model)
    return convert_batch_norm(model, "synchronized")


def _apex_synchronized(model: nn.Module) -> nn.Module:
    try:
        from apex.parallel import convert_syncbn_model
    except ImportError:
        raise InputError(
            "--bn-backend apex: NVIDIA Apex is not installed; use --bn-backend torch"
        ) from None
    return convert_syncbn_model(model)


def load_pretrained(model: nn.Module, source: str, arch: str) -> None:
    """Load the parameters that `--pretrained` names into a model, in place.

    Args:
        model: Changed.
        source: "torchvision", or a file.
        arch: The model's architecture.

    Raises:
        InputError: They cannot be had, or do not fit.
    """
    if source == "torchvision":
        state = _torchvision_weights(arch)
    else:
        state = read_state(source, "--pretrained")
    # Another number of classes, or none: the last layer is trained anew.
    skipped = load_fitting(model, fit(state, model), f"--pretrained {source} (--arch {arch})")
    if skipped:
        logger.warning(
            "--pretrained: %d tensors do not fit and keep their initialisation (%s, ...)",
            len(skipped),
            skipped[0],
        )


def _torchvision_weights(arch: str) -> dict[str, Any]:
    import torchvision

    try:
        weights = torchvision.models.get_model_weights(arch).DEFAULT
        return weights.get_state_dict(progress=False)
    except (OSError, ValueError) as error:
        raise InputError(
            f"--pretrained: torchvision's weights of {arch} cannot be fetched here ({error}); "
            "give the path of a file instead: --pretrained PATH"
        ) from None
