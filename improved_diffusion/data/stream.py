"""An endless, seekable stream of batches, sharded over the ranks."""

from __future__ import annotations

import signal
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch as th
from torch.utils.data import DataLoader, Dataset, default_collate

from .. import distributed
from ..config import ReadingConfig, UserError
from ..nn import NULL_LABEL
from .classes import read_classes
from .dataset import Check, ImageDataset, UnreadableImage, check_images, max_unreadable
from .sources import open_images


class _Stream(Dataset):
    """Position in the endless order -> image. Position g lies in epoch g // N, whose order depends on (seed, epoch)."""

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
            array, out = self._readable(place, key=(self.seed, epoch, place, 2))
        except UserError as error:
            return error  # raised in a worker, it would be wrapped in the worker's traceback
        if self.random_flip and np.random.default_rng((self.seed, epoch, place)).random() < 0.5:
            array = np.ascontiguousarray(array[:, :, ::-1])
        if self.label_drop and np.random.default_rng((self.seed, epoch, place, 1)).random() < self.label_drop:
            out = {**out, "y": np.array(NULL_LABEL, dtype=np.int64)}
        return array, out

    def _readable(self, place: int, key: Sequence[int]):
        """The image at a place of the order; the next one if it is unreadable, for a few of the images."""
        while True:
            i = int(self.order[place % len(self.order)])
            try:
                return self.dataset.sample(i, key)
            except UnreadableImage as error:
                known = i in self.unreadable
                self.unreadable.add(i)
                if len(self.unreadable) > max_unreadable(len(self.dataset)):
                    raise
                if not known:
                    warnings.warn(f"{error}; another image is used instead", stacklevel=1)
                place += 1


def _collate(samples: list[Any]) -> Any:
    """A batch, or the first error among its images."""
    return next((s for s in samples if isinstance(s, UserError)), None) or default_collate(samples)


class _Positions:
    """The positions of one rank's batches from a step on: every world_size-th position of each step."""

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
        self.class_names = class_names
        self.batch_size = batch_size
        self.num_workers = num_workers
        self.rank, self.world_size = distributed.get_rank(), distributed.get_world_size()
        share = len(dataset) // self.world_size
        if share < batch_size:
            raise UserError(
                f"--batch_size {batch_size} is more than the {share} images that each of {self.world_size} ranks gets "
                f"of {len(dataset)}: lower it" + (", or run fewer ranks" if self.world_size > 1 else "")
            )
        self.checked: Check = distributed.from_rank0(check_images, dataset) if check else Check([], {}, 0)
        self.stream = _Stream(dataset, seed, shuffle, random_flip, label_drop, self.checked.unreadable)
        self.num_images = len(self.stream.usable)
        self.batches: Iterator[Any] | None = None
        self.first_step = 0

    def seek(self, step: int) -> None:
        """Continue with the batch of step `step`."""
        self.first_step, self.batches = step, None

    def close(self) -> None:
        """End the worker processes; the next batch would start them again."""
        workers = getattr(self.batches, "_workers", [])
        self.batches = None  # lets them end by themselves
        for worker in workers:
            if worker.is_alive():  # it hangs and ignores SIGTERM
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
                pin_memory=distributed.pins_memory(distributed.dev()),
                # The workers draw nothing at random; the generators of training must not advance.
                generator=th.Generator(),
                worker_init_fn=_start_worker if self.num_workers else None,
            ))  # fmt: skip
        batch = next(self.batches)
        if isinstance(batch, UserError):
            raise batch
        return batch

    @property
    def seen_classes(self) -> list[int]:
        """The indices of the classes that have images, sorted; [] where there are no classes."""
        return sorted(set(self.stream.dataset.local_classes or ()))

    def skipped_names(self) -> list[str]:
        """The names of the unreadable images that are skipped."""
        return [self.stream.dataset.name(i) for i in self.checked.unreadable]


def _start_worker(worker: int) -> None:
    th.set_num_threads(1)
    # Stop signals often go to all processes of a run. The training process acts on them and ends its workers.
    for name in ("SIGINT", "SIGTERM", "SIGUSR1"):
        if hasattr(signal, name):  # Windows has no SIGUSR1
            signal.signal(getattr(signal, name), signal.SIG_IGN)


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
