"""Reading files of torch.save: plain tensors, numbers and text, in dicts and lists.

torch.load with weights_only runs no code, but its tensors may be expanded from one element, overlap each other, or be
sparse or quantised. Kernels that trust a shape then read and write past the memory. Here each tensor has contiguous
memory of its own, and all of them together are bounded by the size of the file.
"""

from __future__ import annotations

import io
import math
import os
import pickletools
import re
import warnings
import zipfile
from collections import OrderedDict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import IO, Any

import torch as th
from torch import nn

from ..config import UserError
from . import files, stand_ins

MAX_PICKLE_BYTES = 2**23  # of the names and shapes, without the numbers
MAX_OBJECTS = 10**6
MAX_DEPTH = 40
MAX_SHARED = 4  # times the file's size: tensors that share memory in the file get their own

FLOATS = (th.float32, th.float64, th.float16, th.bfloat16)
INTEGERS = (th.uint8, th.int8, th.int16, th.int32, th.int64)

# What the pickle inside may name: what plain tensors and dicts are made of.
_STORAGES = ["Float", "Double", "Half", "BFloat16", "Byte", "Char", "Short", "Int", "Long", "Bool"]
_GLOBALS = {
    "collections OrderedDict",
    "collections Counter",
    "torch._utils _rebuild_tensor_v2",
    "torch._utils _rebuild_parameter",
    "torch Size",
    "torch device",
    *(f"torch {name}Storage" for name in _STORAGES),
    *(str(dtype).replace(".", " ") for dtype in (*FLOATS, *INTEGERS, th.bool)),
}
_OTHER_CONSTRUCTORS = {"OBJ", "NEWOBJ", "NEWOBJ_EX", "EXT1", "EXT2", "EXT4"}
_MADE = (("multiarray.scalar", "numpy scalar"), ("multiarray._reconstruct", "numpy array"))
_OTHER = "other objects"
# Parts of objects that have names of their own.
_PARTS = {"numpy.dtype", "numpy.ndarray", "_codecs.encode", "__builtin__.set", "builtins.set", _OTHER}
_SHOWN = 4

_ZIP = b"PK\x03\x04"
_OLD_MAGIC = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."  # of files from before torch 1.6
_OLD_PICKLES = 5  # magic number, version, system, contents, keys of the storages

_DAMAGED = "it is damaged, or not a checkpoint: copy or download it again, or use another file"
_TOO_MANY = "it holds too many objects for a checkpoint: use another file"
_GIVE = "give one, such as ema_0.9999_010000.pt"
_ONNX = rb"\x08[\x01-\x1f][\x12\x1a\x22\x28\x32\x3a\x42]"  # ModelProto's ir_version, and the key of its next field
# (first bytes, what such a file is, what to do)
_KINDS = (
    (b"\x89PNG\r\n\x1a\n", "a PNG image", _GIVE),
    (b"\xff\xd8\xff", "a JPEG image", _GIVE),
    (b"GIF8", "a GIF image", _GIVE),
    (b"%PDF", "a PDF", _GIVE),
    (b"\x1f\x8b", "compressed with gzip", "unpack it first"),
    (b"\x93NUMPY", "an array of numpy", _GIVE),
    (b"\x89HDF", "an HDF5 file, such as Keras writes", _GIVE),
    (b"version https://git-lfs", "a pointer of Git LFS", "fetch the file itself with git lfs pull"),
    (b"<", "a web page or XML", "the download went wrong: download the file again"),
    (b"\x80", "a pickle of another program", _GIVE),
)


class _Unsuitable(Exception):
    """Why a file is not loaded."""


def load(f: IO[bytes], name: str, *, mapped: bool = False, **kwargs: Any) -> Any:
    """What torch.save wrote: dicts, lists, numbers, text, and tensors with contiguous memory of their own.

    :param f: the file, or its bytes.
    :param name: the file's path, for messages.
    :param mapped: leave the tensors of a local file on the disk until they are used.
    :param kwargs: of torch.load. Nothing in the file is executed.
    Raises UserError, in one line, for a file that is damaged, unsafe, or something else.
    """
    size = check(f, name)
    with _naming(name, size), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        f.seek(0)
        content = th.load(name if mapped else f, **{**kwargs, "mmap": mapped, "weights_only": True})
        return _Contents(MAX_SHARED * size + 2**16).own(content, "")


def check(f: IO[bytes], name: str) -> int:
    """The size of a file in bytes. Raises UserError for one that `load` refuses whatever its tensors are; of a large
    file little is read."""
    size = f.seek(0, os.SEEK_END)
    with _naming(name, size):
        if foreign := _foreign_names(f, size):
            raise _Unsuitable(
                f"it holds objects other than plain tensors ({_listed(foreign)}), which could run code or harm when "
                "loaded; they were not loaded: save its state dict alone, as improved-diffusion convert --trust does"
            )
    return size


