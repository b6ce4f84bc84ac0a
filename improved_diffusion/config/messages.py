"""Messages to users: mistakes, and names and values of theirs in one short line."""

from __future__ import annotations

import difflib
import re
import reprlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

FEW_NAMES = 20  # are all listed where one is misspelt
LONGEST_SHOWN = 80  # of a value in a message, in characters
# What moves the cursor, sets colours and titles, or changes the order of what is shown: control characters (C0, DEL,
# C1), line and paragraph separators, bidirectional overrides; and halves of surrogate pairs, which stand for bytes that
# are not UTF-8.
UNSEEN = "\x00-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff"


class UserError(ValueError):
    """A mistake of the user's that one clear message explains: it names the culprit and the remedy.

    The message becomes one line that any terminal can show, whatever a name or a value in it holds.
    """

    def __init__(self, message: object):
        super().__init__(one_line(str(message)))


def _escape(match: re.Match[str]) -> str:
    """What stands for a character that must not be shown."""
    code = ord(match[0])
    return {"\n": "\\n", "\r": "\\r", "\t": "\\t"}.get(match[0], f"\\x{code:02x}" if code < 256 else f"\\u{code:04x}")


def one_line(text: Any) -> str:
    """A text in one line that any terminal can show: control characters and new lines are escaped."""
    return re.sub(f"[{UNSEEN}]", _escape, str(text))


def unknown_name(kind: str, name: str, known: Iterable[str], hint: str = "") -> UserError:
    """The error for a name that does not exist, with the nearest one that does.

    :param hint: what else it may be, said in place of the list of all known names.
    """
    name, known = shorten(name), sorted(known)
    near = nearest(name, known)
    hints = [f"did you mean {near}?"] if near else []
    if hint:
        hints.append(hint)
    elif not near or len(known) <= FEW_NAMES:
        hints.append(f"choose from: {', '.join(known)}")
    return UserError(f"unknown {kind} {name!r}: {' '.join(hints)}")


def nearest(name: str, known: Iterable[str]) -> str | None:
    """The known name that a misspelt or shortened one was meant to be; None where there is none near it. Case and
    leading dashes count for nothing."""
    by_name = {each.lstrip("-").lower(): each for each in known}
    name = name.lstrip("-").lower()
    longer = [each for each in by_name if each.startswith(f"{name}_")]
    if len(longer) == 1 and name not in by_name:
        return by_name[longer[0]]
    # One slip changes a larger share of a short name.
    found = difflib.get_close_matches(name, by_name, n=1, cutoff=0.6 if len(name) <= 5 else 0.7)
    return by_name[found[0]] if found else None


def shorten(text: str) -> str:
    """A text for a message, cut where it is long."""
    return text if len(text) <= LONGEST_SHOWN else f"{text[:LONGEST_SHOWN]}... ({len(text):,} characters)"


def shown(value: Any) -> str:
    """The repr of a value for a message, cut where it is long. The whole repr is never made: it may not fit memory."""
    return _SHORT.repr(value)


class _Short(reprlib.Repr):
    def repr_int(self, x: int, level: int) -> str:
        return repr(x) if x.bit_length() < 3 * LONGEST_SHOWN else f"a number of {x.bit_length():,} bits"

    def repr_str(self, x: str, level: int) -> str:
        return repr(x) if len(x) <= LONGEST_SHOWN else f"{x[:LONGEST_SHOWN]!r}..."


_SHORT = _Short()
_SHORT.maxother, _SHORT.maxlevel = LONGEST_SHOWN, 3


@contextmanager
def naming(path: str) -> Iterator[None]:
    """Name the file in errors about options that come from it."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
