"""What an option is, and what the groups of options share."""

from __future__ import annotations

import difflib
import math
import os
import re
import reprlib
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import Field, dataclass, field, fields
from typing import Any

PRECISIONS = ("fp32", "bf16", "fp16")
FEW_NAMES = 20  # are all listed where one is misspelt
LARGEST = 10**9  # of whole numbers, but for options that set their own
LARGEST_SIDE = 2**16  # of images, in pixels
LONGEST_TEXT = 2**17  # of an option, in characters
LONGEST_PATH = 4096
MOST_SAMPLES = 10**7  # in one command
LONGEST_WAIT = 1e8  # seconds; more overflows timers
LONGEST_SHOWN = 80  # of a value in a message, in characters
MOST_NUMBERS = 10**6  # in a list of image numbers
NUM_CLASSES = 1000  # of a class-conditional model, where nothing says otherwise


class UserError(ValueError):
    """A mistake of the user's that one clear message explains: it names the culprit and the remedy.

    The message becomes one line that any terminal can show, whatever a name or a value in it holds.
    """

    def __init__(self, message: object):
        super().__init__(one_line(str(message)))


def one_line(text: str) -> str:
    """A text with escapes such as \\n and \\x1b for the characters that cannot be printed."""
    return text if text.isprintable() else "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


def unknown_name(kind: str, name: str, known: Iterable[str]) -> UserError:
    """The error for a name that does not exist, with the nearest one that does."""
    name, known = shorten(name), sorted(known)
    near = difflib.get_close_matches(name, known, n=1)
    hints = [f"did you mean {near[0]}?"] if near else []
    if not near or len(known) <= FEW_NAMES:
        hints.append(f"choose from: {', '.join(known)}")
    return UserError(f"unknown {kind} {name!r}: {' '.join(hints)}")


def shorten(text: str) -> str:
    """A text for a message, cut where it is long."""
    return text if len(text) <= LONGEST_SHOWN else f"{text[:LONGEST_SHOWN]}... ({len(text):,} characters)"


def shown(value: Any) -> str:
    """The repr of a value for a message, cut where it is long. The whole repr is never made: it may not fit memory."""
    return _SHORT.repr(value)


def repeated(names: Iterable[str]) -> str | None:
    """The first name that comes a second time; None where there is none."""
    seen: set[str] = set()
    for name in names:
        if name in seen:
            return name
        seen.add(name)
    return None


class _Short(reprlib.Repr):
    def repr_int(self, x: int, level: int) -> str:
        return repr(x) if x.bit_length() < 3 * LONGEST_SHOWN else f"a number of {x.bit_length():,} bits"

    def repr_str(self, x: str, level: int) -> str:
        return repr(x) if len(x) <= LONGEST_SHOWN else f"{x[:LONGEST_SHOWN]!r}..."


_SHORT = _Short()
_SHORT.maxother, _SHORT.maxlevel = LONGEST_SHOWN, 3


# Kinds of values: from the text of a flag, from a file's values and from Python's. Each raises ValueError.


def str2bool(v: str | bool) -> bool:
    """The published spellings of a truth value: yes/true/t/y/1 and no/false/f/n/0."""
    word = str(v).lower() if isinstance(v, (str, int)) else ""
    if word in ("yes", "true", "t", "y", "1"):
        return True
    if word in ("no", "false", "f", "n", "0"):
        return False
    raise ValueError("expected True or False")


def whole_number(value: Any) -> int:
    """An int; also of a text or a float that is a whole number, such as 1e6."""
    if isinstance(value, int) and not isinstance(value, bool):
        return value
    if isinstance(value, str) and re.fullmatch(r"\s*[+-]?\d{1,99}\s*", value):
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


def _plain(value: Any) -> Any:
    """Numbers and arrays of numpy and torch as Python's."""
    return value.tolist() if hasattr(value, "tolist") else value


def _joined(items: Iterable[Any]) -> str:
    if any(isinstance(item, (list, tuple)) for item in items):
        raise ValueError("expected text, or a list of texts")
    texts = [plain_text(_plain(item)) for item in items]
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
    if len(numbers) not in (1, 2) or min(numbers) < 1:
        raise ValueError("expected a size such as 64, or 48x64 for height x width")
    if max(numbers) > LARGEST_SIDE:
        raise ValueError(f"expected a size of at most {LARGEST_SIDE:,} pixels a side")
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


def option(
    default: Any,
    help: str,
    *,
    choices: tuple[str, ...] = (),
    parse: Callable[[Any], Any] | None = None,
    low: float | None = None,
    high: float | None = None,
    fixed: bool = False,
    published: bool = True,
) -> Any:
    """One option.

    :param low, high: the smallest and the largest value; a whole number is at most LARGEST unless `high` is given.
    :param fixed: training decides it and sampling may not contradict it.
    :param published: the method's original code has it too.
    """
    if parse is None:
        parse = _KINDS[type(default)]
    if high is None and parse is whole_number:
        high = LARGEST
    return field(
        default=default,
        metadata=dict(help=help, choices=choices, parse=parse, low=low, high=high, fixed=fixed, published=published),
    )


_KINDS: dict[type, Callable[[Any], Any]] = {bool: str2bool, int: whole_number, float: real_number, str: plain_text}


def extra(default: Any, help: str, **kwargs: Any) -> Any:
    """An option that the published code does not have."""
    return option(default, help, published=False, **kwargs)


def from_dict(cls: type, values: Mapping[str, Any]) -> Any:
    """An instance of the config `cls` from a mapping; a name it does not have raises with the nearest one."""
    known = {f.name for f in fields(cls)}
    for name in values:
        if name not in known:
            raise unknown_name(f"option of {cls.__name__}", name, known)
    return cls(**values)


@dataclass(frozen=True, kw_only=True)
class Config:
    """What the option groups share: each value is checked against its type and choices."""

    def __post_init__(self) -> None:
        for f in fields(self):
            object.__setattr__(self, f.name, _checked(f, getattr(self, f.name)))
        self.validate()

    def validate(self) -> None:
        """Raise UserError for values that cannot work."""

    def require(self, condition: bool, name: str, must: str) -> None:
        if not condition:
            raise UserError(f"--{name} {shorten(str(getattr(self, name)))} {must}")

    def numbers(self, name: str, example: str) -> list[float]:
        """The numbers of an option that is a list of them. Raises UserError for anything else, and for one given twice.

        :param example: of such a list, for the message.
        """
        try:
            found = comma_list(getattr(self, name), real_number)
        except ValueError:
            raise UserError(f"--{name} {shown(getattr(self, name))}: expected numbers such as {example}") from None
        self.require(len(set(found)) == len(found), name, "has a number twice")
        return found


def _checked(f: Field, value: Any) -> Any:
    """The value of an option in its own type. Raises UserError for one that it cannot have."""
    try:
        parsed = f.metadata["parse"](_plain(value))
    except ValueError as error:
        raise UserError(f"--{f.name} {shown(value)}: {error}") from None
    if isinstance(parsed, float) and not math.isfinite(parsed):
        raise UserError(f"--{f.name} {parsed} must be a finite number")
    low, high, choices = (f.metadata[key] for key in ("low", "high", "choices"))
    if low is not None and parsed < low:
        raise UserError(f"--{f.name} {shown(parsed)} must {f'be at least {low}' if low else 'not be negative'}")
    if high is not None and parsed > high:
        raise UserError(f"--{f.name} {shown(parsed)} must be at most {high}")
    if choices and parsed not in choices:
        raise unknown_name(f"--{f.name}", str(parsed), choices)
    return parsed
