"""Collectives between the ranks."""

from __future__ import annotations

import hashlib
import io
import os
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import torch as th
import torch.distributed as dist

from ..config import UserError
from ..utils import files, torch_files
from .launchers import get_rank, get_world_size

BROADCAST_BYTES = 2**26  # sent at once
LARGE_FILE = 2**26  # bytes


def all_gather_object(obj: Any) -> list[Any]:
    """Every rank's object, in rank order. Collective."""
    if get_world_size() == 1:
        return [obj]
    gathered: list[Any] = [None] * get_world_size()
    dist.all_gather_object(gathered, obj)
    return gathered


def all_gather_ragged(tensor: th.Tensor) -> list[th.Tensor]:
    """Every rank's CPU tensor [n, ...], in rank order; n may differ between ranks. Collective."""
    if get_world_size() == 1:
        return [tensor]
    sizes = all_gather_object(len(tensor))
    padded = th.zeros(max(sizes), *tensor.shape[1:], dtype=tensor.dtype)
    padded[: len(tensor)] = tensor
    gathered = [th.zeros_like(padded) for _ in sizes]
    dist.all_gather(gathered, padded)
    return [part[:size] for part, size in zip(gathered, sizes)]


def from_rank0(function: Callable[..., Any], *args: Any) -> Any:
    """Call function(*args) on rank 0 only; every rank returns its result or raises its UserError. Collective."""
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
    """Sum the ranks' tensors, in place. Collective."""
    if get_world_size() > 1:
        dist.all_reduce(tensor)
    return tensor


def barrier() -> None:
    """Wait for all ranks. Collective."""
    if get_world_size() > 1:
        # A CPU tensor, so that gloo handles it: nccl's barrier would have to guess a GPU.
        dist.all_reduce(th.zeros(1))


def load_state_dict(path: str, **kwargs: Any) -> Any:
    """torch.load of a file that at least rank 0's host has. Collective.

    Nothing in the file is executed, and each tensor has memory of its own (`torch_files.load`). Raises UserError for a
    missing, damaged or unsafe file.
    """
    from_rank0(_check_large_file, path)
    return torch_files.load(io.BytesIO(read_bytes(path)), path, **kwargs)


def _check_large_file(path: str) -> None:
    """Refuse a large file of something else before it is read whole."""
    if not files.is_url(path):
        with files.open_read(path) as f:
            if f.seek(0, os.SEEK_END) > LARGE_FILE:
                torch_files.check(f, path)


def read_bytes(path: str) -> bytes | bytearray:
    """The contents of rank 0's file on every rank. Collective.

    A rank that finds the same file on its own host reads it there: ranks of one host share the disk's cache. The others
    receive the contents from rank 0. Raises the same UserError on all ranks if rank 0 cannot read the file.
    """
    if get_world_size() == 1:
        return files.read_bytes(path)
    data: bytes | bytearray | None = None

    def read() -> tuple[int, str]:
        nonlocal data
        data = files.read_bytes(path)
        return len(data), hashlib.sha256(data).hexdigest()

    size, sha256 = from_rank0(read)
    if data is None:
        data = _own_copy(path, size, sha256)
    if any(all_gather_object(data is None)):
        data = _broadcast_bytes(data, size)
    assert data is not None
    return data


def _own_copy(path: str, size: int, sha256: str) -> bytes | None:
    """The contents of this host's file; None unless they have this size and checksum. URLs are read by rank 0 alone."""
    if files.is_url(path) or not os.path.isfile(path) or os.path.getsize(path) != size:
        return None
    try:
        data = files.read_bytes(path)
    except UserError:  # rank 0 can read it, and sends it
        return None
    return data if hashlib.sha256(data).hexdigest() == sha256 else None


def _broadcast_bytes(data: bytes | bytearray | None, size: int) -> bytes | bytearray:
    """Send rank 0's bytes to the ranks that have none (`data` None), as uint8 tensors. Collective."""
    received = bytearray(size) if data is None else data
    for start in range(0, size, BROADCAST_BYTES):
        stop = min(start + BROADCAST_BYTES, size)
        part = th.empty(stop - start, dtype=th.uint8)
        if get_rank() == 0:
            part.numpy()[:] = np.frombuffer(received[start:stop], np.uint8)
        dist.broadcast(part, 0)
        if isinstance(received, bytearray):
            received[start:stop] = part.numpy().tobytes()
    return received


def sync_params(params: Iterable[th.Tensor]) -> None:
    """Give every rank rank 0's values. Collective."""
    if get_world_size() == 1:
        return
    for p in params:
        with th.no_grad():
            dist.broadcast(p, 0)
