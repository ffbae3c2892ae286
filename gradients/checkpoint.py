"""The gradient checkpoint: what was shared, kept apart from what was meant to stay private.

The file is the `.tar` checkpoint of the original tools (a dictionary written by
`torch.save`) with new keys added beside the published ones, so that files of
either origin load in both. Loading never runs code.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from core.clipping import BATCH
from core.data.specs import DataSpec
from core.errors import InputError
from core.local_training import MAX_LOCAL_STEPS
from core.losses import (
    DEFAULT_LOSS,
    GIVEN,
    Function,
    GivenLoss,
    Loss,
    Targets,
    is_default,
    loss_from,
)
from core.models.architecture import Architecture, GivenModel
from core.models.building import ModelSpec, default_stem
from core.models.kinds import BatchNorm
from core.models.malicious import Malice, add_to_language_model, parse_malice, parse_text_malice
from core.named_objects import is_object_name
from core.processes.distributed import shard_sizes
from core.records import BROKEN, check_types, fits
from core.storage import load_checkpoint, save_checkpoint
from core.target import RUNNING_STATISTICS, BatchStatistics, LocalTraining, Target, Truth
from gradients.defenses import current_name, defense_class, defense_names, parse_defenses
from gradients.private_gradient import PrivacySettings

# Of images in [0, 1] with one class each under cross-entropy, which every reader knows.
FORMAT_VERSION = 1
# Of any other client: earlier readers refuse it instead of taking it for such a classifier.
ANY_CLIENT_VERSION = 2
# Of the mean of several clients' updates, which earlier readers would take for one client's.
SUM_VERSION = 3
# The original tools' word for "no layer is frozen".
ALL_LAYERS = "all"
# Builds the module that a checkpoint belongs to, where it is not one of our architectures.
Builder = Callable[[], torch.nn.Module]
# What a file may state. Nothing in it proves these numbers, and an attack allocates by them.
MAX_BATCH_SIZE = 100_000
MAX_IMAGE_SIDE = 16384
# Of a volume, a signal or a row of a table.
MAX_SIDE = 1 << 20
MAX_POOL_KERNEL = 1024
# Of the whole batch, where the file does not hold it: 1 GiB in float32.
MAX_INPUT_VALUES = 2**28


def save_target(
    path: str | Path,
    target: Target,
    truth: Truth | None = None,
    arguments: Mapping[str, Any] | None = None,
    builder: str = "",
) -> None:
    """Write a gradient checkpoint atomically.

    Args:
        path: File to write.
        target: What the client shared.
        truth: What lies behind it; left out, the file is a stripped checkpoint.
        arguments: The command line by flag, for the record.
        builder: For a given module, the function that builds it, as `module:function`. It is
            stored as text; whoever reads the file decides whether to call it.

    Raises:
        InputError: The model is a given module, or the loss a given function, and nothing
            says how to find it again.
    """
    builder = builder or str(target.model.describe().get("builder") or "")
    if isinstance(target.model, GivenModel):
        _check_builder(target.model, builder)
    if isinstance(target.loss, GivenLoss):
        _check_source(target.loss)
    published = _published_keys(target, truth, arguments or {})
    private = {
        "mean_image": None if truth is None else truth.mean_image,
        "nearest_images": None if truth is None else truth.nearest_images,
    }
    save_checkpoint({**published, **_our_keys(target, builder), **private}, path)


def _check_source(loss: GivenLoss) -> None:
    if not is_object_name(loss.source):
        raise InputError(
            f"the loss {loss.name} is a function of your own, and a file holds no code: name it "
            "with GivenLoss(function, source='module:function')"
        )


def _check_builder(model: GivenModel, builder: str) -> None:
    if not is_object_name(builder):
        raise InputError(
            f"{model.name} is a module of your own, and a file holds no code: name the function "
            f"that builds it with builder='module:function' (got {builder!r})"
        )


def _published_keys(
    target: Target, truth: Truth | None, arguments: Mapping[str, Any]
) -> dict[str, Any]:
    """The keys that the original tools write and read."""
    exact = target.bn_statistics if target.synchronized else None
    whole = None if exact is None else list(exact[0].values())
    return {
        "clock": time.strftime("%Y-%m-%d %H:%M:%S"),
        "batch_size": target.batch_size,
        "dataset_setup": {
            "mean": list(target.data.mean),
            "std": list(target.data.std),
            "size": list(target.data.shape),
            "n_classes": target.data.n_classes,
        },
        "arch": target.model.name,
        "model_eval": not target.train_mode,
        "state_dict": target.state_dict,
        "free_last_layers_list": _free_layers(target),
        "target_gradient": list(target.gradient.values()),
        "bn_mean_list": None if whole is None else [mean for mean, _ in whole],
        "bn_var_list": None if whole is None else [var for _, var in whole],
        "x_true": None if truth is None else target.data.normalize(truth.images),
        "y_true": None if truth is None else truth.labels,
        "args": argparse.Namespace(**arguments),
        "syncbn": target.synchronized,
    }


def _our_keys(target: Target, builder: str) -> dict[str, Any]:
    """What the published keys cannot express."""
    statistics = target.bn_statistics
    return {
        "format_version": _version(target),
        **({} if is_default(target.loss) else {"loss": target.loss.describe()}),
        **({"clients": list(target.clients)} if target.clients else {}),
        "model": target.model.describe() | ({"builder": builder} if builder else {}),
        "data": target.data.to_dict(),
        "parameter_names": list(target.gradient),
        "local_training": _local_keys(target.local),
        "shards": list(target.shards),
        "bn_statistics": None
        if statistics is None
        else [{name: [m, v] for name, (m, v) in part.items()} for part in statistics],
        "defenses": list(target.defenses),
        "dropout_seed": target.dropout_seed,
        "running_after": target.running_after,
    }


def _version(target: Target) -> int:
    """The lowest version that says all."""
    if target.clients:
        return SUM_VERSION
    return FORMAT_VERSION if _is_classifier(target) else ANY_CLIENT_VERSION


def _is_classifier(target: Target) -> bool:
    """Whether it is a client of the kind that all versions of the format know."""
    data = target.data
    return is_default(target.loss) and data.bounded and len(data.shape) == 3


def _local_keys(local: LocalTraining) -> dict[str, Any]:
    """The local training as plain values; what few clients do is left out where it was not done."""
    defaults, rare = LocalTraining(), ("proximal", "bn_momentum", "order")
    values = local.to_dict()
    return {k: v for k, v in values.items() if k not in rare or v != getattr(defaults, k)}


def _free_layers(target: Target) -> list[str]:
    """The parameters that are trained, or "all", as the original tools list them."""
    n_parameters = len(dict(target.model.skeleton().named_parameters()))
    return [ALL_LAYERS] if len(target.gradient) == n_parameters else list(target.gradient)


def load_target(
    path: str | Path,
    flag: str = "--checkpoint",
    build: Builder | None = None,
    loss: Function | Loss | None = None,
) -> tuple[Target, Truth | None]:
    """Read a gradient checkpoint of ours or of the original tools. Nothing in it is run.

    Args:
        path: File to read.
        flag: The flag the user gave it with, for messages.
        build: Builds the module, for a checkpoint of a module that the user gave.
        loss: The client's loss, for a checkpoint whose loss is a function that the user gave.

    Returns:
        What the attacker may see, and (kept apart, None if stripped) the truth.

    Raises:
        InputError: Not a gradient checkpoint, or one that contradicts itself.
    """
    raw = load_checkpoint(path, flag)
    required = ("dataset_setup", "arch", "state_dict", "target_gradient", "batch_size")
    missing = [key for key in required if key not in raw]
    if missing:
        raise InputError(f"{flag}: {path} is not a gradient checkpoint (no {', '.join(missing)})")
    try:
        target = _parse_target(raw, build, loss)
        truth = _parse_truth(raw, target)
    except InputError as error:
        raise InputError(f"{flag}: {path}: {error}") from None
    except (*BROKEN, AssertionError) as error:
        raise InputError(
            f"{flag}: {path} is not a valid gradient checkpoint ({error!r:.200})"
        ) from None
    return target, truth


def _parse_target(
    raw: Mapping[str, Any], build: Builder | None, given_loss: Function | Loss | None
) -> Target:
    version = raw.get("format_version", FORMAT_VERSION)
    if type(version) is not int or version > SUM_VERSION:
        raise InputError(
            f"it has format version {version!r:.40} and this program reads up to "
            f"{SUM_VERSION}; update the program"
        )
    loss = _loss(raw, given_loss)
    data = _data_spec(raw, loss)
    model = _changed_by_defenses(_architecture(raw, data, build), raw)
    skeleton = model.skeleton()
    batch_size = _count(raw["batch_size"], "batch size", MAX_BATCH_SIZE)
    if raw.get("x_true") is None:
        _check_inputs(batch_size, data)
    shards = _shards(raw, batch_size)
    synchronized = bool(raw.get("syncbn", False)) or len(shards) == 1
    seed = raw.get("dropout_seed")
    clients = _clients(raw, batch_size)
    return Target(
        model=model,
        data=data,
        state_dict=_state_dict(raw, skeleton, model),
        gradient=_gradient(raw, skeleton, model),
        train_mode=not raw.get("model_eval", False),
        batch_size=batch_size,
        local=_local_training(raw, batch_size // max(1, len(clients))),
        shards=shards,
        synchronized=synchronized,
        bn_statistics=_bn_statistics(raw, skeleton, 1 if synchronized else len(shards)),
        defenses=_defenses(raw),
        dropout_seed=None if seed is None else _integer(seed, "dropout seed", -(2**63), 2**64),
        running_after=_running_after(raw, skeleton),
        loss=loss,
        clients=clients,
    )


def _clients(raw: Mapping[str, Any], batch_size: int) -> tuple[int, ...]:
    """Whose updates the mean is of, each with as many images."""
    stated = raw.get("clients") or []
    if not fits(stated, list[int]) or any(not 0 <= n < MAX_BATCH_SIZE for n in stated):
        raise InputError("its clients are not a list of their numbers")
    if len(set(stated)) != len(stated) or batch_size % max(1, len(stated)):
        raise InputError(
            f"its {len(stated)} clients do not have as many each of its {batch_size} images"
        )
    return tuple(stated)


def _loss(raw: Mapping[str, Any], given: Function | Loss | None) -> Loss:
    """The client's loss: a ready one by its description, any other as it was given."""
    description = raw.get("loss")
    if description is None:
        return DEFAULT_LOSS
    if not isinstance(description, Mapping):
        raise InputError(f"its loss is described by a {type(description).__name__}")
    if description.get("loss") != GIVEN:
        return loss_from(description)
    source = str(description.get("source"))
    if given is None:
        raise InputError(
            f"its loss is a function of the user's own, {source}; say where it is: "
            "--loss module:function, or load_target(path, loss=function)"
        )
    if isinstance(given, Loss):
        return given
    mean = bool(description.get("mean_over_samples", False))
    return GivenLoss(given, source, mean, str(description.get("targets", Targets.OTHER.value)))


