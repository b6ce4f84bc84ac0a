"""Low-resolution images: how they are made, carried and shown."""

import numpy as np
import pytest
import torch as th

from improved_diffusion.data.low_res import WithLowRes, downsample, pairs


@pytest.mark.parametrize("size", [2, (2, 2), "2"])
def test_each_small_pixel_is_the_mean_of_its_area(size):
    x = th.randn(3, 2, 4, 6) if size == (2, 2) else th.randn(3, 2, 4, 4)
    width = x.shape[-1] // 2
    small = downsample(x, size)
    assert small.shape == (3, 2, 2, 2)
    th.testing.assert_close(small[:, :, 0, 1], x[:, :, :2, width:].mean(dim=(2, 3)))


class Data:
    num_images = 3

    def __init__(self):
        self.calls = []

    def seek(self, step):
        self.calls.append(step)

    def close(self):
        self.calls.append("close")

    def __next__(self):
        return th.ones(2, 3, 8, 4), {"y": th.tensor([1, 2])}


def test_the_stream_adds_low_res_and_hands_on_the_rest():
    data = Data()
    stream = WithLowRes(data, (4, 2))
    batch, kwargs = next(stream)
    assert batch.shape == (2, 3, 8, 4) and kwargs.keys() == {"y", "low_res"}
    assert th.equal(kwargs["low_res"], th.ones(2, 3, 4, 2))
    stream.seek(3)
    stream.close()
    assert data.calls == [3, "close"]


def test_each_small_image_stands_enlarged_before_its_large_one():
    rng = np.random.default_rng(0)
    small = rng.integers(0, 256, (3, 2, 1, 3), dtype=np.uint8)
    large = rng.integers(0, 256, (3, 8, 4, 3), dtype=np.uint8)
    both = pairs(small, large)
    assert both.shape == (6, 8, 4, 3)
    np.testing.assert_array_equal(both[1::2], large)
    np.testing.assert_array_equal(both[::2, ::4, ::4], small)
    assert (both[0, :4] == small[0, 0, 0]).all() and (both[0, 4:] == small[0, 1, 0]).all()
