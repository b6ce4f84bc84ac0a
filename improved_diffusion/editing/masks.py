"""Masks: where to paint."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from PIL import Image, ImageOps

from ..config import ReadingConfig, UserError
from ..data.dataset import ImageDataset, quiet
from ..data.sources import open_pictures, stem
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
        painted = Image.fromarray(_painted(dataset.shown(i).image).astype(np.uint8) * 255)
    mask = np.asarray(_resized(painted, dataset.resolution, dataset.reading.resize_mode)) > GREY
    if not mask.any():
        raise UserError(f"--mask {dataset.name(i)} is black, so nothing would be painted: make the part to paint white")
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
