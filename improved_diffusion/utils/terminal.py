"""The standard streams, whatever they are: not UTF-8, closed, or a pipe that nobody reads any more."""

from __future__ import annotations

import os
import sys
from contextlib import suppress
from typing import IO, Any

from ..config import UserError
from .text import printable


def encodable(text: str, stream: Any) -> str:
    """The text as the stream's encoding can show it; other characters are escaped."""
    encoding = getattr(stream, "encoding", None) or "utf-8"
    return text.encode(encoding, errors="backslashreplace").decode(encoding)


def open_streams() -> None:
    """Let the standard streams take any text. For the start of a command: it changes the process's own streams."""
    for number in (0, 1, 2):  # a free one would be given to the next file that is opened, and get what libraries print
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)
    sys.stdout = _prepared(sys.stdout)
    sys.stderr = _prepared(sys.stderr)


def _prepared(stream: Any) -> Any:
    if stream is None:  # it was closed when Python started
        return open(os.devnull, "w", encoding="utf-8", errors="backslashreplace")
    if hasattr(stream, "reconfigure"):
        stream.reconfigure(errors="backslashreplace")
    return stream


def complain(text: str) -> None:
    """Print a line to stderr; an error is ignored, since stderr may be closed, or go to the disk that is full."""
    if sys.stderr is None:  # print would take stdout
        return
    with suppress(OSError, ValueError):
        print(encodable(printable(text), sys.stderr), file=sys.stderr, flush=True)


def show(text: str) -> None:
    """Print what a command was asked for. If the reader has gone, as `head` does, it has seen enough.

    Raises UserError where stdout cannot be written.
    """
    if sys.stdout is None:
        return
    try:
        print(encodable(printable(text), sys.stdout), flush=True)
    except BrokenPipeError:
        _drop(sys.stdout)
    except OSError as error:
        _drop(sys.stdout)
        raise UserError(f"cannot write to the standard output: {error.strerror or error}") from None


def close_streams() -> None:
    """Write what is left to the standard streams, or drop it where that fails: Python would complain at exit."""
    for stream in (sys.stdout, sys.stderr):
        if stream is not None and not stream.closed:
            try:
                stream.flush()
            except OSError:
                _drop(stream)


def _drop(stream: IO[str]) -> None:
    """Send what is written to the stream, and what waits there, nowhere."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, stream.fileno())
    os.close(nowhere)
    stream.flush()
