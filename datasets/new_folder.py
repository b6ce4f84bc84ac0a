"""A folder of PNGs that gets its final name when it is complete. Until then it is called NAME.partial, and a later run
continues there. The scripts in this folder write through it."""

from __future__ import annotations

import itertools
import json
import os
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from improved_diffusion.config import UserError
from improved_diffusion.logs import logger
from improved_diffusion.logs.progress import Progress
from improved_diffusion.utils import files, images

MADE_FROM = "made_from.json"  # a file next to the images that says what they were made from


def check_out_dir(out_dir: str, own_names: Iterable[str]) -> Path:
    """The output folder, which may be new. Raises UserError if it contains anything that the command did not write."""
    _refuse_url(out_dir)
    for name in os.listdir(out_dir) if os.path.isdir(out_dir) else ():
        if name.removesuffix(".partial") not in own_names and not name.startswith("."):
            raise UserError(f"{out_dir} is in use, it holds {name}: choose a new or empty output folder")
    return Path(out_dir)


def _refuse_url(path: str | os.PathLike) -> None:
    if files.is_url(path):
        raise UserError(f"cannot write to {path}: name a local folder, then copy it there")


class NewFolder:
    """The folder at `path`. A run with the same `made_from` continues it.

    Raises UserError if something else is there.
    """

    def __init__(self, path: str | os.PathLike, **made_from: Any):
        _refuse_url(path)
        self.name = os.fspath(path)  # as the user wrote it, for messages
        self.made_from = made_from
        self.path = Path(os.path.realpath(path))
        self.partial = self.path.with_name(self.path.name + ".partial")
        self.complete = self.path.exists() and self._is_ours(self.path)
        if self.partial.exists():
            self._is_ours(self.partial)
        if self.path.exists() and not self.complete:
            try:
                self.path.rmdir()  # to be replaced by the complete one; fail now rather than after hours
            except OSError as error:
                raise UserError(f"cannot replace {self.path}: {error.strerror}: choose another folder") from None

    def _is_ours(self, folder: Path) -> bool:
        """Whether the folder has the same source; False if it is empty. Raises UserError for any other folder."""
        try:
            found = json.loads((folder / MADE_FROM).read_bytes())
        except (OSError, ValueError):
            if folder.is_dir() and not any(folder.iterdir()):
                return False
            raise UserError(f"{folder} holds other files: choose a new or empty output folder") from None
        if found != self.made_from:
            then, now = (", ".join(f"{k} {v}" for k, v in x.items()) for x in (found, self.made_from))
            raise UserError(f"{folder} was made from {then}; this is {now}: choose another output folder, or delete it")
        return True

    def write(self, items: Iterable[tuple[str, Any]], total: int, to_array: Callable[[Any], np.ndarray]) -> None:
        """Write the `total` items, each (file name, source of an image); `to_array(source)` is uint8 [H, W, C].

        Images of an earlier run are kept. Raises UserError if the disk is full or an image is damaged.
        """
        if self.complete:
            logger.log(f"{self.name} is complete already")
            return
        files.make_dirs(self.partial)
        files.write_bytes(self.partial / MADE_FROM, json.dumps(self.made_from).encode())
        done = self._whole_images()
        todo = (item for item in items if item[0] not in done)

        def write_one(item: tuple[str, Any]) -> None:
            name, source = item
            files.write_bytes(self.partial / name, images.encode_png(to_array(source)), durable=False)

        progress = Progress(f"writing {self.name}", total, "image", initial=len(done))
        try:
            with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:  # decoding and encoding in parallel
                while chunk := list(itertools.islice(todo, 256)):
                    progress.update(len(list(pool.map(write_one, chunk))))
        finally:
            progress.close()
        if len(self._whole_images()) != total:
            raise UserError(f"{self.partial} should hold {total} images and does not: delete it and run this again")
        if hasattr(os, "sync"):
            os.sync()  # otherwise a power cut after the rename could leave empty files in a folder that looks complete
        try:
            os.replace(self.partial, self.path)
        except OSError as error:
            raise UserError(f"cannot rename {self.partial} to {self.path}: {error.strerror}") from None
        logger.log(f"{self.name} is complete: {total} images")

    def _whole_images(self) -> set[str]:
        """The names of the images written so far. Files that a killed run left incomplete are removed."""
        whole = set()
        with os.scandir(self.partial) as entries:
            for entry in entries:
                if entry.name.endswith(".tmp"):
                    os.unlink(entry)
                elif entry.name.endswith(".png") and entry.stat().st_size:
                    whole.add(entry.name)
        return whole
