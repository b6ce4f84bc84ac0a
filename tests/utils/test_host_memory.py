"""What the C library does with freed memory."""

import resource

import pytest
import torch as th

from improved_diffusion import distributed
from improved_diffusion.config import SpeedConfig
from improved_diffusion.models.acceleration import accelerate
from improved_diffusion.utils import host_memory

PAGES = 10_000  # of 4 KiB in the tensors


@pytest.fixture(autouse=True)
def as_before():
    kept = host_memory.keeps
    yield
    host_memory.keep_freed() if kept else host_memory.keep_little()


def pages_cleared(times=1):
    """How many pages the system clears for a tensor of 40 MB that comes and goes."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(times):
        th.zeros(PAGES * 1024).add_(1)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


def test_the_memory_of_large_tensors_is_kept_for_the_next_ones():
    host_memory.keep_little()
    assert pages_cleared(3) > 2.9 * PAGES
    host_memory.keep_freed()
    pages_cleared(20)  # until free pieces of the heap have become one
    assert pages_cleared(3) < 0.1 * PAGES


def test_what_is_kept_can_be_given_back():
    host_memory.keep_freed()
    pages_cleared(20)
    distributed.empty_cache(th.device("cpu"))
    assert pages_cleared() > 0.9 * PAGES


def test_a_network_on_a_cpu_keeps_it():
    host_memory.keep_little()
    accelerate(th.nn.Linear(1, 1), SpeedConfig())
    assert host_memory.keeps


def test_another_c_library_is_left_alone(monkeypatch):
    monkeypatch.setattr(host_memory.sys, "platform", "darwin")
    host_memory._function.cache_clear()
    host_memory.keep_freed()
    host_memory.return_freed()
    assert not host_memory.keeps
    monkeypatch.undo()
    host_memory._function.cache_clear()
