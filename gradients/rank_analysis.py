"""R-GAP's rank analysis: can a batch be solved for, layer by layer?"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import nn

from core.errors import InputError
from core.models.unchanged import in_mode

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_POOLS = (nn.MaxPool2d, nn.AvgPool2d, nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool2d)
_COUNTED = (*_CONVOLUTIONS, nn.Linear, *_POOLS)
# Attributes under which torchvision's residual blocks keep their shortcut.
_SHORTCUTS = ("downsample", "proj")
# Attributes by which its inverted residual blocks say whether they have one.
_SHORTCUT_FLAGS = ("use_res_connect", "apply_residual")


@dataclass(frozen=True)
class LayerRank:
    """The balance of unknowns and equations at one layer, over the whole batch.

    Attributes:
        name: Name of the module in the model.
        n_x: Unknowns: elements of the layer's input.
        n_w: Equations from the gradient of its weights.
        n_z: Equations from its output.
        n_v: Virtual constraints carried over from the layers before it.
    """

    name: str
    n_x: int
    n_w: int
    n_z: int
    n_v: int

    @property
    def index(self) -> int:
        """RA index n_x - n_w - n_z - n_v; above zero the input is underdetermined."""
        return self.n_x - self.n_w - self.n_z - self.n_v

    @property
    def carried(self) -> int:
        """Virtual constraints handed to the next layer."""
        surplus = max(self.n_z - self.n_x, 0) - max(self.n_x - self.n_w - self.n_z, 0)
        return max(surplus, 0) + self.n_v


def rank_analysis(model: nn.Module, shape: tuple[int, ...], batch_size: int) -> list[LayerRank]:
    """RA index of every layer of a sequential or residual network.

    Counted are convolutions, pooling and fully connected layers; a residual block
    is one layer whose weights are its last convolution's and its shortcut's. The
    weights count once, inputs and outputs once per image.

    Args:
        model: The model; the function does not change it.
        shape: C, H, W of one image.
        batch_size: Images in the batch.

    Returns:
        One entry per layer in the order of execution. The model's RA index is the
        largest, see `ra_index`.

    Raises:
        InputError: The network has branches that are not residual blocks.

    Source: Zhu and Blaschko, "R-GAP: Recursive Gradient Attack on Privacy", section
        3.4, https://arxiv.org/abs/2010.07733.
    """
    units = dict(_units(model))
    sizes = _sizes(model, list(units), shape)
    layers: list[LayerRank] = []
    carried = 0
    for name, (n_x, n_z) in sizes.items():
        rank = LayerRank(name, n_x * batch_size, units[name], n_z * batch_size, carried)
        layers.append(rank)
        carried = rank.carried
    return layers


def ra_index(layers: list[LayerRank]) -> int:
    """The model's RA index: the largest of its layers'."""
    return max(layer.index for layer in layers)


def format_table(layers: list[LayerRank]) -> str:
    """The analysis as a text table, with the maximum in the last row."""
    from prettytable import PrettyTable

    table = PrettyTable(["layer", "n_x", "n_w", "n_z", "n_v", "RA index"])
    table.align = "r"
    for r in layers:
        table.add_row([r.name, r.n_x, r.n_w, r.n_z, r.n_v, r.index])
    table.add_row(["maximum", "", "", "", "", ra_index(layers)])
    return table.get_string()


def _units(model: nn.Module) -> Iterator[tuple[str, int]]:
    """Name and weights of every counted layer, in the order of definition."""
    yield from _descend("", model, is_root=True)


def _descend(name: str, module: nn.Module, is_root: bool = False) -> Iterator[tuple[str, int]]:
    if isinstance(module, _COUNTED):
        yield name, _weights(module)
    elif _is_residual(module):
        yield name, _residual_weights(module)
    elif is_root or isinstance(module, (nn.Sequential, nn.ModuleList)) or _is_chain(module):
        for child_name, child in module.named_children():
            yield from _descend(f"{name}.{child_name}" if name else child_name, child)
    elif not _is_gate(module) and any(isinstance(m, _COUNTED) for m in module.modules()):
        raise InputError(
            f"--ra: the rank analysis knows sequential and residual networks; {name} "
            f"({type(module).__name__}) is neither"
        )


def _is_gate(module: nn.Module) -> bool:
    """Whether a module only rescales features, like an activation."""
    from torchvision.ops import SqueezeExcitation

    return isinstance(module, SqueezeExcitation)


def _is_residual(module: nn.Module) -> bool:
    from torchvision.models import convnext, regnet, resnet

    always = (resnet.BasicBlock, resnet.Bottleneck, convnext.CNBlock, regnet.ResBottleneckBlock)
    return isinstance(module, always) or _has_shortcut(module) is True


def _is_chain(module: nn.Module) -> bool:
    """Whether a block that could be residual is a plain chain here (its sizes differ)."""
    return _has_shortcut(module) is False


def _has_shortcut(module: nn.Module) -> bool | None:
    """What an inverted residual block of the mobile networks says about itself."""
    stated = (getattr(module, name, None) for name in _SHORTCUT_FLAGS)
    return next((bool(flag) for flag in stated if flag is not None), None)


def _residual_weights(block: nn.Module) -> int:
    shortcut = next(
        (s for s in map(dict(block.named_children()).get, _SHORTCUTS) if s is not None), None
    )
    inside_shortcut = set() if shortcut is None else set(shortcut.modules())
    main = [
        m
        for m in block.modules()
        if isinstance(m, (*_CONVOLUTIONS, nn.Linear)) and m not in inside_shortcut
    ]
    convolutions = [m for m in inside_shortcut if isinstance(m, _CONVOLUTIONS)]
    return _weights(main[-1]) + sum(map(_weights, convolutions))


def _weights(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters() if p.requires_grad)


def _sizes(
    model: nn.Module, names: list[str], shape: tuple[int, ...]
) -> dict[str, tuple[int, int]]:
    """Input and output elements of one image at each named layer, in order of execution."""
    sizes: dict[str, tuple[int, int]] = {}
    hooks = [
        model.get_submodule(name).register_forward_hook(partial(_note_size, sizes, name))
        for name in names
    ]
    was_training = model.training
    parameter = next(model.parameters())
    try:
        # One image in eval mode: train-mode BatchNorm would refuse it, and would
        # move its running statistics.
        with torch.no_grad():
            in_mode(model, False)(
                torch.zeros(1, *shape, dtype=parameter.dtype, device=parameter.device)
            )
    finally:
        model.train(was_training)
        for hook in hooks:
            hook.remove()
    return sizes


def _note_size(
    sizes: dict[str, tuple[int, int]],
    name: str,
    layer: nn.Module,
    inputs: tuple[torch.Tensor, ...],
    output: torch.Tensor,
) -> None:
    sizes[name] = (inputs[0].numel(), output.numel())