def _architecture(raw: Mapping[str, Any], data: DataSpec, build: Builder | None) -> Architecture:
    """What rebuilds the model: the given function for a module of the user's own."""
    described = raw.get("model")
    description: Mapping[str, Any] = described if isinstance(described, Mapping) else {}
    builder = description.get("builder")
    if builder is None:
        spec = _model_spec(raw, data)
        _check_sizes(raw, spec)
        return spec
    if build is None:
        raise InputError(
            f"its model is a module of the user's own, built by {builder}; say where that function "
            "is: --model module:function, or load_target(path, build=function)"
        )
    malicious = str(description.get("malicious") or "")
    model = build()
    if malicious:
        # The block is as large as a number in the file says.
        _check_bins(raw, parse_text_malice(malicious, "the word for its malicious server"))
        model = add_to_language_model(model, malicious, data.shape[0])
    return GivenModel(model, str(builder), data.shape, malicious)


def _changed_by_defenses(model: Architecture, raw: Mapping[str, Any]) -> Architecture:
    """The architecture as the client's defenses left it, of those that are known here."""
    for word in _defenses(raw):
        name = current_name(word.split(":")[0])
        changes = name in defense_names() and defense_class(name).changes_model()
        if changes:
            (defense,) = parse_defenses(word)
            shapes: dict[str, Sequence[int]] = {
                n: tuple(getattr(v, "shape", ())) for n, v in raw["state_dict"].items()
            }
            defense.check_state(shapes)
            model = defense.architecture(model)
    return model


