"""Images as a person holds them in Python, finished or on their way from noise."""

from __future__ import annotations

import fnmatch
import io
import os
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch as th
from PIL import Image

from ..config import UserError, one_line, path_argument, shown
from ..utils import files, images
from ..utils.text import class_parts, counted
from .labels import caption_of, class_name
from .names import BySource, numbered_name
from .writer import PNG_DIR, REQUEST_FILE, SHOWN


@dataclass(frozen=True, repr=False)
class Images:
    """A batch of images.

    :param array: uint8 [N, H, W, C], C of 1 (grey) to 4 (RGB and alpha).
    :param labels: int64 [N], the classes; None without classes.
    :param class_names: the names of all classes, by label; None where they are not known.
    :param numbers: the number of each image below its seed; its file is named by it.
    :param names: what the files are called instead, without endings; made unique where two are the same.
    """

    array: np.ndarray
    labels: np.ndarray | None = None
    class_names: Sequence[str] | None = None
    numbers: Sequence[int] | None = None
    names: Sequence[str] | None = None

    def __len__(self) -> int:
        return len(self.array)

    def __repr__(self) -> str:
        """How many images of which form: a prompt shows the result of each call."""
        return f"Images({counted(len(self), 'image')} of {self.array.dtype} {self.array.shape[1:]})"

    def __getitem__(self, index: int | slice | Sequence[int] | np.ndarray) -> Images:
        """The image, or images, at an index, a slice, several indices or a bool array [N]: always Images.

        Raises IndexError where there is none.
        """
        positions = np.atleast_1d(np.arange(len(self))[index])
        if positions.ndim != 1:
            raise IndexError(f"{shown(index)} is neither an index, a slice nor a list of indices")
        labels = None if self.labels is None else self.labels[positions]
        numbers = None if self.numbers is None else [self.numbers[i] for i in positions]
        names = None if self.names is None else [self.names[i] for i in positions]
        return Images(self.array[positions], labels, self.class_names, numbers, names)

    def pil(self) -> list[Image.Image]:
        """The images as PIL.Image objects."""
        return [images.to_image(array) for array in self.array]

    def grid(self, columns: int | None = None) -> Image.Image:
        """All images in one PIL.Image, as near to a square as can be unless `columns` are given.

        Raises UserError where there are no images.
        """
        self._require_images()
        return images.to_image(images.grid(self.array, columns, min_side=images.SHOWN_SIDE, captions=self.captions()))

    def save(self, folder: str | os.PathLike) -> str:
        """Write PNGs, a grid and an npz of all (arr_0, and the labels as arr_1), as the command does.

        Returns the npz's path. Images of the same names are replaced. Raises UserError where the folder cannot be
        written or holds other images, and where there are no images.
        """
        self._require_images()
        folder = path_argument("folder", folder)
        png_dir = files.join(folder, PNG_DIR)
        names, npz = self.file_names(), f"samples_{'x'.join(map(str, self.array.shape))}.npz"
        _check_others(folder, {*names, npz})
        files.make_dirs(png_dir)
        for name, array in zip(names, self.array):
            files.write_bytes(files.join(png_dir, name), images.encode_png(array), durable=False)
        path = files.join(folder, npz)
        images.save_npz(path, self.array, *([] if self.labels is None else [self.labels]))
        columns, captions = 10 if len(self) >= SHOWN // 2 else None, self.captions()
        images.save_grid(files.join(folder, "samples.png"), self.array[:SHOWN], columns, captions and captions[:SHOWN])
        return path

    def _require_images(self) -> None:
        if not len(self):
            raise UserError("there are no images to show or save: the batch is empty")

    def file_names(self) -> list[str]:
        """What the PNGs are called, in `save` and in the service's replies."""
        if self.names is not None:
            return BySource(self.names, len(self)).names
        numbers = range(len(self)) if self.numbers is None else self.numbers
        if self.labels is None:
            return [numbered_name(number, None) for number in numbers]
        parts = class_parts(self.class_names) if self.class_names else None
        return [numbered_name(number, class_name(parts, int(y))) for number, y in zip(numbers, self.labels)]

    def captions(self) -> list[str] | None:
        """What is written below each image: its class, where there are classes."""
        return None if self.labels is None else [caption_of(self.class_names, int(y)) for y in self.labels]

    def _repr_png_(self) -> bytes:
        """The grid, which a notebook shows."""
        png = io.BytesIO()
        self.grid().save(png, format="PNG")
        return png.getvalue()


def _check_others(folder: str, names: set[str]) -> None:
    """Raise UserError where a folder holds images other than those that are going to be written."""
    if files.exists(files.join(folder, REQUEST_FILE)):
        raise UserError(f"{folder} holds the samples of a command ({REQUEST_FILE}): choose another folder")
    for directory, pattern in ((folder, "samples_*.npz"), (files.join(folder, PNG_DIR), "*.png")):
        for name in fnmatch.filter(files.list_dir(directory), pattern) if files.is_dir(directory) else []:
            if name not in names:
                raise UserError(f"{directory} holds other images, such as {one_line(name)}: choose another folder")


@dataclass(frozen=True)
class SamplingStep:
    """A batch of images on its way from noise, after one step of the sampler.

    :param index: of the step, from 0; `steps` is how many there are.
    :param numbers: of the images in the batch.
    :param pred_xstart: the image that the model predicts at this step, x_0: float32 [N, C, H, W] in [-1, 1].
    :param sample: the noisy image x_t after the step, float32 [N, C, H, W].
    """

    index: int
    steps: int
    numbers: Sequence[int]
    pred_xstart: th.Tensor
    sample: th.Tensor
    class_names: Sequence[str] | None = None

    @property
    def images(self) -> Images:
        """The predicted images, as they look at this step."""
        return Images(images.to_uint8(self.pred_xstart), None, self.class_names, self.numbers)
