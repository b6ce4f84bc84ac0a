"""Reading files of torch.save: plain tensors, numbers and text, in dicts and lists.

torch.load with weights_only runs no code, but its tensors may be expanded from one element, overlap each other, or be
sparse or quantised. Kernels that trust a shape then read and write past the memory. Here each tensor has contiguous
memory of its own, and all of them together are bounded by the size of the file.
"""

from __future__ import annotations

import io
import math
import os
import re
import struct
import warnings
import zipfile
from collections import OrderedDict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import IO, Any

import torch as th
from torch import nn

from ..config import UserError
from . import files, stand_ins, torch_pickles
from .torch_pickles import MAX_OBJECTS, Unsuitable

MAX_DEPTH = 40
MAX_SHARED = 4  # times the file's size: tensors that share memory in the file get their own

FLOATS = (th.float32, th.float64, th.float16, th.bfloat16)
INTEGERS = (th.uint8, th.int8, th.int16, th.int32, th.int64)

_ZIP = b"PK\x03\x04"
# Files from before torch 1.6 are five pickles: this number, a version, the system, the contents, the storages' keys.
_OLD_MAGIC = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."
_OLD_VERSION = b"\x80\x02M\xe9\x03."
# The end of a zip archive: signature, entries, length and start of the directory, length of a comment. Before it, in
# archives of torch: signature, entries, length and start; signature and place of those.
_END, _WIDE_END = struct.Struct("<4s6xHLLH"), struct.Struct("<4s28xQQQ4s4xQ4x")
_OLD_PICKLES = 5

_DAMAGED = "it is damaged, or not a checkpoint: copy or download it again, or use another file"
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
            raise Unsuitable(
                f"it holds objects other than plain tensors ({torch_pickles.listed(foreign)}), which could run code or "
                "harm when loaded; they were not loaded: save its state dict alone, as improved-diffusion convert "
                "--trust does"
            )
        _check_plain(f, size)
    return size


def load_tensors(f: IO[bytes], name: str) -> tuple[Any, str]:
    """(the tensors of a file that may hold objects of other programs, which classes and functions were left out or "").

    Tensors come in dicts by their names, as with `load`. Of the rest nothing is imported or executed; see `stand_ins`.
    Raises UserError as `load` does, but not for such objects.
    """
    size = f.seek(0, os.SEEK_END)
    with _naming(name, size), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        foreign = _foreign_names(f, size)
        f.seek(0)
        if f.read(len(_ZIP)) != _ZIP:
            if foreign:  # torch itself acts on what such a file says beside its objects
                raise Unsuitable("it is of a torch before 1.6, with objects of other programs: save it anew with that")
            _check_plain(f, size)
        left_out = torch_pickles.listed(name for name in foreign if name != torch_pickles.OTHER)
        # stand_ins takes the place of pickle, and imports and calls nothing that the file names.
        content = th.load(_as_checked(f), map_location="cpu", weights_only=False, pickle_module=stand_ins)
        return _Contents(MAX_SHARED * size + 2**16).own(stand_ins.tensors_of(content) or {}, ""), left_out


@contextmanager
def _naming(name: str, size: int) -> Iterator[None]:
    """Turn what goes wrong with a file into UserError, in one line of ours."""
    try:
        yield
    except Unsuitable as error:
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
    """What a file of torch.save names beside plain tensors and dicts. Raises Unsuitable for any other file."""
    f.seek(0)
    head = f.read(512)
    f.seek(0)
    if head.startswith(_ZIP):
        return torch_pickles.foreign_names(_pickle_of_zip(f, size))
    if head.startswith(_OLD_MAGIC):
        return torch_pickles.foreign_names(f, _OLD_PICKLES)
    raise Unsuitable(_kind(head))


def _check_plain(f: IO[bytes], size: int) -> None:
    """Raise Unsuitable where torch would take hours for a file that names nothing else, or leave tensors unfilled."""
    f.seek(0)
    is_zip = f.read(len(_ZIP)) == _ZIP
    f.seek(0)
    if is_zip:
        torch_pickles.read(_pickle_of_zip(f, size))
    else:
        _check_old(f)


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
    members = {(info.filename.partition("/")[2] or info.filename).lower(): info for info in infos}
    if "data.pkl" not in members or "constants.pkl" in members:
        raise Unsuitable(f"it is {_kind_of_zip(members)}, not a checkpoint: {_GIVE}")
    if any(info.compress_type != zipfile.ZIP_STORED or info.compress_size != info.file_size for info in infos):
        raise Unsuitable("its parts are compressed: load it with torch, and save its state dict with torch.save")
    if len(members) < len(infos) or sum(info.file_size for info in infos) > size:
        raise Unsuitable("its parts are larger than the file, or there twice: it is damaged, or written anew")
    if len(infos) != _entries_of_zip(f, size):
        raise Unsuitable("its directory does not list its parts: it is damaged, or written anew")
    if members["data.pkl"].file_size > torch_pickles.MAX_PICKLE_BYTES:
        raise Unsuitable(torch_pickles.TOO_MANY)
    f.seek(0)
    return io.BytesIO(th._C.PyTorchFileReader(f).get_record("data.pkl"))  # of two readers the one that torch.load uses


