"""Masks: where to paint."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from PIL import Image, ImageOps

from ..config import ReadingConfig, UserError, path_argument
from ..data.dataset import ImageDataset, quiet
from ..data.sources import open_pictures, stem
from ..utils.images import as_shown
from ..utils.resizing import fitting

GREY = 127  # brighter pixels are painted, and the grid shows them in this grey
_DEFAULT_READING = ReadingConfig()


def read_masks(
    path: str, size: tuple[int, int], names: Sequence[str], reading: ReadingConfig = _DEFAULT_READING
) -> np.ndarray:
    """The masks of --mask, bool [1 or N, H, W]: true where to paint.

    :param size: (height, width). Masks are resized like the images, without blurring.
    :param names: of the N images, which masks of the same names go with; else they go in order.
    :param reading: how the images are read.
    Raises UserError where their number does not fit, and for a mask that is black all over.
    """
    if not path:
        raise UserError("--mask is missing: name an image, white where to paint and black elsewhere")
    source = open_pictures(path, "--mask")
    dataset = ImageDataset(size, source, reading=replace(reading, published_decoding=False))
    by_name = {stem(source.name(i)): i for i in range(len(source))}
    if len(source) == 1:
        chosen = [0]
    elif set(names) <= by_name.keys():
        chosen = [by_name[name] for name in names]
    elif len(source) == len(names):
        chosen = list(range(len(names)))
    else:
        raise UserError(
            f"--mask {path} has {len(source)} masks for {len(names)} images: give one mask for all, or one for each "
            "image, with the same names or in the same order"
        )
    return np.stack([_mask(dataset, i) for i in chosen])


def _mask(dataset: ImageDataset, i: int) -> np.ndarray:
    with quiet():
        image = dataset.shown(i).image
    return _mask_of(image, f"--mask {dataset.name(i)}", dataset.resolution, dataset.reading.resize_mode)


def as_masks(
    given: Any, size: tuple[int, int], names: Sequence[str], reading: ReadingConfig = _DEFAULT_READING
) -> np.ndarray:
    """Masks given in Python, bool [1 or N, H, W], resized like the images: a path, see read_masks; PIL images, white
    where to paint; or arrays [H, W] or [N, H, W], bool or uint8, true or brighter than grey where to paint.

    Raises UserError for anything else.
    """
    if isinstance(given, (str, os.PathLike)):
        return read_masks(path_argument("mask", given), size, names, reading)
    images = [given] if isinstance(given, Image.Image) else given
    if isinstance(images, (list, tuple)) and images and all(isinstance(image, Image.Image) for image in images):
        shown = [as_shown(image, replace(reading, published_decoding=False)).image for image in images]
        return np.stack([_mask_of(image, f"mask[{i}]", size, reading.resize_mode) for i, image in enumerate(shown)])
    is_array = isinstance(given, np.ndarray) and given.dtype in (bool, np.uint8) and given.size
    if not is_array or given.ndim not in (2, 3):
        what = f"{given.dtype} {list(given.shape)}" if isinstance(given, np.ndarray) else type(given).__name__
        raise UserError(
            "mask: expected the path of an image, a PIL image, or an array [H, W] or [N, H, W] of bool or uint8, true "
            f"or white where to paint, got {what}"
        )
    arrays = given if given.ndim == 3 else given[None]
    painted = arrays if arrays.dtype == bool else arrays > GREY
    return np.stack([_fitted(mask, size, reading.resize_mode) for mask in painted])


def _mask_of(image: Image.Image, name: str, size: tuple[int, int], resize_mode: str) -> np.ndarray:
    """The mask of an image, bool [H, W]. Raises UserError where nothing would be painted."""
    painted = _painted(image)
    mask = _fitted(painted, size, resize_mode)
    if not mask.any():
        where = f" in the part that --resize_mode {resize_mode} keeps" if painted.any() else ""
        raise UserError(f"{name} has no white{where}, so nothing would be painted: make the part to paint white")
    return mask


def _painted(image: Image.Image) -> np.ndarray:
    """Where a mask says to paint, bool [H, W]: where it is white, or, if it has a transparent part and nothing white,
    where it is opaque."""
    alpha = np.asarray(image.getchannel("A")) if image.mode[-1] == "A" else None
    colours = image.convert(image.mode.removesuffix("A"))
    white = np.asarray(colours.convert("L")) > GREY
    if alpha is None:
        return white
    opaque = alpha > GREY
    return white & opaque if opaque.all() or (white & opaque).any() else opaque


def _fitted(painted: np.ndarray, size: tuple[int, int], resize_mode: str) -> np.ndarray:
    """A mask of the model's size, bool [H, W]."""
    return np.asarray(_resized(Image.fromarray(painted.astype(np.uint8) * 255), size, resize_mode)) > GREY


def _resized(mask: Image.Image, size: tuple[int, int], resize_mode: str) -> Image.Image:
    height, width = size
    if resize_mode == "stretch":
        return mask.resize((width, height), Image.Resampling.NEAREST)
    if resize_mode == "pad":
        inner, corner = fitting(mask.size, size)
        canvas = Image.new("L", (width, height))
        canvas.paste(mask.resize(inner, Image.Resampling.NEAREST), corner)
        return canvas
    return ImageOps.fit(mask, (width, height), Image.Resampling.NEAREST)
