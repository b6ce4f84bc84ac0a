"""Worker processes as the engine sees them."""

from __future__ import annotations

import multiprocessing
import signal
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection
from typing import Any

from ..config.service import EngineConfig
from ..utils.stop_signals import SIGNALS
from . import worker
from .queue import Share

END_SECONDS = 5.0  # that a worker has to end by itself


class WorkerProcess:
    """A worker: its process, the pipe to it, and what it draws.

    :param index: among the workers.
    :param devices: how many there are, which the workers share.
    """

    def __init__(self, options: EngineConfig, index: int, devices: int, threads: int):
        self.index = index
        self.device = ""  # until it is ready
        self.held = worker.Held()
        self.work: worker.Work | None = None
        self.shares: list[Share] = []  # what its work is for
        self.share_done = 0.0  # of the work's steps
        self.stopped_at: float | None = None
        self.pipe, theirs = multiprocessing.Pipe()
        self.process = self._start(theirs, options, index % devices, threads)

    def _start(self, pipe: Connection, options: EngineConfig, device: int, threads: int) -> Any:
        args, name = (pipe, options, device, threads), f"worker {self.index}"
        process = multiprocessing.get_context("spawn").Process(target=worker.main, args=args, name=name, daemon=True)
        with _without_signals():
            process.start()
        pipe.close()
        return process

    def draw(self, number: int, shares: list[Share]) -> None:
        """Let it draw one batch."""
        pieces = tuple(worker.Piece(job.request, numbers, job.previews) for job, numbers in shares)
        self.work = worker.Work(number, shares[0][0].file, pieces)
        self.shares, self.share_done, self.stopped_at = shares, 0.0, None
        self._send(self.work)

    def stop_work(self, now: float) -> None:
        """Let it stop after the evaluation that it is at."""
        self.stopped_at = now
        if self.work is not None:
            self._send(self.work.number)

    def finish(self) -> list[Share]:
        """It has nothing to do any more; returns what it had."""
        shares, self.shares, self.work, self.share_done = self.shares, [], None, 0.0
        return shares

    def close(self) -> None:
        """End the process."""
        self._send(None)
        self.pipe.close()
        self.process.join(END_SECONDS)
        if self.process.exitcode is None:
            self.process.kill()
            self.process.join()

    def ending(self) -> str:
        """How the process ended."""
        code = self.process.exitcode
        if code is not None and code < 0:
            return signal.Signals(-code).name
        return f"exit code {code}"

    def _send(self, message: object) -> None:
        with suppress(OSError):  # it has ended, which the engine notices
            self.pipe.send(message)


@contextmanager
def _without_signals() -> Iterator[None]:
    """Block signals that stop programs in this thread: processes that it starts begin without them.

    A terminal sends Ctrl-C to the workers too, at a time when they still import and cannot ignore it.
    """
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    resource_tracker.ensure_running()  # which would unblock them
    before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
