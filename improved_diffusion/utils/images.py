"""Arrays <-> image files: uint8, PNGs, grids, and npz batches of the published form."""

from __future__ import annotations

import io
import math
import os
import threading
import warnings
import zipfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import lru_cache
from typing import IO, Any, NamedTuple

import numpy as np
import torch as th
from PIL import Image, ImageChops, UnidentifiedImageError

from ..config import MAX_IMAGE_PIXELS, ReadingConfig, UserError
from . import files
from .captions import captioned

# What Pillow decodes by itself, recognised by content. PostScript and WMF, which start other programs, are not here.
FORMATS = (
    "AVIF", "BMP", "DIB", "GIF", "ICNS", "ICO", "JPEG", "JPEG2000", "PCX", "PNG", "PPM", "PSD", "QOI", "SGI", "TGA",
    "TIFF", "WEBP",
)  # fmt: skip
MODES = {1: "L", 2: "LA", 3: "RGB", 4: "RGBA"}
MAX_EXPANSION = 100  # of a compressed array that unpacks to more than these bytes
MAX_EXPANDED_BYTES = 2**30
SHOWN_SIDE = 48  # small images are enlarged to this side for viewing
_WITH_ALPHA = ("LA", "La", "PA", "RGBA", "RGBa")
_ORIENTATION, _BITS_PER_SAMPLE = 0x0112, 258  # EXIF and TIFF tags
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_270, 7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}  # fmt: skip
_PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_PNG_TEXTS = (b"tEXt", b"zTXt", b"iTXt", b"iCCP")
_ICONS = (b"\0\0\1\0", b"icns")  # the first bytes of ICO and ICNS
_LIMIT_LOCK = threading.Lock()
_DEFAULT_READING = ReadingConfig()
_ARRAY_MAGIC = b"\x93NUMPY"


def to_uint8(x: th.Tensor) -> np.ndarray:
    """float [N, C, H, W] in [-1, 1] -> uint8 [N, H, W, C], truncated as the published code does."""
    return ((x + 1) * 127.5).clamp(0, 255).to(th.uint8).permute(0, 2, 3, 1).contiguous().cpu().numpy()


def from_uint8(images: np.ndarray) -> th.Tensor:
    """uint8 [N, H, W, C] -> float32 [N, C, H, W] in [-1, 1]."""
    return th.from_numpy(images.astype(np.float32) / 127.5 - 1).permute(0, 3, 1, 2).contiguous()


# Image files as viewers show them


class Decoded(NamedTuple):
    """An image as a viewer shows it."""

    image: Image.Image  # of a mode in MODES
    done: tuple[str, ...] = ()  # what was done to it, for the log


@lru_cache(maxsize=1)
def formats() -> tuple[str, ...]:
    """Those of `FORMATS` that the installed Pillow decodes: the `formats` of every Image.open."""
    Image.init()
    return tuple(name for name in FORMATS if name in Image.OPEN)


def load(f: IO[bytes], max_pixels: int = MAX_IMAGE_PIXELS) -> Image.Image:
    """The decoded image in a file, as it is stored; of several frames the first. Every image file is opened here.

    Raises ValueError for more pixels, before they are decoded, and many kinds of errors for damaged files.
    """
    f = _without_texts(f)
    is_icon = f.read(4) in _ICONS
    f.seek(0)
    if not is_icon:
        try:
            return _load(f, max_pixels)
        except Image.DecompressionBombError:  # Pillow's own limit
            f.seek(0)
    with _limit_in_pillow(max_pixels):
        return _load(f, max_pixels)


def _load(f: IO[bytes], max_pixels: int) -> Image.Image:
    try:
        image = Image.open(f, formats=formats())
    except UnidentifiedImageError:  # whose message is the address of an object
        raise UnidentifiedImageError("its content is of no image format that is read") from None
    width, height = image.size
    if width * height > max_pixels:
        raise ValueError(f"{width} x {height} pixels are more than --max_image_pixels {max_pixels}")
    image.load()
    return image


