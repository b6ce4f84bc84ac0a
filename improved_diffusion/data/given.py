"""Images given to a command, resized for the model."""

from __future__ import annotations

import os
from collections.abc import Collection, Sequence
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from ..config import ReadingConfig, UserError, height_width
from ..logs import logger
from ..utils.images import as_shown, to_array, to_image, with_channels
from ..utils.resizing import PREPARED, resize
from ..utils.text import class_index
from .classes import class_in_name
from .dataset import ImageDataset
from .sources import ArrayImages, open_pictures, stem

_DEFAULT_READING = ReadingConfig()


class GivenImages(NamedTuple):
    """Images to start from."""

    arrays: np.ndarray  # uint8 [N, H, W, C]
    labels: Any  # their classes, an integer for each, where the images tell; of an npz an array, not yet checked
    names: list[str]  # of the files, without what stands after the dot; of arrays, their numbers
    from_files: bool = False

    @property
    def file_names(self) -> list[str] | None:
        """The names of the files, which edited images keep; None where there are no files."""
        return self.names if self.from_files else None


def read_images(
    flag: str, path: str, size_flag: str, wanted: Any, channels: int, class_names: Sequence[str] | None,
    reading: ReadingConfig, exact_npz: bool = False, enlarge: bool = True,
) -> GivenImages:  # fmt: skip
    """The images of an npz, a folder or a zip, of one image, or of several separated by commas.

    They are read and resized as in training; a random crop is the centre.
    :param flag: the option that names the path, and `size_flag` the one of the size, for messages.
    :param wanted: the side, or "HEIGHTxWIDTH"; None: their own size, which must be the same.
    :param class_names: file names that begin with one of them have that class.
    :param reading: how image files become pixels.
    :param exact_npz: an npz of another size raises UserError.
    :param enlarge: otherwise images that are smaller raise UserError.
    """
    source = open_pictures(path, flag)
    as_they_are = ImageDataset(wanted or 1, source, channels=channels, reading=reading)
    sizes = {as_they_are.read(i).size[::-1] for i in range(len(as_they_are))}
    size = height_width(wanted) if wanted else _common_size(sizes, f"{flag} {path}")
    dataset = ImageDataset(size, source, channels=channels, reading=reading)
    if sizes != {size}:
        other = "x".join(map(str, min(s for s in sizes if s != size)))
        if exact_npz and isinstance(source, ArrayImages):
            raise UserError(
                f"{flag} {path} has images of {other}, but the model's {size_flag} is {wanted}: give an npz of "
                "that size, or a folder of images, which are resized"
                + (", or --any_size True" if flag == "--base_samples" else "")
            )
        smaller = ["x".join(map(str, s)) for s in sorted(sizes) if s[0] < size[0] or s[1] < size[1]]
        if smaller and not enlarge:
            raise UserError(
                f"{flag} {path} has images of {smaller[0]}, smaller than {size_flag} {wanted}: give larger ones"
            )
        logger.log(f"{flag}: images of {other} are {PREPARED[reading.resize_mode]} to {size_flag} {wanted}")
    array = np.stack([dataset.pixels(i) for i in range(len(dataset))])
    labels: Any = None
    if isinstance(source, ArrayImages):
        labels = None if source.labels is None else np.atleast_1d(source.labels)
    elif class_names:
        prefixes = [class_in_name(os.path.basename(source.name(i))) for i in range(len(source))]
        index = class_index(class_names)
        if set(prefixes) <= index.keys():
            labels = [index[prefix] for prefix in prefixes]
    names = [stem(source.name(i)) for i in range(len(source))]
    return GivenImages(array, labels, names, not isinstance(source, ArrayImages))


def as_pixels(
    given: Any, what: str, wanted: Any, channels: int, class_names: Sequence[str] | None = None,
    reading: ReadingConfig = _DEFAULT_READING,
) -> GivenImages:  # fmt: skip
    """Images given in Python: a path or several, PIL images, or uint8 arrays [N, H, W, C] or [H, W, C].

    They are resized as in training; a random crop is the centre.
    :param what: the name of the argument, for messages.
    :param wanted: the side, or "HEIGHTxWIDTH"; None: their own size, which must be the same.
    :param class_names: file names that begin with one of them have that class.
    Raises UserError for anything else.
    """
    if isinstance(given, (str, os.PathLike)):
        return read_images(what, os.fspath(given), "image_size", wanted, channels, class_names, reading)
    if isinstance(given, (list, tuple)) and given and all(isinstance(path, (str, os.PathLike)) for path in given):
        return read_images(what, ",".join(map(os.fspath, given)), "image_size", wanted, channels, class_names, reading)
    if isinstance(given, Image.Image):
        given = [given]
    if isinstance(given, np.ndarray):
        arrays = given[None] if given.ndim == 3 else given
        if arrays.dtype != np.uint8 or arrays.ndim != 4 or not 1 <= arrays.shape[-1] <= 4 or not len(arrays):
            raise UserError(
                f"{what}: expected uint8 of shape [N, height, width, channels], got {given.dtype} {given.shape}"
            )
        given = [to_image(array) for array in arrays]
    if not isinstance(given, (list, tuple)) or not given or not all(isinstance(image, Image.Image) for image in given):
        raise UserError(f"{what}: expected a path, PIL images or a uint8 array, got {type(given).__name__}")
    shown = [_shown(image, channels, reading, f"{what}[{i}]") for i, image in enumerate(given)]
    size = height_width(wanted) if wanted else _common_size({image.size[::-1] for image in shown}, what)
    arrays = np.stack([to_array(resize(image, size, reading), channels) for image in shown])
    return GivenImages(arrays, None, [f"{i:06d}" for i in range(len(arrays))])


def _shown(image: Image.Image, channels: int, reading: ReadingConfig, name: str) -> Image.Image:
    """An image in memory as a viewer shows it, with these channels."""
    try:
        return with_channels(as_shown(image, reading), channels, reading, name).image
    except UserError:
        raise
    except ValueError as error:
        raise UserError(f"{name}: {error}") from None


def _common_size(sizes: Collection[tuple[int, int]], what: str) -> tuple[int, int]:
    """The size of all images. Raises UserError where they differ."""
    if len(sizes) > 1:
        some = ", ".join(f"{height}x{width}" for height, width in sorted(sizes)[:3])
        raise UserError(f"{what}: --any_size True needs images of one size, found {some}: enlarge them one by one")
    return next(iter(sizes))
