"""Text from outside, such as the names of files and classes: shown safely, and made into file names."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from typing import Any

from ..config import UNSEEN, one_line

_REFUSED = re.compile(f'[{UNSEEN}/\\\\:*?"<>|]+')  # in a file name, by Windows, macOS or Linux
_RESERVED = re.compile(r"^(con|prn|aux|nul|com\d|lpt\d)(?=\.|$)", re.IGNORECASE)
NAME_BYTES = 100  # of a class in a file name


def printable(text: Any) -> str:
    """The text as a terminal or a log may show it: `one_line` for each of its lines; tabs stay."""
    return re.sub(r"[^\n\t]+", lambda match: one_line(match[0]), str(text))


def as_one(text: str) -> str:
    """A message of several lines, which begin further right from the second on: one at the margin is another one."""
    return text.replace("\n", "\n  ")


def listed(names: Sequence[Any], most: int) -> str:
    """The first names of a list within a message."""
    return ", ".join(map(one_line, names[:most])) + (", ..." if len(names) > most else "")


def counted(number: int, noun: str, plural: str = "") -> str:
    """A number of things, such as "1 image" or "1,200 images".

    :param plural: of a noun that does not just get an s.
    """
    return f"{number:,} {noun if number == 1 else plural or noun + 's'}"


def file_name(name: str, limit: int = NAME_BYTES) -> str:
    """The name as part of a file name: kept as it is but for what file systems refuse, which becomes "-".

    :param limit: in bytes of UTF-8; longer names are cut.
    """
    name = _REFUSED.sub("-", name)
    name = name.encode()[:limit].decode(errors="ignore").strip(" ").rstrip(". ")
    if name.startswith("."):  # hidden, and so skipped as an image
        name = "-" + name[1:]
    return _RESERVED.sub(r"\1-", name) or "-"


def class_parts(names: Sequence[str]) -> list[str]:
    """What stands for each class before the "_" of a file name: the name where possible, and no other class's."""
    parts = [file_name(name.replace("_", "-")) for name in names]
    return unique(parts, first=[part == name for part, name in zip(parts, names)])


def class_index(names: Sequence[str]) -> dict[str, int]:
    """Each class's index by its name, and by what stands for it in file names."""
    parts = {part: i for i, part in enumerate(class_parts(names))}
    return {**parts, **{name: i for i, name in enumerate(names)}}


def unique(names: Sequence[str], first: Sequence[bool] = ()) -> list[str]:
    """The names, of which those that occur again get -2, -3, ... Names that differ in case or in the composition of
    their letters are the same.

    :param first: which of them are to stay as they are, as far as possible.
    """
    found = list(names)
    order = sorted(range(len(names)), key=lambda i: not first[i]) if first else range(len(names))
    taken: set[str] = set()
    number: dict[str, int] = {}
    for i in order:
        key = _folded(names[i])
        while _folded(found[i]) in taken:
            number[key] = number.get(key, 1) + 1
            found[i] = f"{names[i]}-{number[key]}"
        taken.add(_folded(found[i]))
    return found


def _folded(name: str) -> str:
    return unicodedata.normalize("NFC", name).casefold()
