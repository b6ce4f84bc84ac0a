"""Images on disk -> a seekable, sharded, endless stream of batches.

The order is a function of (seed, epoch): batch k of a run takes the same images on any number of ranks, and the
position in the stream follows from the step.
"""

from __future__ import annotations

import io
import json
import os
import warnings
import weakref
import zipfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

import numpy as np
import torch as th
from PIL import Image
from torch.utils.data import DataLoader, Dataset, default_collate

from . import dist_util, files, images
from .config import UserError, height_width

MAX_CHECKED = 10_000  # images read before training starts; beyond, an even selection of so many
MAX_CLASSES = 100_000  # a larger label is a mistake, and would make an embedding of that many rows
MAX_CACHED_BYTES = 2**28  # data sets that are smaller once resized stay in memory, in each process that reads them
MAX_UNREADABLE = 0.01  # the share of unreadable images that is skipped


class FolderImages:
    """The images below a folder, local or on blob storage."""

    def __init__(self, root: str, paths: Sequence[str] | None = None):
        self.root = root
        self.paths = list(_list_recursively(root) if paths is None else paths)

    def __len__(self) -> int:
        return len(self.paths)

    def name(self, i: int) -> str:
        """The image's path below the folder."""
        return self.paths[i][len(self.root) :].lstrip("/\\") if self.root else self.paths[i]

    def describe(self, i: int) -> str:
        """The image's full name, for messages."""
        return self.paths[i]

    def read(self, i: int) -> Image.Image:
        """The decoded image."""
        with files.open_read(self.paths[i]) as f:
            image = Image.open(f)
            image.load()
        return image


class ZipImages:
    """The images in a zip archive."""

    def __init__(self, path: str):
        self.path = path
        try:
            members = [
                n for n in self._archive().namelist() if images.is_image_name(n) and not n.startswith("__MACOSX/")
            ]
        except zipfile.BadZipFile as error:
            raise UserError(f"--data_dir {path} is not a readable zip: {error}") from None
        self.members = sorted(members, key=lambda name: name.split("/"))

    def _archive(self) -> zipfile.ZipFile:
        return _open_zip(self.path, os.getpid())

    def __len__(self) -> int:
        return len(self.members)

    def name(self, i: int) -> str:
        return self.members[i]

    def describe(self, i: int) -> str:
        return f"{self.path}:{self.members[i]}"

    def read(self, i: int) -> Image.Image:
        image = Image.open(io.BytesIO(self._archive().read(self.members[i])))
        image.load()
        return image


@lru_cache(maxsize=4)
def _open_zip(path: str, pid: int) -> zipfile.ZipFile:
    # One handle a process: workers that share one would read from each other's positions.
    f = files.open_read(path)
    try:
        archive = zipfile.ZipFile(f)
    except BaseException:
        f.close()
        raise
    weakref.finalize(archive, f.close)  # a ZipFile does not close what it was handed
    return archive


class ArrayImages:
    """The images of an npz: arr_0 uint8 [N, H, W, C], and perhaps their labels, arr_1."""

    def __init__(self, path: str):
        self.path = path
        arrays = images.load_npz(path)
        self.arrays, self.labels = arrays["arr_0"], arrays.get("arr_1")

    def __len__(self) -> int:
        return len(self.arrays)

    def name(self, i: int) -> str:
        return str(i)

    def describe(self, i: int) -> str:
        return f"{self.path}[{i}]"

    def read(self, i: int) -> Image.Image:
        return images.to_image(self.arrays[i])


def _list_recursively(directory: str) -> Iterator[str]:
    """Image paths, the entries of each directory in sorted order, a subdirectory entered where it stands."""
    for entry in files.list_dir(directory):
        path = files.join(directory, entry)
        if images.is_image_name(entry):
            yield path
        elif files.is_dir(path):
            yield from _list_recursively(path)


def open_images(data_dir: str, what: str = "--data_dir") -> Any:
    """The images of a folder, a .zip or an .npz. Raises UserError where there are none."""
    if not data_dir:
        raise UserError(f"{what} is missing: name a folder of images, a .zip or an .npz")
    if not files.exists(data_dir):
        raise UserError(f"{what} {data_dir} does not exist")
    lower = data_dir.lower()
    found: Any
    if lower.endswith(".zip"):
        found = ZipImages(data_dir)
    elif lower.endswith(".npz"):
        found = ArrayImages(data_dir)
    elif files.is_dir(data_dir):
        found = FolderImages(data_dir)
    else:
        raise UserError(f"{what} {data_dir} is neither a folder nor a .zip nor an .npz")
    if not len(found):
        raise UserError(f"{what} {data_dir} holds no images ({', '.join(images.EXTENSIONS)})")
    return found


