"""Ending a run on request: signals become a flag, and all ranks act on it after the same step."""

from __future__ import annotations

import signal
import socket
import threading
from types import FrameType
from typing import Any

import torch as th
import torch.distributed as dist

from .. import distributed

EXIT_RESUME = distributed.STOPPED
GRACE = 2.0  # seconds
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)  # SIGUSR1 is how SLURM's --signal=USR1@120 warns


_early = 0  # the number of a signal that came before the training loop


def catch_early_warning() -> None:
    """From now on keep a SIGUSR1 for StopSignals: MPI libraries swallow it, and a scheduler warns only once."""
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGUSR1, _note_early)


def _note_early(number: int, frame: FrameType | None) -> None:
    global _early
    _early = number


class StopSignals:
    """A with statement in which the first of SIGNALS sets `received`; a second SIGINT interrupts at once.

    Outside the main thread, where Python allows no handlers, nothing is caught.
    """

    def __init__(self) -> None:
        self.received = _early  # the signal's number
        self.interrupts = 0
        self.left = threading.Event()
        self.before: dict[int, Any] = {}

    def __enter__(self) -> StopSignals:
        if threading.current_thread() is threading.main_thread():
            self.before = {number: signal.signal(number, self._note) for number in SIGNALS}
            # Python's handlers wait until the main thread returns from a collective or from the GPU. The numbers of the
            # signals come through here at once.
            self.reader, self.writer = socket.socketpair()
            self.writer.setblocking(False)
            self.fd_before = signal.set_wakeup_fd(self.writer.fileno(), warn_on_full_buffer=False)
            threading.Thread(target=self._end_a_stuck_process, name="second Ctrl-C", daemon=True).start()
        return self

    def __exit__(self, *exc: Any) -> None:
        self.left.set()
        if self.before:
            signal.set_wakeup_fd(self.fd_before)
            self.writer.close()  # which ends the thread
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.received = self.received or number
        self.interrupts += number == signal.SIGINT
        if self.interrupts > 1:
            raise KeyboardInterrupt

    def _end_a_stuck_process(self) -> None:
        interrupts = 0
        with self.reader:
            while numbers := self.reader.recv(64):
                interrupts += numbers.count(bytes([signal.SIGINT]))
                # The main thread, if it can, ends the process itself, and says more.
                if interrupts > 1 and not self.left.wait(GRACE):
                    distributed.end_process(130)


class Agreement:
    """Lets all ranks see the same number after the same step, without any of them waiting for another."""

    def __init__(self) -> None:
        self.largest = th.zeros(1, dtype=th.int64)
        self.work: Any = None

    def exchange(self, mine: int) -> int:
        """The largest number that a rank gave at the call before; of a single rank, at this one. Collective."""
        if distributed.get_world_size() == 1:
            return mine
        agreed = self.finish()
        self.largest = th.tensor([mine])
        # A CPU tensor, which gloo reduces in the background while the next step computes.
        self.work = dist.all_reduce(self.largest, op=dist.ReduceOp.MAX, async_op=True)
        return agreed

    def finish(self) -> int:
        """What the last exchange comes to; leaves nothing under way. Collective."""
        if self.work is not None:
            self.work.wait()
            self.work = None
        return int(self.largest)
