"""Unpickling without the classes and functions that a pickle names: each is replaced by a class that does nothing.

So no code runs that the file chooses, and the packages that it was written with need not be there. torch.load takes
this module as its `pickle_module`. A small pickle may give one large list to a million calls, and hashing nested tuples
takes hours: what is copied is counted, with Unsuitable beyond MAX_OBJECTS, and only text is hashed.
"""

from __future__ import annotations

import pickle
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from typing import Any, ClassVar

import torch as th

from .torch_pickles import MAX_OBJECTS, TOO_MANY, Unsuitable

MAX_NAME = 300  # characters of a tensor's name, with those of the modules around it


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


class _Ordered(OrderedDict):
    def __setstate__(self, state: Any) -> None:
        if isinstance(state, dict):
            self._metadata = state.get("_metadata")  # of a module's state dict


def _with_text_keys(pairs: Iterable[Any], kind: type[dict] = dict) -> Any:
    return kind((key, value) for key, value in pairs if isinstance(key, str))


def _texts(items: Iterable[Any]) -> set[str]:
    return {item for item in items if isinstance(item, str)}


def _items(value: Any) -> Iterable[Any]:
    """A container's items. Others could be endless, such as a tensor expanded from one number."""
    if not isinstance(value, (list, tuple, dict)):
        raise ValueError(f"a {type(value).__name__} in place of a list")
    return value.items() if isinstance(value, dict) else value


def _tensor(storage: Any, offset: Any, size: Any, stride: Any, *rest: Any) -> th.Tensor:
    return th._utils._rebuild_tensor(storage, offset, size, stride)


def _parameter(data: Any, *rest: Any) -> Any:
    return data


# What stands for the names that plain tensors and dicts are made of.
_PLAIN: dict[str, Callable[..., Any]] = {
    "collections.OrderedDict": lambda items=(): _with_text_keys(_items(items), _Ordered),
    "torch._utils._rebuild_tensor": _tensor,
    "torch._utils._rebuild_tensor_v2": _tensor,
    "torch._utils._rebuild_parameter": _parameter,
    "torch._utils._rebuild_parameter_with_state": _parameter,
    "torch.Size": lambda items=(): tuple(_items(items)),
    "builtins.set": lambda items=(): _texts(_items(items)),
    "__builtin__.set": lambda items=(): _texts(_items(items)),  # as protocol 2 spells it
}
_OF_A_SUBCLASS = "torch._tensor._rebuild_from_type_v2"


_InPython: Any = pickle._Unpickler  # whose operations can be replaced