@contextmanager
def _limit_in_pillow(max_pixels: int) -> Iterator[None]:
    """Let Pillow itself refuse more pixels, with ValueError: also of an image inside an icon, which it decodes when it
    opens the icon.

    Its limit is one for the whole process: changed for as short as possible, by one thread at a time.
    """
    with _LIMIT_LOCK, warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, (max_pixels + 1) // 2  # it refuses twice that
        try:
            yield
        except Image.DecompressionBombError:
            raise ValueError(f"it has more pixels than --max_image_pixels {max_pixels}") from None
        finally:
            Image.MAX_IMAGE_PIXELS = limit


def _without_texts(f: IO[bytes]) -> IO[bytes]:
    """A PNG without its texts and colour profile: Pillow would unpack them, and refuse large ones. Other files as they
    are."""
    if f.read(len(_PNG_SIGNATURE)) != _PNG_SIGNATURE:
        f.seek(0)
        return f
    kept = io.BytesIO()
    kept.write(_PNG_SIGNATURE)
    while head := f.read(8):  # the chunk's length and type; a checksum follows its data
        length, kind = int.from_bytes(head[:4], "big"), head[4:]
        if kind in _PNG_TEXTS:
            f.seek(length + 4, io.SEEK_CUR)
        else:
            kept.write(head)
            kept.write(f.read(length + 4))
        if kind == b"IEND":
            break
    kept.seek(0)
    return kept


def as_shown(image: Image.Image, reading: ReadingConfig = _DEFAULT_READING) -> Decoded:
    """A loaded image upright, in 8 bits, without palette: in the mode of `MODES` that holds it without loss.

    With --published_decoding it stays as it is stored.
    Raises ValueError for pixels that have no such form.
    """
    if reading.published_decoding:
        Image.new(image.mode, (1, 1)).convert("RGB")  # fails for the modes that Pillow cannot convert
        return Decoded(image)
    done = []
    turn = _TURNS.get(_orientation(image))
    if turn is not None:
        image = image.transpose(turn)
        done.append("rotated by EXIF")
    if image.mode[0] in "IF":
        done.append("floating-point" if image.mode == "F" else "16-bit")
        image = _to_8_bits(image)
    mode = _native_mode(image)
    return Decoded(image if image.mode == mode else image.convert(mode), tuple(done))


def _orientation(image: Image.Image) -> Any:
    try:
        return image.getexif().get(_ORIENTATION)
    except Exception:  # Pillow raises many kinds for damaged EXIF, which viewers ignore
        return None


def _native_mode(image: Image.Image) -> str:
    transparent = image.mode in _WITH_ALPHA or "transparency" in image.info
    if image.mode == "P" and image.palette is not None:
        transparent |= image.palette.mode.endswith("A")
    return ("LA" if transparent else "L") if image.mode in ("1", "L", "LA", "La") else "RGBA" if transparent else "RGB"


