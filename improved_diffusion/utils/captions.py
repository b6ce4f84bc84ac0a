"""Names under the pictures of a grid."""

from __future__ import annotations

import os
from collections.abc import Sequence
from functools import lru_cache
from importlib.util import find_spec

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from .text import one_line

SIZE = 11  # of the letters, in pixels, under small pictures


def caption(name: str, otherwise: str) -> str:
    """The name, or what to show otherwise where no font at hand has its letters."""
    name = one_line(name)
    return name if any(_has_letters(font, name) for font in _fonts(SIZE)) else otherwise


def captioned(images: np.ndarray, captions: Sequence[str]) -> np.ndarray:
    """uint8 [N, H, W, C] -> [N, H + h, W, C]: a caption of `caption` below each image, cut where it is too long."""
    _, _, width, channels = images.shape
    size = max(SIZE, width // 16)
    bands = np.full((len(images), size + 4, width, channels), 255, np.uint8)
    for band, text in zip(bands, captions):
        letters = _write(text, size, width)[..., None]
        band[..., : channels - (channels in (2, 4))] = letters  # not the alpha channel
    return np.concatenate([images, bands], axis=1)


def _write(text: str, size: int, width: int) -> np.ndarray:
    """Black letters on white, uint8 [size + 4, width]."""
    canvas = Image.new("L", (width, size + 4), 255)
    fonts = _fonts(size)
    font = next((font for font in fonts if _has_letters(font, text)), fonts[-1])
    shown = text
    while len(shown) > 1 and font.getlength(shown) > width:
        text = text[:-1]
        shown = text + "…"
    ImageDraw.Draw(canvas).text((width / 2, size), shown, fill=0, font=font, anchor="ms")
    return np.asarray(canvas)


@lru_cache(maxsize=4)
def _fonts(size: int) -> tuple[ImageFont.FreeTypeFont, ...]:
    """The fonts to try in turn: Pillow's, which has English letters, and one of many alphabets."""
    matplotlib = find_spec("matplotlib")  # not imported, which takes long, for the place of a file
    assert matplotlib is not None and matplotlib.origin is not None
    path = os.path.join(os.path.dirname(matplotlib.origin), "mpl-data", "fonts", "ttf", "DejaVuSans.ttf")
    own = ImageFont.load_default(size)
    many = ImageFont.truetype(path, size)
    return (own, many) if isinstance(own, ImageFont.FreeTypeFont) else (many,)


def _has_letters(font: ImageFont.FreeTypeFont, text: str) -> bool:
    missing = bytes(font.getmask("\U0010ffff"))  # is in no font
    return not any(bytes(font.getmask(letter)) == missing for letter in set(text) - {" "})
