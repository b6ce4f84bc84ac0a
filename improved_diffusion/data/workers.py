"""Batches read ahead by worker processes, and what happens when those fail."""

from __future__ import annotations

import atexit
import copy
import itertools
import multiprocessing
import multiprocessing.connection
import multiprocessing.context
import os
import shutil
import signal
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch as th
from torch.utils.data import DataLoader, Dataset

from .. import distributed
from ..config import UserError
from ..logs import logger
from ..utils.stop_signals import SIGNALS, catch

MAX_WORKERS = 8  # of each rank, where nobody says how many
AUTO = "auto"
MAX_DEATHS = 3  # of workers, in a row without a batch
DEATH_LIMIT, CLEAN_UP_LIMIT = 2.0, 10.0  # seconds
SHARED_MEMORY = "/dev/shm"  # where Linux keeps what processes share, such as the batches
_OUT_OF_MEMORY, _SHARED_MEMORY_FULL = "SIGKILL", "SIGBUS"  # what the kernel sends then


def check_workers(num_workers: Any) -> None:
    """Raise UserError for what is no number of workers; warn of more than there are cores."""
    if num_workers == AUTO:
        return
    if not isinstance(num_workers, int) or num_workers < 0:
        raise UserError(f"--num_workers {num_workers!r} must be a whole number of processes, 0 or more, or {AUTO}")
    cores = _cores()
    if num_workers > cores:
        logger.warn(f"--num_workers {num_workers} is more than the {cores} CPU cores: more than {cores} are not faster")


