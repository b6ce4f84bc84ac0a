"""Sets of images as their features: extracted by all ranks, described so that two of them can be told comparable."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from .. import distributed
from ..config import UserError, height_width
from ..data.dataset import ImageDataset, quiet, selection
from ..data.sources import ZipImages, open_images
from ..logs.progress import Progress
from ..utils import files, images
from .feature_network import FeatureNetwork, Outputs
from .metrics.frechet import Moments, RunningMoments, moments

MIN_IMAGES = 40  # below, no error of a metric can be told
MAX_PAIRED = 50_000  # images that are compared with each of as many others: what published scores take


class ImageSet:
    """The images of a folder, a zip or an npz, all of one size and as many channels: uint8 [H, W, C] by index.

    :param resize: a size to resize and centre-crop to, as training does; "": they must have one size.
    :param colour: whether grey images are taken for coloured ones.
    :param count: how many to take, a fixed `selection`; 0: all.
    Raises UserError for too few images, and, when it is read, for one that does not fit the others.
    """

    def __init__(self, path: str, flag: str, resize: str = "", colour: bool = False, count: int = 0):
        self.path, self.flag, self.resized = path, flag, bool(resize)
        self.changed = False  # whether an image that was read had another size
        self.source = open_images(path, flag)
        if count > len(self.source):
            raise UserError(f"--num_samples {count}: {flag} {path} has {len(self.source)} images")
        self.count = count or len(self.source)
        self.chosen = selection(len(self.source), self.count)
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
        if image.size[::-1] != self.size:
            if not self.resized:
                raise UserError(
                    f"{name} is {by(image.size[::-1])}, but the first image of {self.flag} {self.path} is "
                    f"{by(self.size)}: give --resize, such as --resize 64, to resize and centre-crop all as training "
                    "does"
                )
            self.changed = True
            image = images.resize_crop(image, self.size)
        mode = images.native_mode(image)
        if mode in ("LA", "RGBA"):
            raise UserError(f"{name} has an alpha channel, which features cannot take: convert the images to RGB")
        if mode == "RGB" and self.channels == 1 and image.mode[0] not in "IF":  # of more than 8 bits
            raise UserError(
                f"{name} is in colour, but the first image of {self.flag} {self.path} is grey: give --colour True to "
                "take all for coloured ones"
            )
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
            "image_size": by(self.size),
            "channels": self.channels,
            "lossy_files": self.lossy,
        }


def by(size: Sequence[int]) -> str:
    """(height, width) as text, such as 48x64."""
    return "x".join(map(str, size))


@dataclass
class FeatureSet:
    """What the network says of a set of images, on rank 0; and what the set is.

    `features` is None for published statistics, of which there are moments alone.
    """

    flag: str
    about: dict[str, Any]
    features: np.ndarray | None = None  # float32 [n, D] of the images `numbers`
    probabilities: np.ndarray | None = None  # [n, C]
    moments: Moments | None = None  # of all images
    spatial_moments: Moments | None = None
    images: ImageSet | None = None
    numbers: np.ndarray | None = None  # [n], rising, of all images or of a selection
    digests: frozenset[bytes] = frozenset()  # of the pixels of each image

    @property
    def name(self) -> str:
        """What messages call it."""
        return f"{self.flag} {self.about.get('file') or self.about['images']}"

    @property
    def count(self) -> int | None:
        """How many images it is of, where that is known."""
        return self.about.get("count")

    def take(self, rows: Sequence[int]) -> np.ndarray:
        """The images uint8 [len(rows), H, W, C] of these rows of the features."""
        assert self.images is not None and self.numbers is not None
        return self.images.take(self.numbers[rows].tolist())

    def subset(self, count: int) -> FeatureSet:
        """A fixed `selection` of as many of the images; all where there are no more."""
        assert self.features is not None
        if count >= len(self.features):
            return self
        rows = selection(len(self.features), count)
        probabilities = None if self.probabilities is None else self.probabilities[rows]
        about = {**self.about, "count": count}
        return FeatureSet(self.flag, about, self.features[rows], probabilities, moments(self.features[rows]))


class _Part(NamedTuple):
    """What comes of a batch."""

    outputs: Outputs
    digests: list[bytes]  # of each image's pixels
    resized: bool  # whether any image so far had another size


def extract(
    images: ImageSet, network: FeatureNetwork, batch_size: int, title: str, probabilities: bool = False
) -> FeatureSet:
    """The features of every image, shared among the ranks, and their moments, on rank 0. Collective.

    Batches are the same on any number of ranks, and so is the result. Of more than MAX_PAIRED images the moments are of
    all, the features of a fixed `selection`.
    """
    rank, world_size = distributed.get_rank(), distributed.get_world_size()
    batches = [range(i, min(i + batch_size, len(images))) for i in range(0, len(images), batch_size)]
    collected = _Collected(selection(len(images), MAX_PAIRED))
    bar = Progress(title, len(images), "image")
    with closing(bar):
        mine = images.batches(batches[rank::world_size])
        for start in range(0, len(batches), world_size):
            now = batches[start : start + world_size]
            own = _judge(next(mine), images, network, probabilities) if rank < len(now) else None
            for batch, part in zip(now, distributed.all_gather_object(own)):
                if rank == 0:
                    collected.add(batch, part)
            bar.update(sum(map(len, now)))
    about = {**images.describe(), **network.describe()}
    return FeatureSet(images.flag, about, images=images) if rank else collected.result(about, images)


def _judge(batch: np.ndarray, images: ImageSet, network: FeatureNetwork, probabilities: bool) -> _Part:
    digests = [hashlib.sha256(image.tobytes()).digest() for image in batch]
    return _Part(network(batch, probabilities), digests, images.changed)


class _Collected:
    """The parts of a set's features, in the order of its images."""

    def __init__(self, numbers: np.ndarray):
        self.numbers = numbers
        self.moments, self.spatial = RunningMoments(), RunningMoments()
        self.features: list[np.ndarray] = []
        self.probabilities: list[np.ndarray] = []
        self.checksum, self.resized = hashlib.sha256(), False
        self.digests: set[bytes] = set()

    def add(self, batch: range, part: _Part) -> None:
        features, spatial, probabilities = part.outputs
        self.moments.add(features)
        if spatial is not None:
            self.spatial.add(spatial)
        rows = self.numbers[slice(*np.searchsorted(self.numbers, (batch.start, batch.stop)))] - batch.start
        self.features.append(features[rows])
        if probabilities is not None:
            self.probabilities.append(probabilities[rows])
        self.checksum.update(b"".join(part.digests))
        self.digests.update(part.digests)
        self.resized |= part.resized

    def result(self, about: dict[str, Any], images: ImageSet) -> FeatureSet:
        about |= {"prepared": "resized and centre-cropped" if self.resized else "as they are"}
        about |= {"pixels_sha256": self.checksum.hexdigest()}
        if len(self.numbers) < len(images):
            about |= {"compared_in_pairs": len(self.numbers)}
        return FeatureSet(
            images.flag, about, np.concatenate(self.features),
            np.concatenate(self.probabilities) if self.probabilities else None, self.moments.result(),
            self.spatial.result() if self.spatial.count else None, images, self.numbers, frozenset(self.digests),
        )  # fmt: skip
