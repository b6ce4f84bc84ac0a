"""The memory that the C library keeps for this process."""

from __future__ import annotations

import ctypes
import functools
import sys
from collections.abc import Callable

# The parameters of glibc's mallopt, from its malloc.h.
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4


def keep_freed() -> None:
    """Keep the memory that tensors on the CPU leave, for those of the next step.

    glibc by itself gets memory from the system for each large tensor and gives it back with the tensor, and the system
    clears it page by page each time. Without effect where the C library is another one.
    """
    mallopt = _function("mallopt")
    if mallopt:
        mallopt(M_MMAP_MAX, 0)
        mallopt(M_TRIM_THRESHOLD, -1)


def return_freed() -> None:
    """Give what is kept and not in use back to the system."""
    malloc_trim = _function("malloc_trim")
    if malloc_trim:
        malloc_trim(0)


@functools.cache
def _function(name: str) -> Callable[..., int] | None:
    """A function of glibc; None where the C library is another one."""
    return getattr(ctypes.CDLL(None), name, None) if sys.platform == "linux" else None
