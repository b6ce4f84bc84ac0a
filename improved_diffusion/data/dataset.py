"""Images on disk -> a seekable, sharded, endless stream of batches.

The order is a function of (seed, epoch): batch k of a run takes the same images on any number of ranks, and the
position in the stream follows from the step.
"""

from __future__ import annotations

import math
import time
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager
from typing import NamedTuple

import numpy as np
from PIL import Image
from torch.utils.data import Dataset

from .. import distributed
from ..config import ReadingConfig, UserError, height_width
from ..logs.progress import Progress
from ..utils import images
from ..utils.resizing import resize
from .sources import ArrayImages, FolderImages, ZipImages
from .store import PixelStore

_DEFAULT_READING = ReadingConfig()
MAX_CHECKED = 10_000  # images read before training starts; of more, a `selection`
MAX_CACHED_BYTES = 2**28  # resized data sets up to this size stay in memory
MAX_UNREADABLE = 0.01  # fraction of unreadable images that may be skipped
SILENT = 5.0  # seconds of reading before its progress is shown
FEW_UNREADABLE = 5  # may be skipped in small sets too, up to half of the images


class ImageDataset(Dataset):
    """Every num_shards-th image from `shard` on, as (float32 [C, H, W] in [-1, 1], dict with "y" if there are classes).

    :param resolution: the side, or (height, width).
    :param image_paths: paths, or a collection of data.sources.
    :param classes: the class index of each image.
    :param reading: how image files become pixels.
    Reading a damaged image, or one in colour for grey `channels`, raises UserError.
    """

    def __init__(
        self, resolution, image_paths, classes=None, shard=0, num_shards=1, channels=3, reading=_DEFAULT_READING
    ):
        super().__init__()
        self.resolution = height_width(resolution)
        self.source = FolderImages("", image_paths) if isinstance(image_paths, (list, tuple)) else image_paths
        self.local_indices = range(len(self.source))[shard::num_shards]
        self.local_classes = None if classes is None else classes[shard::num_shards]
        self.channels = channels
        self.reading = reading
        self.store: PixelStore | None = self._first_store()

    def __len__(self):
        return len(self.local_indices)

    def name(self, idx: int) -> str:
        """What messages call an image."""
        return self.source.describe(self.local_indices[idx])

    def shown(self, idx: int) -> images.Decoded:
        """The image in its original size, as a viewer shows it. Pillow's warnings are not suppressed.

        Raises UnreadableImage.
        """
        try:
            image = self.source.read(self.local_indices[idx], self.reading.max_image_pixels)
            return images.as_shown(image, self.reading)
        except Exception as error:  # Pillow and zipfile raise many kinds for damaged files
            raise UnreadableImage(
                f"{self.name(idx)} is not a readable image: {str(error) or type(error).__name__}"
            ) from None

    def decode(self, idx: int) -> images.Decoded:
        """Like `shown`, with the channels of the data set."""
        return images.with_channels(self.shown(idx), self.channels, self.reading, self.name(idx))

    def read(self, idx: int) -> Image.Image:
        """The image of `decode`, without Pillow's warnings."""
        with quiet():
            return self.decode(idx).image

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """Of all images together, resized: [N, H, W, C]."""
        return len(self), *self.resolution, self.channels

    def _first_store(self) -> PixelStore | None:
        """The images of an npz themselves where nothing changes them; memory for a set that fits in it; else none."""
        if isinstance(self.source, ArrayImages):
            arrays = self.source.arrays[self.local_indices.start :: self.local_indices.step]
            if arrays.shape == self.shape:
                return PixelStore(arrays, np.ones(len(arrays), bool), done={})
        return PixelStore.in_memory(self.shape) if math.prod(self.shape) <= MAX_CACHED_BYTES else None

    def pixels(self, idx: int, key: Sequence[int] | None = None) -> np.ndarray:
        """The resized image, uint8 [H, W, C].

        :param key: of the random generator of --resize_mode random_crop; None: crop the centre.
        """
        if self.reading.resize_mode != "random_crop":
            key = None
        if key is None and self.store is not None and self.store.there[idx]:
            return self.store.rows[idx]
        return self._resized(idx, self.read(idx), key)

    def check(self, idx: int) -> tuple[str, ...]:
        """Read an image, and say what was done to it. Its pixels are kept, so that training need not read it again.

        Pillow's warnings are not suppressed. Raises UnreadableImage, and UserError for other channels.
        """
        image, done = self.decode(idx)
        if self.reading.resize_mode != "random_crop" and self.store is not None:
            self._resized(idx, image, None)
        return done

    def prepare(self, idx: int) -> tuple[np.ndarray, tuple[str, ...]]:
        """(the resized image, what was done to it before), read from its file. Raises UserError as `check` does."""
        image, done = self.decode(idx)
        return images.to_array(resize(image, self.resolution, self.reading), self.channels), done

    def _resized(self, idx: int, image: Image.Image, key: Sequence[int] | None) -> np.ndarray:
        array = images.to_array(resize(image, self.resolution, self.reading, key), self.channels)
        if key is None and self.store is not None and self.store.rows.flags.writeable:
            self.store.keep(idx, array)
        return array

    def sample(self, idx: int, key: Sequence[int] | None = None):
        """The item at `idx`; with `key` see `pixels`."""
        array = np.transpose(self.pixels(idx, key), [2, 0, 1]).astype(np.float32) / 127.5 - 1
        out = {} if self.local_classes is None else {"y": np.array(self.local_classes[idx], dtype=np.int64)}
        return np.ascontiguousarray(array), out

    def __getitem__(self, idx):
        return self.sample(idx)


