"""An endless, seekable stream of batches, sharded over the ranks."""

from __future__ import annotations

import math
import time
import weakref
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch as th
from torch.utils.data import Dataset

from .. import distributed
from ..config import ReadingConfig, UserError
from ..logs import logger
from ..nn import NULL_LABEL
from ..utils.text import counted
from .cache import use_cache
from .classes import read_classes
from .dataset import Check, ImageDataset, check_images, max_unreadable
from .draws import uniform_in_order
from .pixels import to_model_range
from .sources import open_images
from .workers import BatchReader, check_workers, workers_for_cores

PAUSES = (0.1, 1.0)  # seconds before reading a file again that storage did not give


class Batch(NamedTuple):
    """What the stream yields, and what could not be used for it."""

    images: th.Tensor  # [N, C, H, W]
    kwargs: dict[str, th.Tensor]
    failed: dict[int, str]  # index of an image -> why another one is in its place


class _Stream(Dataset):
    """Positions in the endless order -> batch. Position g is in epoch g // N, whose order depends on (seed, epoch)."""

    def __init__(
        self, dataset: ImageDataset, seed: int, shuffle: bool, random_flip: bool, label_drop: float,
        skip: Sequence[int], as_bytes: bool,
    ):  # fmt: skip
        self.dataset = dataset
        self.seed, self.shuffle, self.random_flip, self.label_drop = seed, shuffle, random_flip, label_drop
        self.as_bytes = as_bytes
        self.usable = np.setdiff1d(np.arange(len(dataset)), np.array(skip, dtype=int))
        self.classes = None if dataset.local_classes is None else np.array(dataset.local_classes, dtype=np.int64)
        self.epoch, self.order = -1, self.usable
        self.failed: dict[int, str] = {}  # images that could not be used: index -> why

    def __getitems__(self, positions: Sequence[int]) -> Batch | UserError:
        """The batch at these ascending positions. An error is returned: raised in a worker, it would be wrapped in the
        worker's traceback."""
        epochs, places = np.divmod(np.asarray(positions), len(self.usable))
        try:
            rows, indices, failed = self._images(epochs, places)
        except UserError as error:
            return error
        if self.random_flip:
            _mirror(rows, np.flatnonzero(self._draw(epochs, places) < 0.5))
        images = th.from_numpy(rows).permute(0, 3, 1, 2)
        kwargs = {}
        if self.classes is not None:
            labels = self.classes[indices]
            if self.label_drop:
                labels[self._draw(epochs, places, 1) < self.label_drop] = NULL_LABEL
            kwargs["y"] = th.from_numpy(labels)
        return Batch(images if self.as_bytes else to_model_range(images, "cpu"), kwargs, failed)

    def _draw(self, epochs: np.ndarray, places: np.ndarray, *more: int) -> np.ndarray:
        """A number in [0, 1) for each place: that of np.random.default_rng((seed, epoch, place, *more))."""
        drawn = np.empty(len(places))
        for epoch, mine in _by_epoch(epochs):
            drawn[mine] = uniform_in_order((self.seed, epoch), places[mine], *more)
        return drawn

    def _images(self, epochs: np.ndarray, places: np.ndarray) -> tuple[np.ndarray, np.ndarray, dict[int, str]]:
        """(images uint8 [N, H, W, C], their indices, what could not be used for them)."""
        indices = np.empty(len(places), dtype=np.int64)
        for epoch, mine in _by_epoch(epochs):
            indices[mine] = self._order_of(epoch)[places[mine]]
        store = self.dataset.store
        if self.dataset.reading.resize_mode != "random_crop" and store is not None and store.holds(indices):
            return store.rows[indices], indices, {}
        rows = np.empty((len(places), *self.dataset.shape[1:]), np.uint8)
        failed: dict[int, str] = {}
        for n, (epoch, place) in enumerate(zip(epochs.tolist(), places.tolist())):
            rows[n], indices[n] = self._fitting(epoch, place, failed)
        return rows, indices, failed

    def _order_of(self, epoch: int) -> np.ndarray:
        """The indices of an epoch's images, in its order."""
        if self.shuffle and epoch != self.epoch:
            self.epoch, self.order = epoch, np.random.default_rng((self.seed, epoch)).permutation(self.usable)
        return self.order

    def _fitting(self, epoch: int, place: int, failed: dict[int, str]) -> tuple[np.ndarray, int]:
        """(the image at a place of the order, its index); instead of one that cannot be used, the next one.

        :param failed: gets what could not be used: index -> why.
        """
        key, order, pauses = (self.seed, epoch, place, 2), self._order_of(epoch), list(PAUSES)
        while True:
            i = int(order[place % len(order)])
            try:
                return self.dataset.pixels(i, key), i
            except UserError as error:
                if pauses and i not in self.failed and _is_of_storage(error):
                    time.sleep(pauses.pop(0))
                    continue
                failed[i] = self.failed[i] = str(error)
                _check_number(self.failed, len(self.dataset))
                place += 1


