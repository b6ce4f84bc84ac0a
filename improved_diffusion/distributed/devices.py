"""The device of each rank: an accelerator (CUDA, XPU, MPS, ...) if there is one, else the CPU."""

from __future__ import annotations

import os
import socket
import sys
from collections.abc import Callable

import torch as th
import torch.distributed as dist

from ..config import UserError
from ..utils import host_memory
from . import launchers
from .collectives import all_gather_object

_device: th.device | None = None
_local_size = 1


def find_accelerator() -> th.device | None:
    """The kind of accelerator of this process, without an index; None for the CPU.

    CUDA_VISIBLE_DEVICES="" hides accelerators of every kind.
    """
    if os.environ.get("CUDA_VISIBLE_DEVICES") == "":
        return None
    if hasattr(th, "accelerator"):
        return th.accelerator.current_accelerator() if th.accelerator.is_available() else None
    # torch before 2.6
    for kind, available in (("cuda", th.cuda), ("xpu", th.xpu), ("mps", th.backends.mps)):
        if available.is_available():
            return th.device(kind)
    return None


def choose_device(joined: launchers.Joined) -> str:
    """Choose this rank's device; returns the backend of torch.distributed for it.

    Raises UserError for several ranks on a kind of device that has no backend, such as MPS.
    """
    global _device, _local_size
    _local_size = joined.local_size
    found = find_accelerator()
    if found is None:
        _device = th.device("cpu")
        if joined.local_size > 1 and "OMP_NUM_THREADS" not in os.environ:
            # Ranks on one host share its cores.
            th.set_num_threads(max(1, (os.cpu_count() or 1) // joined.local_size))
        return "gloo"
    if found.type == "mps":  # has no index
        _device = found
    else:
        module = th.get_device_module(found)
        # A scheduler may show each rank its own device only; otherwise the local rank chooses one of all.
        _device = th.device(found.type, joined.local_rank % module.device_count())
        module.set_device(_device)
    backend = _backend(found.type)
    if backend is None and joined.world_size > 1:
        raise UserError(
            f"torch has no collectives between {found.type} devices, so {joined.world_size} ranks cannot use them: run "
            'one process, or run on CPUs with CUDA_VISIBLE_DEVICES=""'
        )
    return f"cpu:gloo,{found.type}:{backend}" if backend else "gloo"


def local_size() -> int:
    """The number of ranks on this host."""
    return _local_size


def _backend(kind: str) -> str | None:
    """The backend for collectives between devices of a kind; None if there is none."""
    if kind == "cuda":
        return "nccl" if dist.is_nccl_available() else "gloo"
    if kind == "xpu" and getattr(dist, "is_xccl_available", lambda: False)():  # from torch 2.7
        return "xccl"
    return None


def dev() -> th.device:
    """The device of this rank."""
    return _device or find_accelerator() or th.device("cpu")


def device_name(device: th.device | None = None) -> str:
    """The device (by default this rank's) and, if known, its model: "cuda:0 (NVIDIA H100)"."""
    device = device or dev()
    if device.type not in ("cuda", "xpu"):
        return str(device)
    return f"{device} ({th.get_device_module(device).get_device_name(device)})"


def check_devices() -> None:
    """Check that all ranks have an accelerator, each its own, or none has. Collective.

    Raises UserError otherwise: the collectives would fail or hang without a message.
    """
    keys = all_gather_object((socket.gethostname(), _device_key()))
    without = [rank for rank, (_, found) in enumerate(keys) if found is None]
    if without and len(without) < len(keys):
        raise UserError(
            f"rank {without[0]} on {keys[without[0]][0]} finds no GPU but other ranks do: fix its driver, exclude the "
            'host, or run all ranks on CPUs with CUDA_VISIBLE_DEVICES=""'
        )
    taken: dict[tuple[str, str | None], int] = {}
    for rank, key in enumerate(keys):
        if key in taken and key[1] is not None:
            raise UserError(
                f"ranks {taken[key]} and {rank} on {key[0]} would share a GPU: start at most one rank per visible GPU "
                f'(rank {rank} sees {_visible()}) on each host, or use CPUs with CUDA_VISIBLE_DEVICES=""'
            )
        taken[key] = rank


def _visible() -> int:
    return 0 if dev().type == "cpu" else th.get_device_module(dev()).device_count()


def _device_key() -> str | None:
    """What tells this rank's accelerator from others of its host; None for the CPU."""
    device = dev()
    if device.type == "cpu":
        return None
    if device.type == "mps":
        return "mps"
    properties = th.get_device_module(device).get_device_properties(device)
    # torch 2.4 has no uuid
    return str(getattr(properties, "uuid", (os.environ.get("CUDA_VISIBLE_DEVICES"), device.index)))


def has_float64(device: th.device) -> bool:
    """Whether the device computes in float64: MPS does not, nor do some XPUs."""
    if device.type == "xpu":
        return bool(th.xpu.get_device_properties(device).has_fp64)
    return device.type != "mps"


def computes_bf16(device: th.device) -> bool:
    """Whether the device has instructions for bfloat16. Others compute in it too, but slower than in float32."""
    if device.type == "cuda":
        return th.version.hip is not None or th.cuda.get_device_capability(device) >= (8, 0)
    if device.type == "cpu":  # torch does not say it of processors other than x86, nor before 2.6
        return bool(getattr(th.cpu, "_is_avx512_bf16_supported", bool)())
    return device.type == "xpu"


def sum_dtype(device: th.device) -> th.dtype:
    """The type for long sums on a device: float64, or float32 where the device has no float64."""
    return th.float64 if has_float64(device) else th.float32


def pins_memory(device: th.device) -> bool:
    """Whether copies from pinned host memory to the device run in the background."""
    return device.type in ("cuda", "xpu")


def to_device(tensor: th.Tensor, device: th.device | str) -> th.Tensor:
    """The CPU tensor on a device, without waiting for the work already queued there.

    float64 becomes float32 where the device has no float64.
    """
    device = th.device(device)
    if tensor.dtype == th.float64 and not has_float64(device):
        tensor = tensor.float()
    if pins_memory(device):
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


class HostCopy:
    """A copy of a tensor in host memory that arrives while the device works on; only `get` waits, for no more than it.

    Of a tensor that is in host memory already, the tensor itself.
    """

    def __init__(self, tensor: th.Tensor):
        self._arrived = None
        self._copy = tensor.detach()
        if pins_memory(tensor.device):
            self._copy = th.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
            self._copy.copy_(tensor.detach(), non_blocking=True)
            self._arrived = th.get_device_module(tensor.device).Event()
            self._arrived.record()

    def get(self) -> th.Tensor:
        """The copy."""
        if self._arrived is not None:
            self._arrived.synchronize()
        return self._copy.cpu()


def synchronize(device: th.device) -> None:
    """Wait until the device has done all queued work; returns at once for the CPU."""
    if device.type == "mps":  # takes no device
        th.mps.synchronize()
    elif device.type != "cpu":
        th.get_device_module(device).synchronize(device)


def peak_memory(device: th.device) -> int | None:
    """The most memory that this process has used, in bytes; None if unknown.

    Of an accelerator its tensors' memory; of MPS, which keeps no peak, what the driver holds now; of the CPU the
    process's resident memory.
    """
    if device.type == "mps":
        return th.mps.driver_allocated_memory()
    if device.type != "cpu":
        return th.get_device_module(device).max_memory_allocated(device)
    try:
        import resource
    except ImportError:  # Windows
        return None
    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return used if sys.platform == "darwin" else used * 1024  # kilobytes, except on macOS


def knows_peak_memory(device: th.device) -> bool:
    """Whether `measure_memory` and `available_memory` work: on CUDA and XPU."""
    return device.type in ("cuda", "xpu")


def measure_memory(work: Callable[[], object], device: th.device) -> int:
    """The most bytes of the device that tensors took during `work`, beyond those that were there before."""
    module = th.get_device_module(device)
    before = module.memory_allocated(device)
    module.reset_peak_memory_stats(device)
    work()
    return module.max_memory_allocated(device) - before


def available_memory(device: th.device) -> int:
    """Bytes that new tensors can take: what the device has free, and what torch keeps without using it."""
    module = th.get_device_module(device)
    info = memory_info(device)
    free = 0 if info is None else info[0]
    return free + module.memory_reserved(device) - module.memory_allocated(device)


def memory_info(device: th.device) -> tuple[int, int] | None:
    """(free, total) bytes of an accelerator's memory; None for the CPU and where it is unknown."""
    if device.type == "mps":
        total = th.mps.recommended_max_memory()
        return total - th.mps.driver_allocated_memory(), total
    query = None if device.type == "cpu" else getattr(th.get_device_module(device), "mem_get_info", None)
    return None if query is None else query(device)


def empty_cache(device: th.device) -> None:
    """Give memory that is kept for later back to the accelerator, or to the system."""
    if device.type == "cpu":
        host_memory.return_freed()
    else:
        th.get_device_module(device).empty_cache()
