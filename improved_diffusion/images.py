"""Arrays <-> image files: uint8, PNGs, grids, and npz batches of the published form."""

from __future__ import annotations

import io
import math
import re
import zipfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch as th
from PIL import Image

from . import files
from .config import UserError

EXTENSIONS = (".jpg", ".jpeg", ".png", ".gif")
MODES = {1: "L", 2: "LA", 3: "RGB", 4: "RGBA"}
_CHANNELS = {"L": 1, "LA": 2, "RGB": 3, "RGBA": 4}


def to_uint8(x: th.Tensor) -> np.ndarray:
    """float [N, C, H, W] in [-1, 1] -> uint8 [N, H, W, C], truncated as the published code does."""
    return ((x + 1) * 127.5).clamp(0, 255).to(th.uint8).permute(0, 2, 3, 1).contiguous().cpu().numpy()


def from_uint8(images: np.ndarray) -> th.Tensor:
    """uint8 [N, H, W, C] -> float32 [N, C, H, W] in [-1, 1]."""
    return th.from_numpy(images.astype(np.float32) / 127.5 - 1).permute(0, 3, 1, 2).contiguous()


def native_mode(image: Image.Image) -> str:
    """The mode in `MODES` that holds the image without loss."""
    if image.mode in _CHANNELS:
        return image.mode
    if image.mode == "1":
        return "L"
    return "RGBA" if "transparency" in image.info else "RGB"


def convert(image: Image.Image, channels: int, name: str) -> Image.Image:
    """The image with the given number of channels. Raises UserError where colour would be lost or alpha made up."""
    if image.mode[0] in "IF":
        raise UserError(f"{name} has more than 8 bits per channel ({image.mode}): convert the images to 8 bits")
    has = _CHANNELS[native_mode(image)]
    if channels == 3 or has == channels or has == 2:  # 2: grey with alpha loses no colour
        return image.convert(MODES[channels])
    raise UserError(
        f"{name} has {has} channel{'s' * (has > 1)} ({image.mode}) where --channels {channels} is asked: "
        f"give --channels {has}, or convert the images"
    )


def to_image(array: np.ndarray) -> Image.Image:
    """uint8 [H, W, C] with 1 to 4 channels -> an image."""
    return Image.fromarray(array[..., 0] if array.shape[-1] == 1 else array, MODES[array.shape[-1]])


def encode_png(array: np.ndarray) -> bytes:
    """uint8 [H, W, C] -> the bytes of a PNG."""
    buffer = io.BytesIO()
    to_image(array).save(buffer, "PNG")
    return buffer.getvalue()


def grid(images: np.ndarray, columns: int | None = None, border: int = 2, min_side: int = 0) -> np.ndarray:
    """uint8 [N, H, W, C] -> one image [H', W', C], row by row, as square as it gets.

    :param min_side: enlarge small images, pixel by pixel, until their shorter side has as many.
    """
    factor = max(1, math.ceil(min_side / min(images.shape[1:3])))
    images = images.repeat(factor, axis=1).repeat(factor, axis=2)
    n, height, width, channels = images.shape
    columns = columns or math.ceil(math.sqrt(n))
    rows = math.ceil(n / columns)
    canvas = np.full((rows * (height + border) + border, columns * (width + border) + border, channels), 255, np.uint8)
    for i, image in enumerate(images):
        y, x = (border + (i // columns) * (height + border), border + (i % columns) * (width + border))
        canvas[y : y + height, x : x + width] = image
    return canvas


def save_grid(path: str, images: np.ndarray, columns: int | None = None) -> None:
    """Write `grid` of uint8 [N, H, W, C] as a PNG, small images enlarged."""
    files.write_bytes(path, encode_png(grid(images, columns, min_side=48)))


def sample_name(index: int, class_name: str | None) -> str:
    """The file name of sample number `index`: its class up to the last underscore, as `labels prefix` reads it."""
    if class_name is None:
        return f"{index:06d}.png"
    return f"{re.sub(r'[^A-Za-z0-9.+-]+', '-', class_name)}_{index:06d}.png"


def save_npz(path: str, *arrays: np.ndarray) -> None:
    """Write arrays as arr_0, arr_1, ... of an npz; a crash leaves an older file whole."""
    buffer = io.BytesIO()
    np.savez(buffer, *arrays)
    files.write_bytes(path, buffer.getvalue())


def load_npz(path: str) -> dict[str, np.ndarray]:
    """The arrays of an npz of images: `arr_0` uint8 [N, H, W, C] and perhaps `arr_1` integers [N].

    Raises UserError for a damaged file, for objects (which could run code) and for arrays of another form.
    """
    try:
        with np.load(io.BytesIO(files.read_bytes(path)), allow_pickle=False) as data:
            arrays = {name: data[name] for name in ("arr_0", "arr_1") if name in data}
    except ValueError as error:
        if "Object arrays" in str(error) or "pickled" in str(error):
            raise UserError(
                f"{path} holds Python objects, which could run code when loaded: save it again as numbers"
            ) from None
        raise UserError(f"{path} is not a readable npz: {error}") from None
    except (OSError, EOFError, zipfile.BadZipFile, KeyError) as error:
        raise UserError(f"{path} is not a readable npz: {error}") from None
    images = arrays.get("arr_0")
    if images is None or images.dtype != np.uint8 or images.ndim not in (3, 4) or not len(images):
        found = "no arr_0" if images is None else f"arr_0 of {images.dtype} {images.shape}"
        raise UserError(f"{path} has {found}: expected arr_0 of uint8 [N, height, width, channels]")
    if images.ndim == 3:
        arrays["arr_0"] = images = images[..., None]
    if images.shape[-1] not in MODES:
        raise UserError(f"{path} has arr_0 of shape {images.shape}: the last number must be 1 to 4 channels")
    labels = arrays.get("arr_1")
    if labels is not None and (labels.shape != images.shape[:1] or labels.dtype.kind not in "iu"):
        raise UserError(
            f"{path} has arr_1 of {labels.dtype} {labels.shape}: expected an integer for each of {len(images)} images"
        )
    return arrays


def is_image_name(name: str) -> bool:
    """Whether the file name is one of an image we read."""
    return Path(name).suffix.lower() in EXTENSIONS


def resize_crop(image: Image.Image, size: Sequence[int]) -> Image.Image:
    """The image made to cover (height, width) and cropped to its centre: halved by a box filter while both sides are at
    least twice as long, then bicubic."""
    height, width = size
    if image.mode in ("1", "P"):
        image = image.convert(native_mode(image))  # filters cannot mix palette indices
    while image.size[0] >= 2 * width and image.size[1] >= 2 * height:
        image = image.resize((image.size[0] // 2, image.size[1] // 2), resample=Image.Resampling.BOX)
    scale = max(width / image.size[0], height / image.size[1])
    image = image.resize(
        (round(image.size[0] * scale), round(image.size[1] * scale)), resample=Image.Resampling.BICUBIC
    )
    left, top = (image.size[0] - width) // 2, (image.size[1] - height) // 2
    return image.crop((left, top, left + width, top + height))