def _by_epoch(epochs: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
    """(epoch, which positions are in it) of each epoch: most batches have one."""
    return ((epoch, epochs == epoch) for epoch in dict.fromkeys(epochs.tolist()))


def _mirror(rows: np.ndarray, which: np.ndarray) -> None:
    """Mirror some of uint8 [N, H, W, C] left to right, in place."""
    # torch has a fast path for this layout, numpy has none.
    flipped = th.from_numpy(rows[which]).permute(0, 3, 1, 2).flip(3)
    rows[which] = flipped.permute(0, 2, 3, 1).numpy()


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


def _as_it_is(batch: Any) -> Any:
    return batch


def _positions(batch_size: int, rank: int, world_size: int, step: int) -> list[int]:
    """The positions of one rank's batch: every world_size-th position of the step."""
    total = batch_size * world_size
    return list(range(step * total + rank, (step + 1) * total, world_size))


class BatchStream:
    """An endless iterator of (float32 [batch_size, C, H, W], dict of int64 "y" [batch_size] where there are classes).

    `seek(step)` moves it to the batch that step `step` of a run takes.
    :param label_drop: the fraction of images whose class is replaced by NULL_LABEL.
    :param num_workers: processes that read ahead; 0: read in this one; "auto": as many as the machine has cores for, 0
        where the images are in memory or in a packed cache.
    :param as_bytes: yield images as uint8, which pixels.to_model_range turns into float32.
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
        num_workers: int | str = 1,
        check: bool = True,
        as_bytes: bool = False,
    ):
        if label_drop and dataset.local_classes is None:
            raise ValueError("label_drop needs a data set with classes")
        check_workers(num_workers)
        self.class_names = class_names
        self.batch_size = batch_size
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
        self.stream = _Stream(dataset, seed, shuffle, random_flip, label_drop, self.checked.unreadable, as_bytes)
        self.num_images = len(self.stream.usable)
        self.failed: dict[int, str] = {}  # images that could not be used since: index -> why
        positions = partial(_positions, batch_size, self.rank, self.world_size)
        if isinstance(num_workers, str):
            ready = dataset.store is not None and dataset.store.holds(self.stream.usable)
            num_workers = 0 if ready else workers_for_cores()
        self.num_workers = num_workers
        batch_bytes = (1 if as_bytes else 4) * batch_size * dataset.channels * math.prod(dataset.resolution)
        self.reader = BatchReader(self.stream, positions, _as_it_is, num_workers, batch_bytes)
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
              random_flip=False, num_workers=1, seed=0, reading=None, cache="off"):  # fmt: skip
    """An endless stream of (images, kwargs) batches of this rank's share; see BatchStream.

    :param data_dir: a folder, a .zip or an .npz; a local path or a URL that blobfile reads.
    :param batch_size: images in a batch, on each rank.
    :param image_size: the side in pixels, or (height, width), that images are resized and cropped to.
    :param class_cond: put the classes' indices under "y".
    :param deterministic: keep the order on disk instead of shuffling.
    :param reading: how image files become pixels, a ReadingConfig.
    :param cache: where the resized images are packed, as --cache: a folder, auto or off.
    """
    source = open_images(data_dir)
    classes, class_names = read_classes(source, labels, data_dir) if class_cond else (None, None)
    dataset = ImageDataset(image_size, source, classes, channels=channels, reading=reading or ReadingConfig())
    use_cache(dataset, cache, data_dir)
    return BatchStream(dataset, batch_size, class_names=class_names, seed=seed, shuffle=not deterministic,
                       random_flip=random_flip, num_workers=num_workers)  # fmt: skip
