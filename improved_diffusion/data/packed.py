"""The packed cache: the resized images of a data set in one file, which every process maps into its memory.

A folder for each data set and each choice of the options that change pixels holds

    pixels-VERSION.npy     uint8 [N, H, W, C]
    cache.json             what it holds; written when all images are in
    packing.json, parts-*  in its place while the file is being written, see `packing`

VERSION is a digest of the images' names, sizes and times, so that the file of other images has another name.
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
import os
import re
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import PIL
from PIL import features

from ..config import UserError
from ..utils import files
from .dataset import ImageDataset
from .sources import ZipImages
from .store import PixelStore

FORMAT = 1  # another one where our own code makes other pixels of the same file
ABOUT, PACKING = "cache.json", "packing.json"
_NAMES_AT_ONCE = 1000


class CacheError(UserError):
    """No cache can be made or read, for a reason that is not the images'."""


class Place:
    """The cache of a data set: where it is, and what it must be of."""

    def __init__(self, root: str, dataset: ImageDataset, data_dir: str):
        self.shape, self.data_dir = dataset.shape, data_dir
        self.bytes = math.prod(self.shape)
        size = "x".join(map(str, self.shape[1:]))
        self.identity: dict[str, Any] = {
            "format": FORMAT, "size": size, "reading": dataclasses.asdict(dataset.reading),
            "pillow": PIL.__version__, "jpeg": features.version("jpg"),
        }  # fmt: skip
        name = re.sub(r"[^\w.-]+", "_", os.path.basename(os.path.abspath(data_dir)))[:40]
        of_options = _digest([files.full_path(data_dir), repr(self.identity)])
        self.folder = os.path.join(root, f"{name}-{size}-{of_options[:12]}")

    def look_at(self, source: Any) -> None:
        """Take in which images there are. Raises UserError where that cannot be told."""
        self.identity = {**self.identity, "images": _digest_of_images(source)}

    @property
    def pixels(self) -> str:
        """The path of the pixels."""
        return self.file(f"pixels-{self.identity['images'][:12]}.npy")

    def file(self, name: str) -> str:
        """The path of a file of the cache."""
        return os.path.join(self.folder, name)

    def find(self) -> tuple[PixelStore | None, str]:
        """(the packed images, ""), or (None, why there are none that can be used; "" where there are none at all)."""
        if not os.path.exists(self.file(ABOUT)):
            return None, ""
        try:
            about = files.read_json(self.file(ABOUT))
            if about["identity"] != self.identity:
                return None, f"the images in {self.data_dir} are others than when they were packed"
            return PixelStore.in_file(self.pixels, self.shape, self.offset(), about["missing"], about["done"]), ""
        except (UserError, OSError, ValueError, TypeError, KeyError, IndexError) as error:
            return None, f"{self.folder} is damaged ({error})"

    def offset(self) -> int:
        """Where the pixels begin in their file. Raises ValueError for a file of another shape or length."""
        with open(self.pixels, "rb") as f:
            np.lib.format.read_magic(f)
            shape, _, dtype = np.lib.format.read_array_header_1_0(f)
            offset = f.tell()
            length = f.seek(0, os.SEEK_END)
        if shape != self.shape or dtype != np.uint8:
            raise ValueError(f"{os.path.basename(self.pixels)} has {dtype} {shape} instead of uint8 {self.shape}")
        if length != offset + self.bytes:
            raise ValueError(f"{os.path.basename(self.pixels)} has {length:,} bytes instead of {offset + self.bytes:,}")
        return offset

    def clear(self) -> None:
        """Remove what the cache holds, also of earlier versions. Processes that use it keep what they have mapped."""
        if os.path.isdir(self.folder):
            names = [name for name in os.listdir(self.folder) if re.fullmatch(r"pixels-.*\.npy|parts-.*\.jsonl", name)]
            for name in (ABOUT, PACKING, *names):
                files.remove(self.file(name))


def _digest(texts: list[str]) -> str:
    return hashlib.sha256("\0".join(texts).encode(errors="surrogateescape")).hexdigest()


def _digest_of_images(source: Any) -> str:
    """A digest of the names of all images, and of what changes with them."""

    def lines(start: int) -> str:
        some = range(start, min(start + _NAMES_AT_ONCE, len(source)))
        return "".join(f"{source.name(i)}\0{source.version(i)}\n" for i in some)

    digest = hashlib.sha256()
    threads = 1 if isinstance(source, ZipImages) else 8  # which wait for a network file system side by side
    with ThreadPoolExecutor(threads) as pool:
        for text in pool.map(lines, range(0, len(source), _NAMES_AT_ONCE)):
            digest.update(text.encode(errors="surrogateescape"))
    return digest.hexdigest()


def free_bytes(folder: str) -> int:
    """The free bytes of the disk that a folder is on, or will be."""
    there = next(path for path in (Path(folder), *Path(folder).parents) if path.is_dir())
    return shutil.disk_usage(there).free


def advice(place: Place) -> str:
    """What to do about a cache that cannot be written."""
    return (
        f": the cache takes {place.bytes / 2**30:.3g} GiB; free some space, choose another --cache, or give --cache off"
    )


def storage_error(place: Place, error: OSError) -> CacheError:
    """The error of a cache that cannot be written."""
    return CacheError(f"cannot write {place.folder}: {error.strerror or error}{advice(place)}")
