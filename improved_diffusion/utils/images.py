"""Arrays <-> image files: uint8, PNGs, grids, and npz batches of the published form."""

from __future__ import annotations

import io
import math
import zipfile
from collections.abc import Iterable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import IO, NamedTuple

import numpy as np
import torch as th
from PIL import Image

from ..config import UserError
from . import files
from .captions import captioned

# What Pillow decodes by itself, recognised by content. PostScript and WMF, which start other programs, are not here.
FORMATS = (
    "AVIF", "BMP", "DIB", "GIF", "ICNS", "ICO", "JPEG", "JPEG2000", "PCX", "PNG", "PPM", "PSD", "QOI", "SGI", "TGA",
    "TIFF", "WEBP",
)  # fmt: skip
EXTENSIONS = (".jpg", ".jpeg", ".png", ".gif")
MODES = {1: "L", 2: "LA", 3: "RGB", 4: "RGBA"}
SHOWN_SIDE = 48  # small images are enlarged to this side for viewing
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
    """Convert an image to a number of channels. Raises UserError if colour would be lost or alpha invented."""
    if image.mode[0] in "IF":
        raise UserError(f"{name} has more than 8 bits per channel ({image.mode}): convert the images to 8 bits")
    has = _CHANNELS[native_mode(image)]
    if channels == 3 or has == channels or has == 2:  # 2: grey with alpha has no colour to lose
        return image.convert(MODES[channels])
    raise UserError(
        f"{name} has {has} channel{'s' * (has > 1)} ({image.mode}) but --channels {channels} was given: "
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


def is_whole_png(data: bytes) -> bool:
    """Whether the bytes are a complete PNG, by its checksums; nothing is decoded."""
    try:
        Image.open(io.BytesIO(data), formats=["PNG"]).verify()
    except (OSError, SyntaxError, ValueError):
        return False
    return True


def decode_png(data: bytes) -> np.ndarray:
    """The bytes of a PNG of `encode_png` -> uint8 [H, W, C]. Raises ValueError if they are damaged."""
    if not is_whole_png(data):  # decoding alone would accept some changed bytes as other colours
        raise ValueError("not a complete PNG")
    try:
        array = np.asarray(Image.open(io.BytesIO(data), formats=["PNG"]))
    except (OSError, SyntaxError) as error:
        raise ValueError(str(error)) from None
    return array[..., None] if array.ndim == 2 else array


def enlarge(images: np.ndarray, min_side: int) -> np.ndarray:
    """uint8 [N, H, W, C] enlarged by whole factors until the shorter side is at least `min_side`."""
    factor = max(1, math.ceil(min_side / min(images.shape[1:3])))
    return images.repeat(factor, axis=1).repeat(factor, axis=2)


def grid(
    images: np.ndarray,
    columns: int | None = None,
    border: int = 2,
    min_side: int = 0,
    captions: Sequence[str] | None = None,
) -> np.ndarray:
    """uint8 [N, H, W, C] -> one image [H', W', C], row by row, as square as possible.

    :param min_side: enlarge small images until their shorter side is at least this.
    :param captions: what to write below each image.
    """
    images = enlarge(images, min_side)
    if captions:
        images = captioned(images, captions)
    n, height, width, channels = images.shape
    columns = columns or math.ceil(math.sqrt(n))
    rows = math.ceil(n / columns)
    canvas = np.full((rows * (height + border) + border, columns * (width + border) + border, channels), 255, np.uint8)
    for i, image in enumerate(images):
        y, x = (border + (i // columns) * (height + border), border + (i % columns) * (width + border))
        canvas[y : y + height, x : x + width] = image
    return canvas


def save_grid(path: str, images: np.ndarray, columns: int | None = None, captions: Sequence[str] | None = None) -> None:
    """Write the `grid` of uint8 [N, H, W, C] as a PNG; small images are enlarged."""
    files.write_bytes(path, encode_png(grid(images, columns, min_side=SHOWN_SIDE, captions=captions)))


def save_strip(path: str, rows: np.ndarray) -> None:
    """Write uint8 [R, K, H, W, C], such as R images at K steps, as a PNG with a row for each image."""
    save_grid(path, rows.reshape(-1, *rows.shape[2:]), columns=rows.shape[1])


def save_gif(path: str, frames: np.ndarray, milliseconds: int = 100) -> None:
    """Write uint8 [K, H, W, C] as an endless GIF; small images are enlarged, transparency becomes white.

    :param milliseconds: the time of each frame; GIF rounds it to tens.
    """
    first, *others = [_opaque(to_image(frame)) for frame in enlarge(frames, SHOWN_SIDE)]
    buffer = io.BytesIO()
    first.save(buffer, "GIF", save_all=True, append_images=others, duration=milliseconds, loop=0)
    files.write_bytes(path, buffer.getvalue())


def _opaque(image: Image.Image) -> Image.Image:
    if image.mode in ("L", "RGB"):
        return image
    white = Image.new("RGBA", image.size, "white")
    white.alpha_composite(image.convert("RGBA"))
    return white.convert("RGB")


class Rows(NamedTuple):
    """A uint8 array that is not held in memory: `rows` yields array[0], array[1], ..."""

    shape: tuple[int, ...]
    rows: Iterable[np.ndarray]


def save_npz(path: str, *arrays: np.ndarray | Rows, **named: np.ndarray) -> None:
    """Write arrays to an npz as np.savez does, as arr_0, arr_1, ... or under their names. After a crash the old file is
    unchanged."""
    with files.open_write(path) as f, zipfile.ZipFile(f, "w") as archive:
        for name, array in [*((f"arr_{i}", array) for i, array in enumerate(arrays)), *named.items()]:
            with archive.open(f"{name}.npy", "w", force_zip64=True) as member:  # may exceed 4 GiB
                if isinstance(array, Rows):
                    _write_rows(member, array)
                else:
                    np.lib.format.write_array(member, array, allow_pickle=False)


def _write_rows(f: IO[bytes], array: Rows) -> None:
    """Write the array as np.save does."""
    header = {"descr": np.lib.format.dtype_to_descr(np.dtype(np.uint8)), "fortran_order": False, "shape": array.shape}
    np.lib.format.write_array_header_1_0(f, header)
    written = 0
    for row in array.rows:
        if row.dtype != np.uint8 or row.shape != array.shape[1:]:
            raise ValueError(f"row {written} of uint8 {array.shape} is {row.dtype} {row.shape}")
        f.write(row.tobytes())
        written += 1
    if written != array.shape[0]:
        raise ValueError(f"got {written} of {array.shape[0]} rows")


def npz_names(path: str) -> list[str]:
    """The names of the arrays in an npz, without reading them. Raises UserError for a damaged file."""
    try:
        with files.open_read(path) as f, zipfile.ZipFile(f) as archive:
            return [name.removesuffix(".npy") for name in archive.namelist()]
    except (OSError, ValueError, zipfile.BadZipFile) as error:
        raise UserError(f"{path} is not a readable npz: {error}") from None


def read_npz(path: str, names: Sequence[str]) -> dict[str, np.ndarray]:
    """The named arrays that are in an npz.

    Raises UserError for a damaged file and for objects, which could run code.
    """
    try:
        with files.open_read(path) as f:
            data = np.load(f, allow_pickle=False)
            if not isinstance(data, np.lib.npyio.NpzFile):
                raise UserError(f"{path} is a single array, not an npz: save it with np.savez")
            with data:
                found = {name: data[name] for name in names if name in data}
    except UserError:
        raise
    except Exception as error:  # numpy and zipfile raise many kinds for damaged files
        if "Object arrays" in str(error) or "pickled" in str(error):
            raise UserError(
                f"{path} holds Python objects, which could run code when loaded: save it again as numbers"
            ) from None
        raise UserError(f"{path} is not a readable npz: {error or type(error).__name__}") from None
    for name, array in found.items():
        if not isinstance(array, np.ndarray):
            raise UserError(f"{path} is not a readable npz: {name} is not an array")
    return found


def load_npz(path: str) -> dict[str, np.ndarray]:
    """The arrays of an npz of images: `arr_0` uint8 [N, H, W, C] and perhaps `arr_1` integers [N].

    Raises UserError for a damaged file, for objects, which could run code, and for other shapes or types.
    """
    arrays = read_npz(path, ("arr_0", "arr_1"))
    images = arrays.get("arr_0")
    if images is None or images.dtype != np.uint8 or images.ndim not in (3, 4) or not images.size:
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


@lru_cache(maxsize=1)
def formats() -> tuple[str, ...]:
    """Those of `FORMATS` that the installed Pillow decodes: the `formats` of every Image.open."""
    Image.init()
    return tuple(name for name in FORMATS if name in Image.OPEN)


def is_image_name(name: str) -> bool:
    """Whether the file name has the ending of a supported image format."""
    return Path(name).suffix.lower() in EXTENSIONS


def resize_crop(image: Image.Image, size: Sequence[int]) -> Image.Image:
    """Resize to cover (height, width) and crop the centre: halved by a box filter while both sides are at least
    twice as long, then bicubic."""
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
