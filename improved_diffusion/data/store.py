"""The resized images of a data set that need not be read again, in memory or in a file."""

from __future__ import annotations

import math
import mmap
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np


class PixelStore:
    """Images by their index.

    :param rows: uint8 [N, H, W, C].
    :param there: bool [N], which rows hold their image.
    :param done: how many images had what done to them, where all have been read; None where that is not known.
    """

    def __init__(self, rows: np.ndarray, there: np.ndarray, done: Mapping[str, int] | None = None):
        self.rows, self.there, self.done = rows, there, done
        self._again: tuple[Any, ...] = (PixelStore, (rows, there, done))

    @classmethod
    def in_memory(cls, shape: Sequence[int]) -> PixelStore:
        """An empty store. Worker processes that are forked share it; its memory is taken as it fills."""

        def shared(count: int) -> np.ndarray:
            return np.frombuffer(mmap.mmap(-1, max(count, 1)), np.uint8, count)

        store = cls(shared(math.prod(shape)).reshape(shape), shared(shape[0]).view(bool))
        store._again = (PixelStore.in_memory, (shape,))
        return store

    @classmethod
    def in_file(
        cls, path: str, shape: Sequence[int], offset: int, missing: Sequence[int], done: Mapping[str, int]
    ) -> PixelStore:
        """A store that is read from a file. Its pages are shared by all processes of the machine.

        :param offset: of the first row, in bytes.
        :param missing: the indices of the images that it does not hold.
        """
        rows = np.memmap(path, np.uint8, "r", offset, tuple(shape)).view(np.ndarray)
        there = np.ones(shape[0], bool)
        there[list(missing)] = False
        store = cls(rows, there, done)
        store._again = (PixelStore.in_file, (path, shape, offset, missing, done))
        return store

    def __reduce__(self) -> tuple[Any, ...]:  # a process that is started afresh opens the file, or fills its own memory
        return self._again

    def keep(self, i: int, image: np.ndarray) -> None:
        """Keep an image, uint8 [H, W, C]."""
        self.rows[i] = image
        self.there[i] = True

    def holds(self, indices: np.ndarray) -> bool:
        """Whether all these images are there."""
        return bool(self.there[indices].all())
