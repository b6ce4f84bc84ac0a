"""Images to the model's size: cropped, padded or stretched."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from PIL import Image

from ..config import ReadingConfig

PREPARED = {  # what each --resize_mode does to images, for messages and reports
    "crop": "resized and centre-cropped", "random_crop": "resized and cropped at random", "pad": "resized and padded",
    "stretch": "stretched",
}  # fmt: skip
SMALLEST_CROP = 0.8  # share of the shorter side that a random crop shows at least, as in ADM's random_crop_arr
MANY_PIXELS = 2**20  # of an enlarged image; beyond, and beyond ELONGATED times its crop, it is cropped before
ELONGATED = 16


def resize(
    image: Image.Image, size: Sequence[int], reading: ReadingConfig, key: Sequence[int] | None = None
) -> Image.Image:
    """The image at (height, width), by --resize_mode.

    :param key: of the random generator of a random crop; None: crop the centre instead.
    """
    if reading.resize_mode == "pad":
        return resize_pad(image, size, reading.background)
    if reading.resize_mode == "stretch":
        return stretch(image, size)
    if reading.resize_mode == "random_crop" and key is not None:
        return random_crop(image, size, np.random.default_rng(key))
    return resize_crop(image, size)


def resize_crop(image: Image.Image, size: Sequence[int]) -> Image.Image:
    """Resize to cover (height, width) and crop the centre: halved by a box filter while both sides are at least
    twice as long, then bicubic."""
    height, width = size
    image = _halve(image, width, height)
    covering = _scaled(image.size, max(width / image.size[0], height / image.size[1]))
    return _resized_part(image, covering, ((covering[0] - width) // 2, (covering[1] - height) // 2), size)


def random_crop(image: Image.Image, size: Sequence[int], rng: np.random.Generator) -> Image.Image:
    """Resize to cover (height, width) or up to 1 / SMALLEST_CROP times it, and crop a random part."""
    height, width = size
    zoom = 1 / rng.uniform(SMALLEST_CROP, 1)
    image = _halve(image, round(width * zoom), round(height * zoom))
    covering = _scaled(image.size, max(width * zoom / image.size[0], height * zoom / image.size[1]))
    corner = (int(rng.integers(covering[0] - width + 1)), int(rng.integers(covering[1] - height + 1)))
    return _resized_part(image, covering, corner, size)


def resize_pad(image: Image.Image, size: Sequence[int], background: str) -> Image.Image:
    """Resize to fit into (height, width), centred on a background."""
    height, width = size
    (inner_width, inner_height), corner = fitting(image.size, size)
    inner = _halve(image, inner_width, inner_height).resize((inner_width, inner_height), Image.Resampling.BICUBIC)
    canvas = Image.new(image.mode, (width, height), background)
    canvas.paste(inner, corner)
    return canvas


def stretch(image: Image.Image, size: Sequence[int]) -> Image.Image:
    """Resize to (height, width), whatever the aspect ratio."""
    height, width = size
    return _halve(image, width, height).resize((width, height), Image.Resampling.BICUBIC)


def fitting(image_size: tuple[int, int], size: Sequence[int]) -> tuple[tuple[int, int], tuple[int, int]]:
    """((width, height) of an image that fits into `size` (height, width), its corner (left, top) there)."""
    height, width = size
    inner_width, inner_height = _scaled(image_size, min(width / image_size[0], height / image_size[1]))
    return (inner_width, inner_height), ((width - inner_width) // 2, (height - inner_height) // 2)


def _halve(image: Image.Image, width: int, height: int) -> Image.Image:
    """The image halved by a box filter while both sides are at least twice as long."""
    while image.size[0] >= 2 * width and image.size[1] >= 2 * height:
        image = image.resize((image.size[0] // 2, image.size[1] // 2), resample=Image.Resampling.BOX)
    return image


def _scaled(size: tuple[int, int], scale: float) -> tuple[int, int]:
    return max(1, round(size[0] * scale)), max(1, round(size[1] * scale))


def _resized_part(
    image: Image.Image, whole: tuple[int, int], corner: tuple[int, int], size: Sequence[int]
) -> Image.Image:
    """The part of `size` (height, width) at the corner of the image that is resized to `whole` (width, height)."""
    (height, width), (left, top) = size, corner
    pixels = whole[0] * whole[1]
    if pixels > MANY_PIXELS and pixels > ELONGATED * width * height and pixels > image.size[0] * image.size[1]:
        return _enlarged_part(image, whole, corner, size)
    image = image.resize(whole, resample=Image.Resampling.BICUBIC)
    return image.crop((left, top, left + width, top + height))


def _enlarged_part(
    image: Image.Image, whole: tuple[int, int], corner: tuple[int, int], size: Sequence[int]
) -> Image.Image:
    """Like `_resized_part`, but cropped first: enlarged whole, an elongated image would take far more memory than its
    file. Pillow's boxes are in single precision, so ordinary images would get slightly other pixels this way."""
    box = []
    for length, long, start, count in zip(image.size, whole, corner, reversed(size)):
        box.append((start * length / long, min(length, (start + count) * length / long)))
    margin = 3  # the bicubic filter reads two pixels on each side
    (left, right), (top, bottom) = ((max(0, math.floor(a) - margin), math.ceil(b) + margin) for a, b in box)
    part = image.crop((left, top, min(image.size[0], right), min(image.size[1], bottom)))
    inside = (box[0][0] - left, box[1][0] - top, box[0][1] - left, box[1][1] - top)
    return part.resize((size[1], size[0]), Image.Resampling.BICUBIC, box=inside)
