"""Ranks: processes that work together, their devices and collectives."""

from .collectives import (
    all_gather_object,
    all_gather_ragged,
    barrier,
    from_rank0,
    get_rank,
    get_world_size,
    load_state_dict,
    sum_over_ranks,
    sync_params,
)
from .devices import dev, to_device
from .errors import STOPPED, run_script
from .launchers import detect_launcher
from .process_group import describe_ranks, setup_dist
from .watchdog import beat, end_process, working

__all__ = [
    "STOPPED", "all_gather_object", "all_gather_ragged", "barrier", "beat", "describe_ranks", "detect_launcher", "dev",
    "end_process", "from_rank0", "get_rank", "get_world_size", "load_state_dict", "run_script", "setup_dist",
    "sum_over_ranks", "sync_params", "to_device", "working",
]  # fmt: skip
