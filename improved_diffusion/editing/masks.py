"""Masks: where to paint."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ..config import UserError
from ..data.dataset import ImageDataset
from ..data.sources import open_pictures, stem
from ..utils import images

GREY = 127  # brighter pixels are painted, and the grid shows them in this grey


def read_masks(path: str, size: tuple[int, int], names: Sequence[str]) -> np.ndarray:
    """The masks of --mask, bool [1 or N, H, W]: true where to paint.

    :param size: (height, width). Masks are resized without blurring, and centre-cropped.
    :param names: of the N images, which masks of the same names go with; else they go in order.
    Raises UserError where their number does not fit, and for a mask that is black all over.
    """
    source = open_pictures(path, "--mask")
    dataset = ImageDataset(size, source)
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
    from PIL import Image, ImageOps

    name = dataset.source.describe(i)
    grey = images.convert(dataset.read(i), 3, name).convert("L")
    height, width = dataset.resolution
    mask = np.asarray(ImageOps.fit(grey, (width, height), Image.Resampling.NEAREST)) > GREY
    if not mask.any():
        raise UserError(f"--mask {name} is black, so nothing would be painted: make the part to paint white")
    return mask
