"""The JSON of another program's object: values by name, which may be anything."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..config import UserError, shown


@dataclass(frozen=True)
class ForeignConfig:
    """Values that are checked when they are taken: each method raises UserError, by name and value, for another one."""

    path: str
    values: Mapping[str, Any]

    @classmethod
    def of(
        cls, values: Mapping[str, Any], defaults: Mapping[str, Any], path: str, ignored: Collection[str] = ()
    ) -> ForeignConfig:
        """The values of an object, with defaults. Raises UserError for other names, unless their values are null or
        false; those that are ignored may be there."""
        for name, value in values.items():
            known = name in defaults or name in ignored or name.startswith("_")
            if not known and value not in (None, False):
                raise UserError(f"{path}: {shown(name)}, {shown(value)} there, is not known: use another model")
        return cls(path, {**defaults, **values})

    def __getitem__(self, name: str) -> Any:
        return self.values[name]

    def refused(self, name: str, expected: str) -> UserError:
        """The error for a value that does not fit."""
        return UserError(f"{self.path}: {name} is {shown(self[name])}, but a model here needs {expected}")

    def choice(self, name: str, allowed: Sequence[Any]) -> Any:
        """One of some values."""
        if self[name] not in allowed:
            raise self.refused(name, " or ".join(map(str, allowed)))
        return self[name]

    def number(self, name: str, low: float, high: float) -> float:
        """A number between two, both included."""
        if not _is_number(self[name]) or not low <= self[name] <= high:
            raise self.refused(name, f"a number from {low} to {high}")
        return self[name]

    def whole(self, name: str, low: int, high: int) -> int:
        """A whole number between two, both included."""
        if type(self[name]) is not int or not low <= self[name] <= high:
            raise self.refused(name, f"a whole number from {low} to {high:,}")
        return self[name]

    def numbers(self, name: str, low: float, high: float) -> list[float]:
        """A list of numbers between two, both included."""
        return self._list(name, lambda n: _is_number(n) and low <= n <= high, f"numbers from {low} to {high}")

    def wholes(self, name: str, low: int, high: int) -> list[int]:
        """A list of whole numbers between two, both included."""
        expected = f"whole numbers from {low} to {high:,}"
        return self._list(name, lambda n: type(n) is int and low <= n <= high, expected)

    def texts(self, name: str, allowed: Sequence[str]) -> list[str]:
        """A list of some words."""
        return self._list(name, lambda word: word in allowed, " and ".join(allowed))

    def _list(self, name: str, fits: Callable[[Any], bool], expected: str) -> list[Any]:
        found = self[name]
        if not isinstance(found, list) or not found or not all(map(fits, found)):
            raise self.refused(name, f"a list of {expected}")
        return found

    def size(self, name: str, high: int) -> tuple[int, int]:
        """(height, width), of a number or of a list of two."""
        sides = self[name] if isinstance(self[name], list) else [self[name]] * 2
        if len(sides) != 2 or any(type(side) is not int or not 1 <= side <= high for side in sides):
            raise self.refused(name, "the side of the images, or height and width")
        return sides[0], sides[1]


def _is_number(value: Any) -> bool:
    return type(value) in (int, float)
