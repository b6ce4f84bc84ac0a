"""Images as the page shows them and as users download them."""

from __future__ import annotations

import base64
import html
import os
import zipfile
from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image

from ..config import ReadingConfig, UserError
from ..data.given import as_pixels
from ..sampling.images import Images
from ..utils import files, images

EDITOR_SIDE = 512  # of an image that is painted on, at least


def data_url(array: np.ndarray) -> str:
    """uint8 [H, W, C] -> an address that holds the image itself."""
    return "data:image/png;base64," + base64.b64encode(images.encode_png(array)).decode()


def grid_html(arrays: Sequence[np.ndarray | None], captions: Sequence[str] = ()) -> str:
    """Images in a grid with sharp pixels, without any file; an empty place for each None."""
    cells = []
    for i, array in enumerate(arrays):
        caption = html.escape(captions[i]) if i < len(captions) else ""
        alt = f"image {i + 1}" + (f", {caption}" if caption else "")
        shown = '<div class="blank"></div>' if array is None else f'<img src="{data_url(array)}" alt="{alt}">'
        cells.append(f"<figure>{shown}<figcaption>{caption}</figcaption></figure>")
    return f'<div class="pixel-grid">{"".join(cells)}</div>'


def captions_of(drawn: Images) -> list[str]:
    """What is written below each image: its class and its number."""
    numbers = range(len(drawn)) if drawn.numbers is None else drawn.numbers
    names = drawn.captions() or [""] * len(drawn)
    return [f"{name} · {number}" if name else str(number) for name, number in zip(names, numbers)]


class Downloads:
    """The files of drawn images, in a folder of their own: PNGs, a zip of them, an npz and maybe a GIF.

    :param folder: an empty one.
    :param beside: further files for the zip, by name: what the images were made from.
    :param film: whether the images follow each other: then there is a GIF to the last one and back.
    """

    def __init__(self, drawn: Images, folder: str, beside: dict[str, bytes] | None = None, film: bool = False):
        self.folder = folder
        names = drawn.file_names()
        self.pngs = [os.path.join(self.folder, name) for name in names]
        for path, array in zip(self.pngs, drawn.array):
            files.write_bytes(path, images.encode_png(array), durable=False)
        self.npz = os.path.join(self.folder, f"samples_{'x'.join(map(str, drawn.array.shape))}.npz")
        images.save_npz(self.npz, drawn.array, *([] if drawn.labels is None else [drawn.labels]))
        self.gif = os.path.join(self.folder, "interpolation.gif") if film else ""
        if film:
            images.save_gif(self.gif, np.concatenate([drawn.array, drawn.array[-2:0:-1]]))
        self.zip = os.path.join(self.folder, "samples.zip")
        with zipfile.ZipFile(self.zip, "w") as archive:
            for path, name in zip(self.pngs, names):
                archive.write(path, name)
            for name, content in (beside or {}).items():
                archive.writestr(name, content)


def read_upload(path: str, size: tuple[int, int], channels: int, what: str = "the image") -> np.ndarray:
    """An uploaded image as the model takes it: uint8 [H, W, C]. Raises UserError for what is no image."""
    try:
        with open(path, "rb") as f:
            image = images.load(f)
    except Exception as error:  # Pillow raises many kinds for damaged files
        raise UserError(f"{what} cannot be read: {error}") from None
    return as_pixels([image], what, f"{size[0]}x{size[1]}", channels, None, ReadingConfig()).arrays[0]


def enlarged(array: np.ndarray) -> np.ndarray:
    """uint8 [H, W, C], large enough to paint on."""
    return images.enlarge(array[None], EDITOR_SIDE)[0]


def painted_mask(editor: dict[str, Any] | None, size: tuple[int, int]) -> np.ndarray:
    """bool [H, W]: where the layers of an image editor have paint over at least half of a pixel.

    :param editor: the value of a gr.ImageEditor of type "pil".
    """
    mask = np.zeros(size, bool)
    for layer in (editor or {}).get("layers") or []:
        alpha = layer.convert("RGBA").getchannel("A").point(lambda value: 255 if value else 0)
        mask |= np.asarray(alpha.resize(size[::-1], Image.Resampling.BOX)) >= 128
    return mask
