"""A thread on each rank that ends it, with a message, where another rank is gone or its own work hangs.

Every few seconds the threads meet in torch's monitored barrier, in a gloo group of their own, whatever the main threads
are stuck in. A rank that is killed is missed at the next meeting, one that is frozen or cut off after `SILENCE` seconds
more; a collective's own timeout is then no more than a last resort, and may be long.
"""

from __future__ import annotations

import os
import re
import sys
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any

import torch as th
import torch.distributed as dist

INTERVAL = 5.0  # seconds between meetings
SILENCE = 30.0  # seconds that a meeting waits for a rank before it counts as lost
WORK_LIMIT = 600.0  # seconds for a piece of this rank's own work
ABORT_LIMIT = 5.0  # seconds for the launcher to end the job before this process just ends
GRACE = 2.0  # seconds for a main thread that has failed as well to report why, and for rank 0 to speak first

_ADVICE = "the same command goes on from what is saved, training with --resume auto"


class _Process:
    """What this process is at."""

    def __init__(self) -> None:
        self.who = ""  # how its messages begin, such as "rank 1 on node7: "
        self.abort: Callable[[int], None] | None = None  # ends the job's other ranks
        self.work: working | None = None
        self.step = 0  # the training step that the main thread is in, from 1; 0: in none
        self.watch: Watchdog | None = None


_process = _Process()
_lock = threading.Lock()


class working:
    """While the main thread is inside, it must get on: a wait longer than limit_s ends this process with a message.

    `with working("the next batch of /data"):`. Costs two assignments. May be nested: the innermost counts.
    """

    __slots__ = ("limit_s", "outer", "what")

    def __init__(self, what: str, limit_s: float | None = None):
        self.what = what
        self.limit_s = WORK_LIMIT if limit_s is None else limit_s

    def __enter__(self) -> working:
        self.outer = _process.work
        _process.work = self
        if _process.watch is None:
            _start(Watchdog())
        return self

    def __exit__(self, *exc: Any) -> None:
        _process.work = self.outer


class Watchdog(threading.Thread):
    """The thread; without a group it looks after this process alone.

    :param hosts: the name of each rank's host.
    :param group: a gloo process group of all ranks that nothing else uses.
    """

    def __init__(self, rank: int = 0, hosts: Sequence[str] = ("",), group: Any = None):
        super().__init__(name="watchdog", daemon=True)
        self.rank, self.hosts, self.group = rank, hosts, group
        self.reason = ""  # why this rank must end, once that is known
        self.known = threading.Event()  # the reason
        self.reported = threading.Event()  # the main thread reports an error, and then ends this process
        self.leaving = False
        self.wake = threading.Event()
        self._seen: working | None = None
        self._seen_times = 0
        self._steps: list[int] = []
        self._same_steps_times = 0

    def run(self) -> None:
        over = False
        while not over:
            self.wake.wait(INTERVAL)
            self._check_work()
            over = self._alone_and_idle() if self.group is None else self._meet()

    def _meet(self) -> bool:
        """Wait for all ranks' threads; whether all of them are done."""
        # Rank 0 gives up first, for it alone learns who is missing.
        patience = SILENCE if self.rank == 0 else SILENCE + GRACE
        mine = th.tensor([int(self.leaving), _process.step, int(_process.work is not None)])
        rows = [th.zeros_like(mine) for _ in self.hosts]
        started = time.monotonic()
        try:
            dist.monitored_barrier(self.group, timedelta(seconds=patience), wait_all_ranks=True)
            dist.all_gather(rows, mine, self.group)
        except (RuntimeError, ValueError) as error:
            in_time = time.monotonic() - started < SILENCE if self.rank == 0 else "Timed out" not in str(error)
            self._lost(self._missing(str(error)), in_time)
            return True
        leaving, steps, working_on = zip(*(row.tolist() for row in rows))
        self._check_steps(list(steps), any(working_on))
        return all(leaving)

    def _check_steps(self, steps: list[int], somebody_works: bool) -> None:
        """End this rank where all are in training steps, and none has got on for as long as WORK_LIMIT."""
        same = steps == self._steps and min(steps) > 0 and not somebody_works
        self._same_steps_times = self._same_steps_times + 1 if same else 0
        self._steps = steps
        if self._same_steps_times * INTERVAL > WORK_LIMIT and not self.reported.is_set():
            behind = [rank for rank, step in enumerate(steps) if step == min(steps)]
            who = "all ranks" if len(behind) == len(steps) else self._names(behind)
            _say(
                f"no rank has finished a step for {WORK_LIMIT / 60:.0f} minutes: {who} did not come through step "
                f"{min(steps) - 1}, in a collective or on a GPU that hangs; {_ADVICE}. This process is here:\n"
                f"{_stack()}"
            )
            time.sleep(GRACE)  # all ranks find out in this meeting, and have something to say
            end_process(1)

    def _names(self, ranks: list[int]) -> str:
        return " and ".join(f"rank {rank} on {self.hosts[rank]}" for rank in ranks)

    def _missing(self, error: str) -> list[int]:
        """The ranks that did not come to a meeting, as far as this one can know: on others than 0, rank 0."""
        named = re.search(r"Ranks? ([\d, ]+?) failed to pass monitoredBarrier", error)
        if named:
            return [int(number) for number in named.group(1).split(",")]
        # Of a connection that is closed torch says no rank; but from a rank that has ended nothing can be received.
        ended = []
        for rank in range(1, len(self.hosts)) if self.rank == 0 else ():
            try:
                dist.irecv(th.zeros(1), rank, self.group)
            except RuntimeError:
                ended.append(rank)
        return ended or [0]

    def _lost(self, ranks: list[int], in_time: bool) -> None:
        """End this rank because of others, unless its main thread does it, with the same knowledge, by itself."""
        if not in_time:
            what = f"did not answer for {SILENCE:.0f} s: the host is down, the network is cut, or the process hangs"
        elif self.rank == 0:
            what = "ended; without a message if it was killed, as for want of memory"
        else:
            what = "ended, and its message says why"
        self.reason = f"{'lost contact with another rank: ' if in_time else ''}{self._names(ranks)} {what}; {_ADVICE}"
        self.known.set()
        if not self.reported.wait(GRACE / 4 if self.rank == 0 else GRACE):
            _say(self.reason)
            end_process(1)

    def _check_work(self) -> None:
        work = _process.work
        # Times are counted rather than seconds, so that a job that is suspended as a whole survives it.
        self._seen_times = self._seen_times + 1 if work is self._seen else 0
        self._seen = work
        if work is not None and self._seen_times * INTERVAL > work.limit_s and not self.reported.is_set():
            limit = f"{work.limit_s / 60:.0f} minutes" if work.limit_s >= 120 else f"{work.limit_s:.0f} s"
            _say(f"waited {limit} for {work.what}; {_ADVICE}. The process is here:\n{_stack()}")
            end_process(1)

    def _alone_and_idle(self) -> bool:
        """Whether this process waits for nothing: it then needs no thread, and the next wait starts another."""
        with _lock:
            if _process.work is None or self.leaving:
                _process.watch = None
                return True
        return False


