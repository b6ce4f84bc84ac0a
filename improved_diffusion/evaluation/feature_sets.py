"""Sets of images and their features, with a description that tells whether two sets can be compared."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch as th

from .. import distributed
from ..config import ReadingConfig, UserError, height_width
from ..data.dataset import ImageDataset, quiet, selection
from ..data.sources import ArrayImages, ZipImages, open_images
from ..logs.progress import Progress
from ..utils import files, images
from ..utils.resizing import PREPARED, resize
from ..utils.text import counted
from .features import FeatureNetwork, Outputs
from .metrics.frechet import Moments, RunningMoments, moments

MIN_IMAGES = 40  # fewer do not give a metric with an error
_DEFAULT_READING = ReadingConfig()
IN_MEMORY = "(an array)"  # instead of a path
AS_THEY_ARE = "as they are"  # how images that were not resized are prepared
MAX_PAIRED = 50_000  # images in metrics that compare all pairs; published scores use as many


class Batch(NamedTuple):
    """Some images of a set."""

    images: np.ndarray  # uint8 [n, H, W, C]
    resized: bool  # whether any had another size


class ImageSet:
    """The images of a folder, a zip, an npz or an array, all of one size and channels: uint8 [H, W, C] by index.

    :param path: of the images, or an array uint8 [N, H, W, C] with 1 or 3 channels.
    :param flag: the option that names them, for messages.
    :param resize: a size to resize to, as training does; "": they must have one size.
    :param colour: treat grey images as RGB.
    :param count: how many to take, a fixed `selection`; 0: all.
    :param reading: how image files become pixels; image i of a random crop is always the same.
    Raises UserError for too few images, and when reading for an image that does not fit the others.
    """

    def __init__(
        self, path: str | np.ndarray, flag: str, resize: str = "", colour: bool = False, count: int = 0,
        reading: ReadingConfig = _DEFAULT_READING,
    ):  # fmt: skip
        self.source = _InMemory(path, flag) if isinstance(path, np.ndarray) else open_images(path, flag)
        self.path = IN_MEMORY if isinstance(path, np.ndarray) else path
        self.flag, self.resize = flag, resize
        if count > len(self.source):
            raise UserError(f"--num_samples {count}: {flag} {self.path} has {len(self.source)} images")
        self.count = count or len(self.source)
        self.indices = selection(len(self.source), self.count)
        if self.count < MIN_IMAGES:
            too_few = f"--num_samples {count}" if count else f"{flag} {self.path} has {counted(self.count, 'image')}"
            raise UserError(
                f"{too_few}: at least {MIN_IMAGES} are needed, and 10,000 for numbers that will be published"
            )
        with quiet():
            first = ImageDataset(1, self.source, reading=reading).shown(0).image
        self.size = height_width(resize) if resize else first.size[::-1]
        self.channels = 3 if colour or reading.published_decoding or first.mode not in ("L", "LA") else 1
        self.dataset = ImageDataset(self.size, self.source, channels=self.channels, reading=reading)
        # Compression alone changes the scores (Parmar et al. 2022, sec. 4).
        self.lossy = any(self.source.name(i).lower().endswith((".jpg", ".jpeg")) for i in self.indices)

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, i: int) -> np.ndarray:
        return self._read(i)[0]

    def _read(self, i: int) -> tuple[np.ndarray, bool]:
        """(the image, whether it had another size)."""
        at = int(self.indices[i])
        shown = self.dataset.shown(at)
        resized = shown.image.size[::-1] != self.size
        if resized and not self.resize:
            raise UserError(
                f"{self.dataset.name(at)} is {by(shown.image.size[::-1])}, but the first image of {self.flag} "
                f"{self.path} is {by(self.size)}: give --resize, such as --resize 64, to resize all as training does"
            )
        if self.channels == 1 and not images.is_grey(shown.image):
            raise UserError(
                f"{self.dataset.name(at)} is in colour, but the first image of {self.flag} {self.path} is grey: give "
                "--colour True to treat all as RGB"
            )
        image = images.with_channels(shown, self.channels, self.dataset.reading, self.dataset.name(at)).image
        if self.resize:
            image = resize(image, self.size, self.dataset.reading, key=(0, at))
        return images.to_array(image, self.channels), resized

    def take(self, indices: Sequence[int]) -> np.ndarray:
        """uint8 [len(indices), H, W, C]."""
        with quiet():
            return np.stack([self[int(i)] for i in indices])

    def batches(self, batches: Sequence[Sequence[int]]) -> Iterator[Batch]:
        """The images of each list of indices. Threads read the next batch meanwhile."""
        # A zip's members are read one by one: its file has one position.
        threads = 1 if isinstance(self.source, ZipImages) else 4
        with quiet(), ThreadPoolExecutor(threads) as pool:
            ahead: list[Any] = []
            for batch in [*batches, None]:
                if batch is not None:
                    ahead.append([pool.submit(self._read, i) for i in batch])
                if len(ahead) > 1 or (batch is None and ahead):
                    arrays, resized = zip(*(future.result() for future in ahead.pop(0)))
                    yield Batch(np.stack(arrays), any(resized))

    def describe(self) -> dict[str, Any]:
        """What another set must agree in to be comparable."""
        return {
            "images": self.path if self.path == IN_MEMORY else files.full_path(self.path),
            "count": self.count,
            "image_size": by(self.size),
            "channels": self.channels,
            "lossy_files": self.lossy,
        }


def check_resizing(resize: str, reading: ReadingConfig) -> None:
    """Raise UserError for a way of resizing without a size to resize to: it would change nothing."""
    if not resize and reading.resize_mode != ReadingConfig.resize_mode:
        raise UserError(
            f"--resize_mode {reading.resize_mode} says how images are resized, but without --resize they are taken as "
            "they are: give --resize, such as --resize 64, or leave it out"
        )


class _InMemory(ArrayImages):
    """Images given as an array."""

    def __init__(self, array: np.ndarray, flag: str):
        if array.dtype != np.uint8 or array.ndim != 4 or array.shape[3] not in (1, 3) or not len(array):
            raise UserError(
                f"{flag} is an array {array.dtype} {array.shape}: expected uint8 [N, H, W, C] with 1 or 3 channels"
            )
        self.path, self.arrays, self.labels = IN_MEMORY, array, None


def by(size: Sequence[int]) -> str:
    """(height, width) as text, such as 48x64."""
    return "x".join(map(str, size))


@dataclass(frozen=True)
class FeatureSet:
    """The network's outputs for a set of images, on rank 0, and a description of the set.

    `features` is None for published statistics, which have moments only.
    """

    flag: str
    about: dict[str, Any]
    features: np.ndarray | None = None  # float32 [n, D] of the images `numbers`
    probabilities: np.ndarray | None = None  # [n, C]
    moments: Moments | None = None  # of all images
    spatial_moments: Moments | None = None
    images: ImageSet | None = None
    numbers: np.ndarray | None = None  # [n], increasing, of all images or of a selection
    digests: frozenset[bytes] = frozenset()  # of the pixels of each image

    @property
    def name(self) -> str:
        """Its name in messages."""
        return f"{self.flag} {self.about.get('file') or self.about['images']}"

    @property
    def count(self) -> int | None:
        """The number of its images, where that is known."""
        return self.about.get("count")

    def take(self, rows: Sequence[int]) -> np.ndarray:
        """The images uint8 [len(rows), H, W, C] of these rows of the features."""
        assert self.images is not None and self.numbers is not None
        return self.images.take(self.numbers[rows].tolist())

    def subset(self, count: int) -> FeatureSet:
        """A fixed `selection` of `count` images; all where there are no more."""
        assert self.features is not None
        if count >= len(self.features):
            return self
        rows = selection(len(self.features), count)
        probabilities = None if self.probabilities is None else self.probabilities[rows]
        about = {**self.about, "count": count}
        return FeatureSet(
            self.flag, about, self.features[rows], probabilities, moments(self.features[rows], metrics_device())
        )


def metrics_device() -> th.device:
    """What computes metrics: this rank's device where it has float64, else the CPU."""
    return distributed.dev() if distributed.has_float64(distributed.dev()) else th.device("cpu")


