"""What a person who waits is told: how long the first step takes, and what to do about a slow one."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from .. import distributed
from ..logs import logger

SLOW = 30.0  # seconds of a step after which it is worth a word

ADVICE = (
    "--preset auto chooses a network for this machine; smaller --num_channels, --num_res_blocks, --image_size or "
    "--batch_size are faster"
)


@contextmanager
def ticking(what: str) -> Iterator[None]:
    """Log every SLOW seconds, on rank 0, that `what` is still going on, the first time with advice."""
    done = threading.Event()

    def tick() -> None:
        start, advice = time.monotonic(), f"; {ADVICE}"
        while not done.wait(SLOW):
            logger.log(f"{what}: {time.monotonic() - start:.0f} s so far{advice}")
            advice = ""

    if distributed.get_rank() != 0:
        yield
        return
    thread = threading.Thread(target=tick, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


@contextmanager
def first_step(loop: Any) -> Iterator[None]:
    """Around a step of a TrainLoop: log how long its first one takes, and at this pace the whole run."""
    if loop.step:
        yield
        return
    start = time.perf_counter()
    with ticking("the first step"):
        yield
        distributed.synchronize(loop.device)
    seconds = time.perf_counter() - start
    left = loop.max_steps - loop.resume_step - 1
    pace = f"; at this pace the remaining {left:,} take {duration(left * seconds)}" if left > 0 else ""
    logger.log(f"the first step took {seconds:.2g} s{pace}")


def duration(seconds: float) -> str:
    """A time in the unit that fits: 40 s, 12 min, 3.5 hours, 20 days."""
    for unit, length in (("days", 86400.0), ("hours", 3600.0), ("min", 60.0)):
        if seconds >= 2 * length:
            return f"{seconds / length:.1f} {unit}"
    return f"{seconds:.0f} s"