def _check_bins(raw: Mapping[str, Any], malice: Malice) -> None:
    """Refuse a block that is larger than any parameter in the file."""
    sides = [n for value in raw["state_dict"].values() for n in getattr(value, "shape", ())]
    if malice.kind == "imprint" and malice.number not in sides:
        raise InputError(f"it states {malice.number} bins but no parameter is that large")


def _check_sizes(raw: Mapping[str, Any], model: ModelSpec) -> None:
    """Refuse a description that would build something far larger than the file holds."""
    sides = [n for value in raw["state_dict"].values() for n in getattr(value, "shape", ())]
    numbers = [("classes", model.n_classes), ("channels", model.width or 1)]
    if model.malicious:
        malice = parse_malice(model.malicious, model.n_classes, "the word for its server")
        if malice.kind in ("imprint", "loki"):
            numbers += [("bins", malice.number), ("clients", malice.clients)]
    for what, number in numbers:
        if number > max(sides, default=0):
            raise InputError(f"it states {number} {what} but no parameter is that large")


def _check_inputs(batch_size: int, data: DataSpec) -> None:
    """Refuse a batch that no attack could hold, where the file does not hold it either."""
    if batch_size * math.prod(data.shape) > MAX_INPUT_VALUES:
        shape = " x ".join(map(str, data.shape))
        raise InputError(
            f"it states {batch_size} images of {shape} values without holding them; more than "
            f"{MAX_INPUT_VALUES} values are not believed"
        )


