"""Images as a person holds them in Python, finished or on their way from noise."""

from __future__ import annotations

import io
import os
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch as th
from PIL import Image

from ..config import UserError, path_argument, shown
from ..utils import files, images
from .writer import PNG_DIR, SHOWN


@dataclass(frozen=True)
class Images:
    """A batch of images.

    :param array: uint8 [N, H, W, C], C of 1 (grey) to 4 (RGB and alpha).
    :param labels: int64 [N], the classes; None without classes.
    :param class_names: the names of all classes, by label; None where they are not known.
    :param numbers: the number of each image below its seed; its file is named by it.
    """

    array: np.ndarray
    labels: np.ndarray | None = None
    class_names: Sequence[str] | None = None
    numbers: Sequence[int] | None = None

    def __len__(self) -> int:
        return len(self.array)

    def __getitem__(self, index: int | slice | Sequence[int] | np.ndarray) -> Images:
        """The image, or images, at an index, a slice, several indices or a bool array [N]: always Images.

        Raises IndexError where there is none.
        """
        positions = np.atleast_1d(np.arange(len(self))[index])
        if positions.ndim != 1:
            raise IndexError(f"{shown(index)} is neither an index, a slice nor a list of indices")
        labels = None if self.labels is None else self.labels[positions]
        numbers = None if self.numbers is None else [self.numbers[i] for i in positions]
        return Images(self.array[positions], labels, self.class_names, numbers)

    def pil(self) -> list[Image.Image]:
        """The images as PIL.Image objects."""
        return [images.to_image(array) for array in self.array]

    def grid(self, columns: int | None = None) -> Image.Image:
        """All images in one PIL.Image, as near to a square as can be unless `columns` are given.

        Raises UserError where there are no images.
        """
        self._require_images()
        return images.to_image(images.grid(self.array, columns, min_side=images.SHOWN_SIDE))

    def save(self, folder: str | os.PathLike) -> str:
        """Write PNGs, a grid and an npz of all (arr_0, and the labels as arr_1), as the command does.

        Returns the npz's path. Raises UserError where the folder cannot be written, and where there are no images.
        """
        self._require_images()
        folder = path_argument("folder", folder)
        png_dir = files.join(folder, PNG_DIR)
        files.make_dirs(png_dir)
        for k, array in enumerate(self.array):
            number = k if self.numbers is None else self.numbers[k]
            name = images.sample_name(number, self._class_name(k))
            files.write_bytes(files.join(png_dir, name), images.encode_png(array), durable=False)
        path = files.join(folder, f"samples_{'x'.join(map(str, self.array.shape))}.npz")
        images.save_npz(path, self.array, *([] if self.labels is None else [self.labels]))
        images.save_grid(files.join(folder, "samples.png"), self.array[:SHOWN], 10 if len(self) >= SHOWN // 2 else None)
        return path

    def _require_images(self) -> None:
        if not len(self):
            raise UserError("there are no images to show or save: the batch is empty")

    def _class_name(self, index: int) -> str | None:
        if self.labels is None:
            return None
        label = int(self.labels[index])
        return self.class_names[label] if self.class_names and label < len(self.class_names) else str(label)

    def _repr_png_(self) -> bytes:
        """The grid, which a notebook shows."""
        png = io.BytesIO()
        self.grid().save(png, format="PNG")
        return png.getvalue()


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
