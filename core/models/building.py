"""Build classifiers: any of torchvision's, and the registered ones.

A `ModelSpec` is all that is needed to rebuild an architecture; it travels with
every checkpoint, so that an attacker builds exactly the model that was shared.
"""

from __future__ import annotations

import dataclasses
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from core.errors import InputError
from core.models.architecture import Description
from core.models.kinds import BatchNorm
from core.registry import Registry

DEFAULT_POOL_KERNEL = 3  # Of torchvision's ResNets.
# For records of a table, unless `--arch` says another.
RECORDS_ARCH = "mlp"
# Side of torchvision's feature map in front of the pooling layer at 224 px, for
# which the rank-analysis defense states its kernel of 19.
REFERENCE_POOL_INPUT = 112


@dataclass(frozen=True)
class ModelSpec:
    """What an architecture is made from.

    Attributes:
        arch: A torchvision classifier, or a name registered with `register_model`.
        n_classes: Number of outputs.
        image_size: Side of the square input in pixels.
        stem: "imagenet" (7x7 stride 2 and pooling) or "cifar" (3x3 stride 1, no
            pooling); concerns ResNets only.
        width: Channels of the first stage; None for the architecture's own.
        pool_kernel: Kernel of the first max-pooling layer, as at 224 px.
        norm: "batch", or "group" where every BatchNorm is replaced by GroupNorm.
        malicious: What a malicious server does to it, see `core.models.malicious`; empty for
            an honest one.
        features: Of a table's record, where the model takes such (N x features) and no images.
    """

    arch: str = "resnet18"
    n_classes: int = 1000
    image_size: int = 224
    stem: str = "imagenet"
    width: int | None = None
    pool_kernel: int = DEFAULT_POOL_KERNEL
    norm: str = "batch"
    malicious: str = ""
    features: int | None = None

    @property
    def name(self) -> str:
        """What messages and file names call it."""
        return self.arch

    def build(self) -> nn.Module:
        """See `core.models.architecture.Architecture`, and `build_model`."""
        return build_model(self)

    def skeleton(self) -> nn.Module:
        """See `core.models.architecture.Architecture`, and `skeleton_of`."""
        return skeleton_of(self)

    def describe(self) -> Description:
        """See `core.models.architecture.Architecture`."""
        return self.to_dict()

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for a checkpoint or a record."""
        values = dataclasses.asdict(self)
        if self.features is None:
            # Said of tables only: files and records of images stay what they were.
            del values["features"]
        return values

    @staticmethod
    def from_dict(values: dict[str, Any]) -> ModelSpec:
        """The inverse of `to_dict`; unknown keys are an `InputError`."""
        try:
            return ModelSpec(**values)
        except TypeError as error:
            raise InputError(
                f"the checkpoint describes its model with unknown fields: {error}"
            ) from None


BUILDERS = Registry[Callable[[ModelSpec], nn.Module]]("model")


def register_model(
    name: str,
) -> Callable[[Callable[[ModelSpec], nn.Module]], Callable[[ModelSpec], nn.Module]]:
    """Make `--arch name` build a model with the decorated function.

    Args:
        name: Must not be taken.

    Raises:
        ValueError: The name is registered already.
    """

    def register(builder: Callable[[ModelSpec], nn.Module]) -> Callable[[ModelSpec], nn.Module]:
        return BUILDERS.add(name, builder)

    return register


def model_names() -> list[str]:
    """Every architecture that `build_model` knows."""
    import torchvision

    return sorted([*BUILDERS, *torchvision.models.list_models(module=torchvision.models)])


def default_stem(image_size: int) -> str:
    """The stem that fits an image side: small images keep their resolution."""
    return "cifar" if image_size < 96 else "imagenet"


def build_model(spec: ModelSpec) -> nn.Module:
    """Build the architecture with freshly initialised parameters (torch's RNG).

    Args:
        spec: Architecture, classes, image size and the defense's changes.

    Returns:
        A classifier from N x C x H x W (normalised) to N x n_classes logits.

    Raises:
        InputError: Unknown architecture, or one that cannot take these images.
    """
    if spec.arch in BUILDERS:
        model = BUILDERS[spec.arch](spec)
    else:
        model = _torchvision_model(spec)
    _set_pool_kernel(model, spec)
    _check_takes_images(model, spec)
    if spec.norm == "group":
        model = replace_batch_norm_by_group_norm(model)
    if spec.malicious:
        from core.models.malicious import add_malicious_layers

        model = add_malicious_layers(model, spec)
    return model


@torch.no_grad()
def skeleton_of(model: ModelSpec) -> torch.nn.Module:
    """The architecture without memory for its parameters, where it can be built so.

    It says which names and shapes belong to it, costs little, and leaves the random
    numbers alone.

    Raises:
        InputError: There is no such architecture, or not with these settings.
    """
    try:
        with torch.device("meta"):
            return build_model(model)
    except RuntimeError:
        # Some constructors compute with tensors (RegNet's widths).
        return _skeleton_that_computes(model)
    except (TypeError, ValueError, ZeroDivisionError, OverflowError) as error:
        raise _cannot_build(model, error) from None


def _skeleton_that_computes(model: ModelSpec) -> torch.nn.Module:
    """As `skeleton_of`, where only what a parameter begins as is without memory."""
    try:
        with _EmptyWithoutMemory():
            # What did not come from `torch.empty` (counters, ones) follows.
            return build_model(model).to("meta")
    except RuntimeError as error:
        if model.arch in BUILDERS:
            return _built_quietly(model)
        raise _cannot_build(model, error) from None


class _EmptyWithoutMemory(torch.overrides.TorchFunctionMode):
    """Takes `torch.empty`, and no other call, to the device "meta"."""

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if func is torch.empty and kwargs.get("device") is None:
            kwargs["device"] = "meta"
        return func(*args, **kwargs)


def _built_quietly(model: ModelSpec) -> torch.nn.Module:
    try:
        with torch.random.fork_rng(devices=[]):
            return build_model(model)
    except (RuntimeError, MemoryError) as error:
        raise _cannot_build(model, error) from None


def _cannot_build(model: ModelSpec, error: BaseException) -> InputError:
    return InputError(f"the model {model.arch} cannot be built ({str(error).splitlines()[0]})")


def _check_takes_images(model: nn.Module, spec: ModelSpec) -> None:
    """Refuse images that vanish in a model's pooling, or do not divide into its patches."""
    parameter = next(model.parameters(), None)
    if parameter is None or parameter.is_meta:
        return
    was_training = model.training
    try:
        # In eval mode nothing is drawn and no statistic moves.
        size = spec.image_size
        shape = (1, 3, size, size) if spec.features is None else (1, spec.features)
        model.eval()(torch.zeros(shape, device=parameter.device))
    except (RuntimeError, ValueError, AssertionError) as error:
        raise _cannot_take(spec, error) from None
    finally:
        model.train(was_training)


def _cannot_take(spec: ModelSpec, error: Exception) -> InputError:
    reason = str(error).strip().splitlines()[0].rstrip(".!")
    if spec.features is not None:
        return InputError(
            f"--arch {spec.arch} cannot take records of {spec.features} features ({reason}); "
            "choose --arch mlp, or give --model"
        )
    return InputError(
        f"--arch {spec.arch} cannot take images of {spec.image_size} px ({reason}); choose "
        "another --image-size or --arch"
    )


def counts_batches(name: str) -> bool:
    """Whether this entry of a state is BatchNorm's counter: old files need not have it."""
    return name.endswith("num_batches_tracked")


def load_parameters(model: nn.Module, state: Mapping[str, torch.Tensor]) -> None:
    """`model.load_state_dict` for parameters from a plain dictionary.

    A file keeps names and tensors but not the versions that torch notes beside them,
    without which torchvision's MNASNet refuses its own parameters. BatchNorm's counter of
    batches, which files from before PyTorch 0.4.1 do not have, stays as it is.

    Raises:
        RuntimeError: They do not fit.
    """
    own: Any = model.state_dict()
    for name, value in state.items():
        # Copying would drop imaginary parts, and take bits for numbers, without a word.
        if not isinstance(value, torch.Tensor) or value.is_complex() or value.dtype == torch.bool:
            kind = getattr(value, "dtype", type(value).__name__)
            raise RuntimeError(f"{name!s:.80} has values of type {kind}")
    counters = {name: own[name] for name in own if counts_batches(name)}
    versioned: Any = OrderedDict(counters | dict(state))
    versioned._metadata = getattr(state, "_metadata", own._metadata)
    model.load_state_dict(versioned)


def _torchvision_model(spec: ModelSpec) -> nn.Module:
    import torchvision

    if spec.arch not in torchvision.models.list_models(module=torchvision.models):
        raise InputError(
            f"--arch {spec.arch}: unknown architecture; known are {', '.join(model_names())}"
        )
    options: dict[str, Any] = {"num_classes": spec.n_classes}
    if spec.arch in ("inception_v3", "googlenet"):
        options |= {"aux_logits": False, "init_weights": True}
    if spec.arch.startswith("vit"):
        options |= {"image_size": spec.image_size}
    is_resnet = spec.arch.startswith(("resnet", "resnext", "wide_resnet"))
    if spec.width is not None:
        return _narrow_resnet(spec)
    try:
        model = torchvision.models.get_model(spec.arch, weights=None, **options)
    except AssertionError as error:
        raise _cannot_take(spec, error) from None
    if is_resnet and spec.stem == "cifar":
        _set_cifar_stem(model)
    return model


def _set_cifar_stem(resnet: Any) -> None:
    """Replace 7x7 stride 2 and pooling, which leave little of a 32 px image."""
    resnet.conv1 = nn.Conv2d(3, resnet.conv1.out_channels, 3, padding=1, bias=False)
    nn.init.kaiming_normal_(resnet.conv1.weight, mode="fan_out", nonlinearity="relu")
    resnet.maxpool = nn.Identity()


def _narrow_resnet(spec: ModelSpec) -> nn.Module:
    """A torchvision ResNet whose first stage has `spec.width` channels instead of 64."""
    from torchvision.models.resnet import BasicBlock, ResNet

    layers = {"resnet18": [2, 2, 2, 2], "resnet34": [3, 4, 6, 3]}.get(spec.arch)
    if layers is None:
        raise InputError(
            "--width: of torchvision's models resnet18 and resnet34 can be narrowed, not "
            f"{spec.arch}"
        )
    assert spec.width is not None
    model = ResNet(BasicBlock, layers, num_classes=spec.n_classes)
    narrow: Any = model
    narrow.inplanes, narrow.dilation = spec.width, 1
    narrow.conv1 = nn.Conv2d(3, spec.width, 7, stride=2, padding=3, bias=False)
    narrow.bn1 = nn.BatchNorm2d(spec.width)
    for stage, blocks in enumerate(layers):
        planes, stride = spec.width * 2**stage, 1 if stage == 0 else 2
        setattr(narrow, f"layer{stage + 1}", narrow._make_layer(BasicBlock, planes, blocks, stride))
    narrow.fc = nn.Linear(spec.width * 8, spec.n_classes)
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
    if spec.stem == "cifar":
        _set_cifar_stem(model)
    return model


def scaled_pool_kernel(kernel: int, feature_map: int) -> int:
    """The pooling kernel for a smaller feature map: the same share of its side, odd.

    Args:
        kernel: Kernel stated for torchvision's 112 px feature map (224 px images).
        feature_map: Side of the actual feature map.

    Example:
        >>> scaled_pool_kernel(19, 112), scaled_pool_kernel(19, 32)
        (19, 5)
    """
    if feature_map >= REFERENCE_POOL_INPUT or kernel <= DEFAULT_POOL_KERNEL:
        return kernel
    scaled = round(kernel * feature_map / REFERENCE_POOL_INPUT)
    return max(DEFAULT_POOL_KERNEL, scaled - (scaled + 1) % 2)


def _set_pool_kernel(model: Any, spec: ModelSpec) -> None:
    """Apply the rank-analysis defense: a large kernel in the first max-pooling layer.

    Source: Zhu and Blaschko, R-GAP, ICLR 2021 (rank analysis),
    https://arxiv.org/abs/2010.07733.
    """
    if spec.pool_kernel == DEFAULT_POOL_KERNEL:
        return
    pool = getattr(model, "maxpool", None)
    feature_map = spec.image_size // (1 if isinstance(pool, nn.Identity) else 2)
    kernel = scaled_pool_kernel(spec.pool_kernel, feature_map)
    if isinstance(pool, (nn.MaxPool2d, nn.Identity)):
        model.maxpool = nn.MaxPool2d(kernel, stride=2, padding=1)
        return
    first = next((m for m in model.modules() if isinstance(m, nn.MaxPool2d)), None)
    if first is None:
        raise InputError(
            f"the RA defense enlarges a max-pooling layer and {spec.arch} has none; "
            "choose another --arch or --scheme"
        )
    # Padding must not exceed half the kernel and keeps the map from vanishing.
    first.kernel_size, first.padding = kernel, (kernel - 1) // 2


def replace_batch_norm_by_group_norm(model: nn.Module, max_groups: int = 32) -> nn.Module:
    """Replace every BatchNorm by GroupNorm, which does not mix the samples of a batch.

    Args:
        model: Changed in place.
        max_groups: Upper limit of groups. A group holds at least four channels: with
            one each, GroupNorm would be InstanceNorm, which forgets colour and contrast.

    Returns:
        The model (a new module where the model itself is a BatchNorm).
    """
    if isinstance(model, BatchNorm):
        channels = model.num_features
        most = max(1, min(max_groups, channels // 4))
        groups = next(g for g in range(most, 0, -1) if channels % g == 0)
        return nn.GroupNorm(groups, channels, eps=model.eps, affine=model.affine)
    for name, child in model.named_children():
        setattr(model, name, replace_batch_norm_by_group_norm(child, max_groups))
    return model


def last_linear(model: nn.Module) -> tuple[str, nn.Linear]:
    """The classification layer: name and module of the last `nn.Linear`.

    Raises:
        InputError: The model has none.
    """
    found = [(name, m) for name, m in model.named_modules() if isinstance(m, nn.Linear)]
    if not found:
        raise InputError(f"{type(model).__name__} has no fully connected layer")
    return found[-1]