class _Part(NamedTuple):
    """The results of a batch."""

    outputs: Outputs
    digests: list[bytes]  # of each image's pixels
    resized: bool  # whether any image had another size


def extract(
    images: ImageSet, network: FeatureNetwork, batch_size: int, title: str, probabilities: bool = False
) -> FeatureSet:
    """The features of every image, shared among the ranks, and their moments, on rank 0. Collective.

    Batches are the same on any number of ranks, and so is the result. With more than MAX_PAIRED images the moments are
    of all, and the features of a fixed `selection`.
    """
    rank, world_size = distributed.get_rank(), distributed.get_world_size()
    batches = [range(i, min(i + batch_size, len(images))) for i in range(0, len(images), batch_size)]
    collected = _Collected(selection(len(images), MAX_PAIRED))
    bar = Progress(title, len(images), "image")
    with closing(bar):
        mine = _prepared(images.batches(batches[rank::world_size]), network)
        for start in range(0, len(batches), world_size):
            now = batches[start : start + world_size]
            own = _evaluate(*next(mine), network, probabilities) if rank < len(now) else None
            for batch, part in zip(now, distributed.all_gather_object(own)):
                if rank == 0:
                    collected.add(batch, part)
            bar.update(sum(map(len, now)))
    about = {**images.describe(), **network.describe()}
    return FeatureSet(images.flag, about, images=images) if rank else collected.result(about, images)


def _prepared(batches: Iterator[Batch], network: FeatureNetwork) -> Iterator[tuple[Batch, Future[th.Tensor]]]:
    """Each batch, and what the network takes of it. A thread prepares the next one meanwhile."""
    with ThreadPoolExecutor(1) as pool:
        waiting = None
        for batch in batches:
            ahead = batch, pool.submit(network.prepare, batch.images)
            if waiting is not None:
                yield waiting
            waiting = ahead
        if waiting is not None:
            yield waiting


def _evaluate(batch: Batch, prepared: Future[th.Tensor], network: FeatureNetwork, probabilities: bool) -> _Part:
    digests = [hashlib.sha256(image.tobytes()).digest() for image in batch.images]
    return _Part(network.run(prepared.result(), probabilities), digests, batch.resized)


class _Collected:
    """The parts of a set's features, in the order of its images."""

    def __init__(self, numbers: np.ndarray):
        self.numbers = numbers
        self.moments, self.spatial = (RunningMoments(metrics_device()) for _ in range(2))
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
        about |= {"prepared": PREPARED[images.dataset.reading.resize_mode] if self.resized else AS_THEY_ARE}
        about |= {"pixels_sha256": self.checksum.hexdigest()}
        if len(self.numbers) < len(images):
            about |= {"compared_in_pairs": len(self.numbers)}
        return FeatureSet(
            images.flag, about, np.concatenate(self.features),
            np.concatenate(self.probabilities) if self.probabilities else None, self.moments.result(),
            self.spatial.result() if self.spatial.count else None, images, self.numbers, frozenset(self.digests),
        )  # fmt: skip
