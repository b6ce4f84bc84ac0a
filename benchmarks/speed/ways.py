"""Several ways to do one thing, measured in turns."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from improved_diffusion import distributed
from improved_diffusion.config import one_line

from .machine import NoMemory, PeakMemory, Switches, switches_kept, synchronize

BLOCK = 0.25  # seconds of one way in a round: then a GPU's queue is as full as in a long run


@dataclass(frozen=True)
class Way:
    """One way to do the thing.

    :param make: prepares it and gives the call to measure. It is called once; what it raises becomes the way's row.
    :param warm_up: calls before the first one that counts.
    :param needs: seconds that preparing it takes, such as for compiling: where they are not left, it is left out.
    :param memory: measure its peak memory; on CPUs that needs a call under torch's profiler.
    :param share: the part of the thing that a call does, for what takes minutes and costs the same from start to end.
    :param columns: more columns of its row.
    """

    name: str
    make: Callable[[], Callable[[], Any]]
    warm_up: int = 2
    needs: float = 0.0
    memory: bool = True
    share: float = 1.0
    columns: dict[str, Any] = field(default_factory=dict)


@dataclass
class Timing:
    """What was measured of a way: `seconds` for each call, in each round; or why there is nothing."""

    way: Way
    seconds: list[float] = field(default_factory=list)
    first: float = 0.0  # seconds of the preparation and the first call
    peak: int | None = None  # bytes
    error: str = ""

    @property
    def median(self) -> float:
        """Seconds of a call."""
        return statistics.median(self.seconds)

    def ratio_to(self, other: Timing) -> float:
        """How many times as fast as the other one: the median over the rounds."""
        return statistics.median(theirs / own for own, theirs in zip(self.seconds, other.seconds))

    def row(self, baseline: Timing | None) -> dict[str, Any]:
        """Its columns. `ratio` is the speed relative to the baseline's."""
        if self.error:
            return {"way": self.way.name, **self.way.columns, "error": self.error}
        ordered = sorted(self.seconds)
        quartiles = [ordered[len(ordered) // 4], ordered[(3 * len(ordered)) // 4]]
        found: dict[str, Any] = {
            "way": self.way.name, **self.way.columns, "seconds": self.median, "quartiles": quartiles,
            "rounds": len(self.seconds), "first_seconds": self.first, "peak_bytes": self.peak,
        }  # fmt: skip
        if baseline is not None and not baseline.error:
            found["ratio"] = self.ratio_to(baseline)
        return found


class Clock:
    """The time that is left."""

    def __init__(self, seconds: float):
        self.end = time.perf_counter() + seconds

    @property
    def left(self) -> float:
        """Seconds."""
        return self.end - time.perf_counter()

    def part(self, share: float) -> Clock:
        """A clock for a share of what is left."""
        return Clock(max(0.0, self.left * share))


@dataclass(frozen=True)
class _Ready:
    """A way that is prepared."""

    timing: Timing
    call: Callable[[], Any]
    switches: Switches
    calls: int  # in a block
    seconds: float  # of a block


def compare(
    ways: Sequence[Way], clock: Clock, least: int = 5, most: int = 20, block: float = BLOCK,
    inspect: Callable[[Way, Callable[[], Any]], None] | None = None,
) -> list[Timing]:  # fmt: skip
    """Measure the ways in turns: `least` rounds, and up to `most` while there is time. The first one is the baseline.

    :param inspect: gets each way and its call afterwards.

    A way that fails is reported with its error, and the others go on. Later ones are left out where there is no time.
    """
    with switches_kept():
        plain = Switches()
        timings: list[Timing] = []
        ready: list[_Ready] = []
        for way in ways:
            timing = Timing(way)
            timings.append(timing)
            left = clock.left - least * sum(each.seconds for each in ready)
            if timings[1:] and left < way.needs:
                timing.error = f"left out: no time ({max(left, 0):.0f} s left)"
                continue
            plain.apply()
            prepared = _prepare(timing, block)
            if prepared:
                ready.append(prepared)
        _rounds(ready, clock, least, most)
        if inspect:
            for each in ready:
                each.switches.apply()
                inspect(each.timing.way, each.call)
    return timings


def _prepare(timing: Timing, block: float) -> _Ready | None:
    """The way, ready to be called; None where it fails."""
    memory = PeakMemory() if timing.way.memory else NoMemory()
    start = time.perf_counter()
    try:
        call = memory(timing.way.make)
        made = time.perf_counter()
        memory(call)
        synchronize()
        seconds, timing.first = time.perf_counter() - made, time.perf_counter() - start
        for number in range(1, timing.way.warm_up):
            if distributed.dev().type == "cuda" and number == timing.way.warm_up - 1:
                memory.most = 0  # the first calls also try cuDNN's algorithms
            start = time.perf_counter()
            memory(call) if distributed.dev().type == "cuda" else call()
            synchronize()
            seconds = time.perf_counter() - start
    except Exception as error:  # of whatever kind: the others go on
        call = None
        _fail(timing, error)
        return None
    timing.peak = getattr(call, "peak", None) or memory.read()
    calls = max(1, round(block / max(seconds, 1e-6)))
    return _Ready(timing, call, Switches(), calls, calls * seconds)


def _fail(timing: Timing, error: Exception) -> None:
    if distributed.is_out_of_memory(error):
        timing.error = "out of memory"
    else:
        timing.error = f"{type(error).__name__}: {one_line(str(error))[:200]}"
    error.__traceback__ = None  # it holds the tensors
    gc.collect()
    distributed.empty_cache(distributed.dev())


def _rounds(ready: list[_Ready], clock: Clock, least: int, most: int) -> None:
    number, longest = 0, 0.0
    while ready and number < most and (number < least or clock.left > longest):
        started = time.perf_counter()
        for each in list(ready):
            each.switches.apply()
            try:
                start = time.perf_counter()
                for _ in range(each.calls):
                    each.call()
                synchronize()
                each.timing.seconds.append((time.perf_counter() - start) / each.calls / each.timing.way.share)
            except Exception as error:
                ready.remove(each)
                _fail(each.timing, error)
        longest = max(longest, time.perf_counter() - started)
        number += 1
