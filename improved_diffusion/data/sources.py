"""Collections of images: folders, zips and npz files, local or on blob storage."""

from __future__ import annotations

import io
import os
import weakref
import zipfile
import zlib
from collections.abc import Sequence
from functools import cached_property, lru_cache
from typing import Any

import numpy as np
from PIL import Image

from ..config import MAX_IMAGE_PIXELS, UserError, one_line
from ..logs import logger
from ..utils import files, images
from .listing import HEAD_BYTES, LeftOut, is_image_head, list_folder, list_zip, parts_of

HEIC = {".heic", ".heif"}  # which Pillow does not read
HEIC_ADVICE = (
    ": convert .heic photos to JPEG first (or take JPEGs: on an iPhone, Settings > Camera > Formats > Most Compatible)"
)
_MEMBER_HEADER_BYTES = 30  # before each file in a zip, without its name
MAX_MEMBER_BYTES = 2**30  # of an image in a zip, which is unpacked in memory


class FolderImages:
    """The images below a folder, local or on blob storage."""

    def __init__(self, root: str, paths: Sequence[str] | None = None):
        self.root = root
        self.left_out = LeftOut()
        if paths is None:
            paths, self.left_out = list_folder(root)
        self.paths = list(paths)

    def __len__(self) -> int:
        return len(self.paths)

    def name(self, i: int) -> str:
        """The image's path below the folder."""
        return self.paths[i][len(self.root) :].lstrip("/\\") if self.root else self.paths[i]

    def describe(self, i: int) -> str:
        """The image's full name, for messages."""
        return one_line(self.paths[i])

    def version(self, i: int) -> str:
        """What is another where the image is: its size and time. Raises UserError below a URL, where asking takes too
        long."""
        if files.is_url(self.paths[i]):
            raise UserError(f"{self.describe(i)} is below a URL: copy the images to a local folder or zip")
        try:
            found = os.stat(self.paths[i])
        except OSError:  # said where it is read
            return "gone"
        return f"{found.st_size} {found.st_mtime_ns}"

    def read(self, i: int, max_pixels: int = MAX_IMAGE_PIXELS) -> Image.Image:
        """The decoded image, as it is stored."""
        with files.open_read(self.paths[i]) as f:
            return images.load(f, max_pixels)


class ZipImages:
    """The images in a zip archive."""

    def __init__(self, path: str):
        self.path = path
        self._version = None if files.is_url(path) else _version(path)
        try:
            archive = self._archive()
        except UserError:
            raise
        except Exception as error:  # zipfile raises many kinds for damaged files
            raise UserError(f"{path} is not a readable zip: {error or type(error).__name__}") from None
        # Before their directory; one that is listed a million times would be read as often.
        if sum(info.compress_size + _MEMBER_HEADER_BYTES for info in archive.infolist()) > archive.start_dir:
            raise UserError(f"{path} lists more than it holds: its files overlap; unpack it and name the folder")
        self.members, self.left_out = list_zip(archive)
        for member in self.members:
            if archive.getinfo(member).flag_bits & 1:
                raise UserError(f"{path} is encrypted: unpack it with its password and name the folder")

    def _archive(self) -> zipfile.ZipFile:
        return _open_zip(files.full_path(self.path), self._version, os.getpid())

    def __len__(self) -> int:
        return len(self.members)

    def name(self, i: int) -> str:
        """The image's path in the archive, without "..", "." and a drive."""
        return "/".join(parts_of(self.members[i]))

    def describe(self, i: int) -> str:
        return f"{self.path}:{one_line(self.members[i])}"

    def version(self, i: int) -> str:
        info = self._archive().getinfo(self.members[i])
        return f"{info.file_size} {info.CRC}"

    def read(self, i: int, max_pixels: int = MAX_IMAGE_PIXELS) -> Image.Image:
        return images.load(io.BytesIO(self._bytes(i)), max_pixels)

    def _bytes(self, i: int) -> bytes:
        """The member's content. Raises OSError where it is damaged or too long."""
        archive = self._archive()
        # No member is read beyond the size that it states.
        if archive.getinfo(self.members[i]).file_size > MAX_MEMBER_BYTES:
            raise OSError(f"it unpacks to more than {MAX_MEMBER_BYTES / 2**30:g} GiB")
        try:
            return archive.read(self.members[i])
        except Exception as error:  # zipfile and its decoders raise many kinds for damaged members
            raise OSError(error or type(error).__name__) from None