def load_tensors(f: IO[bytes], name: str) -> tuple[Any, str]:
    """(the tensors of a file that may hold objects of other programs, which classes and functions were left out or "").

    Tensors come in dicts by their names, as with `load`. Of the rest nothing is imported or executed; see `stand_ins`.
    Raises UserError as `load` does, but not for such objects.
    """
    size = f.seek(0, os.SEEK_END)
    with _naming(name, size), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        left_out = [name for name in _foreign_names(f, size) if name != _OTHER]
        content = th.load(_as_checked(f), map_location="cpu", weights_only=False, pickle_module=stand_ins)
        return _Contents(MAX_SHARED * size + 2**16).own(stand_ins.tensors_of(content) or {}, ""), _listed(left_out)


@contextmanager
def _naming(name: str, size: int) -> Iterator[None]:
    """Turn what goes wrong with a file into UserError, in one line of ours."""
    try:
        yield
    except _Unsuitable as error:
        raise UserError(f"cannot load {name} ({size:,} bytes): {error}") from None
    except Exception as error:  # torch, pickle and zipfile raise many kinds for damaged files
        short = isinstance(error, MemoryError) or "allocate memory" in str(error)
        reason = "there is not enough memory for it" if short else _DAMAGED
        raise UserError(f"cannot load {name} ({size:,} bytes): {reason}") from None


def load_mapped(path: str) -> Any:
    """`load` of a local file whose tensors stay on the disk until they are used."""
    with files.open_read(path) as f:
        return load(f, path, mapped=True, map_location="cpu")


# Before torch reads the file


def _foreign_names(f: IO[bytes], size: int) -> list[str]:
    """What a file of torch.save names beside plain tensors and dicts. Raises _Unsuitable for any other file."""
    f.seek(0)
    head = f.read(512)
    f.seek(0)
    if head.startswith(_ZIP):
        return _foreign_in(_pickle_of_zip(f, size), 1)
    if head.startswith(_OLD_MAGIC):
        return _foreign_in(f, _OLD_PICKLES)
    raise _Unsuitable(_kind(head))


def _as_checked(f: IO[bytes]) -> IO[bytes]:
    """The file in memory, as `_foreign_names` has read it: torch could find other members in a zip archive, such as a
    TorchScript program's, and unpacks a file on the disk that is a tar archive too."""
    f.seek(0)
    data = f.read()
    if not data.startswith(_ZIP):
        return io.BytesIO(data)
    checked = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as archive, zipfile.ZipFile(checked, "w") as written:
        for info in archive.infolist():
            written.writestr(info.filename, archive.read(info))
    checked.seek(0)
    return checked


def _kind(head: bytes) -> str:
    """What a file is that torch.save did not write, and what to do."""
    kind, remedy = "damaged", "copy or download it again, or use another file"
    if not head:
        kind, remedy = "empty", "copy or download it again"
    elif b"torch_utils.persistence" in head:
        kind, remedy = "a network of EDM or StyleGAN with its code", "sample from it with the code that made it"
    elif head[257:262] == b"ustar":
        kind, remedy = "a tar archive", "unpack it first"
    elif head[8:9] == b"{" and int.from_bytes(head[:8], "little") < 2**32:
        kind, remedy = "a safetensors file", "only weights are read from one, and a URL of one ends in .safetensors"
    elif re.match(_ONNX, head):
        kind, remedy = "an ONNX model", _GIVE
    elif found := next((entry for entry in _KINDS if head.lstrip().startswith(entry[0])), None):
        _, kind, remedy = found
    elif all(byte >= 32 or byte in b"\t\n\r" for byte in head):
        kind, remedy = "a text file", _GIVE
    return f"it is {kind}{', or' if kind == 'damaged' else ','} not a checkpoint: {remedy}"


def _pickle_of_zip(f: IO[bytes], size: int) -> IO[bytes]:
    """The pickle inside a zip archive of torch.save."""
    with zipfile.ZipFile(f) as archive:
        infos = archive.infolist()
        members = {info.filename.partition("/")[2] or info.filename: info for info in infos}
        if "data.pkl" not in members or "constants.pkl" in members:
            raise _Unsuitable(f"it is {_kind_of_zip(members)}, not a checkpoint: {_GIVE}")
        if len(members) < len(infos) or sum(info.file_size for info in infos) > size:
            raise _Unsuitable("its parts are larger than the file, or there twice: it is damaged, or written anew")
        if members["data.pkl"].file_size > MAX_PICKLE_BYTES:
            raise _Unsuitable(_TOO_MANY)
        return io.BytesIO(archive.read(members["data.pkl"]))


def _kind_of_zip(names: Iterable[str]) -> str:
    """What a zip archive is that is not a checkpoint, by the names in it."""
    if "constants.pkl" in names:
        return "a TorchScript program"
    if "archive_format" in names or "serialized_exported_program.json" in names:
        return "an exported program"
    return "an npz of arrays" if any(name.endswith(".npy") for name in names) else "a zip archive"