def read_classes(source: Any, labels: str, data_dir: str) -> tuple[list[int], list[str]]:
    """(the class index of each image, the classes' names). `labels` is prefix, folder or the path of a JSON file.

    Raises UserError where the images have no classes of that kind.
    """
    if isinstance(source, ArrayImages):
        if source.labels is None:
            raise UserError(f"{data_dir} has no arr_1, so its images have no classes: leave --class_cond out")
        return _index_classes([int(y) for y in source.labels], data_dir)
    names = [source.name(i).replace("\\", "/") for i in range(len(source))]
    if labels == "prefix":
        found: list[Any] = [name.split("/")[-1].split("_")[0] for name in names]
    elif labels == "folder":
        found = [name.rpartition("/")[0] for name in names]
        if "" in found:
            raise UserError(f"--labels folder: {names[found.index('')]} lies in no folder below {data_dir}")
    else:
        table = _read_label_file(labels)
        missing = [name for name in names if name not in table]
        if missing:
            raise UserError(
                f"--labels {labels} has no label for {missing[0]} and {len(missing) - 1} more of {len(names)} images"
            )
        found = [table[name] for name in names]
    if len(set(found)) == len(found) > 1:
        raise UserError(
            f"--class_cond True with --labels {labels}: each of the {len(found)} images in {data_dir} would be a class "
            "of its own; name the files class_number.png, or use --labels folder or a JSON file, or drop --class_cond"
        )
    return _index_classes(found, labels)


def _index_classes(found: list[Any], where: str) -> tuple[list[int], list[str]]:
    if all(isinstance(label, int) for label in found):
        if min(found) < 0:
            raise UserError(f"the labels in {where} must not be negative, found {min(found)}: number them from 0")
        if max(found) >= MAX_CLASSES:
            raise UserError(f"the labels in {where} go up to {max(found)}: number the classes from 0, without gaps")
        return found, [str(i) for i in range(max(found) + 1)]
    names = sorted({str(label) for label in found})
    index = {name: i for i, name in enumerate(names)}
    return [index[str(label)] for label in found], names


def _read_label_file(path: str) -> dict[str, Any]:
    """Path -> class name or index, of a JSON object, or a list of pairs, alone or under "labels"."""
    try:
        content = json.loads(files.read_bytes(path))
        if isinstance(content, dict) and "labels" in content:
            content = content["labels"]
        table = dict(content)
    except (ValueError, TypeError):
        raise UserError(
            f'--labels {path}: expected JSON such as {{"cat/001.png": "cat"}} or [["001.png", 3]]'
        ) from None
    for name, label in table.items():
        if isinstance(label, bool) or not isinstance(label, (int, str)):
            raise UserError(f"--labels {path}: the label of {name} must be a name or an integer, not {label!r}")
    return table


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
        with _quiet():
            return self.decode(idx)

    def decode(self, idx: int) -> Image.Image:
        """`read` with the warnings that Pillow gives."""
        i = self.local_indices[idx]
        try:
            return self.source.read(i)
        except (OSError, SyntaxError, ValueError, zipfile.BadZipFile, Image.DecompressionBombError) as error:
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


@contextmanager
def _quiet() -> Iterator[None]:
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
    with _quiet(), ThreadPoolExecutor(threads) as pool:
        problems = {int(i): p for i, p in zip(indices, pool.map(problem, indices)) if p}
    if len(problems) > MAX_UNREADABLE * len(indices):
        first = "; ".join(list(problems.values())[:3])
        raise UserError(
            f"{len(problems)} of {len(indices)} images are unreadable, more than 1%: {first}: repair or remove them"
        )
    return list(problems)


class _Stream(Dataset):
    """Position in the endless order -> image. Position g is in epoch g // N, and a function of (seed, epoch)."""

    def __init__(self, dataset: ImageDataset, seed: int, shuffle: bool, random_flip: bool, skip: Sequence[int]):
        self.dataset = dataset
        self.seed, self.shuffle, self.random_flip = seed, shuffle, random_flip
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
        num_workers: int = 1,
        check: bool = True,
    ):
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
        self.stream = _Stream(dataset, seed, shuffle, random_flip, self.skipped)
        self.num_images = len(self.stream.usable)
        self.batches: Iterator[Any] | None = None
        self.first_step = 0

    def seek(self, step: int) -> None:
        """Go on with the batch of step `step`."""
        self.first_step, self.batches = step, None

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
                worker_init_fn=_one_thread if self.num_workers else None,
            ))  # fmt: skip
        batch = next(self.batches)
        if isinstance(batch, UserError):
            raise batch
        return batch

    def skipped_names(self) -> list[str]:
        """The unreadable images that are left out."""
        return [self.stream.dataset.source.describe(i) for i in self.skipped]


def _one_thread(worker: int) -> None:
    th.set_num_threads(1)


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
