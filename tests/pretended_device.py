"""A pretended accelerator: the arithmetic of the CPU under the rules of a GPU.

Its tensors say that they are on another device. An operator that is given some of them and some
of the CPU's is refused, as CUDA refuses it, and so is a generator of the wrong device; code that
asks where it runs takes the branches for a GPU. So a machine without one sees what would fail
there, except kernels, streams and memory.

`install` changes torch for the whole process: call it in one of its own.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.utils import backend_registration
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map

NAME = "pretended"
# Their result is their first argument, whatever the others are.
IN_PLACE = {"aten::copy_", "aten::index_put_", "aten::_index_put_impl_"}
# These take tensors of both devices: copies, indices, and values that become Python's.
MIXED = IN_PLACE | {"aten::_to_copy", "aten::_local_scalar_dense", "aten::index"}
LAZY_VIEWS = {"aten::_conj": torch.conj_physical, "aten::_neg_view": torch.neg}

_CpuGenerator = torch.Generator
_own_generators: set[int] = set()
_kept: list[torch.Generator] = []


class PretendedTensor(torch.Tensor):
    """A tensor of the pretended device; `held` is the CPU's that computes for it."""

    held: torch.Tensor

    @staticmethod
    def __new__(cls, held: torch.Tensor) -> PretendedTensor:
        made: PretendedTensor = torch.Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls,
            held.shape,
            strides=held.stride(),
            storage_offset=held.storage_offset(),
            dtype=held.dtype,
            device=torch.device(NAME, 0),
        )
        made.held = held
        return made

    @classmethod
    def __torch_dispatch__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        return _compute(func, args, kwargs or {})

    def __repr__(self) -> str:  # type: ignore[override]
        return f"{NAME}: {self.held}"

    def __reduce_ex__(self, protocol: Any) -> Any:
        """A file of a GPU's tensor holds its values, and not the device."""
        return self.held.__reduce_ex__(protocol)

    def tolist(self) -> Any:
        """Torch does not know how to for its subclasses."""
        return self.held.tolist()

    @property
    def data(self) -> Any:
        """Assigned to where a module moves to another device."""
        return torch.Tensor.data.__get__(self)  # type: ignore[attr-defined]

    @data.setter
    def data(self, value: Any) -> None:
        torch.Tensor.data.__set__(self, value)  # type: ignore[attr-defined]
        self.held = getattr(value, "held", value)


class Pretend(TorchDispatchMode):
    """While active, tensors can be put on the device."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        return _compute(func, args, kwargs or {})


def _compute(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    name = func._schema.name
    given = [value for value in tree_flatten((args, kwargs))[0] if value is not None]
    tensors = [value for value in given if isinstance(value, torch.Tensor)]
    here = any(isinstance(t, PretendedTensor) for t in tensors)
    if kwargs.get("device") is not None:
        here_after = torch.device(kwargs["device"]).type == NAME
        kwargs = {**kwargs, "device": torch.device("cpu"), **_unpinned(kwargs)}
    elif name in IN_PLACE:
        here_after = isinstance(args[0], PretendedTensor)
    else:
        here_after = here
    _refuse_mixtures(name, tensors, args)
    for generator in given:
        if isinstance(generator, _CpuGenerator) and here_after != _is_own(generator):
            raise RuntimeError(f"{name}: a generator of another device")
    held_args, held_kwargs = tree_map(lambda v: getattr(v, "held", v), (args, kwargs))
    # The dispatcher undoes lazy views above this level, where it does not see the held ones.
    result = LAZY_VIEWS.get(name, func)(*held_args, **held_kwargs)
    # In place, the same object is returned.
    known = {id(t.held): t for t in tensors if isinstance(t, PretendedTensor)}
    return tree_map(lambda value: _wrapped(value, known, here_after), result)


def _unpinned(kwargs: dict[str, Any]) -> dict[str, Any]:
    return {"pin_memory": False} if kwargs.get("pin_memory") else {}


def _wrapped(value: Any, known: dict[int, PretendedTensor], here: bool) -> Any:
    if not isinstance(value, torch.Tensor) or isinstance(value, PretendedTensor):
        return value
    if id(value) in known:
        return known[id(value)]
    return PretendedTensor(value) if here else value


def _refuse_mixtures(name: str, tensors: list[torch.Tensor], args: tuple[Any, ...]) -> None:
    away = [t for t in tensors if not isinstance(t, PretendedTensor)]
    if len(away) == len(tensors):
        return
    if name not in MIXED and any(t.dim() for t in away):
        shapes = [tuple(t.shape) for t in away]
        raise RuntimeError(f"{name}: tensors of the CPU among those of the device: {shapes}")
    if name in {"aten::index", "aten::index_put_"} and not isinstance(args[0], PretendedTensor):
        raise RuntimeError(f"{name}: a tensor of the CPU with indices of the device")


def _is_own(generator: torch.Generator) -> bool:
    # The dispatcher hands over another Python object for the same generator.
    return generator._cdata in _own_generators  # type: ignore[attr-defined]


class _Generators(type):
    def __instancecheck__(cls, value: Any) -> bool:
        return isinstance(value, _CpuGenerator)

    def __or__(cls, other: Any) -> Any:
        return _CpuGenerator | other


class _Generator(metaclass=_Generators):
    def __new__(cls, device: Any = "cpu") -> Any:
        made = _CpuGenerator("cpu")
        if torch.device(device).type == NAME:
            _own_generators.add(made._cdata)  # type: ignore[attr-defined]
            # Its address must not be given to another one.
            _kept.append(made)
        return made


def install() -> torch.device:
    """Register the device; torch of this process is not what it was.

    Raises:
        ImportError: A torch that cannot register a device from Python.
    """
    # Classes that name torch.Generator when they are defined.
    import torch._dynamo

    register: Callable[..., None] | None = getattr(
        backend_registration, "_setup_privateuseone_for_python_backend", None
    )
    dummy: Any = getattr(backend_registration, "_DummyBackendModule", None)
    if register is None or dummy is None:
        raise ImportError("this torch registers no device from Python")

    class Module(dummy):  # type: ignore[misc]
        def get_rng_state(self, device: Any = None) -> torch.Tensor:
            return torch.zeros(1, dtype=torch.uint8)

        def set_rng_state(self, state: torch.Tensor, device: Any = None) -> None:
            pass

        def get_amp_supported_dtype(self) -> list[torch.dtype]:
            return [torch.bfloat16]

    register(NAME, backend_module=Module())
    # torch.tensor(..., device=...) is made on the CPU and copied, so that `Pretend` sees it.
    torch._C._set_only_lift_cpu_tensors(True)  # type: ignore[attr-defined]
    torch.Generator = _Generator  # type: ignore[misc,assignment]
    return torch.device(NAME, 0)