def _check_model(model: ModelSpec) -> None:
    """Words and numbers that `build_model` takes as they come."""
    check_types(model)
    for what, word, words in (
        ("normalisation", model.norm, ("batch", "group")),
        ("stem", model.stem, ("imagenet", "cifar")),
    ):
        if word not in words:
            raise InputError(f"the {what} of its model is {word!r:.40}, not {' or '.join(words)}")
    if not 1 <= model.pool_kernel <= MAX_POOL_KERNEL:
        raise InputError(f"the pooling kernel of its model is {model.pool_kernel}")


def _integer(value: Any, what: str, least: int, limit: int) -> int:
    """A whole number; not True, and nothing that has to be rounded."""
    if isinstance(value, torch.Tensor) and value.numel() == 1 and not value.is_floating_point():
        value = value.item()
    if type(value) is not int or not least <= value <= limit:
        raise InputError(f"its {what} is {value!r:.40}")
    return value


def _count(value: Any, what: str, limit: int) -> int:
    return _integer(value, what, 1, limit)


def _words(values: Any, what: str) -> tuple[str, ...]:
    if not fits(values, list[str]):
        raise InputError(f"its {what} are not a list of words")
    return tuple(values)


def _tensor(value: Any, what: str, shape: Sequence[int] | None = None) -> torch.Tensor:
    """A dense tensor of the given shape, detached."""
    if not isinstance(value, torch.Tensor):
        raise InputError(f"{what} is a {type(value).__name__}, not a tensor")
    if shape is not None and tuple(value.shape) != tuple(shape):
        raise InputError(f"{what} has shape {tuple(value.shape)}, expected {tuple(shape)}")
    if value.is_sparse:
        raise InputError(f"{what} is a sparse tensor")
    return value.detach()


