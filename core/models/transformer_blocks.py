"""The blocks of a transformer as plain matrices, whichever library they are from.

Blocks in the shapes of GPT-2 and BERT (`transformers`) and `nn.TransformerEncoderLayer` are known,
by the modules that they hold.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from core.errors import InputError


@dataclass(frozen=True)
class Matrix:
    """A linear map y = W x + b inside a module.

    Attributes:
        weight: outputs x inputs, a view of the parameter's own memory.
        bias: outputs, likewise.
        parameter: Name of the weight in the model; that of the bias ends in "bias".
        transposed: Whether the parameter is inputs x outputs, as GPT-2's.
    """

    weight: torch.Tensor
    bias: torch.Tensor
    parameter: str
    transposed: bool = False

    @property
    def bias_parameter(self) -> str:
        """Name of the bias."""
        return self.parameter.removesuffix("weight") + "bias"


@dataclass(frozen=True)
class Block:
    """Attention and a feed-forward network of two layers.

    Attributes:
        heads: Of the attention.
        attended: The module whose input the attention reads.
        query: Matrix of the attention; likewise the next three.
        key: See above.
        value: See above.
        out: See above.
        widened: The module whose input the feed-forward network reads: its first layer.
        first: Its matrix.
        second: That of the second layer.
        second_layer: The module of it.
    """

    heads: int
    attended: nn.Module
    query: Matrix
    key: Matrix
    value: Matrix
    out: Matrix
    widened: nn.Module
    first: Matrix
    second: Matrix
    second_layer: nn.Module


def transformer_blocks(model: nn.Module) -> list[Block]:
    """The blocks, in the order in which the model holds them.

    Raises:
        InputError: None is of a known shape.
    """
    found = []
    for name, module in model.named_modules():
        for read in (_of_gpt2, _of_bert, _of_torch):
            block = read(module, f"{name}." if name else "")
            if block is not None:
                found.append(block)
    if not found:
        raise InputError(
            f"the model {type(model).__name__} has no blocks in the shape of GPT-2, BERT or "
            "nn.TransformerEncoderLayer, with biases"
        )
    return found


def _at(module: nn.Module, path: str) -> nn.Module | None:
    for name in path.split("."):
        part = getattr(module, name, None)
        if not isinstance(part, nn.Module):
            return None
        module = part
    return module


def _parts(module: nn.Module, paths: str) -> list[nn.Module] | None:
    """The modules at these paths, each with a bias; None if one is missing."""
    found = [part for part in (_at(module, path) for path in paths.split()) if part is not None]
    biased = all(isinstance(getattr(part, "bias", None), torch.Tensor) for part in found)
    return found if biased and len(found) == len(paths.split()) else None


def _matrix(layer: nn.Module, name: str, transposed: bool = False) -> Matrix:
    weight, bias = layer.weight.data, layer.bias.data
    assert isinstance(weight, torch.Tensor)
    assert isinstance(bias, torch.Tensor)
    return Matrix(weight.T if transposed else weight, bias, f"{name}.weight", transposed)


def _thirds(joint: Matrix) -> tuple[Matrix, Matrix, Matrix]:
    """Query, key and value out of one matrix."""
    each = zip(joint.weight.chunk(3), joint.bias.chunk(3), strict=True)
    found = [Matrix(part, shift, joint.parameter, joint.transposed) for part, shift in each]
    return found[0], found[1], found[2]


def _of_gpt2(module: nn.Module, prefix: str) -> Block | None:
    names = ["attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"]
    parts = _parts(module, " ".join(names))
    if parts is None:
        return None
    joint, out, first, second = (
        _matrix(part, prefix + name, True) for part, name in zip(parts, names, strict=True)
    )
    query, key, value = _thirds(joint)
    heads = int(getattr(_at(module, "attn"), "num_heads", 1))
    return Block(heads, parts[0], query, key, value, out, parts[2], first, second, parts[3])


def _of_bert(module: nn.Module, prefix: str) -> Block | None:
    names = [f"attention.self.{part}" for part in ("query", "key", "value")]
    names += ["attention.output.dense", "intermediate.dense", "output.dense"]
    parts = _parts(module, " ".join(names))
    if parts is None:
        return None
    query, key, value, out, first, second = (
        _matrix(part, prefix + name) for part, name in zip(parts, names, strict=True)
    )
    heads = int(getattr(_at(module, "attention.self"), "num_attention_heads", 1))
    return Block(heads, parts[0], query, key, value, out, parts[4], first, second, parts[5])


def _of_torch(module: nn.Module, prefix: str) -> Block | None:
    if not isinstance(module, nn.TransformerEncoderLayer):
        return None
    attention = module.self_attn
    parts = _parts(module, "self_attn.out_proj linear1 linear2")
    joint, bias = attention.in_proj_weight, attention.in_proj_bias
    if parts is None or joint is None or bias is None:
        return None
    query, key, value = _thirds(Matrix(joint.data, bias.data, f"{prefix}self_attn.in_proj_weight"))
    out = _matrix(parts[0], f"{prefix}self_attn.out_proj")
    first, second = (_matrix(parts[i], f"{prefix}linear{i}") for i in (1, 2))
    heads = attention.num_heads
    return Block(heads, attention, query, key, value, out, parts[1], first, second, parts[2])
