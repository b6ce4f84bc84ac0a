"""The folders that an operator opens to others. They name what is in them, and no name leads out."""

from __future__ import annotations

import os
import re
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from PIL import Image

from ..config import UserError, shown
from ..data.listing import is_hidden, is_run
from ..data.sources import open_images
from ..utils import files, images

DEPTH = 4  # of the folders that are listed
LONGEST_NAME = 100  # of a new folder
MOST_LISTED = 500  # names in a list
MOST_ENTRIES = 200_000  # files and folders that one listing looks at
MOST_SECONDS = 5.0  # that one listing takes
LARGEST_SHOWN = 2**30  # bytes of a zip or an npz of which images are shown


class Root:
    """A folder, and everything below it. Links that leave it do not count as below."""

    def __init__(self, path: str | os.PathLike):
        self.path = os.path.realpath(os.path.expanduser(path))
        if not os.path.isdir(self.path):
            raise UserError(f"{path} is not a folder")

    def path_of(self, name: str, what: str) -> str:
        """The path, without links, of a file or folder named relative to this one.

        :param what: the name is, for the message.
        Raises UserError for a name that leads out of the folder, and for one that does not exist.
        """
        missing = UserError(f"{what} {shown(name)}: there is nothing of that name")
        if not name or "\0" in name or files.is_url(name) or os.path.isabs(name) or ".." in name.split("/"):
            raise missing
        path = os.path.realpath(os.path.join(self.path, name))
        if not self.holds(path) or not os.path.exists(path):
            raise missing
        return path

    def holds(self, path: str) -> bool:
        """Whether a path is this folder or below it, once links are followed."""
        real = os.path.realpath(path)
        return os.path.commonpath([self.path, real]) == self.path

    def name_of(self, path: str) -> str:
        """The name by which `path_of` finds a path."""
        return os.path.relpath(os.path.realpath(path), self.path)

    def new_folder(self, name: str) -> str:
        """The path of a folder to make, of this name, directly below. Raises UserError for a name that will not do."""
        if not re.fullmatch(r"\w[\w .+=-]*(?<![ .])", name) or len(name) > LONGEST_NAME:
            raise UserError(
                f"the name {shown(name)}: give letters, digits, blanks or . _ + = -, a letter or a digit first, at "
                f"most {LONGEST_NAME}"
            )
        path = os.path.join(self.path, name)
        if os.path.lexists(path):
            raise UserError(f"{name} exists already: choose another name")
        return path

    def free_name(self, like: str) -> str:
        """A name for `new_folder`, made of any text."""
        stem = re.sub(r"[^\w+=-]+", "_", os.path.splitext(like)[0]).strip("_-+=")[: LONGEST_NAME - 10] or "run"
        path = os.path.join(self.path, stem)
        return os.path.basename(files.unused(path) if os.path.lexists(path) else path)

    def walk(self, depth: int = DEPTH) -> Iterator[tuple[str, list[os.DirEntry[str]]]]:
        """(path, entries) of this folder and those below it, sorted, without hidden ones and without links out of it.

        It ends after MOST_ENTRIES or MOST_SECONDS.
        """
        until, seen = time.monotonic() + MOST_SECONDS, 0
        waiting = [(self.path, 0)]
        while waiting and seen < MOST_ENTRIES and time.monotonic() < until:
            folder, level = waiting.pop()
            try:
                with os.scandir(folder) as found:
                    entries = sorted((e for e in found if self._counts(e)), key=lambda entry: entry.name)
            except OSError:  # it may not be read, or is gone: there is nothing to offer
                continue
            seen += len(entries)
            yield folder, entries
            if level < depth:
                waiting += [(entry.path, level + 1) for entry in reversed(entries) if _is_folder(entry)]

    def _counts(self, entry: os.DirEntry[str]) -> bool:
        return not is_hidden(entry.name) and (not entry.is_symlink() or (entry.is_file() and self.holds(entry.path)))


def _is_folder(entry: os.DirEntry[str]) -> bool:
    return entry.is_dir(follow_symlinks=False)


@dataclass(frozen=True)
class DataSet:
    """Images below the data root. :param count: of images; None for a file that is not opened to count them."""

    name: str
    count: int | None

    def __str__(self) -> str:
        return self.name if self.count is None else f"{self.name} ({self.count:,} images)"


class DataRoot(Root):
    """The folder whose images may be trained on."""

    def sets(self) -> list[DataSet]:
        """The folders with images in them or below them, and the files .zip and .npz, in the order of their names."""
        counts: Counter[str] = Counter()
        single = []
        for folder, entries in self.walk():
            names = [entry.name for entry in entries if not _is_folder(entry)]
            if folder != self.path and is_run(entry.name for entry in entries):
                continue
            here = sum(map(images.is_image_name, names))
            single += [os.path.join(folder, name) for name in names if name.lower().endswith((".zip", ".npz"))]
            while here and self.holds(folder):
                counts[folder] += here
                folder = os.path.dirname(folder)
        found = [DataSet(self.name_of(folder), count) for folder, count in counts.items()]
        found += [DataSet(self.name_of(path), None) for path in single]
        return sorted(found, key=lambda each: each.name)[:MOST_LISTED]

    def thumbnails(self, name: str, count: int = 8, side: int = 96) -> list[Image.Image]:
        """A few images of a set, evenly spaced, at most `side` pixels wide and high. Raises UserError as training does.

        None of those that cannot be read are shown, nor images behind links that leave the root.
        """
        path = self.path_of(name, "--data_dir")
        if not os.path.isdir(path) and os.path.getsize(path) > LARGEST_SHOWN:
            return []
        source = open_images(path)
        shown_images = []
        for i in np.unique(np.linspace(0, len(source) - 1, count).astype(int)):
            if os.path.isdir(path) and not self.holds(source.paths[i]):
                continue
            try:
                image = images.opaque(images.as_shown(source.read(int(i))).image)
            except (OSError, ValueError, SyntaxError):  # training names the images that it cannot read
                continue
            image.thumbnail((side, side))
            shown_images.append(image)
        return shown_images

    def label_files(self) -> list[str]:
        """The names of the files that may hold classes."""
        found = [
            self.name_of(entry.path)
            for _, entries in self.walk()
            for entry in entries
            if entry.name.lower().endswith((".json", ".csv", ".tsv")) and entry.is_file()
        ]
        return sorted(found)[:MOST_LISTED]
