"""Reads the pickles in which CIFAR-10 is published, without running what a hostile one could hold."""

from __future__ import annotations

import io
import pickle
from typing import Any

import numpy as np

from improved_diffusion.config import UserError


def _dtype(name, align, copy):
    return np.dtype(name, align=bool(align), copy=bool(copy))  # old pickles have 0 and 1, which numpy warns of


def _encode(text, encoding):
    return text.encode("latin1")  # how Python 3 writes bytes in Python 2's format; no other codec has a place here


_reconstruct = np.empty(0).__reduce__()[0]  # its module was renamed, and numpy warns of the old name
ALLOWED = {
    ("numpy.core.multiarray", "_reconstruct"): _reconstruct,
    ("numpy._core.multiarray", "_reconstruct"): _reconstruct,
    ("numpy", "ndarray"): np.ndarray,
    ("numpy", "dtype"): _dtype,
    ("_codecs", "encode"): _encode,
}


class ArraysOnly(pickle.Unpickler):
    """Reads numbers, texts, lists, dicts and numpy arrays; looks up nothing else, so nothing else is called."""

    def find_class(self, module, name):
        if (module, name) not in ALLOWED:
            raise UserError(f"it asks for {module}.{name}, which is no part of an image; it was not called")
        return ALLOWED[module, name]


def loads(data: bytes) -> Any:
    """The object in a pickle of Python 2 or 3. Raises UserError where anything but the above is in it."""
    return ArraysOnly(io.BytesIO(data), encoding="bytes").load()
