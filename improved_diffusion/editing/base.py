"""What the editing commands share.

A command is used in two steps: `prepare` makes the model ready for it, and an object made of that model and arrays
draws edited images by their numbers. `read` makes the object from --images instead, and `write` fills a folder.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, TypeVar

import numpy as np

from ..checkpoints.loading import LoadedModel
from ..config import UserError
from ..data.given import GivenImages, read_images
from ..logs import logger
from ..sampling.labels import Labels, label_kwargs
from ..sampling.names import ByNumber, BySource, FileNames
from ..sampling.request import describe_request, samples_name
from ..sampling.writer import last_images, write_samples
from ..utils import files
from .model import EditingModel

E = TypeVar("E", bound="Edit")


class Edit:
    """An editing command on given arrays.

    :param model: from `prepare` of the same class.
    :param labels: the class of each image to make; None for an unconditional model.
    """

    command: ClassVar[str]

    def __init__(self, model: EditingModel, labels: Labels | None):
        self.model, self.labels = model, labels
        self.sources: Sequence[str] | None = None  # the names of the given images, without endings

    @classmethod
    def prepare(cls, loaded: LoadedModel[Any]) -> EditingModel:
        """The model with the command's defaults, sampler and path.

        Raises UserError for options that the command cannot work with. Collective.
        """
        raise NotImplementedError

    @classmethod
    def read(cls: type[E], model: EditingModel) -> E:
        """The command on what the settings name, such as --images. Collective."""
        raise NotImplementedError

    @property
    def count(self) -> int:
        """How many images to make."""
        raise NotImplementedError

    def draw(self, numbers: Sequence[int]) -> np.ndarray:
        """The edited images with these numbers, uint8 [N, H, W, C]. Each follows from the seed and its number."""
        raise NotImplementedError

    def describe(self) -> dict[str, Any]:
        """What the images depend on besides the checkpoint and its sampler."""
        raise NotImplementedError

    def shown_beside(self, number: int) -> np.ndarray | None:
        """An image to show beside the edited one in the grid, uint8 [H, W, C]; None where there is none."""
        return None

    @property
    def file_names(self) -> FileNames:
        """What the files of the images are called."""
        return BySource(self.sources, self.count) if self.sources else ByNumber(self.labels)

    @property
    def name(self) -> str:
        """The default name of the output folder."""
        sampler = self.model.sampler
        return f"{self.command}_{samples_name(self.model.loaded, sampler.name, sampler.steps)}"

    def request(self) -> dict[str, Any]:
        """All that the images depend on. Collective."""
        described = describe_request(self.model.loaded, self.model.sampler)
        names = "\0".join(self.sources or ()).encode(errors="backslashreplace")
        named = {"names_sha256": hashlib.sha256(names).hexdigest()} if names else {}
        return {"command": self.command, **self.describe(), **named, **described}

    def write(self, out_dir: str) -> str:
        """Make the images that are not in the folder yet; returns the npz's path. Collective."""
        return self.write_images(self.draw, out_dir, self.request())

    def write_images(self, draw: Callable[[list[int]], np.ndarray], out_dir: str, request: Mapping[str, Any]) -> str:
        """Write what `draw` gives for the numbers 0..count-1, as npz, PNGs and a grid. Collective."""
        logger.log(self.model.sampler.describe())
        return write_samples(
            draw,
            out_dir=out_dir,
            numbers=range(self.count),
            batch_size=self.model.settings.edit.batch_size,
            labels=self.labels,
            request=request,
            beside=self.shown_beside,
            names=self.file_names,
        )

    def images_from(self, numbers: Sequence[int], **start: Any) -> np.ndarray:
        """Where the trajectories of images with these numbers end: uint8 [N, H, W, C]."""
        return last_images(self.model.trajectory(numbers, label_kwargs(self.labels, numbers), **start))


class ImageEdit(Edit):
    """A command that makes image i from given image i modulo their number.

    :param images: uint8 [N, H, W, C] of the model's size.
    :param labels: their classes; None where they have none.
    Raises UserError for images of another size, and where the model needs classes and there are none.
    """

    def __init__(self, model: EditingModel, images: np.ndarray, labels: Sequence[int] | None = None):
        self.images = model.check_images(images)
        super().__init__(model, model.labels(labels, len(images), source_name(model.settings)))

    @classmethod
    def read(cls: type[E], model: EditingModel) -> E:
        given = read_given(model)
        edit = cls(model, given.arrays, given.labels)  # type: ignore[call-arg, arg-type]
        edit.sources = given.file_names
        return edit

    @property
    def count(self) -> int:
        return self.model.settings.copies.num_samples or len(self.images)

    def originals(self, numbers: Sequence[int]) -> np.ndarray:
        """The images that those with these numbers are made from, uint8 [N, H, W, C]."""
        return self.images[[i % len(self.images) for i in numbers]]

    def shown_beside(self, number: int) -> np.ndarray:
        return self.originals([number])[0]

    def describe(self) -> dict[str, Any]:
        return {"images": full_paths(self.model.settings.images.images), "images_sha256": sha256(self.images)}


# Given images


def read_given(prepared: EditingModel) -> GivenImages:
    """The images of --images, resized for the model. Collective.

    Raises UserError where --out_dir is inside of --images: the same command would read its own output next time.
    """
    settings = prepared.settings
    path, out_dir = settings.images.images, settings.run.out_dir
    folder = os.path.realpath(path)
    if out_dir and os.path.isdir(folder) and os.path.commonpath([folder, os.path.realpath(out_dir)]) == folder:
        raise UserError(f"--out_dir {out_dir} is inside of --images {path}: choose a folder outside of it")
    names = prepared.classes.names if prepared.classes else None
    model = settings.model
    return read_images("--images", path, "--image_size", model.size, model.channels, names, settings.reading)


def source_name(settings: Any) -> str:
    """What messages call the images."""
    path = settings.images.images
    return f"--images {path}" if path else "the image array"


def full_paths(paths: str) -> str:
    """Comma-separated paths from the root on."""
    return ",".join(files.full_path(path) for path in paths.split(",")) if paths else ""


def sha256(array: np.ndarray) -> str:
    """The SHA-256 sum of an array's values."""
    return hashlib.sha256(np.ascontiguousarray(array).data).hexdigest()
