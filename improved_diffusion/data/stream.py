"""An endless, seekable stream of batches, sharded over the ranks."""

from __future__ import annotations

import math
import os
import time
import weakref
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
from torch.utils.data import Dataset, default_collate

from .. import distributed
from ..config import ReadingConfig, UserError
from ..logs import logger
from ..nn import NULL_LABEL
from ..utils.text import counted
from .classes import read_classes
from .dataset import Check, ImageDataset, check_images, max_unreadable
from .sources import open_images
from .workers import BatchReader

PAUSES = (0.1, 1.0)  # seconds before reading a file again that storage did not give


class _Stream(Dataset):
    """Position in the endless order -> image. Position g lies in epoch g // N, whose order depends on (seed, epoch)."""

    def __init__(
        self, dataset: ImageDataset, seed: int, shuffle: bool, random_flip: bool, label_drop: float, skip: Sequence[int]
    ):
        self.dataset = dataset
        self.seed, self.shuffle, self.random_flip, self.label_drop = seed, shuffle, random_flip, label_drop
        self.usable = np.setdiff1d(np.arange(len(dataset)), np.array(skip, dtype=int))
        self.epoch, self.order = -1, self.usable
        self.failed: dict[int, str] = {}  # images that could not be used: index -> why

    def __getitem__(self, position: int):
        epoch, place = divmod(position, len(self.usable))
        if self.shuffle and epoch != self.epoch:
            self.epoch, self.order = epoch, np.random.default_rng((self.seed, epoch)).permutation(self.usable)
        try:
            array, out, failed = self._fitting(place, key=(self.seed, epoch, place, 2))
        except UserError as error:
            return error  # raised in a worker, it would be wrapped in the worker's traceback
        if self.random_flip and np.random.default_rng((self.seed, epoch, place)).random() < 0.5:
            array = np.ascontiguousarray(array[:, :, ::-1])
        if self.label_drop and np.random.default_rng((self.seed, epoch, place, 1)).random() < self.label_drop:
            out = {**out, "y": np.array(NULL_LABEL, dtype=np.int64)}
        return array, out, failed

    def _fitting(self, place: int, key: Sequence[int]):
        """(the image at a place of the order, its kwargs, {}); instead of an image that cannot be used, the next one,
        with why: index -> message."""
        pauses = list(PAUSES)
        failed: dict[int, str] = {}
        while True:
            i = int(self.order[place % len(self.order)])
            try:
                return *self.dataset.sample(i, key), failed
            except UserError as error:
                if pauses and i not in self.failed and _is_of_storage(error):
                    time.sleep(pauses.pop(0))
                    continue
                failed[i] = self.failed[i] = str(error)
                _check_number(self.failed, len(self.dataset))
                place += 1


def _is_of_storage(error: BaseException | None) -> bool:
    """Whether an image could not be read, rather than decoded: a network file system may have it again soon."""
    while error is not None:
        if isinstance(error, OSError) and error.errno is not None:
            return True
        error = error.__context__
    return False


def _check_number(failed: Mapping[int, str], total: int) -> None:
    if len(failed) > max_unreadable(total):
        first = "; ".join(list(failed.values())[:3])
        raise UserError(f"{len(failed)} of {total} images cannot be used any more: {first}: repair or remove them")


def _collate(samples: list[Any]) -> Any:
    """(images, kwargs, what could not be used); or the first error among the samples."""
    error = next((sample for sample in samples if isinstance(sample, UserError)), None)
    if error is not None:
        return error
    images, kwargs = default_collate([(array, out) for array, out, _ in samples])
    return images, kwargs, {i: why for *_, failed in samples for i, why in failed.items()}


def _check_workers(num_workers: Any) -> None:
    if not isinstance(num_workers, int) or num_workers < 0:
        raise UserError(f"--num_workers {num_workers!r} must be a whole number of processes, 0 or more")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if num_workers > cores:
        logger.warn(f"--num_workers {num_workers} is more than the {cores} CPU cores: more than {cores} are not faster")


def _positions(batch_size: int, rank: int, world_size: int, step: int) -> list[int]:
    """The positions of one rank's batch: every world_size-th position of the step."""
    total = batch_size * world_size
    return list(range(step * total + rank, (step + 1) * total, world_size))


