"""The machine: its names, its clock, its memory, and the switches of torch that belong to a way of computing."""

from __future__ import annotations

import datetime
import os
import platform
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch as th
from torch.profiler import ProfilerActivity, profile

from improved_diffusion import distributed


def device_name() -> str:
    """The GPU's name, or that of the processor."""
    device = distributed.dev()
    if device.type == "cuda":
        return th.cuda.get_device_name()
    return f"{_processor()}" if device.type == "cpu" else device.type


def _processor() -> str:
    try:
        found = re.search(r"^model name\s*: (.*)$", Path("/proc/cpuinfo").read_text(), re.M)
    except OSError:
        found = None
    return found[1] if found else platform.processor() or platform.machine()


def file_name(name: str) -> str:
    """The name in the form that file names have."""
    return re.sub(r"\W+", "_", name).strip("_")


def description() -> dict[str, Any]:
    """What a measurement depends on, beside the code."""
    return {
        "device": device_name(), "processor": _processor(), "cores": os.cpu_count(), "threads": th.get_num_threads(),
        "torch": th.__version__, "cuda": th.version.cuda, "python": platform.python_version(),
        "load": round(os.getloadavg()[0], 1) if hasattr(os, "getloadavg") else None,
        "date": datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
    }  # fmt: skip


def synchronize() -> None:
    """Wait for the device."""
    distributed.synchronize(distributed.dev())


class Switches:
    """torch's global switches for float32 arithmetic and for the choice of algorithms, as they are now."""

    def __init__(self) -> None:
        cudnn = th.backends.cudnn
        self.values = (th.get_float32_matmul_precision(), cudnn.allow_tf32, cudnn.benchmark)

    def apply(self) -> None:
        """Set them so again."""
        matmul, th.backends.cudnn.allow_tf32, th.backends.cudnn.benchmark = self.values
        th.set_float32_matmul_precision(matmul)


@contextmanager
def switches_kept() -> Iterator[None]:
    """Afterwards torch's switches are as before."""
    before = Switches()
    try:
        yield
    finally:
        before.apply()


class PeakMemory:
    """The most memory in tensors that calls use together, in bytes, beside what was in use before the first of them."""

    def __init__(self) -> None:
        self.before = _allocated()
        self.now = self.most = 0

    def __call__(self, work: Callable[[], Any]) -> Any:
        """What work() returns."""
        if distributed.dev().type == "cuda":
            th.cuda.reset_peak_memory_stats()
            result = work()
            self.most = max(self.most, th.cuda.max_memory_allocated() - self.before)
            return result
        if distributed.dev().type != "cpu":
            return work()
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
            result = work()
        events = sorted(_memory_events(profiler), key=lambda event: event[0])
        for _, change in events:
            self.now += change
            self.most = max(self.most, self.now)
        return result

    def read(self) -> int | None:
        """The peak; None on devices that do not tell."""
        return self.most or None


class NoMemory:
    """Stands in for PeakMemory where nothing is measured."""

    most = 0

    def __call__(self, work: Callable[[], Any]) -> Any:
        return work()

    def read(self) -> None:
        return None


def _allocated() -> int:
    return th.cuda.memory_allocated() if distributed.dev().type == "cuda" else 0


def _memory_events(profiler: profile) -> Iterator[tuple[int, int]]:
    """(time, bytes allocated or, negative, freed)."""

    def visit(event: Any) -> Iterator[tuple[int, int]]:
        if event.typed[0].name == "Allocation":
            yield event.start_time_ns, event.extra_fields.alloc_size
        for child in event.children:
            yield from visit(child)

    assert profiler.profiler is not None and profiler.profiler.kineto_results is not None
    for event in profiler.profiler.kineto_results.experimental_event_tree():
        yield from visit(event)
