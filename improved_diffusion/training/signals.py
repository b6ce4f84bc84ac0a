"""Ending a run on request: a signal sets a flag, and all ranks act on it after the same step."""

from __future__ import annotations

import itertools
import signal
import socket
import sys
import threading
import time
from types import FrameType
from typing import Any

import torch as th
import torch.distributed as dist

from .. import distributed
from ..utils.stop_signals import NOTHING_SAVED, SIGNALS, catch, put_back, stopped_early, take_kept

EXIT_RESUME = distributed.STOPPED
GRACE = 2.0  # seconds
WAIT_FOR_RANK_0 = 5.0  # seconds
TIME_IS_UP = 1000  # a reason to stop that is not the number of a signal


class Stopped(SystemExit):
    """Training was asked to stop by a signal, and has saved what it could. Left alone, it ends with EXIT_RESUME.

    :param next_start: where --resume auto continues from.
    """

    def __init__(self, number: int, steps_done: int, next_start: str = "there"):
        super().__init__(EXIT_RESUME)
        self.signal, self.steps_done, self.next_start = signal.Signals(number), steps_done, next_start

    def __str__(self) -> str:
        if not self.steps_done:
            return stopped_early(self.signal)
        return (
            f"stopped by {self.signal.name} after {self.steps_done} steps; --resume auto continues from "
            f"{self.next_start}"
        )


class StopSignals:
    """A with statement in which the first of SIGNALS sets `received`; a second SIGINT interrupts at once.

    Outside the main thread, where Python allows no handlers, no signal is caught; a SIGHUP that is ignored stays so.
    :param starting: until `begin`, there is nothing to save: SIGTERM and SIGHUP raise Stopped, SIGINT
        KeyboardInterrupt. A SIGUSR1 is kept for the training, also from before this statement: it is an early warning,
        and a scheduler warns only once.
    """

    def __init__(self, starting: bool = False) -> None:
        self.received = 0  # the signal's number
        self.starting = starting
        self.interrupts = 0
        self.left = threading.Event()  # the main thread reacts to a second SIGINT by itself
        self.before: dict[int, Any] = {}

    def begin(self) -> None:
        """Training begins: from now on signals set `received` alone."""
        self.starting = False
        if self.before:
            self._catch()  # again: MPI has put a handler of its own in front of ours

    def _catch(self) -> dict[int, Any]:
        return catch(SIGNALS, self._note)

    def __enter__(self) -> StopSignals:
        self.before = self._catch()
        if self.before:
            self.received = self.received or take_kept()
            # Python's handlers wait until the main thread returns from a collective or from the GPU; the numbers of the
            # signals arrive on this socket at once.
            self.reader, self.writer = socket.socketpair()
            self.writer.setblocking(False)
            self.fd_before = signal.set_wakeup_fd(self.writer.fileno(), warn_on_full_buffer=False)
            threading.Thread(target=self._watch, name="second Ctrl-C", daemon=True).start()
        return self

    def __exit__(self, *exc: Any) -> None:
        self.left.set()
        if self.before:
            signal.set_wakeup_fd(self.fd_before)
            self.writer.close()  # which ends the thread
        put_back(self.before)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.received = self.received or number
        self.interrupts += number == signal.SIGINT
        if self.interrupts > (0 if self.starting else 1):
            self.left.set()
            raise KeyboardInterrupt(NOTHING_SAVED if self.starting else "")
        if self.starting and number in (signal.SIGTERM, getattr(signal, "SIGHUP", None)):
            raise Stopped(number, 0)

    def _watch(self) -> None:
        """End a process whose main thread does not react to a second SIGINT; not a person's interpreter or notebook."""
        interrupts = 0
        interactive = hasattr(sys, "ps1")
        with self.reader:
            while numbers := self.reader.recv(64):
                interrupts += numbers.count(bytes([signal.SIGINT]))
                # If the main thread can react, it ends the process itself, with a better message.
                if interrupts > 1 and not interactive and not self.left.wait(GRACE):
                    distributed.end_process(130)


class TimeLimit:
    """A limit on the wall-clock time, by rank 0's clock.

    :param hours: from now; 0: no limit.
    """

    def __init__(self, hours: float):
        self.hours, self.started = hours, time.monotonic()

    def is_over(self) -> bool:
        """Whether the time is up; False except on rank 0."""
        return 0 < self.hours * 3600 <= time.monotonic() - self.started and distributed.get_rank() == 0


class Agreement:
    """Lets all ranks see the same number after the same step, without a rank waiting for another."""

    def __init__(self) -> None:
        self.largest = th.zeros(1, dtype=th.int64)
        self.work: Any = None

    def exchange(self, mine: int) -> int:
        """The largest number that a rank gave at the previous call; with a single rank, at this one. Collective."""
        if distributed.get_world_size() == 1:
            return mine
        agreed = self.finish()
        self.largest = th.tensor([mine])
        # A CPU tensor, which gloo reduces in the background while the next step computes.
        self.work = dist.all_reduce(self.largest, op=dist.ReduceOp.MAX, async_op=True)
        return agreed

    def finish(self) -> int:
        """The result of the last exchange; afterwards none is in progress. Collective."""
        if self.work is not None:
            self.work.wait()
            self.work = None
        return int(self.largest)


class LastSave:
    """Lets the other ranks, if they end by an error too, wait until rank 0 has saved.

    It goes by the process group's store: the ranks may be anywhere, so that no collective would come back. Making one
    is collective.
    """

    numbers = itertools.count()
    POLL = 0.1  # seconds

    def __init__(self) -> None:
        number = next(self.numbers)
        self.begun, self.ended = f"last save {number} begun", f"last save {number} ended"

    def __enter__(self) -> LastSave:
        self._tell(self.begun)
        return self

    def __exit__(self, *exc: Any) -> None:
        self._tell(self.ended)

    def wait(self, limit_s: float) -> None:
        """On another rank: wait a moment for rank 0 to begin, and then for its end."""
        if self._wait(self.begun, WAIT_FOR_RANK_0):
            self._wait(self.ended, limit_s)

    def _tell(self, key: str) -> None:
        if distributed.get_world_size() > 1:
            _store().set(key, "")

    def _wait(self, key: str, limit_s: float) -> bool:
        deadline = time.monotonic() + limit_s
        while not _store().check([key]):
            if time.monotonic() > deadline:
                return False
            time.sleep(self.POLL)
        return True


def _store() -> Any:
    return dist.distributed_c10d._get_default_store()
