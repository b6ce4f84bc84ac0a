"""Images on disk -> a seekable, sharded, endless stream of batches.

The order is a function of (seed, epoch): batch k of a run takes the same images on any number of ranks, and the
position in the stream follows from the step.
"""

from __future__ import annotations

import warnings
import zipfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import numpy as np
from PIL import Image
from torch.utils.data import Dataset

from ..config import UserError, height_width
from ..utils import images
from .sources import FolderImages, ZipImages

MAX_CHECKED = 10_000  # images read before training starts; of more, a `selection`
MAX_CACHED_BYTES = 2**28  # resized data sets up to this size stay in the memory of each reading process
MAX_UNREADABLE = 0.01  # fraction of unreadable images that may be skipped


class ImageDataset(Dataset):
    """Every num_shards-th image from `shard` on, as (float32 [C, H, W] in [-1, 1], dict with "y" if there are classes).

    :param resolution: the side, or (height, width).
    :param image_paths: paths, or a collection of data.sources.
    :param classes: the class index of each image.
    Reading a damaged image, or one with other channels than `channels`, raises UserError.
    """

    def __init__(self, resolution, image_paths, classes=None, shard=0, num_shards=1, channels=3):
        super().__init__()
        self.resolution = height_width(resolution)
        self.source = FolderImages("", image_paths) if isinstance(image_paths, (list, tuple)) else image_paths
        self.local_indices = range(len(self.source))[shard::num_shards]
        self.local_classes = None if classes is None else classes[shard::num_shards]
        self.channels = channels
        self.cache: dict[int, np.ndarray] = {}

    def __len__(self):
        return len(self.local_indices)

    def read(self, idx: int) -> Image.Image:
        """The image in its original size."""
        with quiet():
            return self.decode(idx)

    def decode(self, idx: int) -> Image.Image:
        """Like `read`, with Pillow's warnings."""
        i = self.local_indices[idx]
        try:
            return self.source.read(i)
        except (
            OSError,
            SyntaxError,
            ValueError,
            RuntimeError,
            zipfile.BadZipFile,
            Image.DecompressionBombError,
        ) as error:
            raise UnreadableImage(f"{self.source.describe(i)} is not a readable image: {error}") from None

    def _pixels(self, idx: int) -> np.ndarray:
        """The resized image, uint8 [H, W] or [H, W, C]."""
        if idx in self.cache:
            return self.cache[idx]
        image = images.resize_crop(self.read(idx), self.resolution)
        array = np.asarray(images.convert(image, self.channels, self.source.describe(self.local_indices[idx])))
        if len(self) * array.nbytes <= MAX_CACHED_BYTES:
            self.cache[idx] = array
        return array

    def __getitem__(self, idx):
        array = self._pixels(idx).astype(np.float32) / 127.5 - 1
        array = array[None] if array.ndim == 2 else np.transpose(array, [2, 0, 1])
        out = {} if self.local_classes is None else {"y": np.array(self.local_classes[idx], dtype=np.int64)}
        return np.ascontiguousarray(array), out


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


def check_images(dataset: ImageDataset) -> list[int]:
    """The indices of unreadable images, found by reading all, or a `selection` of MAX_CHECKED.

    Raises UserError if more than 1% are unreadable, or if an image has other channels.
    """
    indices = selection(len(dataset), MAX_CHECKED)

    def problem(idx):
        try:
            image = dataset.decode(idx)
        except UnreadableImage as error:
            return str(error)
        images.convert(image, dataset.channels, dataset.source.describe(dataset.local_indices[idx]))
        return None

    # The members of a zip are read one by one: its file has one position.
    threads = 1 if isinstance(dataset.source, ZipImages) else 4
    with quiet(), ThreadPoolExecutor(threads) as pool:
        problems = {int(i): p for i, p in zip(indices, pool.map(problem, indices)) if p}
    if len(problems) > MAX_UNREADABLE * len(indices):
        first = "; ".join(list(problems.values())[:3])
        raise UserError(
            f"{len(problems)} of {len(indices)} images are unreadable, more than 1%: {first}: repair or remove them"
        )
    return list(problems)
