"""Images on disk -> a seekable, sharded, endless stream of batches.

The order is a function of (seed, epoch): batch k of a run takes the same images on any number of ranks, and the
position in the stream follows from the step.
"""

from __future__ import annotations

import signal
import warnings
import zipfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch as th
from PIL import Image
from torch.utils.data import DataLoader, Dataset, default_collate

from . import dist_util, images
from .config import UserError, height_width
from .image_sources import FolderImages, ZipImages, open_images, read_classes
from .nn import NULL_LABEL

MAX_CHECKED = 10_000  # images read before training starts; beyond, an even selection of so many
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
    """The indices of unreadable images, found by reading all of them, or an even selection of MAX_CHECKED.

    Raises UserError where more than 1% are unreadable, or where one does not fit the channels.
    """
    indices = np.unique(np.linspace(0, len(dataset) - 1, min(len(dataset), MAX_CHECKED)).astype(int))

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


class _Stream(Dataset):
    """Position in the endless order -> image. Position g is in epoch g // N, and a function of (seed, epoch)."""

    def __init__(
        self, dataset: ImageDataset, seed: int, shuffle: bool, random_flip: bool, label_drop: float, skip: Sequence[int]
    ):
        self.dataset = dataset
        self.seed, self.shuffle, self.random_flip, self.label_drop = seed, shuffle, random_flip, label_drop
        self.usable = np.setdiff1d(np.arange(len(dataset)), np.array(skip, dtype=int))
        self.epoch, self.order = -1, self.usable
        self.unreadable: set[int] = set()

    def __getitem__(self, position: int):
        epoch, place = divmod(position, len(self.usable))
        if self.shuffle and epoch != self.epoch:
            self.epoch, self.order = epoch, np.random.default_rng((self.seed, epoch)).permutation(self.usable)
        try:
            array, out = self._readable(place)
        except UserError as error:
            return error  # raised in a worker it would arrive wrapped in the worker's traceback
        if self.random_flip and np.random.default_rng((self.seed, epoch, place)).random() < 0.5:
            array = np.ascontiguousarray(array[:, :, ::-1])
        if self.label_drop and np.random.default_rng((self.seed, epoch, place, 1)).random() < self.label_drop:
            out = {**out, "y": np.array(NULL_LABEL, dtype=np.int64)}
        return array, out

    def _readable(self, place: int):
        """The image at a place of the order; the next one's where it turns out to be unreadable, up to 1%."""
        while True:
            i = int(self.order[place % len(self.order)])
            try:
                return self.dataset[i]
            except UnreadableImage as error:
                known = i in self.unreadable
                self.unreadable.add(i)
                if len(self.unreadable) > MAX_UNREADABLE * len(self.dataset):
                    raise
                if not known:
                    warnings.warn(f"{error}; another image takes its place", stacklevel=1)
                place += 1


def _collate(samples: list[Any]) -> Any:
    """A batch, or the first error among its images."""
    return next((s for s in samples if isinstance(s, UserError)), None) or default_collate(samples)


class _Positions:
    """The positions of one rank's batches, from a step on: of each step's, every world_size-th from its rank."""

    def __init__(self, first_step: int, batch_size: int, rank: int, world_size: int):
        self.first_step, self.batch_size, self.rank, self.world_size = first_step, batch_size, rank, world_size

    def __iter__(self):
        total = self.batch_size * self.world_size
        start = self.first_step * total
        while True:
            yield list(range(start + self.rank, start + total, self.world_size))
            start += total


class BatchStream:
    """An endless iterator of (float32 [batch_size, C, H, W], dict of int64 "y" [batch_size] where there are classes).

    `seek(step)` moves it to the batch that step `step` of a run takes.
    :param label_drop: the share of images that come without their class, as NULL_LABEL.
    Raises UserError where a rank's share is smaller than its batch.
    """

    def __init__(
        self,
        dataset: ImageDataset,
        batch_size: int,
        *,
        class_names: Sequence[str] | None = None,
        seed: int = 0,
        shuffle: bool = True,
        random_flip: bool = False,
        label_drop: float = 0.0,
        num_workers: int = 1,
        check: bool = True,
    ):
        if label_drop and dataset.local_classes is None:
            raise ValueError("label_drop hides classes, of which there are none")
        self.class_names = class_names
        self.batch_size = batch_size
        self.num_workers = num_workers
        self.rank, self.world_size = dist_util.get_rank(), dist_util.get_world_size()
        share = len(dataset) // self.world_size
        if share < batch_size:
            raise UserError(
                f"--batch_size {batch_size} is more than the {share} images that each of {self.world_size} ranks gets "
                f"of {len(dataset)}: lower it" + (", or run fewer ranks" if self.world_size > 1 else "")
            )
        self.skipped = dist_util.from_rank0(check_images, dataset) if check else []
        self.stream = _Stream(dataset, seed, shuffle, random_flip, label_drop, self.skipped)
        self.num_images = len(self.stream.usable)
        self.batches: Iterator[Any] | None = None
        self.first_step = 0

    def seek(self, step: int) -> None:
        """Go on with the batch of step `step`."""
        self.first_step, self.batches = step, None

    def close(self) -> None:
        """End the processes that read images; the next batch would start them again."""
        workers = getattr(self.batches, "_workers", [])
        self.batches = None  # which lets them end by themselves
        for worker in workers:
            if worker.is_alive():  # it is stuck, and ignores SIGTERM
                worker.kill()

    def __iter__(self) -> BatchStream:
        return self

    def __next__(self):
        if self.batches is None:
            self.batches = iter(DataLoader(
                self.stream,
                batch_sampler=_Positions(self.first_step, self.batch_size, self.rank, self.world_size),
                num_workers=self.num_workers,
                collate_fn=_collate,
                pin_memory=th.cuda.is_available(),
                # The workers draw nothing at random, and the training's generators must not be advanced.
                generator=th.Generator(),
                worker_init_fn=_start_worker if self.num_workers else None,
            ))  # fmt: skip
        batch = next(self.batches)
        if isinstance(batch, UserError):
            raise batch
        return batch

    def skipped_names(self) -> list[str]:
        """The unreadable images that are left out."""
        return [self.stream.dataset.source.describe(i) for i in self.skipped]


def _start_worker(worker: int) -> None:
    th.set_num_threads(1)
    # What stops a run, often sent to all of its processes, is for the training to act on; it then ends its workers.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)


def load_data(*, data_dir, batch_size, image_size, class_cond=False, deterministic=False, channels=3, labels="prefix",
              random_flip=False, num_workers=1, seed=0):  # fmt: skip
    """An endless stream of (images, kwargs) batches of this rank's share; see BatchStream.

    :param data_dir: a folder, a .zip or an .npz; a local path or a URL that blobfile reads.
    :param batch_size: images in a batch, on each rank.
    :param image_size: the side in pixels, or (height, width), that images are resized and cropped to.
    :param class_cond: put the classes' indices under "y".
    :param deterministic: keep the order on disk instead of shuffling.
    """
    source = open_images(data_dir)
    classes, class_names = read_classes(source, labels, data_dir) if class_cond else (None, None)
    dataset = ImageDataset(image_size, source, classes, channels=channels)
    return BatchStream(dataset, batch_size, class_names=class_names, seed=seed, shuffle=not deterministic,
                       random_flip=random_flip, num_workers=num_workers)  # fmt: skip
