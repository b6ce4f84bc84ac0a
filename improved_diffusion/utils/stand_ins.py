"""Unpickling without the classes and functions that a pickle names: each is replaced by a class that does nothing.

So no code runs that the file chooses, and the packages that it was written with need not be there. torch.load takes
this module as its `pickle_module`.
"""

from __future__ import annotations

import pickle
from collections import OrderedDict
from collections.abc import Iterator
from typing import Any

import torch as th


class StandIn(dict):
    """An object whose class is not there: the entries and attributes that the file gives it."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__()

    def __call__(self, *args: Any, **kwargs: Any) -> StandIn:
        return StandIn()

    def __setstate__(self, state: Any) -> None:
        for part in state if isinstance(state, tuple) else (state,):  # attributes, and those in slots
            if isinstance(part, dict):
                self.update(part)

    def append(self, item: Any) -> None:
        """Left out: what is looked for has a name."""

    extend = add = append
    __hash__ = object.__hash__  # type: ignore[assignment]
    __eq__ = object.__eq__
    __ne__ = object.__ne__


def _tensor(storage: Any, offset: Any, size: Any, stride: Any, *rest: Any) -> th.Tensor:
    return th._utils._rebuild_tensor(storage, offset, size, stride)


def _parameter(data: Any, *rest: Any) -> Any:
    return data


def _of_a_subclass(function: Any, kind: Any, args: Any, state: Any) -> Any:
    return function(*args)


def _plain() -> dict[str, Any]:
    """What stands for the names that plain tensors and dicts are made of. Made anew for each file, which may write
    attributes onto it."""

    class Ordered(OrderedDict):
        pass

    return {
        "collections.OrderedDict": Ordered,
        "torch._utils._rebuild_tensor": lambda *args: _tensor(*args),
        "torch._utils._rebuild_tensor_v2": lambda *args: _tensor(*args),
        "torch._utils._rebuild_parameter": lambda *args: _parameter(*args),
        "torch._utils._rebuild_parameter_with_state": lambda *args: _parameter(*args),
        "torch._tensor._rebuild_from_type_v2": lambda *args: _of_a_subclass(*args),
        "torch.Size": lambda *args: tuple(*args),
        "builtins.set": lambda *args: set(*args),
        "__builtin__.set": lambda *args: set(*args),  # as protocol 2 spells it
    }


class Unpickler(pickle.Unpickler):
    """Reads a pickle of torch.save. Nothing is imported."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.plain = _plain()

    def find_class(self, module: str, name: str) -> Any:
        found = self.plain.get(f"{module}.{name}")
        return type(name, (StandIn,), {}) if found is None else found


def load(file: Any, **kwargs: Any) -> Any:
    """pickle.load by this module's Unpickler."""
    return Unpickler(file, **kwargs).load()


def tensors_of(value: Any, known: dict[int, Any] | None = None) -> Any:
    """The tensors in what was read, in dicts by their names; an nn.Module is the dict of its state.

    All else is left out: what is neither a tensor nor in a dict whose keys are text, and dicts without any.
    """
    known = {} if known is None else known
    if isinstance(value, th.Tensor) or id(value) in known:
        return known.get(id(value), value)
    if not isinstance(value, dict):
        return None
    known[id(value)] = None  # in itself it is left out
    found: Any = OrderedDict()
    is_module = isinstance(value, StandIn) and {"_parameters", "_buffers", "_modules"} <= value.keys()
    for name, item in dict(_state(value, "", set())).items() if is_module else value.items():
        kept = tensors_of(item, known)
        if isinstance(name, str) and (isinstance(kept, th.Tensor) or kept):
            found[name] = kept
    if isinstance(metadata := getattr(value, "_metadata", None), dict):  # of a module's state dict
        found._metadata = metadata
    known[id(value)] = found
    return found


def _state(module: dict[str, Any], prefix: str, seen: set[int]) -> Iterator[tuple[str, Any]]:
    """(name, tensor) of the state dict of an nn.Module that is not there."""
    seen.add(id(module))
    passing = module.get("_non_persistent_buffers_set", ())
    for name, tensor in [*module["_parameters"].items(), *module["_buffers"].items()]:
        if name not in passing:
            yield f"{prefix}{name}", tensor
    for name, child in module["_modules"].items():
        if isinstance(child, StandIn) and id(child) not in seen:
            yield from _state(child, f"{prefix}{name}.", seen)
