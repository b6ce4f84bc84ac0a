"""Ranks: the processes of one run, their devices and collectives.

What a command needs before it runs is here at once; the rest when it is first used: importing torch takes seconds.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from .errors import STOPPED, describe_error, is_out_of_memory, run_script
from .launchers import get_rank, get_world_size
from .watchdog import end_process, heartbeat, watched, working

if TYPE_CHECKING:
    from .collectives import (
        all_gather_object,
        all_gather_ragged,
        barrier,
        from_rank0,
        load_state_dict,
        read_bytes,
        sum_over_ranks,
        sync_params,
    )
    from .devices import (
        HostCopy,
        available_memory,
        computes_bf16,
        dev,
        empty_cache,
        has_float64,
        knows_peak_memory,
        local_size,
        measure_memory,
        memory_info,
        peak_memory,
        pins_memory,
        sum_dtype,
        synchronize,
        to_device,
    )
    from .peaks import device_peak
    from .process_group import describe_ranks, join_ranks, setup_dist

__all__ = [
    "STOPPED", "HostCopy", "all_gather_object", "all_gather_ragged", "available_memory", "barrier", "computes_bf16",
    "describe_error",
    "describe_ranks", "dev", "device_peak", "empty_cache", "end_process", "from_rank0", "get_rank", "get_world_size",
    "has_float64", "heartbeat", "is_out_of_memory", "join_ranks", "knows_peak_memory", "load_state_dict", "local_size",
    "measure_memory", "memory_info", "peak_memory", "pins_memory", "read_bytes", "run_script", "setup_dist",
    "sum_dtype", "sum_over_ranks", "sync_params", "synchronize", "to_device", "watched", "working",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    if name in __all__:
        for module in ("collectives", "devices", "peaks", "process_group"):
            found = vars(import_module(f".{module}", __name__))
            if name in found:
                return globals().setdefault(name, found[name])
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