def _entries_of_zip(f: IO[bytes], size: int) -> int:
    """How many entries the directory of a zip archive has. Raises Unsuitable unless it lies right before the end of the
    file: zipfile and torch look for others in different places."""
    end = size - _END.size
    f.seek(end)
    signature, entries, length, start, comment = _END.unpack(f.read(_END.size))
    f.seek(max(end - _WIDE_END.size, 0))
    wide = _WIDE_END.unpack(f.read(_WIDE_END.size).rjust(_WIDE_END.size))
    if wide[-2] == b"PK\6\7":
        end -= _WIDE_END.size
        wide_signature, entries, length, start, _, place = wide
        if wide_signature != b"PK\6\6" or place != end:
            signature = b""
    if signature != b"PK\5\6" or comment or start + length != end:
        raise Unsuitable("its directory does not end it: it is damaged, or written anew")
    return entries


def _kind_of_zip(names: Iterable[str]) -> str:
    """What a zip archive is that is not a checkpoint, by the names in it."""
    if "constants.pkl" in names:
        return "a TorchScript program"
    if "archive_format" in names or "serialized_exported_program.json" in names:
        return "an exported program"
    return "an npz of arrays" if any(name.endswith(".npy") for name in names) else "a zip archive"


def _check_old(f: IO[bytes]) -> None:
    """Raise Unsuitable for a file from before torch 1.6 that does not hold the numbers of each storage that it names:
    torch would leave those as they are in memory."""
    if f.read(len(_OLD_MAGIC + _OLD_VERSION)) != _OLD_MAGIC + _OLD_VERSION:
        raise Unsuitable(_DAMAGED)
    torch_pickles.read(f)  # of the system
    named = torch_pickles.read(f).storages
    stored = torch_pickles.read(f).content
    if not all(isinstance(key, str) for key in stored) or sorted(stored) != sorted(named):
        raise Unsuitable("it does not hold the numbers of all of its tensors: it is damaged, or made to do harm")


# After torch has read it


class _Contents:
    """Copies what a file holds, so that nothing is shared. Raises Unsuitable for what is not plain.

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
            raise Unsuitable("it holds too many objects, or too deep lists of lists: use another file")
        if isinstance(value, th.Tensor):
            return self._tensor(value, where)
        if isinstance(value, dict):
            return self._dict(value, where, depth)
        if isinstance(value, (list, tuple)):
            items = [self.own(item, f"{where}.{i}", depth + 1) for i, item in enumerate(value)]
            return items if isinstance(value, list) else tuple(items)
        whole = isinstance(value, int) and abs(value) < 2**63
        if not (whole or value is None or isinstance(value, (str, float, th.dtype, th.device))):
            raise Unsuitable(f"{_shown(where)} is not a tensor, a number or text: use another file")
        return value

    def _dict(self, value: dict, where: str, depth: int) -> dict:
        copied: Any = OrderedDict() if isinstance(value, OrderedDict) else {}
        for key, item in value.items():
            if not isinstance(key, (str, int)):
                raise Unsuitable(f"a key of {_shown(where)} is neither text nor a whole number: use another file")
            copied[key] = self.own(item, f"{where}.{key}"[-200:], depth + 1)
        if "_metadata" in getattr(value, "__dict__", {}):  # of a module's state dict
            copied._metadata = self.own(value._metadata, "_metadata", depth + 1)  # type: ignore[attr-defined]
        return copied

    def _tensor(self, value: th.Tensor, where: str) -> th.Tensor:
        problem = problem_of(value)
        if problem:
            raise Unsuitable(f"{_shown(where)} {problem}: damaged, or made to do harm; use another file")
        value = value.detach()
        if value.dtype == th.bool:
            value = value.view(th.uint8) != 0  # other bytes than 0 and 1 are no bools
        memory, nbytes = value.untyped_storage(), value.numel() * value.element_size()
        self.room -= nbytes
        if self.room < 0:
            raise Unsuitable("its tensors share memory and are larger than the file: use another file")
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
