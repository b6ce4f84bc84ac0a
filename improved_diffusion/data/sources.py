"""Collections of images (folders, zips and npz files, local or on blob storage) and the classes of their images."""

from __future__ import annotations

import io
import json
import os
import weakref
import zipfile
from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import Any

from PIL import Image

from ..config import MAX_IMAGE_PIXELS, UserError
from ..utils import files, images

MAX_CLASSES = 100_000  # a larger label is a mistake, and would make an embedding of that many rows


class FolderImages:
    """The images below a folder, local or on blob storage."""

    def __init__(self, root: str, paths: Sequence[str] | None = None):
        self.root = root
        self.paths = list(_list_recursively(root) if paths is None else paths)

    def __len__(self) -> int:
        return len(self.paths)

    def name(self, i: int) -> str:
        """The image's path below the folder."""
        return self.paths[i][len(self.root) :].lstrip("/\\") if self.root else self.paths[i]

    def describe(self, i: int) -> str:
        """The image's full name, for messages."""
        return self.paths[i]

    def read(self, i: int, max_pixels: int = MAX_IMAGE_PIXELS) -> Image.Image:
        """The decoded image, as it is stored."""
        with files.open_read(self.paths[i]) as f:
            return images.load(f, max_pixels)


class ZipImages:
    """The images in a zip archive."""

    def __init__(self, path: str):
        self.path = path
        try:
            # A name may occur twice if a file was added again: the last one counts, as in unpacking.
            members = [n for n in set(self._archive().namelist()) if images.is_image_name(n)]
            members = [n for n in members if not n.startswith("__MACOSX/")]
        except zipfile.BadZipFile as error:
            raise UserError(f"{path} is not a readable zip: {error}") from None
        self.members = sorted(members, key=lambda name: name.split("/"))

    def _archive(self) -> zipfile.ZipFile:
        return _open_zip(self.path, os.getpid())

    def __len__(self) -> int:
        return len(self.members)

    def name(self, i: int) -> str:
        return self.members[i]

    def describe(self, i: int) -> str:
        return f"{self.path}:{self.members[i]}"

    def read(self, i: int, max_pixels: int = MAX_IMAGE_PIXELS) -> Image.Image:
        return images.load(io.BytesIO(self._archive().read(self.members[i])), max_pixels)


@lru_cache(maxsize=4)
def _open_zip(path: str, pid: int) -> zipfile.ZipFile:
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

    def __init__(self, path: str):
        self.path = path
        arrays = images.load_npz(path)
        self.arrays, self.labels = arrays["arr_0"], arrays.get("arr_1")

    def __len__(self) -> int:
        return len(self.arrays)

    def name(self, i: int) -> str:
        return str(i)

    def describe(self, i: int) -> str:
        return f"{self.path}[{i}]"

    def read(self, i: int, max_pixels: int = MAX_IMAGE_PIXELS) -> Image.Image:
        return images.to_image(self.arrays[i])


def _list_recursively(directory: str, above: tuple[str, ...] = ()) -> Iterator[str]:
    """Image paths, depth first, the entries of each directory in sorted order.

    :param above: the parent directories; links back to them are not followed.
    """
    above = (*above, directory if files.is_url(directory) else os.path.realpath(directory))
    for entry in files.list_dir(directory):
        path = files.join(directory, entry)
        if images.is_image_name(entry):
            yield path
        elif files.is_dir(path) and (files.is_url(path) or os.path.realpath(path) not in above):
            yield from _list_recursively(path, above)