def _finite(
    value: Any, what: str, shape: Sequence[int] | None = None, *, whole: bool | None = False
) -> torch.Tensor:
    """The same without NaN or infinity, of real numbers.

    Args:
        value: What the file holds.
        what: What to call it in a message.
        shape: Expected; None for any.
        whole: Whether it holds whole numbers (of any type) instead of floating-point ones;
            None for either, or yes and no.
    """
    tensor = _tensor(value, what, shape)
    if tensor.is_complex() or not _is_of_kind(tensor, whole):
        raise InputError(f"{what} has values of type {tensor.dtype}")
    if not torch.isfinite(tensor).all():
        raise InputError(f"{what} is not finite (NaN or infinity)")
    return tensor


def _is_of_kind(value: torch.Tensor, whole: bool | None) -> bool:
    if whole is None:
        return True
    if value.dtype == torch.bool:
        return False
    if whole and value.is_floating_point():
        return bool((value == value.round()).all())
    return whole or value.is_floating_point()


def _state_dict(
    raw: Mapping[str, Any], skeleton: torch.nn.Module, model: Architecture
) -> dict[str, torch.Tensor]:
    """theta_0 with every value checked against the architecture."""
    state = {name.removeprefix("module."): value for name, value in raw["state_dict"].items()}
    expected = skeleton.state_dict()
    strange = [n for n in state if n not in expected] + [n for n in expected if n not in state]
    if strange:
        raise InputError(f"its parameters are not those of {model.name}: {strange[0]}")
    # A mask of attention, for one, may hold infinity; statistics may not.
    free = {n for n, _ in skeleton.named_buffers() if not n.endswith(RUNNING_STATISTICS)}
    return {
        name: _like(value, f"the parameter {name}", expected[name], finite=name not in free)
        for name, value in state.items()
    }


def _like(value: Any, what: str, expected: torch.Tensor, *, finite: bool) -> torch.Tensor:
    """A tensor of the shape and the kind of another one; its number format may differ."""
    tensor = _tensor(value, what, expected.shape)
    # A module of the user's own may have complex or logical buffers.
    odd = [t.is_complex() or t.dtype == torch.bool for t in (tensor, expected)]
    if any(odd) and tensor.dtype != expected.dtype:
        raise InputError(f"{what} has values of type {tensor.dtype}")
    if any(odd) or not finite:
        return tensor
    return _finite(tensor, what, whole=not expected.is_floating_point())


def _gradient(
    raw: Mapping[str, Any], skeleton: torch.nn.Module, model: Architecture
) -> dict[str, torch.Tensor]:
    named = dict(skeleton.named_parameters())
    names = _gradient_names(raw, list(named))
    gradients = list(raw["target_gradient"])
    if len(names) != len(gradients) or not gradients:
        raise InputError(
            f"it holds {len(gradients)} gradients but {model.name} has {len(names)} parameters"
        )
    if len(set(names)) != len(names):
        raise InputError("its gradient names a parameter twice")
    unknown = [name for name in names if name not in named]
    if unknown:
        raise InputError(f"its gradient names a parameter {unknown[0]} that {model.name} has not")
    return {
        name: _finite(gradient, f"the gradient of {name}", named[name].shape)
        for name, gradient in zip(names, gradients, strict=True)
    }


def _gradient_names(raw: Mapping[str, Any], named: Sequence[str]) -> list[str]:
    """Which parameters the list of gradients belongs to, in its order."""
    if raw.get("parameter_names") is not None:
        return list(_words(raw["parameter_names"], "parameter names"))
    free = raw.get("free_last_layers_list") or [ALL_LAYERS]
    if ALL_LAYERS in free:
        return list(named)
    # The original tools match by substring.
    return [name for name in named if any(str(part) in name for part in free)]