def _to_8_bits(image: Image.Image) -> Image.Image:
    """Integers of up to 16 bits, or floats in [0, 1], as grey; with alpha where one value is transparent."""
    values = np.asarray(image)
    if image.mode == "F":
        if not np.all((values >= 0) & (values <= 1)):
            raise ValueError("it has floating-point pixels outside of 0 to 1")
        return Image.fromarray(np.rint(values * 255).astype(np.uint8))
    tags: Mapping[int, Any] = getattr(image, "tag_v2", {})  # of a TIFF
    largest: int = 2 ** min(tags.get(_BITS_PER_SAMPLE, (16,))[0], 16) - 1
    if np.any((values < 0) | (values > largest)):
        raise ValueError(f"it has pixels outside of 0 to {largest}")
    grey = Image.fromarray(((values.astype(np.uint32) * 255 + largest // 2) // largest).astype(np.uint8))
    if "transparency" in image.info:
        grey.putalpha(Image.fromarray(np.where(values == image.info["transparency"], 0, 255).astype(np.uint8)))
    return grey


def with_channels(decoded: Decoded, channels: int, reading: ReadingConfig, name: str) -> Decoded:
    """An image `as_shown` with a number of channels: on --background where it loses its alpha.

    With --published_decoding it stays as it is stored: `to_mode` converts it after resizing.
    Raises UserError where colour would be lost.
    """
    image, done = decoded
    if reading.published_decoding:
        if channels != 3:
            raise UserError(f"--published_decoding True reads RGB: --channels {channels} needs our own decoding")
        return decoded
    has = len(image.getbands())
    if channels in (1, 3) and has in (2, 4):
        if image.getchannel("A").getextrema() != (255, 255):
            done = (*done, f"transparent on {reading.background}")
        image = _on_background(image, reading.background, grey=channels == 1)
    if channels in (1, 2) and has in (3, 4):
        if not is_grey(image):
            raise UserError(
                f"{name} has {has} channels ({decoded.image.mode}) and colour, but the model has --channels "
                f"{channels}: convert the images to grey or, for a new model, give --channels {has}"
            )
        done = (*done, "grey stored as colour")
    return Decoded(to_mode(image, channels), done)


def to_mode(image: Image.Image, channels: int) -> Image.Image:
    """The image in the mode of `MODES` for a number of channels."""
    return image if image.mode == MODES[channels] else image.convert(MODES[channels])


def is_grey(image: Image.Image) -> bool:
    """Whether all pixels of an image of a mode in `MODES` are grey, where they are not transparent."""
    if image.mode == "RGBA":
        image = _on_background(image, "black")
    if image.mode != "RGB":
        return True
    red, green, blue = image.split()
    return all(ImageChops.difference(red, other).getbbox() is None for other in (green, blue))


def _on_background(image: Image.Image, background: str, grey: bool = False) -> Image.Image:
    """An LA or RGBA image on a colour, as RGB; `grey`: on the colour's lightness, and as L if the image is LA."""
    mode = "L" if grey and image.mode == "LA" else "RGB"
    shade = "L" if grey else "RGB"
    pixel = Image.new(shade, (1, 1), background).convert(mode).getpixel((0, 0))
    ground = Image.new(mode, image.size, pixel)
    ground.paste(image.convert(mode), mask=image.getchannel("A"))
    return ground


def opaque(image: Image.Image) -> Image.Image:
    """An image of a mode in `MODES` without its alpha: on white."""
    return image if image.mode in ("L", "RGB") else _on_background(image, "white")


# Arrays as images


def to_image(array: np.ndarray) -> Image.Image:
    """uint8 [H, W, C] with 1 to 4 channels -> an image."""
    return Image.fromarray(array[..., 0] if array.shape[-1] == 1 else array, MODES[array.shape[-1]])


def to_array(image: Image.Image, channels: int) -> np.ndarray:
    """An image -> uint8 [H, W, C] with this number of channels."""
    return np.asarray(to_mode(image, channels)).reshape(image.size[1], image.size[0], channels)


def encode_png(array: np.ndarray) -> bytes:
    """uint8 [H, W, C] -> the bytes of a PNG."""
    buffer = io.BytesIO()
    to_image(array).save(buffer, "PNG")
    return buffer.getvalue()


def is_whole_png(data: bytes) -> bool:
    """Whether the bytes are a complete PNG of a size that Pillow reads, by its checksums; nothing is decoded."""
    try:
        Image.open(io.BytesIO(data), formats=["PNG"]).verify()
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError):
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
    if array.dtype != np.uint8:
        raise ValueError(f"a PNG of {array.dtype}")
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
    first, *others = [opaque(to_image(frame)) for frame in enlarge(frames, SHOWN_SIDE)]
    buffer = io.BytesIO()
    first.save(buffer, "GIF", save_all=True, append_images=others, duration=milliseconds, loop=0)
    files.write_bytes(path, buffer.getvalue())


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
    with _open_npz(path) as archive:
        return [name.removesuffix(".npy") for name in archive.namelist()]


def read_npz(path: str, names: Sequence[str]) -> dict[str, np.ndarray]:
    """The named arrays that are in an npz.

    Raises UserError for a damaged file, for objects, which could run code, and for arrays that the memory cannot hold.
    """
    with _open_npz(path) as archive:
        members = {name.removesuffix(".npy"): name for name in archive.namelist()}
        return {name: _read_array(archive, members[name], name) for name in names if name in members}


@contextmanager
def _open_npz(path: str) -> Iterator[zipfile.ZipFile]:
    """The archive that an npz is; what is wrong with it or in it becomes UserError."""
    try:
        with files.open_read(path) as f:
            if f.read(len(_ARRAY_MAGIC)) == _ARRAY_MAGIC:
                raise UserError(f"{path} is a single array, not an npz: save it with np.savez")
            f.seek(0)
            with zipfile.ZipFile(f) as archive:
                yield archive
    except _WrongArray as error:
        raise UserError(f"{path} {error}") from None
    except UserError:
        raise
    except Exception as error:  # numpy and zipfile raise many kinds for damaged files
        raise UserError(f"{path} is not a readable npz: {str(error) or type(error).__name__}") from None


class _WrongArray(ValueError):
    """An array that is not read, for a reason that follows the file's name."""


def _read_array(archive: zipfile.ZipFile, member: str, name: str) -> np.ndarray:
    info = archive.getinfo(member)
    with archive.open(info) as f:
        shape, dtype, start = _read_header(f, name)
    if dtype.hasobject:
        raise _WrongArray("holds Python objects, which could run code when loaded: save it again as numbers")
    size = math.prod(shape) * dtype.itemsize
    # Before memory is allocated. A compressed member is at most about 1030 times as long as it is in the file.
    if size != info.file_size - start or info.file_size > 2000 * info.compress_size:
        raise _WrongArray(f"is not a readable npz: {name} is not {dtype} of shape {shape}, as it says")
    if not size and shape[:1] != (0,):  # a small file may state any number of them
        raise _WrongArray(f"has {name} of {dtype} {shape}, which holds no values: save it again with np.savez")
    if size > max(MAX_EXPANDED_BYTES, MAX_EXPANSION * info.compress_size):
        raise _WrongArray(
            f"unpacks {name} from {info.compress_size:,} bytes to {size / 2**30:,.1f} GiB: save it again with np.savez "
            "if that is right"
        )
    if size > _memory_bytes():
        raise _WrongArray(f"needs {size / 2**30:,.0f} GiB of memory for {name}, more than this machine has: split it")
    with archive.open(info) as f:
        return np.lib.format.read_array(f, allow_pickle=False)


def _read_header(f: IO[bytes], name: str) -> tuple[tuple[int, ...], np.dtype, int]:
    """(shape, dtype, length of the header) of an array in an npz."""
    if f.read(len(_ARRAY_MAGIC)) != _ARRAY_MAGIC:
        raise _WrongArray(f"is not a readable npz: {name} is not an array")
    version = f.read(2)
    read = {b"\1\0": np.lib.format.read_array_header_1_0, b"\2\0": np.lib.format.read_array_header_2_0}.get(version)
    if read is None:
        raise _WrongArray(f"is not a readable npz: {name} is in version {list(version)} of numpy's format")
    shape, _, dtype = read(f)
    return shape, dtype, f.tell()


def _memory_bytes() -> float:
    if not hasattr(os, "sysconf"):  # Windows
        return math.inf
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def load_npz(path: str) -> np.ndarray:
    """The images of an npz, its `arr_0`, as uint8 [N, H, W, C]; [N, H, W] are grey.

    Raises UserError for a damaged file, for objects, which could run code, and for other shapes or types.
    """
    images = read_npz(path, ("arr_0",)).get("arr_0")
    if images is None or images.dtype != np.uint8 or images.ndim not in (3, 4) or not images.size:
        found = f"no arr_0 but {_listed(npz_names(path))}"
        if images is not None:
            found = f"arr_0 of {images.dtype} {images.shape}"
        raise UserError(
            f"{path} has {found}: expected arr_0 of uint8 [N, height, width, channels], as np.savez(path, images) "
            "writes it"
        )
    if images.ndim == 3:
        images = images[..., None]
    if images.shape[-1] not in MODES:
        advice = ": transpose it, images.transpose(0, 2, 3, 1)" if images.shape[1] in MODES else ""
        raise UserError(f"{path} has arr_0 of shape {images.shape}: the last number must be 1 to 4 channels{advice}")
    return images


def _listed(names: Sequence[str]) -> str:
    return (", ".join(names[:8]) + (", ..." if len(names) > 8 else "")) or "nothing"


@lru_cache(maxsize=1)
def extensions() -> frozenset[str]:
    """The suffixes of `formats`, such as ".jpg", in lower case."""
    formats()
    return frozenset(suffix for suffix, name in Image.registered_extensions().items() if name in FORMATS)


def is_image_name(name: str) -> bool:
    """Whether the file name has the suffix of a supported image format."""
    return os.path.splitext(name)[1].lower() in extensions()