def _foreign_in(f: IO[bytes], pickles: int) -> list[str]:
    """What the pickles name beside plain tensors and dicts: classes, functions, and other ways to make objects."""
    found: dict[str, None] = {}
    limit = f.tell() + MAX_PICKLE_BYTES
    for _ in range(pickles):
        texts = ["", ""]  # a STACK_GLOBAL takes the last two
        for opcode, argument, _ in pickletools.genops(f):
            if opcode.name in ("GLOBAL", "INST") and argument not in _GLOBALS:
                found[str(argument).replace(" ", ".")] = None
            elif opcode.name == "STACK_GLOBAL":
                found[_OTHER if " ".join(texts) in _GLOBALS else ".".join(texts)] = None
            elif opcode.name in _OTHER_CONSTRUCTORS:
                found[_OTHER] = None
            elif isinstance(argument, str):
                texts = [texts[1], argument]
            if f.tell() > limit or (opcode.name.endswith("PUT") and int(argument or 0) > MAX_PICKLE_BYTES):
                raise _Unsuitable(_TOO_MANY)
    return list(found)


def _listed(names: Iterable[str]) -> str:
    """Names of classes and functions for a message, the well-known ones by what they make."""
    shown = dict.fromkeys(next((made for end, made in _MADE if name.endswith(end)), name) for name in names)
    telling = [name for name in shown if name not in _PARTS] or list(shown)
    more = ", ..." if len(telling) > _SHOWN else ""
    return ", ".join(ascii(name[:60])[1:-1] for name in telling[:_SHOWN]) + more


# After torch has read it


class _Contents:
    """Copies what a file holds, so that nothing is shared. Raises _Unsuitable for what is not plain.

    :param room: bytes that the tensors may take together.
    """

    def __init__(self, room: int):
        self.room, self.objects = room, MAX_OBJECTS
        self.taken: set[int] = set()  # memory that a tensor has for itself

    def own(self, value: Any, where: str, depth: int = 0) -> Any:
        """The value itself, or a copy: containers are new, tensors are contiguous.

        :param where: its keys, for messages.
        """
        self.objects -= 1
        if self.objects < 0 or depth > MAX_DEPTH:
            raise _Unsuitable("it holds too many objects, or too deep lists of lists: use another file")
        if isinstance(value, th.Tensor):
            return self._tensor(value, where)
        if isinstance(value, dict):
            return self._dict(value, where, depth)
        if isinstance(value, (list, tuple)):
            items = [self.own(item, f"{where}.{i}", depth + 1) for i, item in enumerate(value)]
            return items if isinstance(value, list) else tuple(items)
        whole = isinstance(value, int) and abs(value) < 2**63
        if not (whole or value is None or isinstance(value, (str, float, th.dtype, th.device))):
            raise _Unsuitable(f"{_shown(where)} is not a tensor, a number or text: use another file")
        return value

    def _dict(self, value: dict, where: str, depth: int) -> dict:
        copied: Any = OrderedDict() if isinstance(value, OrderedDict) else {}
        for key, item in value.items():
            if not isinstance(key, (str, int)):
                raise _Unsuitable(f"a key of {_shown(where)} is neither text nor a whole number: use another file")
            copied[key] = self.own(item, f"{where}.{key}"[-200:], depth + 1)
        if "_metadata" in getattr(value, "__dict__", {}):  # of a module's state dict
            copied._metadata = self.own(value._metadata, "_metadata", depth + 1)  # type: ignore[attr-defined]
        return copied

    def _tensor(self, value: th.Tensor, where: str) -> th.Tensor:
        problem = problem_of(value)
        if problem:
            raise _Unsuitable(f"{_shown(where)} {problem}: damaged, or made to do harm; use another file")
        value = value.detach()
        if value.dtype == th.bool:
            value = value.view(th.uint8) != 0  # other bytes than 0 and 1 are no bools
        memory, nbytes = value.untyped_storage(), value.numel() * value.element_size()
        self.room -= nbytes
        if self.room < 0:
            raise _Unsuitable("its tensors share memory and are larger than the file: use another file")
        whole = value.is_contiguous() and memory.nbytes() == nbytes
        if whole and memory.data_ptr() not in self.taken:
            self.taken.add(memory.data_ptr())
            return value
        return value.clone(memory_format=th.contiguous_format)


def problem_of(tensor: th.Tensor) -> str | None:
    """Why a tensor is not plain, None where it is: dense, strided, of numbers, with memory for each of its elements."""
    if type(tensor) not in (th.Tensor, nn.Parameter) or tensor.layout != th.strided or tensor.is_nested:
        return "is a special kind of tensor"
    if tensor.is_quantized or tensor.is_meta or tensor.is_neg() or tensor.is_conj():
        return "is a special kind of tensor"
    if tensor.dtype not in (*FLOATS, *INTEGERS, th.bool):
        return f"has the type {str(tensor.dtype).removeprefix('torch.')}, which no checkpoint needs"
    count = math.prod(tensor.shape)
    if any(stride < 0 for stride in tensor.stride()) or tensor.storage_offset() < 0:
        return "goes backwards through its memory"
    if (tensor.storage_offset() + count) * tensor.element_size() > tensor.untyped_storage().nbytes() and count:
        return f"of the shape {tuple(tensor.shape)} has memory for fewer numbers"
    return None


def _shown(where: str) -> str:
    """The keys of a value, on one line."""
    return ascii(where.removeprefix("."))[1:-1] or "its content"
