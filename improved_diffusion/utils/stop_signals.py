"""Signals before a command has begun, while Python still imports, and after it has ended. Imports little itself."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from types import FrameType
from typing import Any

# What a training says that Ctrl-C interrupts before its first step.
NOTHING_SAVED = "before the first step, nothing new was saved; run the same command again"
STOPPED = 75  # the exit code of a run that was asked to stop and has saved: EX_TEMPFAIL, run it again
# SIGUSR1 is how SLURM's --signal=USR1@120 warns; a terminal that closes sends SIGHUP. Windows has neither.
SIGNALS = tuple(getattr(signal, name) for name in ("SIGTERM", "SIGINT", "SIGUSR1", "SIGHUP") if hasattr(signal, name))

_kept: list[int] = []  # early warnings for the training to come
_early: dict[int, Any] = {}  # the handlers to put back when the command begins


def catch(numbers: tuple[int, ...], handler: Any) -> dict[int, Any]:
    """Set the handler of signals; returns those before. A SIGHUP that is ignored, as under nohup, stays so.

    Outside the main thread, where Python allows no handlers, none is set.
    """
    if threading.current_thread() is not threading.main_thread():
        return {}
    hang_up = getattr(signal, "SIGHUP", None)
    ignored = hang_up is not None and signal.getsignal(hang_up) is signal.SIG_IGN
    return {number: signal.signal(number, handler) for number in numbers if not (number == hang_up and ignored)}


@contextmanager
def cleaning_up(clean: Callable[[], None]) -> Iterator[None]:
    """Call `clean` if a signal ends the process in the block, as SIGTERM and SIGHUP do where nothing handles them."""

    def end(number: int, frame: FrameType | None) -> None:
        clean()
        signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)

    ending = [getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)]
    before = catch(tuple(number for number in ending if signal.getsignal(number) is signal.SIG_DFL), end)
    try:
        yield
    finally:
        put_back(before)


def put_back(handlers: dict[int, Any]) -> None:
    """Set the handlers that `catch` has returned."""
    for number, handler in handlers.items():
        # None: one that is not Python's cannot be put back; MPI's ignores the signal.
        signal.signal(number, signal.SIG_IGN if handler is None else handler)


def catch_early(trains: bool) -> None:
    """For the first moments of a command, before it imports torch: there is nothing to save, and a signal ends it.

    :param trains: SIGTERM and SIGHUP end it as they end a training before its first step, and SIGUSR1 is kept for it.
    SIGINT's handler is put back by `begin`. The others stay until the training's own.
    """
    _early.clear()
    if trains:
        catch(tuple(number for number in SIGNALS if number != signal.SIGINT), _end)
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # a shell's background job ignores it
        _early.update(catch((signal.SIGINT,), partial(_end, trains=trains)))


def begin() -> None:
    """The command runs from now on: Ctrl-C is its own."""
    put_back(_early)
    _early.clear()


def _end(number: int, frame: FrameType | None, trains: bool = True) -> None:
    if number == getattr(signal, "SIGUSR1", None):
        _kept.append(number)
        return
    # Not an exception: a package that is half imported would make something else of it.
    text, code = stopped_early(number), STOPPED
    if number == signal.SIGINT:
        text, code = f"interrupted: {NOTHING_SAVED}" if trains else "interrupted", 130
    with suppress(OSError):
        os.write(2, f"{text}\n".encode())
    os._exit(code)


def stopped_early(number: int) -> str:
    """What a training says that a signal stops before its first step."""
    return f"stopped by {signal.Signals(number).name} before the first step: run the same command again"


def take_kept() -> int:
    """The signal that was kept since `catch_early`, once; else 0."""
    number = _kept[0] if _kept else 0
    _kept.clear()
    return number


def ignore_until_exit() -> None:
    """For a command that is done: a signal to stop what has ended must not change its exit code."""
    catch(SIGNALS, signal.SIG_IGN)
