"""Collectives between the ranks."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterable
from typing import Any

import torch as th
import torch.distributed as dist

from ..config import UserError
from ..utils import files
from .launchers import rank_by_environment


def get_rank() -> int:
    """This process's rank; known before setup_dist() too."""
    if dist.is_initialized():
        return dist.get_rank()
    return rank_by_environment()


def get_world_size() -> int:
    """The number of ranks; 1 before setup_dist()."""
    return dist.get_world_size() if dist.is_initialized() else 1


def all_gather_object(obj: Any) -> list[Any]:
    """Every rank's object, in rank order. Collective."""
    if get_world_size() == 1:
        return [obj]
    gathered: list[Any] = [None] * get_world_size()
    dist.all_gather_object(gathered, obj)
    return gathered


def all_gather_ragged(tensor: th.Tensor) -> list[th.Tensor]:
    """Every rank's CPU tensor [n, ...], n its own, in rank order. Collective."""
    if get_world_size() == 1:
        return [tensor]
    sizes = all_gather_object(len(tensor))
    padded = th.zeros(max(sizes), *tensor.shape[1:], dtype=tensor.dtype)
    padded[: len(tensor)] = tensor
    gathered = [th.zeros_like(padded) for _ in sizes]
    dist.all_gather(gathered, padded)
    return [part[:size] for part, size in zip(gathered, sizes)]


def from_rank0(function: Callable[..., Any], *args: Any) -> Any:
    """function(*args) called on rank 0 alone; every rank gets its result, or raises its UserError. Collective."""
    if get_world_size() == 1:
        return function(*args)
    outcome: list[Any] = [None, None]
    if get_rank() == 0:
        try:
            outcome[0] = function(*args)
        except UserError as error:
            outcome[1] = error
    dist.broadcast_object_list(outcome, src=0, device=th.device("cpu"))
    if outcome[1] is not None:
        raise outcome[1]
    return outcome[0]


def sum_over_ranks(tensor: th.Tensor) -> th.Tensor:
    """The sum of the ranks' tensors, in place. Collective."""
    if get_world_size() > 1:
        dist.all_reduce(tensor)
    return tensor


def barrier() -> None:
    """Wait for all ranks. Collective."""
    if get_world_size() > 1:
        # A CPU tensor, so that gloo serves it: nccl's barrier would first have to guess a GPU.
        dist.all_reduce(th.zeros(1))


def load_state_dict(path: str, **kwargs: Any) -> Any:
    """torch.load of a file that rank 0 reads and hands to all, so that only its host must have it. Collective.

    Nothing in the file is executed (`weights_only`). Raises UserError for a missing, cut or hostile file.
    """
    data = from_rank0(files.read_bytes, path)
    try:
        return th.load(io.BytesIO(data), **{**kwargs, "weights_only": True})
    except Exception as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        if "weights_only" in str(error) or "Unsupported" in str(error):
            reason = "it holds objects other than tensors, which could run code when loaded; they were not loaded"
        raise UserError(
            f"cannot load {path} ({len(data)} bytes): {reason}: damaged, or not a checkpoint; use another file"
        ) from None


def sync_params(params: Iterable[th.Tensor]) -> None:
    """Give every rank rank 0's values. Collective."""
    for p in params:
        with th.no_grad():
            dist.broadcast(p, 0)
