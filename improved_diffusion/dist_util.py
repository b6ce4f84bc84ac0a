"""Ranks and devices under their published names; their code is in `distributed`."""

from .distributed import (
    all_gather_object,
    all_gather_ragged,
    barrier,
    describe_ranks,
    dev,
    from_rank0,
    get_rank,
    get_world_size,
    load_state_dict,
    run_script,
    setup_dist,
    sum_over_ranks,
    sync_params,
)

__all__ = [
    "all_gather_object", "all_gather_ragged", "barrier", "describe_ranks", "dev", "from_rank0", "get_rank",
    "get_world_size", "load_state_dict", "run_script", "setup_dist", "sum_over_ranks", "sync_params",
]  # fmt: skip
