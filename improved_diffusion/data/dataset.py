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

MAX_CHECKED = 10_000  # images read before training starts; of more, a selection
MAX_CACHED_BYTES = 2**28  # data sets that are smaller once resized stay in memory, in each process that reads them
MAX_UNREADABLE = 0.01  # the share of unreadable images that is skipped


class ImageDataset(Dataset):
    """Every num_shards-th image from `shard` on, as (float32 [C, H, W] in [-1, 1], dict with "y" if there are classes).

    :param resolution: the side, or (height, width).
    :param image_paths: paths, or one of the image collections above.
    :param classes: the class index of each image.
    Reading an image that is damaged, or does not fit `channels`, raises UserError.
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
        """The image at its own size."""
        with quiet():
            return self.decode(idx)

    def decode(self, idx: int) -> Image.Image:
        """`read` with the warnings that Pillow gives."""
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
        """The image as the network sees it, uint8 [H, W] or [H, W, C]."""
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
    """`count` of the numbers 0..total-1, rising; all where there are no more.

    The same ones each time, drawn at random: images come in the order of their classes, or the classes in turn, so that
    neither the first ones nor every n-th would be like the rest.
    """
    return np.sort(np.random.default_rng(0).permutation(total)[:count])


@contextmanager
def quiet() -> Iterator[None]:
    """No warnings of odd metadata: the pixels decide. For one thread at a time, as the filters are the process's."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


class UnreadableImage(UserError):
    """An image that cannot be decoded."""


def check_images(dataset: ImageDataset) -> list[int]:
    """The indices of unreadable images, found by reading all of them, or a `selection` of MAX_CHECKED.

    Raises UserError where more than 1% are unreadable, or where one does not fit the channels.
    """
    indices = selection(len(dataset), MAX_CHECKED)

    def problem(idx):
        try:
            image = dataset.decode(idx)
        except UnreadableImage as error:
            return str(error)
        images.convert(image, dataset.channels, dataset.source.describe(dataset.local_indices[idx]))
        return None

    # A zip's members are read one by one: its file has one position.
    threads = 1 if isinstance(dataset.source, ZipImages) else 4
    with quiet(), ThreadPoolExecutor(threads) as pool:
        problems = {int(i): p for i, p in zip(indices, pool.map(problem, indices)) if p}
    if len(problems) > MAX_UNREADABLE * len(indices):
        first = "; ".join(list(problems.values())[:3])
        raise UserError(
            f"{len(problems)} of {len(indices)} images are unreadable, more than 1%: {first}: repair or remove them"
        )
    return list(problems)