class Unpickler(_InPython):
    """Reads a pickle of torch.save. Nothing is imported; keys of dicts other than text are left out."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.made = 0  # objects, and items of containers that calls were given

    def find_class(self, module: str, name: str) -> Any:
        name = f"{module}.{name}"
        return self._of_a_subclass if name == _OF_A_SUBCLASS else _PLAIN.get(name, StandIn)

    def get_extension(self, code: int) -> None:
        self.stack.append(StandIn)

    # The operations that call, copy or hash. Each is in place of the one of the same name.

    def load_reduce(self) -> None:
        arguments = self.stack.pop()
        self.stack[-1] = self._called(self.stack[-1], arguments)

    def load_newobj(self) -> None:
        arguments = self.stack.pop()
        self.stack[-1] = self._called(self.stack[-1], arguments)

    def load_newobj_ex(self) -> None:
        self.stack.pop()  # arguments by name
        self.load_newobj()

    def load_obj(self) -> None:
        kind, *arguments = self.pop_mark()
        self.stack.append(self._called(kind, tuple(arguments)))

    def load_inst(self) -> None:
        module, name = (self.readline()[:-1].decode("ascii") for _ in range(2))
        arguments = tuple(self.pop_mark())
        self.stack.append(self._called(self.find_class(module, name), arguments))

    def load_build(self) -> None:
        state = self.stack.pop()
        self._count(state, *(state if isinstance(state, tuple) else ()))
        if isinstance(self.stack[-1], (StandIn, _Ordered)):  # anything else keeps what it is
            self.stack[-1].__setstate__(state)

    def load_dict(self) -> None:
        items = self.pop_mark()
        self.stack.append(_with_text_keys(zip(items[::2], items[1::2], strict=True)))

    def load_setitem(self) -> None:
        value, key = self.stack.pop(), self.stack.pop()
        self._update([key, value])

    def load_setitems(self) -> None:
        self._update(self.pop_mark())

    def load_empty_set(self) -> None:
        self._count()
        self.stack.append(set())

    def load_additems(self) -> None:
        items = self.pop_mark()
        if isinstance(self.stack[-1], set):
            self.stack[-1].update(_texts(items))

    def load_frozenset(self) -> None:
        self._count()
        items = self.pop_mark()
        self.stack.append(_texts(items))

    def load_binpersid(self) -> None:
        saved = self.stack.pop()
        kind, _, key, location, count, *_ = saved
        if not (isinstance(saved, tuple) and all(isinstance(text, str) for text in (kind, key, location))):
            raise ValueError("not a storage")
        if not isinstance(count, int):
            raise ValueError("not a storage")
        self.stack.append(self.persistent_load(saved))

    def _update(self, items: list[Any]) -> None:
        if not isinstance(self.stack[-1], dict):
            raise ValueError("items for something else than a dict")
        self.stack[-1].update(_with_text_keys(zip(items[::2], items[1::2], strict=True)))

    def _called(self, function: Any, arguments: Any) -> Any:
        if not isinstance(arguments, tuple):
            raise ValueError("arguments that are not a tuple")
        self._count(arguments)
        self._count(*arguments)
        return function(*arguments)

    def _of_a_subclass(self, function: Any, kind: Any, arguments: Any, state: Any) -> Any:
        return self._called(function, arguments)

    def _count(self, *containers: Any) -> None:
        """Bound what a pickle of a few bytes makes."""
        self.made += 1 + sum(len(each) for each in containers if isinstance(each, (list, tuple, dict)))
        if self.made > MAX_OBJECTS:
            raise Unsuitable(TOO_MANY)

    dispatch: ClassVar = {
        **_InPython.dispatch,
        pickle.REDUCE[0]: load_reduce,
        pickle.NEWOBJ[0]: load_newobj,
        pickle.NEWOBJ_EX[0]: load_newobj_ex,
        pickle.OBJ[0]: load_obj,
        pickle.INST[0]: load_inst,
        pickle.BUILD[0]: load_build,
        pickle.DICT[0]: load_dict,
        pickle.SETITEM[0]: load_setitem,
        pickle.SETITEMS[0]: load_setitems,
        pickle.EMPTY_SET[0]: load_empty_set,
        pickle.ADDITEMS[0]: load_additems,
        pickle.FROZENSET[0]: load_frozenset,
        pickle.BINPERSID[0]: load_binpersid,
    }


def load(file: Any, **kwargs: Any) -> Any:
    """pickle.load by this module's Unpickler."""
    return Unpickler(file, **kwargs).load()


def tensors_of(value: Any) -> Any:
    """The tensors in what was read, in dicts by their names; an nn.Module is the dict of its state.

    All else is left out: what is neither a tensor nor in a dict whose keys are text, and dicts without any.
    """
    return _Tensors().of(value)


class _Tensors:
    def __init__(self) -> None:
        self.known: dict[int, Any] = {}
        self.names = 0  # in the states of modules, which may share others

    def of(self, value: Any) -> Any:
        if isinstance(value, th.Tensor) or id(value) in self.known:
            return self.known.get(id(value), value)
        if not isinstance(value, dict):
            return None
        self.known[id(value)] = None  # in itself it is left out
        found: Any = OrderedDict()
        is_module = isinstance(value, StandIn) and {"_parameters", "_buffers", "_modules"} <= value.keys()
        for name, item in dict(self._state(value, "", set())).items() if is_module else value.items():
            kept = self.of(item)
            if isinstance(kept, th.Tensor) or kept:
                found[name] = kept
        if isinstance(metadata := getattr(value, "_metadata", None), dict):  # of a module's state dict
            found._metadata = metadata
        self.known[id(value)] = found
        return found

    def _state(self, module: dict[str, Any], prefix: str, seen: set[int]) -> Iterator[tuple[str, Any]]:
        """(name, tensor) of the state dict of an nn.Module that is not there."""
        seen.add(id(module))
        passing = module.get("_non_persistent_buffers_set")
        passing = passing if isinstance(passing, set) else set()
        for name, tensor in [*module["_parameters"].items(), *module["_buffers"].items()]:
            if name not in passing:
                yield self._named(prefix, name), tensor
        for name, child in module["_modules"].items():
            below = self._named(prefix, name)
            if isinstance(child, StandIn) and id(child) not in seen:
                yield from self._state(child, f"{below}.", seen)

    def _named(self, prefix: str, name: str) -> str:
        self.names += 1
        if self.names > MAX_OBJECTS or len(prefix) + len(name) > MAX_NAME:
            raise Unsuitable(TOO_MANY)
        return f"{prefix}{name}"