def open_images(data_dir: str, what: str = "--data_dir") -> Any:
    """The images of a folder, a .zip or an .npz. Raises UserError if there are none."""
    if not data_dir:
        raise UserError(f"{what} is missing: name a folder of images, a .zip or an .npz")
    if not files.exists(data_dir):
        raise UserError(f"{what} {data_dir} does not exist")
    lower = data_dir.lower()
    found: Any
    if lower.endswith(".zip"):
        found = ZipImages(data_dir)
    elif lower.endswith(".npz"):
        found = ArrayImages(data_dir)
    elif files.is_dir(data_dir):
        found = FolderImages(data_dir)
    else:
        raise UserError(f"{what} {data_dir} is neither a folder nor a .zip nor an .npz")
    if not len(found):
        raise UserError(f"{what} {data_dir} holds no images ({', '.join(images.EXTENSIONS)})")
    return found


def stem(name: str) -> str:
    """The name of an image's file without folder and extension."""
    return os.path.splitext(os.path.basename(name.replace("\\", "/")))[0]


def open_pictures(path: str, what: str) -> Any:
    """Like open_images; also accepts one or more image files, separated by commas."""
    paths = path.split(",")
    if not files.is_dir(path) and all(map(images.is_image_name, paths)):
        for each in paths:
            if not files.exists(each):
                raise UserError(f"{what} {each} does not exist")
        return FolderImages("", paths)
    return open_images(path, what)


def read_classes(source: Any, labels: str, data_dir: str, few: bool = False) -> tuple[list[int], list[str]]:
    """(the class index of each image, the classes' names). `labels` is prefix, folder or the path of a JSON file.

    :param few: allow data sets with only one image of each class.
    Raises UserError if the images have no classes of that kind.
    """
    if isinstance(source, ArrayImages):
        if source.labels is None:
            raise UserError(f"{data_dir} has no arr_1, so its images have no classes: drop --class_cond")
        return _index_classes([int(y) for y in source.labels], data_dir)
    names = [source.name(i).replace("\\", "/") for i in range(len(source))]
    if labels == "prefix":
        found: list[Any] = [name.split("/")[-1].split("_")[0] for name in names]
    elif labels == "folder":
        found = [name.rpartition("/")[0] for name in names]
        if "" in found:
            raise UserError(f"--labels folder: {names[found.index('')]} is in no folder below {data_dir}")
    else:
        table = _read_label_file(labels)
        missing = [name for name in names if name not in table]
        if missing:
            raise UserError(
                f"--labels {labels} has no label for {missing[0]} and {len(missing) - 1} more of {len(names)} images"
            )
        found = [table[name] for name in names]
    if len(set(found)) == len(found) > 1 and not few:
        raise UserError(
            f"--class_cond True with --labels {labels}: each of the {len(found)} images in {data_dir} would be a class "
            "of its own; name the files class_number.png, or use --labels folder or a JSON file, or drop --class_cond"
        )
    return _index_classes(found, labels)


def _index_classes(found: list[Any], where: str) -> tuple[list[int], list[str]]:
    if all(isinstance(label, int) for label in found):
        if min(found) < 0:
            raise UserError(f"the labels in {where} must not be negative, found {min(found)}: number them from 0")
        if max(found) >= MAX_CLASSES:
            raise UserError(f"the labels in {where} go up to {max(found)}: number the classes from 0, without gaps")
        return found, [str(i) for i in range(max(found) + 1)]
    names = sorted({str(label) for label in found})
    index = {name: i for i, name in enumerate(names)}
    return [index[str(label)] for label in found], names


def _read_label_file(path: str) -> dict[str, Any]:
    """Path -> class name or index, from a JSON object or list of pairs, at the top or under "labels"."""
    try:
        content = json.loads(files.read_bytes(path))
        if isinstance(content, dict) and "labels" in content:
            content = content["labels"]
        table = dict(content)
    except (ValueError, TypeError):
        raise UserError(
            f'--labels {path}: expected JSON such as {{"cat/001.png": "cat"}} or [["001.png", 3]]'
        ) from None
    for name, label in table.items():
        if isinstance(label, bool) or not isinstance(label, (int, str)):
            raise UserError(f"--labels {path}: the label of {name} must be a name or an integer, not {label!r}")
    return table
