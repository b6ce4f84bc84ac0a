"""What an option is, and what the groups of options share."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import Field, dataclass, field, fields
from typing import Any

from .messages import UserError, shorten, shown, unknown_name
from .values import comma_list, plain_text, real_number, str2bool, unwrapped, whole_number

PRECISIONS = ("fp32", "bf16", "fp16")
AUTO_PRECISION = "auto"  # of training: bf16 where the device computes in it, else fp32
LARGEST = 10**9  # of whole numbers, but for options that set their own
MOST_SAMPLES = 10**7  # in one command
LONGEST_WAIT = 1e8  # seconds; more overflows timers
NUM_CLASSES = 1000  # of a class-conditional model, where nothing says otherwise


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
    older: Any = None,
    flags: Mapping[str, Callable[[str], str]] | None = None,
    bare: str = "",
) -> Any:
    """One option.

    :param low, high: the smallest and the largest value; a whole number is at most LARGEST unless `high` is given.
    :param fixed: training decides it and sampling may not contradict it.
    :param published: the method's original code has it too.
    :param older: what models have whose files are from before the option existed.
    :param bare: the value that the flag has where none follows it; a truth value's is True.
    :param flags: published flags that set it as well, each with what turns its value into this option's.
    """
    if parse is None:
        parse = _KINDS[type(default)]
    if high is None and parse is whole_number:
        high = LARGEST
    return field(
        default=default,
        metadata=dict(
            help=help, choices=choices, parse=parse, low=low, high=high, fixed=fixed, published=published, older=older,
            flags=flags or {}, bare="True" if parse is str2bool else bare,
        ),
    )  # fmt: skip


_KINDS: dict[type, Callable[[Any], Any]] = {bool: str2bool, int: whole_number, float: real_number, str: plain_text}


def extra(default: Any, help: str, **kwargs: Any) -> Any:
    """An option that the published code does not have."""
    return option(default, help, published=False, **kwargs)


def with_default(config: type, name: str, default: Any) -> Any:
    """The option of a config with another default, for a class derived from it."""
    (found,) = (f for f in fields(config) if f.name == name)
    return field(default=default, metadata=found.metadata)


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
            object.__setattr__(self, f.name, checked_value(f, getattr(self, f.name)))
        self.validate()

    def validate(self) -> None:
        """Raise UserError for values that cannot work."""

    def require(self, condition: bool, name: str, must: str) -> None:
        if not condition:
            raise UserError(f"--{name} {shorten(str(getattr(self, name)))} {must}")

    def require_numbers(self, name: str, kind: Callable[[str], Any], most: int, largest: float) -> None:
        """Raise UserError where an option is not a list of at most `most` positive numbers up to `largest`."""
        text = getattr(self, name)
        try:
            numbers = comma_list(text, kind)
        except ValueError:
            raise UserError(f"--{name} {shown(text)}: expected numbers such as 16,8") from None
        if not all(number > 0 for number in numbers):
            raise UserError(f"--{name} {shown(text)}: every number must be positive")
        if len(numbers) > most or any(number > largest for number in numbers):
            raise UserError(f"--{name} {shown(text)}: expected up to {most} numbers of at most {largest}")

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


def checked_value(f: Field, value: Any) -> Any:
    """The value of an option in its own type. Raises UserError for one that it cannot have."""
    try:
        parsed = f.metadata["parse"](unwrapped(value))
    except ValueError as error:
        raise UserError(f"--{f.name} {shown(value)}: {error}") from None
    if isinstance(parsed, float) and not math.isfinite(parsed):
        raise UserError(f"--{f.name} {parsed} must be a finite number")
    low, high, choices = (f.metadata[key] for key in ("low", "high", "choices"))
    if isinstance(parsed, str):  # a word in place of a number
        low = high = None
    if low is not None and parsed < low:
        raise UserError(f"--{f.name} {shown(parsed)} must {f'be at least {low}' if low else 'not be negative'}")
    if high is not None and parsed > high:
        raise UserError(f"--{f.name} {shown(parsed)} must be at most {high}")
    if choices and parsed not in choices:
        raise unknown_name(f"--{f.name}", str(parsed), choices)
    return parsed
