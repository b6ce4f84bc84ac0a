"""Kinds of values: each takes the text of a flag, the values of files and those of Python, and raises ValueError."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Callable, Iterable
from contextlib import suppress
from typing import Any

from .messages import UserError, shown

LONGEST_TEXT = 2**17  # of an option, in characters
LONGEST_PATH = 4096
MAX_DIGITS = 99  # of a whole number; Python itself refuses to read or to show more than 4300
MOST_NUMBERS = 10**6  # in a list of image numbers


def str2bool(v: str | bool) -> bool:
    """The published spellings of a truth value: yes/true/t/y/1 and no/false/f/n/0."""
    word = str(v).lower() if isinstance(v, str) or (isinstance(v, int) and v in (0, 1)) else ""
    if word in ("yes", "true", "t", "y", "1"):
        return True
    if word in ("no", "false", "f", "n", "0"):
        return False
    raise ValueError("expected True or False")


def whole_number(value: Any) -> int:
    """An int; also of a text or a float that is a whole number, such as 1e6."""
    if isinstance(value, int) and not isinstance(value, bool):
        return value
    if isinstance(value, str) and re.fullmatch(rf"\s*[+-]?\d{{1,{MAX_DIGITS}}}\s*", value):
        return int(value)
    number = real_number(value)
    if not number.is_integer() or abs(number) > 2**53:  # beyond which floats are not exact
        raise ValueError("expected a whole number")
    return int(number)


def real_number(value: Any) -> float:
    """A float, which may not be finite."""
    if isinstance(value, (str, int, float)) and not isinstance(value, bool):
        with suppress(ValueError, OverflowError):
            return float(value)
    raise ValueError("expected a number")


def plain_text(value: Any) -> str:
    """A text; a list is joined by commas."""
    if isinstance(value, (list, tuple)):
        return _joined(value)
    if isinstance(value, int) and abs(value) >= 10**MAX_DIGITS:
        raise ValueError(f"a number of more than {MAX_DIGITS} digits")
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return str(value)
    if isinstance(value, os.PathLike):
        value = os.fspath(value)
    if not isinstance(value, str):
        raise ValueError("expected text")
    if len(value) > LONGEST_TEXT:
        raise ValueError(f"longer than {LONGEST_TEXT:,} characters")
    if "\0" in value or any("\ud800" <= c <= "\udfff" for c in value):
        raise ValueError("is not Unicode text")
    return value


def unwrapped(value: Any) -> Any:
    """Numbers and arrays of numpy and torch as Python's."""
    return value.tolist() if hasattr(value, "tolist") else value


def _joined(items: Iterable[Any]) -> str:
    if any(isinstance(item, (list, tuple)) for item in items):
        raise ValueError("expected text, or a list of texts")
    texts = [plain_text(unwrapped(item)) for item in items]
    if not texts:
        raise ValueError("an empty list: leave the option out")
    if any("," in text for text in texts):
        raise ValueError("an item has a comma, which separates items")
    return plain_text(",".join(texts))


def path_of(value: Any) -> str:
    """A path or URL, in which ~ and ~user at the start are home folders."""
    if not isinstance(value, (str, os.PathLike)):
        raise ValueError("expected a path")
    path = os.path.expanduser(plain_text(value))
    if path.startswith("~"):
        raise ValueError(f"there is no user {path.split('/')[0][1:]!r}: write ./~ for a name that begins with ~")
    if len(path) > LONGEST_PATH:
        raise ValueError(f"a path has at most {LONGEST_PATH:,} characters")
    return path


def path_argument(name: str, value: Any) -> str:
    """`path_of` an argument. Raises UserError for anything else than a path, with the argument's name."""
    try:
        path = path_of(value)
    except ValueError as error:
        raise UserError(f"{name} {shown(value)}: {error}") from None
    if not path:
        raise UserError(f"{name} is empty: expected a path")
    return path


def paths_of(value: Any) -> str:
    """Paths separated by commas, or a list of them, as `path_of`."""
    parts = plain_text(value).split(",")
    return ",".join(path_of(part.strip() if part.strip().startswith("~") else part) for part in parts)


def parse_size(value: Any) -> int | str:
    """`64`, `"48x64"` or (48, 64) (height x width); a square one comes back as an int."""
    parts = value if isinstance(value, (list, tuple)) else [value]
    if isinstance(value, str):
        parts = value.lower().split("x")
    try:
        numbers = [whole_number(part) for part in parts]
    except ValueError:
        numbers = []
    if len(numbers) not in (1, 2) or min(numbers) < 1 or max(numbers) >= 2**31:
        raise ValueError("expected a size such as 64, or 48x64 for height x width")
    height, width = numbers[0], numbers[-1]
    return height if height == width else f"{height}x{width}"


def height_width(size: int | str | tuple[int, int]) -> tuple[int, int]:
    """(height, width) in pixels of an `image_size`."""
    parsed = parse_size(size)
    if isinstance(parsed, int):
        return parsed, parsed
    height, width = parsed.split("x")
    return int(height), int(width)


def comma_list(text: str, kind: Callable[[str], Any]) -> list[Any]:
    """The items of a comma-separated option; none for an empty one. Raises ValueError for infinite numbers."""
    items = [kind(part) for part in str(text).split(",") if part.strip()]
    if any(isinstance(item, float) and not math.isfinite(item) for item in items):
        raise ValueError("expected finite numbers")
    return items


def number_list(text: str) -> list[int]:
    """The numbers of a list such as `17,40-47`, both ends of a range included; none for an empty one.

    Raises ValueError for anything else, and for more than MOST_NUMBERS.
    """
    ranges = []
    for part in text.split(",") if text.strip() else []:
        match = re.fullmatch(r"([0-9]{1,18})(?:-([0-9]{1,18}))?", part.strip())
        if match is None or (match[2] and int(match[2]) < int(match[1])):
            raise ValueError("expected numbers such as 17,40-47")
        ranges.append(range(int(match[1]), int(match[2] or match[1]) + 1))
    if sum(map(len, ranges)) > MOST_NUMBERS:
        raise ValueError(f"more than {MOST_NUMBERS:,} numbers")
    return [number for each in ranges for number in each]


def repeated(names: Iterable[str]) -> str | None:
    """The first name that comes a second time; None where there is none."""
    seen: set[str] = set()
    for name in names:
        if name in seen:
            return name
        seen.add(name)
    return None
