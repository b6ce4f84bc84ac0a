"""The device of each rank."""

from __future__ import annotations

import math
import os
import socket
import sys

import torch as th

from ..config import UserError
from . import launchers
from .collectives import all_gather_object

_device: th.device | None = None


def choose_device(joined: launchers.Joined) -> str:
    """Set this rank's device; the backend for it."""
    global _device
    if th.cuda.is_available():
        # A scheduler may show each rank its own GPU only; where it shows all, the local rank chooses.
        _device = th.device("cuda", joined.local_rank % th.cuda.device_count())
        th.cuda.set_device(_device)
        return "cpu:gloo,cuda:nccl"
    _device = th.device("cpu")
    if joined.local_size > 1 and "OMP_NUM_THREADS" not in os.environ:
        # Ranks on one host share its cores.
        th.set_num_threads(max(1, (os.cpu_count() or 1) // joined.local_size))
    return "gloo"


def dev() -> th.device:
    """The device of this rank."""
    if _device is not None:
        return _device
    return th.device("cuda" if th.cuda.is_available() else "cpu")


def device_name() -> str:
    """The device and, for a GPU, the name of its model."""
    if dev().type != "cuda":
        return str(dev())
    return f"{dev()} ({th.cuda.get_device_name(dev())})"


def check_devices() -> None:
    """All ranks have GPUs, each its own, or none has: nccl would fail, or hang, without saying so."""
    gpu = None
    if dev().type == "cuda":
        properties = th.cuda.get_device_properties(dev())
        # torch 2.4 has no uuid
        gpu = str(getattr(properties, "uuid", (os.environ.get("CUDA_VISIBLE_DEVICES"), dev().index)))
    keys = all_gather_object((socket.gethostname(), gpu))
    without = [rank for rank, (_, found) in enumerate(keys) if found is None]
    if without and len(without) < len(keys):
        raise UserError(
            f"rank {without[0]} on {keys[without[0]][0]} finds no GPU where others do: mend its driver, leave the host "
            'out, or run all on CPUs with CUDA_VISIBLE_DEVICES=""'
        )
    taken: dict[tuple[str, str | None], int] = {}
    for rank, key in enumerate(keys):
        if key in taken and key[1] is not None:
            raise UserError(
                f"ranks {taken[key]} and {rank} on {key[0]} would share a GPU: start at most one rank per visible GPU "
                f'(this one sees {th.cuda.device_count()}) on each host, or on CPUs with CUDA_VISIBLE_DEVICES=""'
            )
        taken[key] = rank


def to_device(tensor: th.Tensor, device: th.device) -> th.Tensor:
    """The CPU tensor on a device, without waiting for what the device has still to do."""
    if th.device(device).type == "cuda":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


def synchronize(device: th.device) -> None:
    """Wait until the device has done all its work."""
    if device.type == "cuda":
        th.cuda.synchronize(device)
    elif device.type != "cpu":
        th.accelerator.synchronize(device)


def memory_info(device: th.device) -> tuple[int, int]:
    """(free, total) bytes: of an accelerator that tells, else of the machine (half of it where free is not known)."""
    if device.type == "cuda":
        return th.cuda.mem_get_info(device)
    if not hasattr(os, "sysconf"):
        raise UserError("the size of this machine's memory is not known: --dry_run needs Linux or macOS")
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if os.path.exists("/proc/meminfo"):
        with open("/proc/meminfo") as f:
            table = dict(line.split(":") for line in f)
        return int(table["MemAvailable"].split()[0]) * 1024, total
    return total // 2, total


def peak_memory(device: th.device) -> float:
    """The largest number of bytes in use so far: on the accelerator, or without one by this process; NaN if unknown."""
    if device.type == "cuda":
        return th.cuda.max_memory_allocated(device)
    try:
        import resource
    except ImportError:  # Windows
        return math.nan
    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return used if sys.platform == "darwin" else used * 1024  # kilobytes, except on macOS