def _shards(raw: Mapping[str, Any], batch_size: int) -> tuple[int, ...]:
    stated = raw.get("shards") or _original_shards(raw, batch_size)
    if not fits(stated, list[int]):
        raise InputError("its shards are not a list of numbers of images")
    shards = tuple(stated)
    if sum(shards) != batch_size or min(shards) < 1:
        raise InputError(f"its shards {shards!s:.80} do not add up to its batch size {batch_size}")
    return shards


def _original_shards(raw: Mapping[str, Any], batch_size: int) -> Sequence[int]:
    """Images per process of the original tools, which divided the batch evenly."""
    args = raw.get("args")
    processes = int(getattr(args, "world_size", 1) or 1)
    if getattr(args, "multiprocessing_distributed", False) and 1 < processes <= batch_size:
        return shard_sizes(batch_size, processes)
    return (batch_size,)


def _data_spec(raw: Mapping[str, Any], loss: Loss) -> DataSpec:
    setup = raw["dataset_setup"]
    shape = tuple(_count(n, "image side", MAX_SIDE) for n in setup["size"])
    n_classes = _integer(setup["n_classes"], "number of classes", 0, 2**62)
    if raw.get("data") is not None:
        data = DataSpec.from_dict(raw["data"])
    else:
        data = DataSpec(
            name=str(getattr(raw.get("args"), "data_name", "unknown")),
            shape=shape,
            mean=tuple(torch.as_tensor(setup["mean"]).flatten().tolist()),
            std=tuple(torch.as_tensor(setup["std"]).flatten().tolist()),
            n_classes=n_classes,
        )
    if tuple(data.shape) != shape or data.n_classes != n_classes:
        raise InputError("its two descriptions of the data (data, dataset_setup) differ")
    check_types(data)
    _check_data(data, loss)
    return data


def _check_data(data: DataSpec, loss: Loss) -> None:
    side = MAX_IMAGE_SIDE if len(data.shape) == 3 else MAX_SIDE
    if not 1 <= len(data.shape) <= 4 or not all(1 <= n <= side for n in data.shape):
        raise InputError(f"its images have shape {data.shape}")
    fewest = {Targets.CLASSES: 2, Targets.LABELS: 1}.get(loss.targets, 0)
    if data.n_classes < fewest:
        raise InputError(f"it has {data.n_classes} classes")
    if data.n_tokens:
        _check_vocabulary(data)
        return
    channels = data.shape[0]
    if len(data.mean) != channels or len(data.std) != channels:
        raise InputError(f"its mean and std do not have {channels} values")
    if data.columns is not None and (data.columns.width,) != data.shape:
        raise InputError(f"its columns make {data.columns.width} features, not {data.shape}")
    numbers = torch.tensor([*data.mean, *data.std], dtype=torch.float64)
    if not torch.isfinite(numbers).all() or min(data.std) <= 0:
        raise InputError("its mean and std are not finite numbers with a positive std")


def _check_vocabulary(data: DataSpec) -> None:
    if len(data.shape) != 1 or data.mean or data.std or not 1 < data.n_tokens <= MAX_SIDE:
        raise InputError(f"its sentences of shape {data.shape} have {data.n_tokens} tokens")
    if data.tokens and len(data.tokens) != data.n_tokens:
        raise InputError(f"it has {len(data.tokens)} words for {data.n_tokens} tokens")
    if data.pad is not None and not 0 <= data.pad < data.n_tokens:
        raise InputError(f"it fills sentences up with token {data.pad} of {data.n_tokens}")


