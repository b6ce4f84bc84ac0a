"""How many images are drawn at once, and what happens where they do not fit."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch as th

from improved_diffusion import distributed
from improved_diffusion.sampling import batches
from improved_diffusion.sampling.batches import Halving, fitting_batch


def out_of_memory():
    return th.cuda.OutOfMemoryError("out of memory")


@pytest.fixture
def quiet(monkeypatch):
    """What is said; there is no accelerator whose memory could be given back."""
    said = []
    monkeypatch.setattr(distributed, "empty_cache", lambda device: None)
    monkeypatch.setattr(batches.logger, "warn", said.append)
    return said


class Small:
    """A device on which `most` images fit."""

    def __init__(self, most):
        self.most, self.sizes = most, []

    def __call__(self, numbers):
        self.sizes.append(len(numbers))
        if len(numbers) > self.most:
            raise out_of_memory()
        return np.array(numbers)[:, None]


@pytest.mark.parametrize("most, sizes", [
    (64, [20, 20]), (20, [20, 20]), (10, [20, 10, 10, 10, 10]), (7, [20, 10, 5, 5, 5, 5, 5, 5, 5, 5]),
])  # fmt: skip
def test_a_batch_that_does_not_fit_is_drawn_in_parts_and_later_ones_too(most, sizes, quiet):
    device = Small(most)
    draw = Halving(device)
    for start in (0, 100):
        assert draw(range(start, start + 20))[:, 0].tolist() == list(range(start, start + 20))
    assert device.sizes == sizes
    assert len(quiet) == sum(size > most for size in sizes)
    assert all("--batch_size" in text for text in quiet)


def test_an_image_that_does_not_fit_alone_is_the_devices_error(quiet):
    with pytest.raises(th.cuda.OutOfMemoryError):
        Halving(Small(0))([1, 2, 3])


def test_other_errors_are_not_for_smaller_batches(quiet):
    def broken(numbers):
        raise RuntimeError("shapes do not fit")

    with pytest.raises(RuntimeError, match="shapes"):
        Halving(broken)([1, 2])
    assert not quiet


@pytest.mark.parametrize("count, expected", [(1, 1), (16, 16), (1000, 16)])
def test_on_a_cpu_the_batch_is_a_constant_and_nothing_is_tried(count, expected):
    assert fitting_batch(None, count, th.device("cpu")) == expected


class Accelerator:
    """Counts bytes as torch does for a GPU of `total` bytes, of which torch keeps `kept` without using them."""

    def __init__(self, total, before=0, kept=0):
        self.total, self.now, self.kept, self.peak = total, before, kept, before

    def use(self, size):
        self.peak = max(self.peak, self.now + size)

    def module(self, device):
        return SimpleNamespace(
            memory_allocated=lambda device: self.now, max_memory_allocated=lambda device: self.peak,
            reset_peak_memory_stats=lambda device: setattr(self, "peak", self.now),
            memory_reserved=lambda device: self.now + self.kept,
            mem_get_info=lambda device: (self.total - self.now - self.kept, self.total),
        )  # fmt: skip


@pytest.mark.parametrize("each, before, kept, count, expected", [
    (100, 0, 0, 1000, 80),  # 0.8 x 10,000 / 100
    (100, 5000, 0, 1000, 40),  # the weights take half
    (100, 5000, 2000, 1000, 40),  # what torch keeps for later is free
    (100, 0, 0, 50, 50),  # no more than there are
    (1, 0, 0, 10_000, 512),  # more would be no faster
    (1250, 0, 0, 1000, 6),  # fewer than eight
    (9000, 0, 0, 1000, 1),
])  # fmt: skip
def test_on_an_accelerator_it_follows_from_the_memory_of_a_few_images(each, before, kept, count, expected, monkeypatch):
    device = Accelerator(10_000, before, kept)
    device.peak = 10**9  # of something earlier
    monkeypatch.setattr(th, "get_device_module", device.module)
    tried = []

    def try_out(count):
        tried.append(count)
        device.use(each * count)

    assert fitting_batch(try_out, count, th.device("cuda")) == expected
    assert tried == [8]