def selection(total: int, count: int) -> np.ndarray:
    """`count` of the numbers 0..total-1, in ascending order; all if there are no more.

    Random, but the same each time. Folders are often sorted by class or cycle through the classes, so neither the first
    images nor every n-th would represent the rest.
    """
    return np.sort(np.random.default_rng(0).permutation(total)[:count])


@contextmanager
def quiet() -> Iterator[None]:
    """Suppress warnings about metadata. For one thread at a time: warning filters belong to the whole process."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


class UnreadableImage(UserError):
    """An image that cannot be decoded."""


class Check(NamedTuple):
    """What reading a data set before training found."""

    unreadable: list[int]  # indices
    done: dict[str, int]  # how many images had what done to them
    num_read: int  # images

    def describe(self) -> str:
        """What was done to the images, for the log; "" where nothing was."""
        return ", ".join(f"{count:,} {what}" for what, count in self.done.items())


def max_unreadable(count: int) -> float:
    """How many of `count` images may be unreadable and are skipped."""
    return max(MAX_UNREADABLE * count, min(FEW_UNREADABLE, count / 2))


def check_images(dataset: ImageDataset) -> Check:
    """Read all images, or a `selection` of MAX_CHECKED; those that a packed store holds have been read before.

    Raises UserError if more than 1% and more than 5 are unreadable, or if an image has other channels.
    """
    indices = selection(len(dataset), MAX_CHECKED)
    num_checked, before = len(indices), None if dataset.store is None else dataset.store.done
    if dataset.store is not None and before is not None:
        indices = indices[~dataset.store.there[indices]]

    def problem_or_done(idx: int) -> str | tuple[str, ...]:
        try:
            return dataset.check(idx)
        except UnreadableImage as error:
            return str(error)

    # The members of a zip are read one by one: its file has one position.
    threads = 1 if isinstance(dataset.source, ZipImages) else 4
    found: dict[int, str | tuple[str, ...]] = {}
    start = time.monotonic()
    with quiet(), ThreadPoolExecutor(threads) as pool, ExitStack() as until_read:
        bar = None
        outcomes = distributed.watched(pool.map(problem_or_done, indices), "one of the first images to be read")
        for i, outcome in zip(indices, outcomes):
            found[int(i)] = outcome
            if bar is None and time.monotonic() - start > SILENT:
                bar = until_read.enter_context(closing(Progress("reading images", len(indices), "image", len(found))))
            elif bar is not None:
                bar.update(1)
    problems = {i: outcome for i, outcome in found.items() if isinstance(outcome, str)}
    if len(problems) > max_unreadable(num_checked):
        first = "; ".join(list(problems.values())[:3])
        raise UserError(
            f"{len(problems)} of {num_checked} images are unreadable, more than {FEW_UNREADABLE} and more than 1%: "
            f"{first}: repair or remove them"
        )
    if before is not None:
        return Check(list(problems), dict(before), len(dataset))
    done = Counter(what for outcome in found.values() if not isinstance(outcome, str) for what in outcome)
    return Check(list(problems), dict(done.most_common()), num_checked)
