"""Weights in a .safetensors file, with their description in its metadata.

Such a file is the length of its header in 8 bytes, the header, which is JSON of each tensor's type, shape and place,
and the numbers. The header is checked here before the numbers are read; the package safetensors reads them.
"""

from __future__ import annotations

import json
import math
from collections import OrderedDict
from collections.abc import Iterable, Mapping
from typing import Any, NoReturn

import torch as th

from .. import distributed
from ..config import UserError, shown
from ..utils import files, torch_files, torch_pickles
from .description import KEY

SUFFIX = ".safetensors"
MAX_HEADER_BYTES = torch_pickles.MAX_PICKLE_BYTES
MAX_DIMENSIONS = 8
_LENGTH_BYTES = 8
_METADATA = "__metadata__"
_DTYPES = dict(
    zip(("F32", "F64", "F16", "BF16", "U8", "I8", "I16", "I32", "I64"), (*torch_files.FLOATS, *torch_files.INTEGERS))
)
_DAMAGED = "it is damaged, or made to do harm: copy or download it again, or use another file"


def has_suffix(path: str) -> bool:
    """Whether a path is named as such a file."""
    return path.lower().endswith(SUFFIX)


def recognises(path: str) -> bool:
    """Whether a file is one of this format, by its first bytes; a URL, by its name."""
    if files.is_url(path):
        return has_suffix(path)
    start = files.read_start(path, _LENGTH_BYTES + 1)
    return start[_LENGTH_BYTES:] == b"{" and (has_suffix(path) or _length(start) < 2**32)


def load(path: str) -> dict[str, th.Tensor]:
    """The tensors of a file that at least rank 0's host has, on the CPU; our description, where the file has one, is in
    their `_metadata`, as in a .pt file. Collective.

    Raises UserError, in one line, for a file that is damaged or holds anything but plain tensors of numbers.
    """
    package = _package()
    if not files.is_url(path):
        distributed.from_rank0(_check, path)  # before a large file is read whole
    data = distributed.read_bytes(path)
    outline = _outline(data, len(data), path)
    try:
        outline.update(package.torch.load(bytes(data)))
    except package.SafetensorError:
        _refuse(path, len(data), _DAMAGED)
    return outline


def _check(path: str) -> None:
    read_outline(path)


def read_outline(path: str) -> dict[str, th.Tensor]:
    """Like `load`, of a local file, with tensors of the device "meta": only the header is read."""
    size = files.size(path)
    length = _length(files.read_start(path, _LENGTH_BYTES))
    return _outline(files.read_start(path, _LENGTH_BYTES + min(length, MAX_HEADER_BYTES)), size, path)


def to_bytes(state_dict: Mapping[str, th.Tensor], description: Mapping[str, Any]) -> bytes:
    """A file of these tensors."""
    # Copies, as the format has no tensors that share memory.
    tensors = {
        name: tensor.detach().to("cpu", copy=True, memory_format=th.contiguous_format)
        for name, tensor in state_dict.items()
    }
    # One entry: the package writes several in an order that changes, and with it the file's checksum.
    return _package().torch.save(tensors, {KEY: json.dumps(description)})


def _package() -> Any:
    try:
        import safetensors.torch
    except ImportError:
        raise UserError(
            "a .safetensors file needs the package safetensors: pip install 'improved_diffusion[safetensors]'"
        ) from None
    return safetensors


def _length(start: bytes | bytearray) -> int:
    """The length of the header that a file begins with."""
    return int.from_bytes(start[:_LENGTH_BYTES], "little")


def _refuse(path: str, size: int, reason: str) -> NoReturn:
    raise UserError(f"cannot load {path} ({size:,} bytes): {reason}")


def _outline(data: bytes | bytearray, size: int, path: str) -> dict[str, th.Tensor]:
    """What the header says, as tensors without numbers.

    :param data: at least the header.
    :param size: of the whole file.
    Raises UserError unless the tensors fill the rest of the file without gaps.
    """
    length = _length(data)
    end = _LENGTH_BYTES + length
    if end > size or length < 2:
        _refuse(path, size, f"its header claims {length:,} bytes: it is cut off or damaged, or no safetensors file")
    if length > MAX_HEADER_BYTES:
        _refuse(path, size, f"its header has {length:,} bytes, more than a checkpoint needs: use another file")
    header = files.parse_json(bytes(data[_LENGTH_BYTES:end]), f"the header of {path}")
    if not isinstance(header, dict):
        _refuse(path, size, _DAMAGED)
    metadata = header.pop(_METADATA, {})
    if not isinstance(metadata, dict) or not all(isinstance(text, str) for text in metadata.values()):
        _refuse(path, size, f"its metadata is not text by name: {_DAMAGED}")
    for name, entry in header.items():
        if problem := _problem_of(entry):
            _refuse(path, size, f"{ascii(name)[1:-1][:200] or 'a tensor without a name'} {problem}")
    if not _fill([entry["data_offsets"] for entry in header.values()], size - end):
        _refuse(path, size, f"its tensors overlap, leave gaps or end elsewhere than the file: {_DAMAGED}")
    outline: Any = OrderedDict(
        (name, th.empty(entry["shape"], dtype=_DTYPES[entry["dtype"]], device="meta")) for name, entry in header.items()
    )
    if KEY in metadata:  # other programs' metadata is no description
        outline._metadata = {KEY: {"json": metadata[KEY]}}
    return outline


def _problem_of(entry: Any) -> str | None:
    """Why the header's entry of a tensor is refused; None where it is sound."""
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        return f"is not described by a type, a shape and a place: {_DAMAGED}"
    dtype, shape, place = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in _DTYPES:
        return f"has the type {shown(dtype)}, expected {', '.join(_DTYPES)}: use another file"
    if not _are_counts(shape) or len(shape) > MAX_DIMENSIONS or math.prod(max(n, 1) for n in shape) >= 2**48:
        return f"has the shape {shown(shape)}: {_DAMAGED}"
    if not _are_counts(place) or len(place) != 2:
        return f"has the place {shown(place)}: {_DAMAGED}"
    if math.prod(shape) * _DTYPES[dtype].itemsize != place[1] - place[0]:
        return f"of the shape {shown(shape)} has {place[1] - place[0]:,} bytes: {_DAMAGED}"
    return None


def _are_counts(value: Any) -> bool:
    return isinstance(value, list) and all(type(item) is int and 0 <= item < 2**48 for item in value)


def _fill(places: Iterable[list[int]], size: int) -> bool:
    """Whether places (first byte, first byte behind) fill this many bytes, one after the other."""
    reached = 0
    for start, end in sorted(places):
        if start != reached:
            return False
        reached = end
    return reached == size
