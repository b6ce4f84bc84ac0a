"""Checks of a pickle inside a file of torch.save, before torch reads it. Nothing is built or executed.

A pickle is a program for a machine with a stack. Here it runs with stand-ins for dicts and objects, so that what torch
would hash and call is known: keys that are nested tuples, or numbers with one hash, take torch hours.
"""

from __future__ import annotations

import pickletools
from collections.abc import Iterable
from typing import IO, Any, NamedTuple

MAX_PICKLE_BYTES = 2**23  # of the names and shapes, without the numbers
MAX_OBJECTS = 10**6
MAX_LARGE_KEYS = 10**4  # before torch 1.5 an optimizer's keys were addresses in memory
TOO_MANY = "it holds too many objects for a checkpoint: use another file"

# What a pickle may name: what plain tensors and dicts are made of.
_STORAGES = {
    f"torch {name}Storage"
    for name in ("Float", "Double", "Half", "BFloat16", "Byte", "Char", "Short", "Int", "Long", "Bool")
}
_DTYPES = ("float32", "float64", "float16", "bfloat16", "uint8", "int8", "int16", "int32", "int64", "bool")
_GLOBALS = {
    "collections OrderedDict",
    "collections Counter",
    "torch._utils _rebuild_tensor_v2",
    "torch._utils _rebuild_parameter",
    "torch Size",
    "torch device",
    *_STORAGES,
    *(f"torch {name}" for name in _DTYPES),
}
_OTHER_CONSTRUCTORS = {"OBJ", "NEWOBJ", "NEWOBJ_EX", "EXT1", "EXT2", "EXT4"}

_MADE = (("multiarray.scalar", "numpy scalar"), ("multiarray._reconstruct", "numpy array"))
OTHER = "other objects"
# Parts of objects that have names of their own.
_PARTS = {"numpy.dtype", "numpy.ndarray", "_codecs.encode", "__builtin__.set", "builtins.set", OTHER}
_SHOWN = 4

_OBJECT = object()  # stands for what a call returns


class Unsuitable(Exception):
    """Why a file is not loaded."""


class _Global(NamedTuple):
    name: str


class _Dict(list):
    """Stands for a dict: its keys."""


class Pickle(NamedTuple):
    """What a pickle makes: dicts and objects are stand-ins."""

    content: Any
    storages: set[str]  # the keys of the memory that its tensors take


def foreign_names(f: IO[bytes], pickles: int = 1) -> list[str]:
    """What the pickles name beside plain tensors and dicts: classes, functions, and other ways to make objects."""
    found: dict[str, None] = {}
    limit = f.tell() + MAX_PICKLE_BYTES
    for _ in range(pickles):
        texts = ["", ""]  # a STACK_GLOBAL takes the last two
        for opcode, argument, _ in pickletools.genops(f):
            if opcode.name in ("GLOBAL", "INST") and argument not in _GLOBALS:
                found[str(argument).replace(" ", ".")] = None
            elif opcode.name == "STACK_GLOBAL":
                found[OTHER if " ".join(texts) in _GLOBALS else ".".join(texts)] = None
            elif opcode.name in _OTHER_CONSTRUCTORS:
                found[OTHER] = None
            elif isinstance(argument, str):
                texts = [texts[1], argument]
            if f.tell() > limit or (opcode.name.endswith("PUT") and int(argument or 0) > MAX_PICKLE_BYTES):
                raise Unsuitable(TOO_MANY)
    return list(found)


def listed(names: Iterable[str]) -> str:
    """Names of classes and functions for a message, the well-known ones by what they make."""
    shown = dict.fromkeys(next((made for end, made in _MADE if name.endswith(end)), name) for name in names)
    telling = [name for name in shown if name not in _PARTS] or list(shown)
    more = ", ..." if len(telling) > _SHOWN else ""
    return ", ".join(ascii(name[:60])[1:-1] for name in telling[:_SHOWN]) + more


def read(f: IO[bytes]) -> Pickle:
    """Run the pickle at the position of a file, in which `foreign_names` finds nothing.

    Raises Unsuitable for keys other than text and whole numbers, and other errors where it is damaged.
    """
    machine = _Machine()
    for opcode, argument, _ in pickletools.genops(f):
        machine.step(opcode.name, argument)
    return Pickle(machine.stack.pop(), machine.storages)


