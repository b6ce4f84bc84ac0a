"""Ranks: the processes of one run, their devices and collectives."""

from .collectives import (
    all_gather_object,
    all_gather_ragged,
    barrier,
    from_rank0,
    get_rank,
    get_world_size,
    load_state_dict,
    read_bytes,
    sum_over_ranks,
    sync_params,
)
from .devices import (
    HostCopy,
    available_memory,
    dev,
    empty_cache,
    has_float64,
    is_out_of_memory,
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
from .errors import STOPPED, describe_error, run_script
from .process_group import describe_ranks, join_ranks, setup_dist
from .watchdog import end_process, heartbeat, watched, working

__all__ = [
    "STOPPED", "HostCopy", "all_gather_object", "all_gather_ragged", "available_memory", "barrier", "describe_error",
    "describe_ranks", "dev", "empty_cache", "end_process", "from_rank0", "get_rank", "get_world_size", "has_float64",
    "heartbeat", "is_out_of_memory", "join_ranks", "knows_peak_memory", "load_state_dict", "local_size",
    "measure_memory", "memory_info", "peak_memory", "pins_memory", "read_bytes", "run_script", "setup_dist",
    "sum_dtype", "sum_over_ranks", "sync_params", "synchronize", "to_device", "watched", "working",
]  # fmt: skip