def _version(path: str) -> tuple[int, ...]:
    """What is another for a file that has been written again."""
    found = os.stat(path)
    return found.st_ino, found.st_mtime_ns, found.st_size


@lru_cache(maxsize=4)
def _open_zip(path: str, version: tuple[int, ...] | None, pid: int) -> zipfile.ZipFile:
    # One handle per process: a shared one has one position.
    f = files.open_read(path)
    try:
        archive = zipfile.ZipFile(f)
    except BaseException:
        f.close()
        raise
    weakref.finalize(archive, f.close)  # a ZipFile does not close a file that it did not open
    return archive


class ArrayImages:
    """The images of an npz: arr_0 uint8 [N, H, W, C], and optionally their labels, arr_1."""

    left_out = LeftOut()

    def __init__(self, path: str):
        self.path = path
        self.arrays = images.load_npz(path)

    @cached_property
    def labels(self) -> np.ndarray | None:
        """arr_1 as it is, which is not read before it is needed; None where there is none."""
        return images.read_npz(self.path, ("arr_1",)).get("arr_1")

    def __len__(self) -> int:
        return len(self.arrays)

    def name(self, i: int) -> str:
        return str(i)

    def describe(self, i: int) -> str:
        return f"{self.path}[{i}]"

    def version(self, i: int) -> str:
        return str(zlib.crc32(self.arrays[i].tobytes()))

    def read(self, i: int, max_pixels: int = MAX_IMAGE_PIXELS) -> Image.Image:
        return images.to_image(self.arrays[i])


def open_images(data_dir: str, what: str = "--data_dir") -> Any:
    """The images of a folder, a .zip or an .npz. What is left out is logged. Raises UserError if there are none."""
    if not data_dir:
        raise UserError(f"{what} is missing: name a folder of images, a .zip or an .npz")
    _check_exists(data_dir, what)
    lower = data_dir.lower()
    found: Any
    if files.is_dir(data_dir):
        found = FolderImages(data_dir)
    elif lower.endswith(".zip"):
        found = ZipImages(data_dir)
    elif lower.endswith(".npz"):
        found = ArrayImages(data_dir)
    else:
        raise UserError(f"{what} {data_dir} is neither a folder nor a .zip nor an .npz{_advice(lower)}")
    if not len(found):
        holds = f"left out: {found.left_out}" if found.left_out else "it is empty"
        advice = HEIC_ADVICE if HEIC & found.left_out.counts.keys() else ""
        raise UserError(
            f"{what} {data_dir} holds no images that Pillow reads, such as .jpg, .png or .webp ({holds}){advice}"
        )
    if found.left_out:
        logger.log(f"{what} {data_dir}: left out {found.left_out}")
    return found


def _check_exists(path: str, what: str) -> None:
    if files.exists(path):
        return
    hint = f": did you mean {path.strip()}, without blanks around it?" if path != path.strip() else ""
    raise UserError(f"{what} {path} does not exist{hint}")


def _advice(path: str) -> str:
    if path.endswith(".npy"):
        return ": it is a single array, save it with np.savez"
    if os.path.splitext(path)[1] in HEIC:
        return HEIC_ADVICE
    if images.is_image_name(path):
        return ": it is a single image, name its folder"
    if path.endswith((".tar", ".tgz", ".gz", ".7z", ".rar", ".bz2", ".xz")):
        return ": unpack it and name the folder"
    return ""


def stem(name: str) -> str:
    """The name of an image's file without folder and extension."""
    return os.path.splitext(os.path.basename(name.replace("\\", "/")))[0]


def open_pictures(path: str, what: str) -> Any:
    """Like open_images; also accepts one or more image files, separated by commas."""
    if not path:
        raise UserError(f"{what} is missing: name an image, several separated by commas, a folder, a .zip or an .npz")
    if path.lower().endswith((".zip", ".npz")) or files.is_dir(path):
        return open_images(path, what)
    paths = [path] if files.exists(path) else path.split(",")
    for each in paths:
        _check_exists(each, what)
    if len(paths) == 1 and not _is_image(path):
        return open_images(path, what)
    for each in paths:
        if not _is_image(each):
            advice = _advice(each.lower()) or ": name images, or one folder"
            raise UserError(f"{what} {each} is not an image that Pillow reads{advice}")
    return FolderImages("", paths)


def _is_image(path: str) -> bool:
    if files.is_url(path):
        return images.is_image_name(path)
    with files.open_read(path) as f:
        return images.is_image_name(path) or is_image_head(f.read(HEAD_BYTES))
