"""A thread on each rank that ends the process, with a message, if another rank is lost or this rank's work hangs.

Every few seconds the threads wait for each other in torch's monitored barrier, in a gloo group of their own,
independently of what the main threads do. A killed rank is noticed at the next check, a frozen or disconnected one
`SILENCE` seconds later. The timeout of the collectives themselves is only a last resort and may be long.
"""

from __future__ import annotations

import os
import re
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from datetime import timedelta
from typing import Any, TypeVar

from ..config import RunConfig
from ..utils.terminal import close_streams

INTERVAL = 5.0  # seconds between checks
SILENCE = 30.0  # seconds that a check waits for a rank before it counts as lost
ABORT_LIMIT = 5.0  # seconds that the launcher gets to end the job; then this process ends alone
GRACE = 2.0  # seconds for a main thread that failed too to report why, and for rank 0 to report first

T = TypeVar("T")
_ADVICE = "rerun the same command to continue (training: with --resume auto)"


class _Process:
    """The state of this process."""

    def __init__(self) -> None:
        self.who = ""  # the prefix of its messages, such as "rank 1 on node7: "
        self.abort: Callable[[int], None] | None = None  # ends the job's other ranks
        self.work: working | None = None
        self.limit_s: float = RunConfig.hang_timeout  # for this rank's work, and for one step of all
        self.step = 0  # the training step of the main thread, from 1; 0: not training
        self.watch: Watchdog | None = None


_process = _Process()
_lock = threading.Lock()


class working:
    """A limit on the time that the main thread spends inside: beyond limit_s this process ends with a message.

    `with working("the next batch of /data"):`. Costs two assignments. May be nested: the innermost limit applies.
    :param what: what the message says it waited for.
    :param limit_s: seconds; by default the `hang_timeout` of setup_dist.
    """

    __slots__ = ("limit_s", "outer", "what")

    def __init__(self, what: str, limit_s: float | None = None):
        self.what = what
        self.limit_s = _process.limit_s if limit_s is None else limit_s

    def __enter__(self) -> working:
        self.outer = _process.work
        _process.work = self
        if _process.watch is None:
            _start(Watchdog())
        return self

    def __exit__(self, *exc: Any) -> None:
        _process.work = self.outer


def watched(items: Iterable[T], what: str, limit_s: float | None = None) -> Iterator[T]:
    """The items; waiting for each of them is limited as in `working`."""
    items = iter(items)
    while True:
        with working(what, limit_s):
            try:
                item = next(items)
            except StopIteration:
                return
        yield item


class Watchdog(threading.Thread):
    """The thread; without a group it watches this process only.

    :param hosts: the name of each rank's host.
    :param group: a gloo process group of all ranks, not used for anything else.
    """

    def __init__(self, rank: int = 0, hosts: Sequence[str] = ("",), group: Any = None):
        super().__init__(name="watchdog", daemon=True)
        self.rank, self.hosts, self.group = rank, hosts, group
        self.reason = ""  # why this rank must end, once known
        self.known = threading.Event()  # the reason is known
        self.reported = threading.Event()  # the main thread reports an error and ends this process
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
            over = self._alone_and_idle() if self.group is None else self._check_ranks()

    def _check_ranks(self) -> bool:
        """Wait for all ranks' threads; returns whether all of them are done."""
        import torch as th
        import torch.distributed as dist

        # Rank 0 gives up first: only rank 0 learns which rank is missing.
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
        """End this rank if all ranks are in training steps and none has finished one within the limit."""
        same = steps == self._steps and min(steps) > 0 and not somebody_works
        self._same_steps_times = self._same_steps_times + 1 if same else 0
        self._steps = steps
        if self._same_steps_times * INTERVAL > _process.limit_s and not self.reported.is_set():
            behind = [rank for rank, step in enumerate(steps) if step == min(steps)]
            who = "all ranks" if len(behind) == len(steps) else self._names(behind)
            _say(
                f"no rank has finished a step for {_duration(_process.limit_s)}: {who} hung in step {min(steps) - 1}, "
                f"in a collective or on a GPU; {_ADVICE}. If steps may take longer, raise --hang_timeout. The stack of "
                f"this process:\n{_stack()}"
            )
            time.sleep(GRACE)  # all ranks notice at the same check, and report
            end_process(1)

    def _names(self, ranks: list[int]) -> str:
        return " and ".join(f"rank {rank} on {self.hosts[rank]}" for rank in ranks)

    def _missing(self, error: str) -> list[int]:
        """The ranks missing from a check, as far as this rank knows: ranks other than 0 can only name rank 0."""
        import torch as th
        import torch.distributed as dist

        named = re.search(r"Ranks? ([\d, ]+?) failed to pass monitoredBarrier", error)
        if named:
            return [int(number) for number in named.group(1).split(",")]
        # torch names no rank for a closed connection, but receiving from a rank that has ended fails.
        ended = []
        for rank in range(1, len(self.hosts)) if self.rank == 0 else ():
            try:
                dist.irecv(th.zeros(1), rank, self.group)
            except RuntimeError:
                ended.append(rank)
        return ended or [0]

    def _lost(self, ranks: list[int], in_time: bool) -> None:
        """End this rank because others are lost, unless its main thread reports that itself."""
        if not in_time:
            what = f"did not answer for {SILENCE:.0f} s: the host is down, the network is cut, or the process hangs"
        elif self.rank == 0:
            what = "ended; without a message if it was killed, for example by the out-of-memory killer"
        else:
            what = "ended; its own message says why"
        self.reason = f"{'lost contact with another rank: ' if in_time else ''}{self._names(ranks)} {what}; {_ADVICE}"
        self.known.set()
        if not self.reported.wait(GRACE / 4 if self.rank == 0 else GRACE):
            _say(self.reason)
            end_process(1)

    def _check_work(self) -> None:
        work = _process.work
        # Counts checks instead of seconds, so that a job that is suspended as a whole survives.
        self._seen_times = self._seen_times + 1 if work is self._seen else 0
        self._seen = work
        if work is not None and self._seen_times * INTERVAL > work.limit_s and not self.reported.is_set():
            _say(
                f"waited {_duration(work.limit_s)} for {work.what}; {_ADVICE}. If it may take longer, raise "
                f"--hang_timeout. The stack of this process:\n{_stack()}"
            )
            end_process(1)

    def _alone_and_idle(self) -> bool:
        """Whether this process waits for nothing: the thread then ends, and the next wait starts another."""
        with _lock:
            if _process.work is None or self.leaving:
                _process.watch = None
                return True
        return False


