"""What an option is, and what the groups of options share."""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any

PRECISIONS = ("fp32", "bf16", "fp16")
FEW_NAMES = 20  # are all listed where one is misspelt
NUM_CLASSES = 1000  # of a class-conditional model, where nothing says otherwise


class UserError(ValueError):
    """A mistake of the user's that one clear message explains: it names the culprit and the remedy."""


def unknown_name(kind: str, name: str, known: Iterable[str]) -> UserError:
    """The error for a name that does not exist, with the nearest one that does."""
    known = sorted(known)
    near = difflib.get_close_matches(name, known, n=1)
    hints = [f"did you mean {near[0]}?"] if near else []
    if not near or len(known) <= FEW_NAMES:
        hints.append(f"choose from: {', '.join(known)}")
    return UserError(f"unknown {kind} {name!r}: {' '.join(hints)}")


def str2bool(v: str | bool) -> bool:
    """The published spellings of a truth value: yes/true/t/y/1 and no/false/f/n/0."""
    if isinstance(v, bool):
        return v
    if v.lower() in ("yes", "true", "t", "y", "1"):
        return True
    if v.lower() in ("no", "false", "f", "n", "0"):
        return False
    raise ValueError("expected True or False")


def parse_size(value: int | str | tuple[int, int]) -> int | str:
    """`64` or `"48x64"` (height x width); a square one comes back as an int."""
    parts = value if isinstance(value, tuple) else str(value).lower().split("x")
    numbers = [int(part) for part in parts]
    if len(numbers) > 2 or min(numbers) < 1:
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
    """The items of a comma-separated option; none for an empty one."""
    return [kind(part) for part in str(text).split(",") if part.strip()]


def number_list(text: str) -> list[int]:
    """The numbers of a list such as `17,40-47`, both ends of a range included; none for an empty one."""
    numbers: list[int] = []
    for part in (part.strip() for part in str(text).split(",") if part.strip()):
        first, dash, last = part.partition("-")
        if not first.isdigit() or (dash and not last.isdigit()) or (dash and int(last) < int(first)):
            raise ValueError("expected numbers such as 17,40-47")
        numbers += range(int(first), int(last or first) + 1)
    return numbers


def option(
    default: Any,
    help: str,
    *,
    choices: tuple[str, ...] = (),
    parse: Callable[[str], Any] | None = None,
    fixed: bool = False,
    published: bool = True,
) -> Any:
    """One option. `fixed`: training decides it and sampling may not contradict it. `published`: the method's original
    code has it too."""
    if parse is None:
        parse = str2bool if isinstance(default, bool) else type(default)
    return field(
        default=default,
        metadata=dict(help=help, choices=choices, parse=parse, fixed=fixed, published=published),
    )


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
            value = getattr(self, f.name)
            try:
                value = f.metadata["parse"](value)
            except (TypeError, ValueError, AttributeError, OverflowError) as error:
                raise UserError(f"--{f.name} {value!r}: {error}") from None
            if isinstance(value, float) and not math.isfinite(value):
                raise UserError(f"--{f.name} {value} must be a finite number")
            object.__setattr__(self, f.name, value)
            choices = f.metadata["choices"]
            if choices and value not in choices:
                raise unknown_name(f"--{f.name}", str(value), choices)
        self.validate()

    def validate(self) -> None:
        """Raise UserError for values that cannot work."""

    def require(self, condition: bool, name: str, must: str) -> None:
        if not condition:
            raise UserError(f"--{name} {getattr(self, name)} {must}")

    def require_most(self, **largest: int) -> None:
        """Raise UserError where an option is larger than the given value."""
        for name, value in largest.items():
            self.require(getattr(self, name) <= value, name, f"must be at most {value}")