class _Machine:
    """The operations that torch's own reader of pickles knows."""

    def __init__(self) -> None:
        self.stack: list[Any] = []
        self.below: list[list[Any]] = []  # the stacks under each mark
        self.memo: dict[int, Any] = {}
        self.storages: set[str] = set()
        self.large_keys = 0
        self.copied = 0  # items of containers that calls were given

    def step(self, name: str, argument: Any) -> None:
        stack = self.stack
        match name:
            case "PROTO" | "STOP":
                pass
            case "MARK":
                self.below.append(stack)
                self.stack = []
            case "NONE" | "NEWTRUE" | "NEWFALSE" | "EMPTY_SET":
                stack.append({"NEWTRUE": True, "NEWFALSE": False}.get(name))
            case "BININT" | "BININT1" | "BININT2" | "LONG1" | "BINFLOAT" | "BINUNICODE" | "SHORT_BINSTRING":
                stack.append(argument)
            case "GLOBAL":
                stack.append(_Global(argument))
            case "EMPTY_DICT" | "EMPTY_LIST" | "EMPTY_TUPLE":
                stack.append({"EMPTY_DICT": _Dict, "EMPTY_LIST": list, "EMPTY_TUPLE": tuple}[name]())
            case "BINPUT" | "LONG_BINPUT":
                if argument > MAX_PICKLE_BYTES:
                    raise Unsuitable(TOO_MANY)
                self.memo[argument] = stack[-1]
            case "BINGET" | "LONG_BINGET":
                stack.append(self.memo[argument])
            case "TUPLE":
                items = self._pop_marked()
                self.stack.append(tuple(items))
            case "TUPLE1" | "TUPLE2" | "TUPLE3":
                size = int(name[-1])
                stack[-size:] = [tuple(stack[-size:])]
            case "APPEND":
                item = stack.pop()
                stack[-1].append(item)
            case "APPENDS":
                items = self._pop_marked()
                self.stack[-1].extend(items)
            case "SETITEM":
                self._set_keys(stack[-3], stack[-2:-1])
                del stack[-2:]
            case "SETITEMS":
                keys = self._pop_marked()[::2]
                self._set_keys(self.stack[-1], keys)
            case "REDUCE":
                arguments = stack.pop()
                self._count(*arguments)
                stack[-1] = self._called(stack[-1], arguments)
            case "BUILD":
                attributes = stack.pop()
                self._count(attributes)
                if not isinstance(attributes, _Dict):
                    raise Unsuitable("it gives an object other attributes than torch does: use another file")
            case "BINPERSID":
                stack[-1] = self._storage(*stack[-1])
            case _:
                raise ValueError(name)

    def _pop_marked(self) -> list[Any]:
        items, self.stack = self.stack, self.below.pop()
        return items

    def _set_keys(self, target: _Dict, keys: list[Any]) -> None:
        for key in keys:
            if not isinstance(key, (str, int)):
                raise Unsuitable("a key of a dict in it is neither text nor a whole number: use another file")
            self.large_keys += isinstance(key, int) and abs(key) > MAX_OBJECTS
        if self.large_keys > MAX_LARGE_KEYS:
            raise Unsuitable(TOO_MANY)
        target.extend(keys)

    def _count(self, *values: Any) -> None:
        """Bound the work of calls: one long list may be given to a million of them."""
        self.copied += sum(len(value) for value in values if isinstance(value, (list, tuple)))
        if self.copied > MAX_OBJECTS:
            raise Unsuitable(TOO_MANY)

    def _called(self, what: _Global, arguments: Any) -> object:
        if what.name not in ("collections OrderedDict", "collections Counter"):
            return _OBJECT
        made = _Dict()
        if arguments and isinstance(arguments[0], _Dict):
            made.extend(arguments[0])
        elif arguments and isinstance(arguments[0], list) and what.name == "collections OrderedDict":
            self._set_keys(made, [pair[0] for pair in arguments[0]])  # [key, value], as Python 2 saved them
        elif arguments:
            raise Unsuitable("it makes a dict of something else: use another file")
        return made

    def _storage(self, kind: Any, of: Any, key: Any, device: Any, size: Any, view: Any = None) -> object:
        texts = kind == "storage" and isinstance(key, str) and isinstance(device, str)
        if not (texts and isinstance(of, _Global) and of.name in _STORAGES and isinstance(size, int) and view is None):
            raise ValueError("not a storage")
        self.storages.add(key)
        return _OBJECT
