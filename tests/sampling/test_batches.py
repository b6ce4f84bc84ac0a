"""How many images are drawn at once, and what happens where they do not fit."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch as th
from model_helpers import save_checkpoint, tiny_settings
from script_helpers import call

import improved_diffusion as idf
from improved_diffusion import distributed
from improved_diffusion.checkpoints.loading import load_model
from improved_diffusion.config import UserError
from improved_diffusion.config.settings import ImageSampling
from improved_diffusion.models.acceleration import Accelerated, as_it_is
from improved_diffusion.sampling import batches
from improved_diffusion.sampling.batches import Halving, fitting_batch
from improved_diffusion.sampling.guidance import ClassifierFreeGuidance
from improved_diffusion.sampling.pipeline import SamplingPipeline


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


@pytest.mark.parametrize("guidance_scale", [1, 2])
def test_a_trial_does_not_decide_for_which_shapes_a_network_is_compiled(guidance_scale):
    class Doubling(Accelerated):
        def run(self, x):
            return 2 * self.model(x)

    network = th.nn.Identity()
    fast = Doubling(network)
    model = ClassifierFreeGuidance(fast, guidance_scale) if guidance_scale != 1 else fast
    with as_it_is(model):
        assert fast(th.ones(8)).sum() == 8
    assert fast(th.ones(64)).sum() == 128 and fast(th.ones(64)).sum() == 128
    assert fast(th.ones(8)).sum() == 8


@pytest.mark.parametrize("options, expected", [
    (dict(num_samples=40), 16), (dict(num_samples=5), 5), (dict(seeds="3"), 1),
])  # fmt: skip
def test_a_batch_size_of_zero_is_chosen_and_the_images_are_the_same(options, expected, tmp_path):
    path = save_checkpoint(tmp_path / "model.pt", tiny_settings())
    options = dict(steps=1, sampler="ddim", batch_size=0, **options)
    pipeline = SamplingPipeline(load_model(ImageSampling.of(options), options, str(path)))
    assert pipeline.batch_size == expected
    model = idf.load(path)
    count = dict(seeds="3,4,5", progress=False, sampler="ddim", steps=1)
    np.testing.assert_array_equal(model.sample(batch_size=0, **count).array, model.sample(batch_size=2, **count).array)
    with pytest.raises(UserError, match="batch_size"):
        model.sample(batch_size=-1, **count)


def test_the_command_takes_a_batch_size_of_zero(tmp_path):
    path = save_checkpoint(tmp_path / "model.pt", tiny_settings())
    args = ["--model_path", path, "--steps", 1, "--num_samples", 3, "--batch_size", 0, "--out_dir", tmp_path / "out"]
    call("image_sample", *args, cwd=tmp_path).succeed()
    assert len(list((tmp_path / "out/samples").iterdir())) == 3


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