def _model_spec(raw: Mapping[str, Any], data: DataSpec) -> ModelSpec:
    if len(data.shape) == 1 and raw.get("model") is not None:
        model = ModelSpec.from_dict(raw["model"])
        _check_model(model)
        if (model.n_classes, model.features) != (data.n_classes, data.shape[0]):
            raise InputError("its model and its data differ in classes or features")
        return model
    if len(data.shape) != 3:
        raise InputError(f"its model is one of ours, which takes images, not shape {data.shape}")
    if data.shape[1] != data.shape[2]:
        raise InputError(f"its images of {data.shape[1]} x {data.shape[2]} px are not square")
    if raw.get("model") is not None:
        model = ModelSpec.from_dict(raw["model"])
        _check_model(model)
        if model.n_classes != data.n_classes or model.image_size != data.shape[1]:
            raise InputError("its model and its data differ in classes or image size")
        return model
    # The original tools always used torchvision's own stem.
    stem = "imagenet" if default_stem(data.shape[1]) == "imagenet" else _stem_of(raw["state_dict"])
    # Their command line kept some numbers as text.
    kernel = int(getattr(raw.get("args"), "kernel_size_of_maxpool", 3) or 3)
    model = ModelSpec(raw["arch"], data.n_classes, data.shape[1], stem, pool_kernel=kernel)
    _check_model(model)
    return model


def _stem_of(state_dict: Mapping[str, torch.Tensor]) -> str:
    weight = state_dict.get("conv1.weight", state_dict.get("module.conv1.weight"))
    return "cifar" if weight is not None and weight.shape[-1] == 3 else "imagenet"


def _local_training(raw: Mapping[str, Any], batch_size: int) -> LocalTraining:
    if raw.get("local_training") is None:
        # The original tools split the images into one batch per local iteration.
        args = raw.get("args")
        batches = int(getattr(args, "epochs", 1) or 1)
        stated: dict[str, Any] = {"batches": batches, "lr": float(getattr(args, "lr", 0.1) or 0.1)}
    else:
        stated = dict(raw["local_training"])
    stated["epochs"] = _count(stated.get("epochs", 1), "number of local epochs", MAX_LOCAL_STEPS)
    stated["batches"] = _count(stated.get("batches", 1), "number of local batches", MAX_LOCAL_STEPS)
    stated["order"] = _order(stated.get("order"), batch_size)
    try:
        local = LocalTraining.from_dict(stated)
        check_types(local)
    except InputError as error:
        raise InputError(f"its local training is amiss: {error}") from None
    _count(local.steps, "number of local steps", MAX_LOCAL_STEPS)
    return local


def _order(stated: Any, batch_size: int) -> tuple[tuple[int, ...], ...] | None:
    if stated is None:
        return None
    if not fits(stated, list[list[int]]):
        raise InputError("its local steps are not lists of image numbers")
    order = tuple(tuple(step) for step in stated)
    if any(not step or not 0 <= min(step) <= max(step) < batch_size for step in order):
        raise InputError(f"its local steps do not use images 0 to {batch_size - 1} only")
    return order


def _defenses(raw: Mapping[str, Any]) -> tuple[str, ...]:
    """What the client says it did; the original tools say it in their command line."""
    args = raw.get("args")
    if raw.get("defenses") is not None or not getattr(args, "enable_dp", False):
        return _words(raw.get("defenses") or [], "defenses")
    # Their --enable-dp clips the mean gradient and adds noise of sigma C to it.
    privacy = PrivacySettings(
        noise_multiplier=float(getattr(args, "sigma", 0.01)),
        max_norm=float(getattr(args, "max_per_sample_grad_norm", 1.0)),
        clipping=BATCH,
    )
    return (privacy.word,)


def _bn_statistics(
    raw: Mapping[str, Any], skeleton: torch.nn.Module, n_parts: int
) -> tuple[BatchStatistics, ...] | None:
    norms = {
        name: m.num_features for name, m in skeleton.named_modules() if isinstance(m, BatchNorm)
    }
    parts = raw.get("bn_statistics") or _published_statistics(raw, list(norms))
    if not parts:
        return None
    if len(parts) != n_parts or any(set(part) != set(norms) for part in parts):
        raise InputError("its BatchNorm statistics are not one set per process over all layers")
    return tuple(
        {name: _layer_statistics(part[name], name, n) for name, n in norms.items()}
        for part in parts
    )