def _duration(seconds: float) -> str:
    return f"{seconds / 60:.0f} minutes" if seconds >= 120 else f"{seconds:.0f} s"


def _stack() -> str:
    """The stack of the main thread."""
    frame = sys._current_frames().get(threading.main_thread().ident or 0)
    return "".join(traceback.format_stack(frame)).rstrip()


def heartbeat(step: int) -> None:
    """Tell the watchdog that the main thread begins training step `step`, from 1; 0: training has ended."""
    _process.step = step


def identify(who: str, abort: Callable[[int], None] | None = None) -> None:
    """Set the prefix of this process's messages, and the function that ends the other ranks' processes."""
    _process.who, _process.abort = who, abort


def set_limit(limit_s: float) -> None:
    """Set the seconds that `working` allows by default, and that a training step of all ranks may take."""
    _process.limit_s = limit_s


def start(rank: int, hosts: Sequence[str]) -> None:
    """Watch all ranks of the default process group. Collective."""
    import torch.distributed as dist

    leave()  # the watchdog of the start, which watched this process only
    group = dist.new_group(backend="gloo", timeout=timedelta(seconds=SILENCE))
    _start(Watchdog(rank, hosts, group))


def leave() -> None:
    """Stop watching, once the program has ended on all ranks. Collective."""
    watch = _process.watch
    if watch is None:
        return
    watch.leaving = True
    watch.wake.set()
    watch.join()
    _process.watch = None


def report_by_main(lost_peer: bool) -> str:
    """Let the main thread report an error and end this process, instead of the watchdog.

    Returns why other ranks are lost, if the watchdog knows.
    :param lost_peer: the error probably comes from a lost rank: wait a moment for the reason.
    """
    watch = _process.watch
    if watch is None:
        return ""
    watch.reported.set()
    if lost_peer and watch.group is not None:
        watch.wake.set()  # the next check tells which rank is missing
        watch.known.wait(GRACE)
    return watch.reason


def end_process(code: int) -> None:
    """End this process, whatever its threads do, and the other ranks' processes if the launcher can."""
    close_streams()
    if _process.abort is not None:
        time.sleep(0.5)  # mpiexec drops output that the abort overtakes
        # The abort itself may hang, for example if the network failed.
        aborting = threading.Thread(target=_process.abort, args=(code,), daemon=True)
        aborting.start()
        aborting.join(ABORT_LIMIT)
    os._exit(code)


def _say(text: str) -> None:
    # Not print: the main thread may hold the lock of the stream.
    with suppress(OSError):  # stderr may be closed
        os.write(2, f"{_process.who}error: {text}\n".encode(errors="backslashreplace"))


def _start(watch: Watchdog) -> None:
    with _lock:
        if _process.watch is None:
            _process.watch = watch
            watch.start()


def _forget() -> None:
    # The thread does not exist in a forked process, such as a data worker, which needs none.
    global _lock
    _lock = threading.Lock()
    _process.watch, _process.work = None, None


if hasattr(os, "register_at_fork"):  # not on Windows
    os.register_at_fork(after_in_child=_forget)
