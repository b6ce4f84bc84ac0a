"""What the C library does with freed memory."""

import resource

import torch as th

from improved_diffusion import distributed
from improved_diffusion.config import SpeedConfig
from improved_diffusion.models.acceleration import accelerate
from improved_diffusion.utils import host_memory

PAGES = 10_000  # of 4 KiB in the tensors


def pages_cleared(times=1):
    """How many pages the system clears for a tensor of 40 MB that comes and goes."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(times):
        th.zeros(PAGES * 1024).add_(1)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


def test_a_network_on_a_cpu_keeps_memory_until_it_is_given_back():
    accelerate(th.nn.Linear(1, 1), SpeedConfig())
    pages_cleared(20)  # until free pieces of the heap have become one
    assert pages_cleared(3) < 0.1 * PAGES
    distributed.empty_cache(th.device("cpu"))
    assert pages_cleared() > 0.9 * PAGES


def test_another_c_library_is_left_alone(monkeypatch):
    monkeypatch.setattr(host_memory.sys, "platform", "darwin")
    monkeypatch.setattr(host_memory.ctypes, "CDLL", None)
    host_memory._function.cache_clear()
    host_memory.keep_freed()
    host_memory.return_freed()
    host_memory._function.cache_clear()
