"""What the files of samples are called."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Protocol

from ..utils.text import file_name, unique
from .labels import Labels


class FileNames(Protocol):
    """The names of the samples' PNGs, by their numbers."""

    def __call__(self, number: int) -> str:
        """The file name of a sample."""

    def found(self, names: Iterable[str]) -> dict[int, str]:
        """The samples among the names of a folder, by number."""


class ByNumber:
    """000007.png, or cat_000007.png of a class, as `--labels prefix` reads it."""

    def __init__(self, labels: Labels | None):
        self.labels = labels

    def __call__(self, number: int) -> str:
        return numbered_name(number, self.labels.file_part(number) if self.labels else None)

    def found(self, names: Iterable[str]) -> dict[int, str]:
        matches = ((re.search(r"(\d+)\.png$", name), name) for name in names)
        return {int(match.group(1)): name for match, name in matches if match}


class BySource:
    """The name of the image that a sample is made from, with a number where several are made from one.

    :param sources: the names of the given images, without endings: sample i is made from image i modulo their number.
    :param count: how many samples there are.
    """

    def __init__(self, sources: Sequence[str], count: int):
        parts = [file_name(name) for name in sources]
        if count > len(parts):
            parts = [f"{parts[i % len(parts)]}_{i // len(parts) + 1}" for i in range(count)]
        self.names = [f"{part}.png" for part in unique(parts[:count])]
        self.numbers = {name: i for i, name in enumerate(self.names)}

    def __call__(self, number: int) -> str:
        return self.names[number]

    def found(self, names: Iterable[str]) -> dict[int, str]:
        return {self.numbers[name]: name for name in names if name in self.numbers}


def numbered_name(number: int, class_part: str | None) -> str:
    """The file name of a sample: its class, as a part of file names, comes first."""
    return f"{number:06d}.png" if class_part is None else f"{class_part}_{number:06d}.png"