def workers_for_cores() -> int:
    """How many workers this rank's share of the cores has room for, beside the rank itself."""
    return max(1, min(MAX_WORKERS, _cores() // distributed.local_size() - 1))


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class BatchReader:
    """The batches of a data set from a step on, without end.

    Batch k is what `collate` makes of the items at `positions(k)`, whoever reads it. A data set that has __getitems__
    gives the items all at once. So workers that are killed are
    replaced from the batch that is due, and where workers cannot work, this process reads instead.
    :param num_workers: processes; 0: read in this one.
    :param batch_bytes: the size of a batch, for messages.
    Raises UserError if workers crash again and again.
    """

    def __init__(
        self, dataset: Dataset, positions: Callable[[int], list[int]], collate: Callable[[list[Any]], Any],
        num_workers: int, batch_bytes: int,
    ):  # fmt: skip
        self.dataset, self.positions, self.collate = dataset, positions, collate
        self.num_workers, self.batch_bytes = num_workers, batch_bytes
        self.step = 0  # of the next batch
        self.deaths = 0
        self.batches: Any = None
        self.owner = os.getpid()

    def seek(self, step: int) -> None:
        """Continue with batch `step`."""
        self.close()
        self.step = step

    def close(self) -> None:
        """End the workers; the next batch would start them again."""
        atexit.unregister(self._kill)
        self._kill()
        if self.batches is not None and self.num_workers:
            # torch's own clean-up takes locks, which a killed worker may have held: then only this thread waits.
            clean_up = threading.Thread(target=self.batches._shutdown_workers, daemon=True)
            clean_up.start()
            clean_up.join(CLEAN_UP_LIMIT)
        self.batches = None

    def _kill(self) -> None:
        """End the worker processes. They ignore SIGTERM, and have nothing to finish."""
        if os.getpid() == self.owner:  # and not a process forked from it
            for worker in _workers_of(self.batches):
                worker.kill()

    def __next__(self) -> Any:
        while True:
            try:
                if self.batches is None:
                    self.batches = self._start()
                batch = next(self.batches)
            except (OSError, EOFError, RuntimeError) as error:
                if not self.num_workers:
                    raise
                self._recover(error)
            else:
                self.step, self.deaths = self.step + 1, 0
                return batch

    def _start(self) -> Iterator[Any]:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "This DataLoader will create")  # BatchStream says it
            loader = DataLoader(
                self.dataset,
                batch_sampler=map(self.positions, itertools.count(self.step)),  # type: ignore[arg-type]
                num_workers=self.num_workers,
                collate_fn=self.collate,
                pin_memory=distributed.pins_memory(distributed.dev()),
                # The workers draw nothing at random; the generators of training must not advance.
                generator=th.Generator(),
                worker_init_fn=_start_worker if self.num_workers else None,
                multiprocessing_context=_context() if self.num_workers else None,
            )
            with _keep_child_handler():
                batches = iter(loader)
        if self.num_workers:
            # Now, so that it runs before multiprocessing's own, which waits for the workers without end.
            atexit.register(self._kill)
        return batches

    def _recover(self, error: Exception) -> None:
        """Prepare to read the batch that is due again: with new workers, or else in this process."""
        started = self.batches is not None
        names = _deaths(_workers_of(self.batches))
        self.close()
        self.deaths += 1
        if not started:
            self._read_here(f"worker processes cannot be started ({_reason(error)})")
        elif not names or _SHARED_MEMORY_FULL in names:
            self._read_here(self._shared_memory_problem(", ".join(names) or _reason(error)))
        elif not all(name.startswith("SIG") for name in names):
            self._read_here(
                f"a worker process ended ({', '.join(names)}; see its own message). Where Python starts processes "
                "afresh, as on Windows and macOS, a script needs `if __name__ == '__main__':`"
            )
        elif self.deaths < MAX_DEATHS:
            logger.warn(f"a process that reads images ended: {_describe(names)}; new ones go on with the same batches")
        elif _OUT_OF_MEMORY in names:
            self._read_here(f"processes that read images ended {self.deaths} times in a row: {_describe(names)}")
        else:  # this process would crash too
            raise UserError(
                f"processes that read images crash ({', '.join(names)}), {self.deaths} times in a row, in the next "
                f"images from step {self.step} on: one of the images, or the installation of Pillow, is damaged"
            ) from None

    def _read_here(self, problem: str) -> None:
        logger.warn(f"{problem}. The main process reads the images itself from now on, which may be slower")
        self.num_workers = 0

    def _shared_memory_problem(self, reason: str) -> str:
        size = ""
        if os.path.isdir(SHARED_MEMORY):
            size = f"; {SHARED_MEMORY} has {_mebibytes(shutil.disk_usage(SHARED_MEMORY).total)}"
        return (
            f"worker processes cannot hand over their batches of {_mebibytes(self.batch_bytes)} in shared memory "
            f"({reason}{size}): start the container with a larger --shm-size, or give --num_workers 0"
        )


class _Flag:
    """What a DataLoader needs of multiprocessing's Event. That one has a lock, which a worker may hold when it is
    killed; then this process would wait for the lock without end."""

    def __init__(self) -> None:
        self.value = multiprocessing.RawValue("b", 0)

    def is_set(self) -> bool:
        return bool(self.value.value)

    def set(self) -> None:
        self.value.value = 1


def _context() -> multiprocessing.context.BaseContext:
    context = copy.copy(multiprocessing.get_context(multiprocessing.get_start_method()))
    context.Event = _Flag  # type: ignore[method-assign,assignment]
    return context


def _workers_of(batches: Any) -> list[Any]:
    """The processes of a DataLoader's iterator; [] if it reads in this process."""
    return getattr(batches, "_workers", [])


@contextmanager
def _keep_child_handler() -> Iterator[None]:
    """Keep the SIGCHLD handler inside. torch's raises an error wherever the main thread is when a worker dies, even in
    the middle of a training step; reading the next batch notices the death as well."""
    child = getattr(signal, "SIGCHLD", None)  # Windows has none
    before = signal.getsignal(child) if child is not None else None
    try:
        yield
    finally:
        if child is not None and before is not None and signal.getsignal(child) is not before:
            signal.signal(child, before)


def _deaths(workers: list[Any]) -> list[str]:
    """How workers have ended, such as "SIGKILL" or "exit code 1"; [] if they all live."""
    # A broken connection is noticed a moment before the death.
    ended = multiprocessing.connection.wait([worker.sentinel for worker in workers], timeout=DEATH_LIMIT)
    codes = set()
    for worker in workers:
        if worker.sentinel in ended:
            worker.join(DEATH_LIMIT)
            codes.add(worker.exitcode or 0)
    return sorted(f"exit code {code}" if code >= 0 else signal.Signals(-code).name for code in codes)


def _describe(names: list[str]) -> str:
    if _OUT_OF_MEMORY in names:
        return "killed, probably by the out-of-memory killer (a lower --num_workers needs less memory)"
    return f"crashed ({', '.join(names)})"


def _reason(error: Exception) -> str:
    """The last line of an error: a worker's error comes with its whole traceback."""
    return (str(error).strip() or type(error).__name__).splitlines()[-1]


def _mebibytes(count: int) -> str:
    return f"{count / 2**20:,.1f} MiB"


def _start_worker(worker: int) -> None:
    th.set_num_threads(1)
    # Stop signals often go to all processes of a run. The training process acts on them and ends its workers.
    catch(SIGNALS, signal.SIG_IGN)
