"""Sets of images as their features: extracted by all ranks, described so that two of them can be told comparable."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from typing import Any

import numpy as np

from . import dist_util, files, images, logger
from .config import UserError, height_width
from .evaluation.features import FeatureNetwork, Outputs
from .evaluation.frechet import Moments, moments
from .image_datasets import ImageDataset, quiet
from .image_sources import ZipImages, open_images

MIN_IMAGES = 40  # below, no error of a metric can be told


class ImageSet:
    """The images of a folder, a zip or an npz, all of one size and as many channels: uint8 [H, W, C] by index.

    :param resize: a size to resize and centre-crop to, as training does; "": they must have one size.
    :param colour: whether grey images are taken for coloured ones.
    :param count: how many to take, evenly from all, as files may be in the order of their classes; 0: all.
    Raises UserError for too few images, and, when it is read, for one that does not fit the others.
    """

    def __init__(self, path: str, flag: str, resize: str = "", colour: bool = False, count: int = 0):
        self.path, self.flag, self.resized = path, flag, bool(resize)
        self.source = open_images(path, flag)
        if count > len(self.source):
            raise UserError(f"--num_samples {count}: {flag} {path} has {len(self.source)} images")
        self.count = count or len(self.source)
        self.chosen = np.linspace(0, len(self.source) - 1, self.count).round().astype(int)
        if self.count < MIN_IMAGES:
            plural = "s" * (self.count > 1)
            too_few = f"--num_samples {count}" if count else f"{flag} {path} has {self.count} image{plural}"
            raise UserError(
                f"{too_few}: at least {MIN_IMAGES} are needed to tell anything, and 10,000 for numbers to be published"
            )
        first = ImageDataset(1, self.source).read(0)
        self.size = height_width(resize) if resize else first.size[::-1]
        self.channels = 3 if colour or images.native_mode(first) not in ("L", "LA") else 1
        self.dataset = ImageDataset(self.size, self.source, channels=self.channels)
        # Compression alone moves the scores (Parmar et al. 2022, sec. 4).
        self.lossy = any(self.source.name(i).lower().endswith((".jpg", ".jpeg")) for i in self.chosen)

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, i: int) -> np.ndarray:
        at = int(self.chosen[i])
        image, name = self.dataset.decode(at), self.source.describe(at)
        if self.resized:
            image = images.resize_crop(image, self.size)
        elif image.size[::-1] != self.size:
            raise UserError(
                f"{name} is {_by(image.size[::-1])}, but the first image of {self.flag} {self.path} is "
                f"{_by(self.size)}: give --resize, such as --resize 64, to resize and centre-crop all as training does"
            )
        if images.native_mode(image) == "RGBA":
            raise UserError(f"{name} has an alpha channel, which features cannot take: convert the images to RGB")
        array = np.asarray(images.convert(image, self.channels, name))
        return array[..., None] if array.ndim == 2 else array

    def take(self, indices: Sequence[int]) -> np.ndarray:
        """uint8 [len(indices), H, W, C]."""
        with quiet():
            return np.stack([self[int(i)] for i in indices])

    def batches(self, batches: Sequence[Sequence[int]]) -> Iterator[np.ndarray]:
        """uint8 [n, H, W, C] of each batch, the next being read meanwhile."""
        # A zip's members are read one by one: its file has one position.
        threads = 1 if isinstance(self.source, ZipImages) else 4
        with quiet(), ThreadPoolExecutor(threads) as pool:
            ahead: list[Any] = []
            for batch in [*batches, None]:
                if batch is not None:
                    ahead.append([pool.submit(self.__getitem__, i) for i in batch])
                if len(ahead) > 1 or (batch is None and ahead):
                    yield np.stack([future.result() for future in ahead.pop(0)])

    def describe(self) -> dict[str, Any]:
        """What tells whether another set can be compared with this one."""
        return {
            "images": files.full_path(self.path),
            "count": self.count,
            "image_size": _by(self.size),
            "channels": self.channels,
            "prepared": "resized and centre-cropped" if self.resized else "as they are",
            "lossy_files": self.lossy,
        }


def _by(size: Sequence[int]) -> str:
    return "x".join(map(str, size))


@dataclass
class FeatureSet:
    """What the network says of a set of images, on rank 0; and what the set is.

    `features` is None for published statistics, of which there are moments alone.
    """

    flag: str
    about: dict[str, Any]
    features: np.ndarray | None = None  # float32 [N, D]
    probabilities: np.ndarray | None = None  # [N, C]
    moments: Moments | None = None
    spatial_moments: Moments | None = None
    images: ImageSet | None = None

    @property
    def name(self) -> str:
        """What messages call it."""
        return f"{self.flag} {self.about['images']}"

    @property
    def count(self) -> int | None:
        """How many images it is of, where that is known."""
        return self.about.get("count")


def extract(images: ImageSet, network: FeatureNetwork, batch_size: int, title: str) -> FeatureSet:
    """The features of every image, shared among the ranks, and their moments on rank 0. Collective.

    Batches are the same on any number of ranks, and so is the result.
    """
    rank, world_size = dist_util.get_rank(), dist_util.get_world_size()
    batches = [range(i, min(i + batch_size, len(images))) for i in range(0, len(images), batch_size)]
    parts: list[tuple[Outputs, list[bytes]]] = []
    bar = logger.Progress(title, len(images), "image")
    with closing(bar):
        mine = images.batches(batches[rank::world_size])
        for start in range(0, len(batches), world_size):
            now = batches[start : start + world_size]
            part = _judge(next(mine), network) if rank < len(now) else None
            parts += [part for part in dist_util.all_gather_object(part) if part is not None and rank == 0]
            bar.update(sum(map(len, now)))
    about = {**images.describe(), **network.describe()}
    if rank:
        return FeatureSet(images.flag, about, images=images)
    outputs = [part for part, _ in parts]
    digests = b"".join(digest for _, digests in parts for digest in digests)
    about["pixels_sha256"] = hashlib.sha256(digests).hexdigest()
    features, spatial, probabilities = (
        None if columns[0] is None else np.concatenate(columns) for columns in zip(*outputs)
    )
    assert features is not None
    return FeatureSet(
        images.flag, about, features, probabilities, moments(features),
        None if spatial is None else moments(spatial), images,
    )  # fmt: skip


def _judge(batch: np.ndarray, network: FeatureNetwork) -> tuple[Outputs, list[bytes]]:
    return network(batch), [hashlib.sha256(image.tobytes()).digest() for image in batch]