def _stack() -> str:
    """Where the main thread is."""
    frame = sys._current_frames().get(threading.main_thread().ident or 0)
    return "".join(traceback.format_stack(frame)).rstrip()


def beat(step: int) -> None:
    """The main thread begins training step `step`, from 1; 0: it trains no more."""
    _process.step = step


def identify(who: str, abort: Callable[[int], None] | None = None) -> None:
    """How this process's messages begin, and what ends the other ranks' processes."""
    _process.who, _process.abort = who, abort


def start(rank: int, hosts: Sequence[str]) -> None:
    """Watch over all ranks of the default process group. Collective."""
    leave()  # the lone one that has watched over the start
    group = dist.new_group(backend="gloo", timeout=timedelta(seconds=SILENCE))
    _start(Watchdog(rank, hosts, group))


def leave() -> None:
    """The program is done: wait until it is on all ranks, then stop watching. Collective."""
    watch = _process.watch
    if watch is None:
        return
    watch.leaving = True
    watch.wake.set()
    watch.join()
    _process.watch = None


def report_by_main(lost_peer: bool) -> str:
    """The main thread is about to report an error and to end this process: the thread leaves both to it.

    Returns why other ranks are lost, where the watchdog knows.
    :param lost_peer: the error comes from that, probably: wait a moment for the reason.
    """
    watch = _process.watch
    if watch is None:
        return ""
    watch.reported.set()
    if lost_peer and watch.group is not None:
        watch.wake.set()  # the next meeting tells who is missing
        watch.known.wait(GRACE)
    return watch.reason


def end_process(code: int) -> None:
    """End this process, and where the launcher offers that the others, whatever any thread is stuck in."""
    sys.stdout.flush()
    if _process.abort is not None:
        time.sleep(0.5)  # the abort would overtake what was printed, and mpiexec would throw that away
        # It may hang itself, as where the network is what failed.
        aborting = threading.Thread(target=_process.abort, args=(code,), daemon=True)
        aborting.start()
        aborting.join(ABORT_LIMIT)
    os._exit(code)


def _say(text: str) -> None:
    # Not print: the main thread may hold the stream's lock.
    os.write(2, f"{_process.who}error: {text}\n".encode())


def _start(watch: Watchdog) -> None:
    with _lock:
        if _process.watch is None:
            _process.watch = watch
            watch.start()


def _forget() -> None:
    # A process that reads images has no such thread, and needs none.
    global _lock
    _lock = threading.Lock()
    _process.watch, _process.work = None, None


if hasattr(os, "register_at_fork"):  # Windows does not fork
    os.register_at_fork(after_in_child=_forget)