class BatchStream:
    """An endless iterator of (float32 [batch_size, C, H, W], dict of int64 "y" [batch_size] where there are classes).

    `seek(step)` moves it to the batch that step `step` of a run takes.
    :param label_drop: the fraction of images whose class is replaced by NULL_LABEL.
    Raises UserError if a rank gets fewer images than its batch size.
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
            raise ValueError("label_drop needs a data set with classes")
        _check_workers(num_workers)
        self.class_names = class_names
        self.batch_size = batch_size
        self.num_workers = num_workers
        self.rank, self.world_size = distributed.get_rank(), distributed.get_world_size()
        share = len(dataset) // self.world_size
        if share < batch_size:
            if self.world_size == 1:
                images = counted(len(dataset), "image")
                raise UserError(f"--batch_size {batch_size} is more than the {images} in the data: lower it")
            raise UserError(
                f"--batch_size {batch_size} is more than the {counted(share, 'image')} that each of {self.world_size} "
                f"ranks gets of {len(dataset)}: lower it, or run fewer ranks"
            )
        self.checked: Check = distributed.from_rank0(check_images, dataset) if check else Check([], {}, 0)
        self.stream = _Stream(dataset, seed, shuffle, random_flip, label_drop, self.checked.unreadable)
        self.num_images = len(self.stream.usable)
        self.failed: dict[int, str] = {}  # images that could not be used since: index -> why
        positions = partial(_positions, batch_size, self.rank, self.world_size)
        batch_bytes = 4 * batch_size * dataset.channels * math.prod(dataset.resolution)
        self.reader = BatchReader(self.stream, positions, _collate, num_workers, batch_bytes)
        weakref.finalize(self, self.reader.close).atexit = False  # at exit the reader ends its workers by itself

    def seek(self, step: int) -> None:
        """Continue with the batch of step `step`."""
        self.reader.seek(step)

    def close(self) -> None:
        """End the worker processes; the next batch would start them again. Also done when the stream is no longer
        used, and when the program ends."""
        self.reader.close()

    def __enter__(self) -> BatchStream:
        return self

    def __exit__(self, *exc: Any) -> None:
        self.close()

    def __iter__(self) -> BatchStream:
        return self

    def __next__(self):
        batch = next(self.reader)
        if isinstance(batch, UserError):
            raise batch
        images, kwargs, failed = batch
        self._count(failed)
        return images, kwargs

    def _count(self, failed: Mapping[int, str]) -> None:
        """Warn once of each image that could not be used. Raises UserError if they are too many."""
        for i in failed.keys() - self.failed.keys():
            logger.warn(f"{failed[i]}; another image is used instead")
        self.failed.update(failed)
        _check_number(self.failed, len(self.stream.dataset))

    @property
    def seen_classes(self) -> list[int]:
        """The indices of the classes that have images, sorted; [] where there are no classes."""
        return sorted(set(self.stream.dataset.local_classes or ()))

    def skipped_names(self) -> list[str]:
        """The names of the unreadable images that are skipped."""
        return [self.stream.dataset.name(i) for i in self.checked.unreadable]


def load_data(*, data_dir, batch_size, image_size, class_cond=False, deterministic=False, channels=3, labels="prefix",
              random_flip=False, num_workers=1, seed=0, reading=None):  # fmt: skip
    """An endless stream of (images, kwargs) batches of this rank's share; see BatchStream.

    :param data_dir: a folder, a .zip or an .npz; a local path or a URL that blobfile reads.
    :param batch_size: images in a batch, on each rank.
    :param image_size: the side in pixels, or (height, width), that images are resized and cropped to.
    :param class_cond: put the classes' indices under "y".
    :param deterministic: keep the order on disk instead of shuffling.
    :param reading: how image files become pixels, a ReadingConfig.
    """
    source = open_images(data_dir)
    classes, class_names = read_classes(source, labels, data_dir) if class_cond else (None, None)
    dataset = ImageDataset(image_size, source, classes, channels=channels, reading=reading or ReadingConfig())
    return BatchStream(dataset, batch_size, class_names=class_names, seed=seed, shuffle=not deterministic,
                       random_flip=random_flip, num_workers=num_workers)  # fmt: skip