def _published_statistics(raw: Mapping[str, Any], norms: Sequence[str]) -> list[dict[str, Any]]:
    means, variances = raw.get("bn_mean_list"), raw.get("bn_var_list")
    if not means or not variances:
        return []
    if not len(means) == len(variances) == len(norms):
        raise InputError(f"it has {len(means)} BatchNorm statistics for {len(norms)} layers")
    return [dict(zip(norms, zip(means, variances, strict=True), strict=True))]


def _layer_statistics(pair: Any, name: str, n: int) -> tuple[torch.Tensor, torch.Tensor]:
    mean, variance = pair
    mean = _finite(mean, f"the BatchNorm mean of {name}", (n,))
    variance = _finite(variance, f"the BatchNorm variance of {name}", (n,))
    if (variance < 0).any():
        raise InputError(f"the BatchNorm variance of {name} is negative")
    return mean, variance


def _running_after(
    raw: Mapping[str, Any], skeleton: torch.nn.Module
) -> dict[str, torch.Tensor] | None:
    shared = raw.get("running_after")
    if not shared:
        return None
    expected = {
        name: buffer.shape
        for name, buffer in skeleton.named_buffers()
        if name.endswith(RUNNING_STATISTICS)
    }
    if set(shared) != set(expected):
        raise InputError("its running statistics after training are not those of all layers")
    return {
        name: _finite(shared[name], f"{name} after training", shape)
        for name, shape in expected.items()
    }


def _parse_truth(raw: Mapping[str, Any], target: Target) -> Truth | None:
    if raw.get("x_true") is None or raw.get("y_true") is None:
        return None
    if target.data.n_tokens:
        return _true_text(raw, target)
    shape = (target.batch_size, *target.data.shape)
    inputs = _finite(raw["x_true"], "the true images tensor", shape).float()
    labels = _true_labels(raw["y_true"], target)
    mean = raw.get("mean_image")
    if mean is not None:
        mean = target.data.clamp(_finite(mean, "the mean image", target.data.shape).float())
    nearest = raw.get("nearest_images")
    if nearest is not None:
        nearest = target.data.clamp(_finite(nearest, "the nearest images", shape).float())
    images = target.data.clamp(target.data.denormalize(inputs))
    columns = target.data.columns
    return Truth(images, labels, mean_image=mean, nearest_images=nearest, columns=columns)


def _true_text(raw: Mapping[str, Any], target: Target) -> Truth:
    """Sentences of token ids within the vocabulary, and guesses of them."""
    length, n = target.data.shape[0], target.batch_size
    shapes = {"x_true": (n, length), "mean_image": (length,), "nearest_images": (n, length)}
    found: dict[str, torch.Tensor | None] = dict.fromkeys(shapes)
    for key, shape in shapes.items():
        if raw.get(key) is not None:
            ids = _finite(raw[key], f"the token ids {key}", shape, whole=True).long()
            if int(ids.min()) < 0 or int(ids.max()) >= target.data.n_tokens:
                raise InputError(f"its token ids {key} lie outside its vocabulary")
            found[key] = ids
    assert found["x_true"] is not None
    labels = _true_labels(raw["y_true"], target)
    return Truth(found["x_true"], labels, found["mean_image"], found["nearest_images"])


def _true_labels(value: Any, target: Target) -> torch.Tensor:
    """Class indices within range, or targets of any other kind, one entry per sample."""
    labels = _finite(value, "the true labels tensor", whole=None)
    soft = labels.is_floating_point() and labels.dim() == 2
    if target.loss.targets is not Targets.CLASSES or soft:
        if labels.dim() == 0 or len(labels) != target.batch_size:
            raise InputError(f"its true targets have shape {tuple(labels.shape)}")
        return labels
    labels = _finite(labels, "the true labels tensor", (target.batch_size,), whole=True).long()
    if int(labels.min()) < 0 or int(labels.max()) >= target.data.n_classes:
        raise InputError(f"its true labels lie outside 0..{target.data.n_classes - 1}")
    return labels
