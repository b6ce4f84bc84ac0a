"""Reads the pickles in which CIFAR-10 is published without running code that a hostile one could contain."""

from __future__ import annotations

import io
import pickle
from typing import Any

import numpy as np

from improved_diffusion.config import UserError


def _dtype(name, align, copy):
    return np.dtype(name, align=bool(align), copy=bool(copy))  # old pickles have 0 and 1, and numpy warns about them


def _encode(text, encoding):
    return text.encode("latin1")  # how Python 3 writes bytes in Python 2's format; no other codec is needed


_reconstruct = np.empty(0).__reduce__()[0]  # its module was renamed, and numpy warns about the old name
ALLOWED = {
    ("numpy.core.multiarray", "_reconstruct"): _reconstruct,
    ("numpy._core.multiarray", "_reconstruct"): _reconstruct,
    ("numpy", "ndarray"): np.ndarray,
    ("numpy", "dtype"): _dtype,
    ("_codecs", "encode"): _encode,
}


class ArraysOnly(pickle.Unpickler):
    """Reads numbers, strings, lists, dicts and numpy arrays. No other name is looked up, so nothing else is called."""

    def find_class(self, module, name):
        if (module, name) not in ALLOWED:
            raise UserError(f"it asks for {module}.{name}, which is not part of an image; it was not called")
        return ALLOWED[module, name]


def loads(data: bytes) -> Any:
    """The object in a Python 2 or 3 pickle. Raises UserError if it contains anything else."""
    return ArraysOnly(io.BytesIO(data), encoding="bytes").load()
