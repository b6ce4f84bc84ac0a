"""The memory that the C library keeps for this process."""

from __future__ import annotations

import ctypes
import functools
import sys
from collections.abc import Callable

# The parameters of glibc's mallopt, from its malloc.h.
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_MMAP_MAX = -1, -3, -4

keeps = False  # whether freed memory is kept, rather than handled by glibc as it would be by itself


def keep_freed() -> None:
    """Keep the memory that tensors on the CPU leave, for those of the next step.

    glibc by itself gets memory from the system for each large tensor and gives it back with the tensor, and the system
    clears it page by page each time. Without effect where the C library is another one.
    """
    global keeps
    keeps = _set({M_MMAP_MAX: 0, M_TRIM_THRESHOLD: -1})


def keep_little() -> None:
    """End `keep_freed`: from here on glibc has the limits that its own grow to at most."""
    global keeps
    keeps = False
    _set({M_MMAP_MAX: 2**16, M_MMAP_THRESHOLD: 2**25, M_TRIM_THRESHOLD: 2**26})
    return_freed()


def return_freed() -> None:
    """Give what is kept and not in use back to the system."""
    malloc_trim = _function("malloc_trim")
    if malloc_trim:
        malloc_trim(0)


def _set(parameters: dict[int, int]) -> bool:
    """Set parameters of glibc's malloc; whether there are any."""
    mallopt = _function("mallopt")
    return mallopt is not None and all(mallopt(*each) for each in parameters.items())


@functools.cache
def _function(name: str) -> Callable[..., int] | None:
    """A function of glibc; None where the C library is another one."""
    return getattr(ctypes.CDLL(None), name, None) if sys.platform == "linux" else None
